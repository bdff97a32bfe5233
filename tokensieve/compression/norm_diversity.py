"""Baseline: length of the projected token times diversity.

    S_i   || z_i ||, z_i the projected token;   selection as in ZOO-Prune (`score_diversity.py`)

Why it is here: a token's sensitivity in ZOO-Prune (https://arxiv.org/abs/2509.24837) ranks tokens almost
as its norm does (Spearman 0.99 on random weights of LLaVA-1.5 sizes), at no cost. A method that cannot
beat this one has not shown that its score matters.
"""

from __future__ import annotations

import torch

from tokensieve.compression.plan import Plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.score_diversity import select_by_score
from tokensieve.compression.tokens import VisualTokens


@register_method("norm-diversity", title="Baseline: L2 norm of the token times max-min diversity", follows_tokens=True)
def norm_diversity(tokens: VisualTokens, num_keep: int, *, generator: torch.Generator | None = None) -> Plan:
    """Keeps long tokens that differ from each other. Deterministic: `generator` is not used."""
    return select_by_score(tokens, tokens.features.float().norm(dim=-1), num_keep)
