"""Condensation of patch tokens as in TCA: keep the best, merge the middle around centres, fuse or drop the rest.

Pure functions; `tca` says which paper they come from, in which blocks they act and where scores come from.

    top = ceil((1 - r) P),  m = P + 1 - top
    keep   the top - 2m patches of the highest score stay as they are
    merge  the next 2m become 4: greedy centres z (one given, then always the token farthest from its nearest centre);
           every token y goes to its nearest centre; merged = sum w y / sum w, w = 1 / ||y - z||, 1 for z itself
    fuse   the other m - 1 become one, sum score * token with weights as they are, or are dropped
"""

# Shape legend: B images, P patches, D width, H heads, S kept, M merge band, F fused or dropped, K centres

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tokensieve.compression.tower_stage import stable_order, take_rows

NUM_CENTERS = 4
MAX_DROP_RATE = 1 / 3  # from here on nothing would be kept as it is


@dataclass(frozen=True)
class Split:
    """How many patches of a block are kept, merged and fused (or dropped)."""

    keep: int
    merge: int
    fuse: int


def split_patches(num_patches: int, drop_rate: float) -> Split:
    """The three counts for `num_patches` patches; `keep` is below 1 where the drop rate is too high for so few."""
    top = math.ceil((1 - drop_rate) * num_patches)
    spare = num_patches + 1 - top
    return Split(keep=top - 2 * spare, merge=2 * spare, fuse=spare - 1)


def num_left(num_patches: int, drop_rate: float, *, fuse: bool = True) -> int:
    """Patch tokens after one block; as many as before where condensing would not make it shorter."""
    return min(num_patches, split_patches(num_patches, drop_rate).keep + NUM_CENTERS + fuse)


@lru_cache(maxsize=256)
def drop_rate_for(num_patches: int, num_keep: int, *, num_steps: int = 3, fuse: bool = True) -> float:
    """The smallest drop rate that ends `num_steps` blocks with as many patch tokens as fit in `num_keep`.

    Where no drop rate gets that low, the lowest count that can be reached. In steps of 0.001; 0 for a budget of all.
    """
    best, best_left = 0.0, num_patches
    for rate in (i / 1000 for i in range(1, math.ceil(1000 * MAX_DROP_RATE))):
        left, possible = num_patches, True
        for _ in range(num_steps):
            after = num_left(left, rate, fuse=fuse)
            possible &= after == left or split_patches(left, rate).keep >= 1
            left = after
        if possible and (left < best_left if best_left > num_keep else best_left < left <= num_keep):
            best, best_left = rate, left
    return best


def rank_score(attention_BHP: Tensor) -> Tensor:
    """`[B, P]`: mean over heads of each patch's rank in that head, 0 for the lowest; of equals the first is higher."""
    lowest_first_BHP = stable_order(attention_BHP.flip(-1))
    return lowest_first_BHP.argsort(dim=-1).flip(-1).float().mean(1)


def farthest_centers(x_BMD: Tensor, first_B: Tensor, num_centers: int = NUM_CENTERS) -> Tensor:
    """`[B, K]`: greedy centres, each the token farthest (Euclidean) from its nearest centre so far; all distinct."""
    center_BK = [first_B]
    nearest_BM = _distance(x_BMD, first_B)
    for _ in range(num_centers - 1):
        taken_BK = torch.stack(center_BK, 1)
        center_BK.append(nearest_BM.scatter(1, taken_BK, -1.0).argmax(1))
        nearest_BM = torch.minimum(nearest_BM, _distance(x_BMD, center_BK[-1]))
    return torch.stack(center_BK, 1)


def _distance(x_BMD: Tensor, index_B: Tensor) -> Tensor:
    # The expanded square form would give the centre itself a distance above 0.
    center_B1D = x_BMD.gather(1, index_B[:, None, None].expand(-1, 1, x_BMD.shape[-1]))
    return (x_BMD - center_B1D).norm(dim=-1)


def merge_weights(x_BMD: Tensor, center_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre of every token, `[B, M]` (ties to the first), and weights `[B, K, M]` whose rows sum to 1."""
    distance_BKM = torch.stack([_distance(x_BMD, index_B) for index_B in center_BK.unbind(1)], 1)
    cluster_BM = distance_BKM.argmin(1)
    own_K = torch.arange(center_BK.shape[1], device=center_BK.device)
    cluster_BM = cluster_BM.scatter(1, center_BK, own_K.expand_as(center_BK))
    inside_BKM = cluster_BM[:, None] == own_K[:, None]
    weight_BKM = torch.where(distance_BKM > 0, 1 / distance_BKM, 1.0) * inside_BKM
    return cluster_BM, weight_BKM / weight_BKM.sum(-1, keepdim=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Condensation:
    """One block's condensation. Indices count the patches of the sequence that entered the block.

    Attributes:
        x: `[B, P', D]`: kept, merged, then the fused one (if the variant fuses).
        keep: `[B, S]` and band: `[B, M]`, falling score. rest: `[B, F]`, rising index.
        centers: `[B, K]` and cluster: `[B, M]`, into the band and into the centres.
    """

    x: Tensor
    keep: Tensor
    band: Tensor
    rest: Tensor
    centers: Tensor
    cluster: Tensor


def condense(x_BPD: Tensor, score_BP: Tensor, split: Split, first_B: Tensor, *, fuse: bool = True) -> Condensation:
    """Keeps, merges and fuses (or drops) patches by `score_BP`; equal scores rank by index. Float32 inside.

    Gradients flow through the tokens, not through the merge weights.

    `first_B` is the first centre of every image, an index into its merge band of `split.merge` tokens.
    """
    order_BP = stable_order(score_BP, descending=True)
    keep_BS, band_BM, rest_BF = order_BP.split([split.keep, split.merge, split.fuse], 1)
    rest_BF = rest_BF.sort(1).values
    sorted_BPD = take_rows(x_BPD, torch.cat([keep_BS, band_BM, rest_BF], 1))
    kept_BSD, band_BMD, rest_BFD = sorted_BPD.split([split.keep, split.merge, split.fuse], 1)
    band_BMD = band_BMD.float()
    with torch.no_grad():  # 1 / distance has no gradient at the centre
        center_BK = farthest_centers(band_BMD, first_B)
        cluster_BM, weight_BKM = merge_weights(band_BMD, center_BK)
    parts = [kept_BSD, (weight_BKM @ band_BMD).to(x_BPD.dtype)]
    if fuse:
        fused_B1D = score_BP.gather(1, rest_BF)[:, None] @ rest_BFD.float()
        parts.append(fused_B1D.to(x_BPD.dtype))
    x = torch.cat(parts, 1)
    return Condensation(x=x, keep=keep_BS, band=band_BM, rest=rest_BF, centers=center_BK, cluster=cluster_BM)
