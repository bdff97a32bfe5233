"""Methods made for one picture, on a video or any-resolution image: its pictures, each with a share of the budget."""

# Shape legend: N visual tokens of an item, n those of one picture

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.budget import even_shares, share_budget
from tokensieve.compression.tokens import VisualTokens


def split_views(tokens: VisualTokens, num_keep: int) -> list[tuple[Tensor, int]]:
    """The tokens `[n]` (int64, rising) of every frame of a video, or tile of an image, and how many of them stay.

    Equal shares that add up to `num_keep`. What is left over is spread over time in a video, and goes to the first
    tiles of an image (the base view comes first); what a small tile cannot use goes to the others. Views without a
    share are there too, with 0.
    """
    num_frames = tokens.grids[0][0] if len(tokens.grids) == 1 else 1
    if num_frames > 1:
        members = torch.arange(len(tokens), device=tokens.features.device).chunk(num_frames)
        return list(zip(members, even_shares(num_frames, num_keep), strict=True))
    tiles, counts = tokens.crop.unique(return_counts=True)
    members = [(tokens.crop == tile).nonzero()[:, 0] for tile in tiles]
    return list(zip(members, share_budget(counts.tolist(), num_keep), strict=True))
