"""ToMe: Token Merging: Your ViT But Faster.

Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman (ICLR 2023). https://arxiv.org/abs/2210.09461

    k_i         attention keys of token i, mean over heads, scaled to length 1
    A, B        tokens at even and at odd places of the sequence; prefix tokens (class, registers) take no part
    S_ab        k_a . k_b
    b(a)        argmax_b S_ab; the r tokens a with the highest S_{a, b(a)} merge, r at most half of the patches
    x_b         (s_b x_b + sum of s_a x_a) / (s_b + sum of s_a), over the tokens a that merge into b
    s_b         s_b + sum of s_a: how many patches a token stands for, 1 at first
    order       prefix, A that did not merge, B
    attention   softmax(q k^T / sqrt(d) + log s), "proportional attention"

Merges in every block, between attention and MLP. The mean of all tokens weighted by s stays the same.

What differs from the official code (facebookresearch/ToMe; written from the equations):
- A budget: `keep` is turned into a number r for every block, so that the tower ends with exactly that many tokens
  where halving in every block can reach it (the paper gives r by hand: option `r`).
- Register tokens are protected like the class token; LayerScale, query and key norms and gates are applied, which
  the official timm patch leaves out; the size also weighs the attention of pooling heads.
- Distances below 1e-6 are rounding and count as 0, so that equal tokens tie and the first ones merge.
"""

# Shape legend: B images, N tokens in, K tokens out, A and b tokens of the two sets, D width, d head, r merges

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor
from torch.nn import functional as F

from tokensieve.compression.budget import num_to_keep
from tokensieve.compression.maxmin import SAME
from tokensieve.compression.registry import register_method
from tokensieve.compression.tower_stage import BlockView, Reduced, TowerStage
from tokensieve.errors import BadOption


@register_method(
    "tome",
    title="Token Merging: Your ViT But Faster",
    url="https://arxiv.org/abs/2210.09461",
    place="tower",
    effect="merges",
    needs=("keys",),
    output_length="Every block can at most halve the patches, so a tower of L blocks keeps at least a share of 2^-L.",
    licence="CC BY-NC 4.0",
    differs="Meets a budget; protects registers; size-weighted pooling heads; equal tokens tie.",
)
def tome(*, r: int | list[int] | tuple[int, float] | None = None, proportional: bool = True) -> ToMe:
    """A stage that merges similar patches in every block.

    Args:
        r: the paper's schedule instead of the budget: merges per block, one number or a list (blocks beyond its end
            merge nothing), or `(r, inflect)` for numbers that go linearly from `int(r (1 - inflect))` to the same
            distance above r (inflect -1: from 2r down to 0). `keep` is not used then.
        proportional: add log s to the attention logits. The authors turn it off for MAE models without ToMe training.

    Raises:
        BadOption: `r` is none of these.
    """
    return ToMe(r, proportional)


class ToMe(TowerStage):
    """See `tome`."""

    needs = frozenset({"keys"})
    averages = True

    def __init__(self, r: int | list[int] | tuple[int, float] | None, proportional: bool):
        self.r = _checked(r)
        self.proportional = proportional
        self._merges: list[int] = []

    def begin(self, *, num_tokens: int, num_prefix: int, num_blocks: int, keep: float | int, batch: int) -> None:
        if self.r is None:
            num_patches = num_tokens - num_prefix
            self._merges = merges_for_budget(num_patches, num_to_keep(keep, num_patches), num_blocks)
        else:
            self._merges = merges_from_r(self.r, num_blocks)

    def acts_in(self, block: int) -> bool:
        return block < len(self._merges) and self._merges[block] > 0

    def reduce(self, x: Tensor, view: BlockView) -> Reduced | None:
        return merge_similar(x, view.size, view.keys, self._merges[view.index], view.num_prefix)


