"""DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models.

Alvar, Singh, Akbari, Zhang. https://arxiv.org/abs/2503.02175 (CVPR 2025)

    D_ij  1 - cos(z_i, z_j) of the projected tokens
    keep  first the token whose nearest other token is farthest, then argmax_i min_{p in picked} D_ip

What differs from the official code (vbdi/divprune, CC BY-NC 4.0; written from the description):
- The whole item at once: all frames of a video, all tiles of an image compete for one budget.
- A picked token is never picked again (there: possible where all distances left are 0).
- Distances below 1e-6 are rounding and count as 0, so copies tie and the lowest index wins.
- No N x N matrix above 1024 tokens.
"""

from __future__ import annotations

import torch

from tokensieve.compression.maxmin import greedy_max_min, most_isolated, unit_rows
from tokensieve.compression.plan import Plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.tokens import VisualTokens


@register_method(
    "divprune",
    title="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    url="https://arxiv.org/abs/2503.02175",
    follows_tokens=True,
    licence="CC BY-NC 4.0",
    differs="A picked token is never picked again; distances within rounding tie, the lowest index wins.",
)
def divprune(tokens: VisualTokens, num_keep: int, *, generator: torch.Generator | None = None) -> Plan:
    """Keeps the tokens that are farthest from each other. Deterministic: `generator` is not used."""
    unit_ND = unit_rows(tokens.features)
    order_K = greedy_max_min(unit_ND, num_keep, most_isolated(unit_ND))
    return Plan(order_K.sort().values, len(tokens))
