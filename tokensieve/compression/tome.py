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
from tokensieve.compression.tower_stage import BlockView, Reduced, TowerStage, stable_order, take_rows
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
    num_left = num_tokens - r
    distance_BA, best_BA = _nearest_in_other_set(metric, num_prefix)
    merged_Br, stays_Ba = stable_order(distance_BA).split([r, distance_BA.shape[1] - r], dim=1)
    stays_Ba = stays_Ba.sort(dim=-1).values[:, (num_prefix + 1) // 2 :]  # prefix tokens are first: none of them merges
    place_N = torch.arange(num_tokens, device=x.device).expand(batch, -1)
    other_Bb = place_N[:, 1::2]
    anchor_BK = torch.cat([place_N[:, :num_prefix], 2 * stays_Ba, other_Bb[:, num_prefix // 2 :]], dim=1)

    into_Br = best_BA.gather(1, merged_Br)
    place_Br = into_Br + (num_left - other_Bb.shape[1])  # the tokens of set B are last
    from_Br, into_Br = 2 * merged_Br, 2 * into_Br + 1
    target_BN = torch.empty_like(place_N).scatter_(1, anchor_BK, place_N[:, :num_left]).scatter_(1, from_Br, place_Br)

    from_size_Br = size.gather(1, from_Br)
    new_size_BK = size.gather(1, anchor_BK).scatter_add_(1, place_Br, from_size_Br)
    with torch.autocast(x.device.type, enabled=False):
        meets_Brr = place_Br[:, :, None] == place_Br[:, None]
        into_BrD = take_rows(x, into_Br).float() * size.gather(1, into_Br)[..., None]
        sum_BrD = into_BrD + (meets_Brr * from_size_Br[:, None]) @ take_rows(x, from_Br).float()
        mean_BrD = (sum_BrD / new_size_BK.gather(1, place_Br)[..., None]).to(x.dtype)
    first_Br = (meets_Brr.cumsum(-1) == 0).sum(-1)  # where several merge, the first of their (equal) means is taken
    row_BK = anchor_BK.scatter(1, place_Br, num_tokens + first_Br)
    new_x_BKD = take_rows(torch.cat([x, mean_BrD], 1), row_BK)
    return Reduced(x=new_x_BKD, size=new_size_BK, target=target_BN, anchor=anchor_BK)


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
