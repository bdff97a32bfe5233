"""LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (PruMerge and PruMerge+).

Shang, Cai, Xu, Lee, Yan. https://arxiv.org/abs/2403.15388 (ICCV 2025)

    a_j    attention from the class token to patch j in the last layer of the vision tower, all heads taken as one
    kept   the highest a_j: as many as there are outliers, a_j > Q3 + 1.5 (Q3 - Q1)
    "+"    and every s-th patch of the picture, s = int(int(N / number of outliers) / 3)
    merge  x_i <- x_i + sum of a_j x_j over the 32 others with the most similar keys (cosine), kept or not
    extra  one more token, the sum of a_j x_j over all dropped patches; weights are not normalised

Merging happens before the projector.

What differs from the official code (42Shawn/LLaVA-PruMerge; written from the description):
- By default the budget decides, not the outliers, and is met exactly, the extra token included: the official
  `reduction_ratio`, which loses the extra token and what `int` cuts off. `adaptive=True` is the paper's rule.
- "+" under a budget: a quarter for the highest a_j, the rest for patches at equal distances among the others (ours,
  INFERRED from the official settings: at a ratio of 1/8 every second patch is added).
- Without outliers one patch is kept (there: none, and "+" divides by zero); s is at least 1; "+" covers the whole
  picture (there: patches 0 to 574, whatever its size).
- Outliers are counted in each picture (there: over the batch), and each frame of a video and each tile of an image is
  a picture of its own, with its own extra token. One whose share of the budget is one token becomes that extra token;
  one that keeps everything stays as it is.
- Tokens stay in reading order; there in order of score. The extra token has no patch of its own: it takes the place
  of the dropped patch with the highest a_j, which has the largest part in it.
- Towers without a class token: attention received in the last layer instead of a_j (ours).
- Where the projector pools patches, attention and keys are averaged over them and the pooled features are merged.
"""

# Shape legend: N visual tokens, n those of one picture, K kept patches, R rows of a chunk, C width of a key,
#               E entries of a merge

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokensieve.compression.maxmin import MAX_MATRIX_BYTES, unit_rows
from tokensieve.compression.plan import Plan, merge_plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.sink_guard import set_aside, sinks_to_guard
from tokensieve.compression.tokens import VisualTokens
from tokensieve.compression.tower_view import TowerView
from tokensieve.compression.views import split_views
from tokensieve.errors import BadOption

NUM_NEIGHBOURS = 32

_FACTS = dict(
    url="https://arxiv.org/abs/2403.15388",
    effect="merges",
    needs=("tower",),
    output_length="Exactly the budget; with adaptive=True what the outlier rule gives, whatever the budget.",
    licence="Apache-2.0",
    differs="The budget decides and includes the extra token (adaptive=True is the paper's rule); reading order; "
    "every frame or tile is a picture of its own.",
)
_TITLE = "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models"


@register_method("prumerge", title=_TITLE, **_FACTS)
def prumerge(
    tokens: VisualTokens,
    num_keep: int,
    *,
    generator: torch.Generator | None = None,
    adaptive: bool = False,
    sinks: str = "off",
) -> Plan:
    """Keeps what the class token attends to and merges the rest into it. Deterministic: `generator` is not used.

    Args:
        tokens: the candidates; `tokens.tower` must be there.
        num_keep: how many stay, the extra token included.
        adaptive: let the outliers of each picture decide, as the paper does; `num_keep` is then not used.
        sinks: what becomes of the tower's attention sinks (ours, see `sink_guard`): "off" (ranked like all others, as
            in the paper), "exclude" (neither kept nor merged, the budget goes to the others) or "protect" (all stay
            as they are, outside the budget: `num_keep` plus the number of sinks stay).

    Raises:
        BadOption: `adaptive` is no bool, `sinks` is none of these, or attention is NaN.
    """
    return _merge_views(tokens, num_keep, adaptive, sinks, top_patches, outlier_patches)


@register_method("prumerge+", title=f"{_TITLE} (PruMerge+)", **_FACTS)
def prumerge_plus(
    tokens: VisualTokens,
    num_keep: int,
    *,
    generator: torch.Generator | None = None,
    adaptive: bool = False,
    sinks: str = "off",
) -> Plan:
    """As `prumerge`, with patches spread over the whole picture. Deterministic: `generator` is not used.

    Args:
        tokens: the candidates; `tokens.tower` must be there.
        num_keep: how many stay, the extra token included.
        adaptive: let the outliers of each picture decide, as the paper does; `num_keep` is then not used.
        sinks: what becomes of the tower's attention sinks (ours, see `sink_guard`): "off" (ranked like all others, as
            in the paper), "exclude" (neither kept nor merged, the budget goes to the others) or "protect" (all stay
            as they are, outside the budget: `num_keep` plus the number of sinks stay).

    Raises:
        BadOption: `adaptive` is no bool, `sinks` is none of these, or attention is NaN.
    """
    return _merge_views(tokens, num_keep, adaptive, sinks, top_and_spread_patches, outlier_and_spread_patches)


