"""What video methods share: frames, still places and how many are merged, shares of a budget."""

# Shape legend: N tokens, T frames, n places of a frame, S scenes, G groups, D width

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tokensieve.compression.maxmin import SAME
from tokensieve.compression.tokens import VisualTokens


def frames_of(tokens: VisualTokens) -> Tensor:
    """`[T, n, D]` float32: the frames of a video. An image, with all its views, is one frame."""
    num_frames = tokens.grids[0][0] if len(tokens.grids) == 1 else 1
    return tokens.features.float().unflatten(0, (num_frames, -1))


def still_places(likeness_Sn: Tensor, lengths: list[int], threshold: float, num_keep: int = 0) -> Tensor:
    """`[S, n]` bool: places of a scene whose tokens are one in all its frames, so that they may be averaged over time.

    Those with a likeness (a cosine) above `threshold`, the most alike first, and no more of them than leave `num_keep`
    tokens: in effect the threshold rises until the merge alone does not fall below the budget.

    Args:
        likeness_Sn: how alike the tokens of each place are over the scene.
        lengths: frames of each scene; scenes of one frame have no still place.
        threshold: the least likeness of a still place.
        num_keep: tokens to be left over all scenes, each still place counted once.
    """
    saved_S = torch.tensor(lengths, device=likeness_Sn.device) - 1
    still_Sn = (likeness_Sn > threshold) & (saved_S > 0)[:, None]
    unlike_Sn = F.threshold(1 - likeness_Sn, SAME, 0.0)  # equal up to rounding: the first places win
    order = unlike_Sn.flatten().sort(stable=True).indices
    saved = (still_Sn * saved_S[:, None]).flatten()[order].cumsum(0)
    num_spare = sum(lengths) * likeness_Sn.shape[1] - num_keep
    fits = torch.empty_like(saved, dtype=torch.bool).scatter_(0, order, saved <= num_spare)
    return still_Sn & fits.view_as(still_Sn)


def proportional_shares(sizes: list[int], total: int) -> list[int]:
    """Splits `total` (at most the sum) over groups in proportion to their sizes, by largest remainder.

    Equal remainders go to the first groups. No share is above its group's size.

        proportional_shares([10, 5, 5], 6) == [3, 2, 1]
    """
    all_tokens = sum(sizes)
    if not all_tokens:
        return [0] * len(sizes)
    shares, rest = zip(*(divmod(size * total, all_tokens) for size in sizes), strict=True)
    first = sorted(range(len(sizes)), key=lambda g: -rest[g])[: total - sum(shares)]
    return [share + (g in first) for g, share in enumerate(shares)]
