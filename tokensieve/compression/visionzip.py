"""VisionZip: Longer is Better but Not Necessary in Vision Language Models.

Yang, Chen, Tian, Wang, Li, Yu, Jia. https://arxiv.org/abs/2412.04467 (CVPR 2025)

    a_j         attention from the class token to patch j, layer -2 of the vision tower, all heads
    dominant    the highest a_j
    targets     of the M others every s-th in reading order, the first C; s = max(1, M // C)
    contextual  target + mean of the tokens assigned to it: each other token goes to the target with the most
                similar key (cosine; keys averaged over heads)

The sum, not an average, is what the released code computes and what the published numbers rest on. Merging happens
before the projector.

What differs from the official code (dvlab-research/VisionZip; written from the description):
- The class token is no candidate here, so all dominant tokens are patches; there it is one of them.
- Tokens stay in reading order, a contextual one at the place of its target; there they follow the dominant ones.
- The budget is one number, split 54 : 10 as in their 64-token setting (`dominant`).
- Towers without a class token: attention received in the last layer, mean over heads and queries, and that layer's
  keys, as HoliTom's adaptation for SigLIP has it (its keys are INFERRED).
- Every frame of a video and every tile of an image is a picture of its own, with an equal share of the budget.
- Where the projector pools patches, the numbers above are averaged over them and the pooled features are merged.
"""

# Shape legend: N visual tokens, n those of one picture, M of them not dominant, C contextual, d width of a head,
#               E entries of a merge

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from tokensieve.compression.density_peaks import nearest_centre
from tokensieve.compression.maxmin import unit_rows
from tokensieve.compression.plan import Plan, merge_plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.sink_guard import set_aside, sinks_to_guard
from tokensieve.compression.tokens import VisualTokens
from tokensieve.compression.tower_view import TowerView
from tokensieve.compression.views import split_views
from tokensieve.errors import BadOption

DOMINANT_SHARE = 54 / 64


@register_method(
    "visionzip",
    title="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
    url="https://arxiv.org/abs/2412.04467",
    effect="merges",
    needs=("tower",),
    licence="Apache-2.0",
    differs="One budget, split 54 : 10 into dominant and contextual tokens; reading order; the class token is no "
    "candidate; every frame or tile gets an equal share.",
)
def visionzip(
    tokens: VisualTokens,
    num_keep: int,
    *,
    generator: torch.Generator | None = None,
    dominant: float = DOMINANT_SHARE,
    sinks: str = "off",
) -> Plan:
    """Keeps what the class token attends to and sums up the rest. Deterministic: `generator` is not used.

    Args:
        tokens: the candidates; `tokens.tower` must be there.
        num_keep: how many stay, contextual ones included.
        dominant: share of each picture's budget that goes to dominant tokens, in (0, 1], rounded, at least one
            token. With 1 nothing is merged.
        sinks: what becomes of the tower's attention sinks (ours, see `sink_guard`): "off" (ranked like all others, as
            in the paper), "exclude" (neither kept nor merged, the budget goes to the others) or "protect" (all stay
            as they are, outside the budget: `num_keep` plus the number of sinks stay).

    Raises:
        BadOption: `dominant` or `sinks` is none of these, or attention is NaN.
    """
    check_dominant(dominant)
    score_N, key_Nd = scores_and_keys(tokens.tower)
    if not score_N.isfinite().all():
        raise BadOption(
            "Some attention of the vision tower is NaN, so there is no dominant token.",
            hint="Check the model's weights and dtype: float16 overflows in some vision towers.",
        )
    is_sink_N = sinks_to_guard(tokens.tower, sinks, ranking_layer(tokens.tower))
    entries = []
    for member_n, share in split_views(tokens, num_keep):
        member_n, share, aside = set_aside(member_n, share, is_sink_N, sinks)
        entries.append((aside, aside, torch.ones_like(aside, dtype=torch.float32)))
        if share:
            num_dominant = max(1, round(share * dominant))
            anchor_E, source_E, weight_E = zip_picture(
                score_N[member_n], key_Nd[member_n], num_dominant, share - num_dominant
            )
            entries.append((member_n[anchor_E], member_n[source_E], weight_E))
    return merge_plan(len(tokens), *map(torch.cat, zip(*entries, strict=True)), before_projector=True)


def check_dominant(dominant: float) -> None:
    """Raises BadOption unless this is a share of a budget that dominant tokens may have."""
    if isinstance(dominant, bool) or not isinstance(dominant, Real) or not 0 < dominant <= 1:
        raise BadOption(f"dominant must be a share in (0, 1], got {dominant!r}.")


def scores_and_keys(tower: TowerView) -> tuple[Tensor, Tensor]:
    """`[N]` score and `[N, d]` key of every token, of the `ranking_layer`."""
    layer = tower.layers[ranking_layer(tower)]
    return layer.salience(), layer.mean_keys()


def ranking_layer(tower: TowerView) -> int:
    """-2 in a tower with a class token, else -1, the last layer."""
    return -2 if tower.layers[-2].num_prefix else -1


def zip_picture(
    score_n: Tensor, key_nd: Tensor, num_dominant: int, num_contextual: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What becomes of one picture: `[E]` kept token, `[E]` token it takes over and `[E]` with which weight.

    Args:
        score_n: higher is better; equal scores go to the lowest index.
        key_nd: keys, compared by cosine.
        num_dominant, num_contextual: how many stay of each kind; together at most n.
    """
    order_n = score_n.sort(descending=True, stable=True).indices
    dominant, rest_M = order_n[:num_dominant], order_n[num_dominant:].sort().values
    if not num_contextual:
        return dominant, dominant, torch.ones_like(dominant, dtype=torch.float32)
    stride = max(1, len(rest_M) // num_contextual)
    target_C = torch.arange(num_contextual, device=rest_M.device) * stride
    label_M = nearest_centre(unit_rows(key_nd[rest_M]), target_C)  # of unit rows the nearest is the most similar
    num_assigned_C = label_M.bincount(minlength=num_contextual) - 1
    weight_M = 1 / num_assigned_C[label_M].clamp(min=1)
    weight_M[target_C] = 1.0
    return (
        torch.cat([dominant, rest_M[target_C][label_M]]),
        torch.cat([dominant, rest_M]),
        torch.cat([torch.ones_like(dominant, dtype=torch.float32), weight_M]),
    )