def _merge_views(
    tokens: VisualTokens,
    num_keep: int,
    adaptive: bool,
    sinks: str,
    by_budget: Callable[[Tensor, int], Tensor],
    by_outliers: Callable[[Tensor], Tensor],
) -> Plan:
    if not isinstance(adaptive, bool):
        raise BadOption(f"adaptive must be True or False, got {adaptive!r}.")
    score_N, key_NC = scores_and_keys(tokens.tower)
    if not score_N.isfinite().all():
        raise BadOption(
            "Some attention of the vision tower is NaN, so there is no best patch.",
            hint="Check the model's weights and dtype: float16 overflows in some vision towers.",
        )
    is_sink_N = sinks_to_guard(tokens.tower, sinks)
    entries = []
    for member_n, share in split_views(tokens, num_keep):
        member_n, share, aside = set_aside(member_n, 0 if adaptive else share, is_sink_N, sinks)
        entries.append((aside, aside, torch.ones_like(aside, dtype=torch.float32)))
        score_n = score_N[member_n]
        if adaptive:
            kept_K = by_outliers(score_n)
        elif share == len(member_n):
            kept_K = torch.arange(share, device=member_n.device)
        elif share:
            kept_K = by_budget(score_n, share - 1)  # the extra token is the last of the share
        else:
            continue
        anchor_E, source_E, weight_E = merge_picture(score_n, key_NC[member_n], kept_K)
        entries.append((member_n[anchor_E], member_n[source_E], weight_E))
    return merge_plan(len(tokens), *map(torch.cat, zip(*entries, strict=True)), before_projector=True)


def scores_and_keys(tower: TowerView) -> tuple[Tensor, Tensor]:
    """`[N]` attention a_j to every token and its `[N, C]` key, both of the last layer."""
    layer = tower.layers[-1]
    score_N = layer.class_attention(one_head=True) if layer.num_prefix else layer.received_attention()
    return score_N, layer.all_keys()


def top_patches(score_n: Tensor, num_keep: int) -> Tensor:
    """`[K]` indices of the highest scores, the highest first; equal scores go to the lowest index."""
    return score_n.sort(descending=True, stable=True).indices[:num_keep]


def outlier_patches(score_n: Tensor) -> Tensor:
    """`[K]` indices of the scores above Q3 + 1.5 (Q3 - Q1), the highest first; if there is none, of the highest."""
    low, high = score_n.quantile(0.25), score_n.quantile(0.75)
    return top_patches(score_n, max(1, int((score_n > high + 1.5 * (high - low)).sum())))


def top_and_spread_patches(score_n: Tensor, num_keep: int) -> Tensor:
    """`[num_keep]` indices: a quarter (rounded, at least one) by score, then others at equal distances."""
    if not num_keep:
        return top_patches(score_n, 0)
    top_K = top_patches(score_n, max(1, round(num_keep / 4)))
    num_spread = num_keep - len(top_K)
    others = _others(top_K, len(score_n))
    interval = torch.arange(num_spread, device=score_n.device)
    return torch.cat([top_K, others[(2 * interval + 1) * len(others) // (2 * num_spread)]]) if num_spread else top_K


def outlier_and_spread_patches(score_n: Tensor) -> Tensor:
    """`[K]` indices: the outliers, then every s-th patch of the picture that is none of them."""
    top_K = outlier_patches(score_n)
    stride = max(1, len(score_n) // len(top_K) // 3)
    others = _others(top_K, len(score_n))
    return torch.cat([top_K, others[others % stride == 0]])


def _others(chosen_K: Tensor, num_patches: int) -> Tensor:
    is_other_n = torch.ones(num_patches, dtype=torch.bool, device=chosen_K.device)
    is_other_n[chosen_K] = False
    return is_other_n.nonzero()[:, 0]


def merge_picture(score_n: Tensor, key_nC: Tensor, kept_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What becomes of one picture: `[E]` token that stays, `[E]` token it takes over and `[E]` with which weight.

    The tokens that stay are `kept_K` and, for the extra token, the dropped one with the highest score. Where nothing
    is dropped, all stay as they are.

    Args:
        score_n: a_j.
        key_nC: keys, compared by cosine.
        kept_K: distinct indices in any order; may be empty.
    """
    dropped = _others(kept_K, len(score_n))
    if not len(dropped):
        return kept_K, kept_K, torch.ones_like(score_n)
    neighbour_Kk = most_similar(key_nC, kept_K, NUM_NEIGHBOURS)
    extra = dropped[score_n[dropped].argmax()]
    return (
        torch.cat([kept_K, kept_K.repeat_interleave(neighbour_Kk.shape[1]), extra.expand(len(dropped))]),
        torch.cat([kept_K, neighbour_Kk.flatten(), dropped]),
        torch.cat([torch.ones_like(score_n[kept_K]), score_n[neighbour_Kk.flatten()], score_n[dropped]]),
    )


def most_similar(key_nC: Tensor, kept_K: Tensor, num_neighbours: int) -> Tensor:
    """`[K, k]` the k tokens whose keys are most similar to each kept one's, itself left out; k is at most n - 1."""
    unit_nC = unit_rows(key_nC)
    num_neighbours = min(num_neighbours, len(unit_nC) - 1)
    neighbour_Rk = [kept_K.new_empty(0, num_neighbours)]
    for row_R in kept_K.split(max(1, MAX_MATRIX_BYTES // (4 * len(unit_nC)))):
        cosine_Rn = unit_nC[row_R] @ unit_nC.T
        cosine_Rn.scatter_(1, row_R[:, None], -torch.inf)
        neighbour_Rk.append(cosine_Rn.topk(num_neighbours, dim=1).indices)
    return torch.cat(neighbour_Rk)
