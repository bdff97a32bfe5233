"""Baseline: tokens at equal distances along the sequence, frames and rows included."""

from __future__ import annotations

import torch

from tokensieve.compression.plan import Plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.tokens import VisualTokens


@register_method("uniform", title="Baseline: tokens at equal distances along the sequence", needs=())
def uniform(tokens: VisualTokens, num_keep: int, *, generator: torch.Generator | None = None) -> Plan:
    """Cuts the sequence into `num_keep` equal intervals and keeps the token at the centre of each.

    10 tokens, 3 kept: centres 1.67, 5, 8.33 -> tokens 1, 5, 8. Deterministic: `generator` is not used.
    """
    interval_K = torch.arange(num_keep, device=tokens.features.device)
    return Plan((2 * interval_K + 1) * len(tokens) // (2 * num_keep), len(tokens))