def merge_similar(x: Tensor, size: Tensor, metric: Tensor, r: int, num_prefix: int) -> Reduced:
    """One step of bipartite soft matching.

    Args:
        x: `[B, N, D]`.
        size: `[B, N]`.
        metric: `[B, N, d]`, compared by cosine.
        r: merges, cut to half of the N - num_prefix patches.
        num_prefix: tokens in front that stay as they are.
    """
    batch, num_tokens = size.shape
    r = min(r, (num_tokens - num_prefix) // 2)
    distance_BA, best_BA = _nearest_in_other_set(metric, num_prefix)
    order_BA = distance_BA.sort(dim=-1, stable=True).indices
    merged_Br = order_BA[:, :r]

    is_merged_BN = torch.zeros(batch, num_tokens, dtype=torch.bool, device=x.device)
    is_merged_BN.scatter_(1, 2 * merged_Br, True)
    place_N = torch.arange(num_tokens, device=x.device)
    rank_N = torch.where(place_N < num_prefix, 0, 1 + place_N % 2)  # prefix, then set A, then set B
    rank_BN = rank_N.expand(batch, -1).masked_fill(is_merged_BN, 3)
    anchor_BK = rank_BN.sort(dim=-1, stable=True).indices[:, : num_tokens - r]

    new_place_K = torch.arange(num_tokens - r, device=x.device).expand(batch, -1)
    target_BN = torch.zeros(batch, num_tokens, dtype=torch.long, device=x.device).scatter_(1, anchor_BK, new_place_K)
    into_Br = 2 * best_BA.gather(1, merged_Br) + 1
    target_BN.scatter_(1, 2 * merged_Br, target_BN.gather(1, into_Br))

    weighted_BND = torch.cat([x.float() * size[..., None], size[..., None]], dim=-1)
    sums_BKD = _sum_by_target(weighted_BND, target_BN, num_tokens - r)
    new_size_BK1 = sums_BKD[..., -1:]
    merged_BKD = (sums_BKD[..., :-1] / new_size_BK1).to(x.dtype)
    return Reduced(x=merged_BKD, size=new_size_BK1[..., 0], target=target_BN, anchor=anchor_BK)


def _nearest_in_other_set(metric: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """For each token of set A the distance to the nearest of set B and its index there, both `[B, A]`."""
    with torch.no_grad(), torch.autocast(metric.device.type, enabled=False):
        unit_BNd = F.normalize(metric.float(), dim=-1)
        even_BAd, odd_Bbd = unit_BNd[:, ::2], unit_BNd[:, 1::2]
        distance_BAb = F.threshold(1 - even_BAd @ odd_Bbd.transpose(1, 2), SAME, 0.0)
        distance_BAb[:, : (num_prefix + 1) // 2] = torch.inf
        distance_BAb[:, :, : num_prefix // 2] = torch.inf
        best_BA = distance_BAb.argmin(-1)
        return distance_BAb.gather(-1, best_BA[..., None])[..., 0], best_BA


def _sum_by_target(values_BND: Tensor, target_BN: Tensor, num_targets: int) -> Tensor:
    """`[B, K, D]` sums of the rows with equal target; repeatable on GPUs, unlike a scattered sum."""
    batch = len(target_BN)
    flat = (target_BN + num_targets * torch.arange(batch, device=target_BN.device)[:, None]).flatten()
    order = flat.sort(stable=True).indices
    lengths = flat.new_zeros(batch * num_targets).scatter_add_(0, flat, torch.ones_like(flat))
    sums = torch.segment_reduce(values_BND.flatten(0, 1)[order], "sum", lengths=lengths, axis=0)
    return sums.view(batch, num_targets, -1)


def merges_for_budget(num_patches: int, num_keep: int, num_blocks: int) -> list[int]:
    """Merges per block so that `num_keep` of `num_patches` are left after `num_blocks` blocks.

    As even as halving allows: the first blocks take the remainder, and more where later ones could not catch up.
    If even halving everywhere is not enough, all halve.
    """
    merges = []
    for block in range(num_blocks):
        left = num_blocks - block
        even_share = -((num_keep - num_patches) // left)
        to_stay_reachable = num_patches - num_keep * 2 ** (left - 1)
        merges.append(min(max(even_share, to_stay_reachable), num_patches // 2))
        num_patches -= merges[-1]
    return merges


def merges_from_r(r: int | list[int] | tuple[int, float], num_blocks: int) -> list[int]:
    """Merges per block from the paper's notation, see `tome`."""
    if isinstance(r, int):
        return [r] * num_blocks
    if isinstance(r, list):
        return r[:num_blocks]
    mean, inflect = r
    first = int(mean * (1 - inflect))
    step = 2 * (mean - first) / max(1, num_blocks - 1)
    return [int(first + step * block) for block in range(num_blocks)]


def _checked(r: int | list[int] | tuple[int, float] | None) -> int | list[int] | tuple[int, float] | None:
    if r is None or _is_count(r) or (isinstance(r, list) and all(_is_count(each) for each in r)):
        return r
    if isinstance(r, list | tuple) and len(r) == 2 and _is_count(r[0]) and isinstance(r[1], Real) and abs(r[1]) <= 1:
        return tuple(r)  # a file of options has no tuples: there the pair is a list that ends in -1.0
    raise BadOption(
        f"r must be a number of merges per block, a list of them, or a pair (r, inflect), got {r!r}.",
        hint="Give 8, [8, 8, 4], or (8, -1.0) with inflect in [-1, 1]; leave it out to use `keep`.",
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
