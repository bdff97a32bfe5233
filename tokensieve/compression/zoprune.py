"""ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models.

Kim, Zhang, Liu, Jung, Lee, Hong. https://arxiv.org/abs/2509.24837 (CVPR 2026)

    x_i   input of the projector M for token i;   z_i = M(x_i)   what the language model reads
    S_i   sensitivity: mean over m random unit directions u of || M(x_i + h u) - M(x_i - h u) || / 2h
    keep  first argmax S, then argmax s_i * min_{p in picked} (1 - cos(z_i, z_p)), s = S min-max scaled

It looks at neither the question nor attention maps, and runs no layer again but the projector.

What differs from the official code (AIM-SKKU/ZOO-Prune):
- The default estimator is the closed form that the probes converge to, where the projector is a
  two-layer MLP; `estimator="zo"` is the official one.
- Probes run in float32 (the LLaVA-1.5 file casts to half, where rounding swamps a step of 0.01) and
  with the projector itself (the LLaVA-NeXT file uses a rank-128 copy).
- In any-resolution images the budget is spent exactly: equal shares per tile, the remainder to the
  first tiles, what a small tile cannot use to the others. The official code truncates per tile.
- Equal scores count as 1 in every tile (there: LLaVA-1.5 only), also when equal only up to rounding.
- Newline tokens are not candidates, and the real ones stay (the LLaVA-NeXT file keeps others).
- Where one projector row joins several patches (Qwen), `u` is added to each; there is no official code.
"""

# Shape legend: N tokens, P projector rows, M directions, V width of the vision tower

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from tokensieve.compression.plan import Plan
from tokensieve.compression.registry import did_you_mean, register_method
from tokensieve.compression.score_diversity import select_by_score
from tokensieve.compression.sensitivity import (
    draw_directions,
    gain_by_factored_probing,
    gain_by_probing,
    gain_closed_form,
)
from tokensieve.compression.tokens import VisualTokens
from tokensieve.errors import BadOption

ESTIMATORS = ("auto", "exact", "zo", "zo-factorised")
NUM_DIRECTIONS = 64
STEP = 0.01


@register_method(
    "zoprune",
    title="ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models",
    url="https://arxiv.org/abs/2509.24837",
    needs=("features", "projector"),
    follows_tokens=True,
    licence="Apache-2.0",
    differs="Closed-form sensitivity by default where the projector is a two-layer MLP (estimator='zo' is the "
    "official probe); float32 probes; exact budget over the tiles of an any-resolution image.",
)
def zoprune(
    tokens: VisualTokens,
    num_keep: int,
    *,
    generator: torch.Generator | None = None,
    estimator: str = "auto",
    num_directions: int = NUM_DIRECTIONS,
    step: float = STEP,
) -> Plan:
    """Keeps tokens that the projector answers to strongly and that differ from each other.

    Args:
        tokens: the candidates; `tokens.projector` must be there.
        num_keep: how many stay.
        generator: source of the directions; None draws the same ones every time (seed 0).
        estimator: "exact" (closed form), "zo" (the paper's probe), "zo-factorised" (same numbers, about
            half the time), or "auto": "exact" for a two-layer MLP projector, "zo" for any other.
        num_directions: probes per token (not used by "exact").
        step: length of a probe, in the units of the projector's input (not used by "exact").

    Raises:
        BadOption: there is no projector, it is not a two-layer MLP though the estimator needs one, or an
            option is out of range.
    """
    score_P = sensitivity(tokens, generator, estimator, num_directions, step)
    return select_by_score(tokens, tokens.projector.to_tokens(score_P), num_keep)


def sensitivity(
    tokens: VisualTokens,
    generator: torch.Generator | None = None,
    estimator: str = "auto",
    num_directions: int = NUM_DIRECTIONS,
    step: float = STEP,
) -> Tensor:
    """`[P]` float32: the sensitivity of every projector row. Arguments and errors as in `zoprune`."""
    check_options(estimator, num_directions, step)
    projector = tokens.projector
    if projector is None:
        raise BadOption(
            "'zoprune' needs the projector and its input, and these tokens come without.",
            hint="Use 'norm-diversity' or 'divprune', which look at the features only.",
        )
    has_mlp = projector.mlp is not None and projector.inputs.ndim == 2
    if estimator == "auto":
        estimator = "exact" if has_mlp else "zo"
    if estimator != "zo" and not has_mlp:
        raise BadOption(
            f"estimator={estimator!r} needs a projector that is a two-layer MLP on single patches; this one is not.",
            hint="Use estimator='zo' (or 'auto'), which works with any projector.",
        )
    if estimator == "exact":
        if (num_directions, step) != (NUM_DIRECTIONS, STEP):
            warnings.warn(
                "The exact estimator has no probes: num_directions and step are not used. "
                "Give estimator='zo' to use them.",
                stacklevel=2,
            )
        return gain_closed_form(projector.mlp, projector.inputs)
    generator = generator or torch.Generator().manual_seed(0)
    bank_MV = draw_directions(num_directions, projector.inputs.shape[-1], generator)
    if estimator == "zo-factorised":
        return gain_by_factored_probing(projector.mlp, projector.inputs, bank_MV, step)
    return gain_by_probing(projector, bank_MV, step, width_out=tokens.features.shape[-1])


def check_options(estimator: str, num_directions: int, step: float) -> None:
    if estimator not in ESTIMATORS:
        raise BadOption(
            f"estimator must be one of {', '.join(ESTIMATORS)}; got {estimator!r}.",
            hint=did_you_mean(str(estimator), ESTIMATORS),
        )
    if isinstance(num_directions, bool) or not isinstance(num_directions, int) or num_directions < 1:
        raise BadOption(f"num_directions must be a whole number from 1 up, got {num_directions!r}.")
    if isinstance(step, bool) or not isinstance(step, (int, float)) or not (math.isfinite(step) and step > 0):
        raise BadOption(f"step must be a finite number above 0, got {step!r}.")
