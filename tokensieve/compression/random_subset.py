"""Baseline: a random subset. Often surprisingly strong (UniPruneBench, https://arxiv.org/abs/2511.02650)."""

from __future__ import annotations

import torch

from tokensieve.compression.plan import Plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.tokens import VisualTokens


@register_method("random", title="Baseline: a random subset of the tokens", needs=())
def random(tokens: VisualTokens, num_keep: int, *, generator: torch.Generator | None = None) -> Plan:
    """Keeps a random subset. Without a `generator` it is the same one every time (seed 0)."""
    generator = generator or torch.Generator().manual_seed(0)
    shuffled_N = torch.randperm(len(tokens), generator=generator, device=generator.device)
    return Plan(shuffled_N[:num_keep].sort().values.to(tokens.features.device), len(tokens))
