"""Selection by score times diversity, tile by tile: the second half of ZOO-Prune, for any score.

Scores `S` are scaled to `s = (S - min S) / (max S - min S)`, or to 1 where they are all equal. The first
pick is `argmax s`, each later one `argmax s_i * min_{p in picked} (1 - cos(z_i, z_p))`.
"""

# Shape legend: N tokens, M tokens of one tile, K kept, D width

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.budget import share_budget
from tokensieve.compression.maxmin import greedy_max_min, unit_rows
from tokensieve.compression.plan import Plan
from tokensieve.compression.tokens import VisualTokens
from tokensieve.errors import BadOption

# A linear projector gives every token the same score up to rounding (spread 6e-5 of the mean measured
# in float32); min-max would blow that up to [0, 1].
FLAT_SPREAD = 1e-4


def relative_score(score_N: Tensor) -> Tensor:
    """Min-max to [0, 1]; all ones where the spread is below `FLAT_SPREAD` of the mean magnitude."""
    low, high = score_N.aminmax()
    relative_N = (score_N - low) / (high - low + 1e-8)
    is_flat = high - low <= FLAT_SPREAD * score_N.abs().mean()
    return torch.where(is_flat, torch.ones_like(relative_N), relative_N)


def score_diversity_order(features_ND: Tensor, score_N: Tensor, num_keep: int) -> Tensor:
    """`[K]` token indices in the order they are picked."""
    relative_N = relative_score(score_N.float())
    return greedy_max_min(unit_rows(features_ND), num_keep, relative_N.argmax(0, keepdim=True), relative_N)


def select_by_score(tokens: VisualTokens, score_N: Tensor, num_keep: int) -> Plan:
    """The plan that keeps exactly `num_keep` tokens, chosen inside every tile of `tokens.crop`.

    Raises:
        BadOption: a score is NaN or infinite.
    """
    if not score_N.isfinite().all():
        raise BadOption(
            "Some token scores are NaN or infinite, so there is no best token.",
            hint="Check the model's weights and dtype: the vision tower or projector overflows.",
        )
    tiles, counts = tokens.crop.unique(return_counts=True)
    kept = []
    for tile, share in zip(tiles, share_budget(counts.tolist(), num_keep), strict=True):
        if share:
            member_M = (tokens.crop == tile).nonzero()[:, 0]
            order_K = score_diversity_order(tokens.features[member_M], score_N[member_M], share)
            kept.append(member_M[order_K])
    return Plan(torch.cat(kept).sort().values, len(tokens))
