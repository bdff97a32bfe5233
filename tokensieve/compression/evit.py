"""EViT: Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations.

Liang, Ge, Tong, Song, Wang, Xie (ICLR 2022). https://arxiv.org/abs/2202.07800

In three blocks, after the attention and its residual:

    a_j     mean over heads of the attention from the class token to patch j
    n       ceil(kappa P) of the P patches, kappa the keep rate: those with the highest a_j, in descending order
    x_f     sum of a_j x_j over the others (a_j as it is, not made to sum to 1): the fused token, last
    order   class token, kept, fused

The fused token takes part in the next choice like any patch. Without fusion the others are dropped.

What differs from the official code (youweiliang/evit; written from the equations):
- A budget: `keep` is turned into counts that shrink by the same factor in every step and end at exactly that many
  patch tokens, the fused one included. Option `keep_rate` gives the paper's kappa.
- The paper's blocks 3, 6, 9 of 12 (from 0) become a quarter, half and three quarters of other depths (INFERRED).
- Without a class token a_j is the attention that patch j receives, mean over heads and queries (INFERRED).
- Register tokens are kept; equal scores keep the first patch.
"""

# Shape legend: B images, N tokens in, P patches among them, n kept patches, K tokens out, D width

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from tokensieve.compression.budget import num_to_keep
from tokensieve.compression.registry import register_method
from tokensieve.compression.tower_stage import BlockView, Reduced, TowerStage, stable_order, take_rows
from tokensieve.errors import BadOption


@register_method(
    "evit",
    title="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
    url="https://arxiv.org/abs/2202.07800",
    place="tower",
    effect="merges",
    needs=("attention",),
    licence="Apache-2.0",
    differs="Meets a budget; scales its blocks to the depth; attention received where there is no class token.",
)
def evit(*, keep_rate: float | None = None, fuse: bool = True, blocks: Sequence[int] | None = None) -> EViT:
    """A stage that keeps the most attended patches in three blocks and fuses the others into one token.

    Args:
        keep_rate: the paper's kappa in (0, 1], the share of patches kept in each of the blocks, instead of the
            budget. `keep` is not used then.
        fuse: add the fused token; without it the other patches are dropped.
        blocks: where to reduce, counted from 0; None for a quarter, half and three quarters of the depth.

    Raises:
        BadOption: `keep_rate` or `blocks` are none of these.
    """
    return EViT(keep_rate, fuse, blocks)


class EViT(TowerStage):
    """See `evit`."""

    needs = frozenset({"attention"})

    def __init__(self, keep_rate: float | None, fuse: bool, blocks: Sequence[int] | None):
        if keep_rate is not None and not (isinstance(keep_rate, Real) and 0 < keep_rate <= 1):
            raise BadOption(f"keep_rate must be in (0, 1], got {keep_rate!r}.", hint="The paper uses 0.5 to 0.9.")
        if blocks is not None and not (blocks and all(isinstance(block, int) and block >= 0 for block in blocks)):
            raise BadOption(f"blocks must be a list of block numbers counted from 0, got {blocks!r}.")
        self.keep_rate, self.fuse, self.blocks = keep_rate, fuse, blocks
        self._num_kept: dict[int, int] = {}

    def begin(self, *, num_tokens: int, num_prefix: int, num_blocks: int, keep: float | int, batch: int) -> None:
        num_patches = num_tokens - num_prefix
        blocks = blocks_of_depth(num_blocks) if self.blocks is None else sorted(set(self.blocks))
        if blocks[-1] >= num_blocks:
            raise BadOption(
                f"evit was told to reduce in block {blocks[-1]}, but only blocks 0 to {num_blocks - 1} may reduce here."
            )
        if self.keep_rate is None:
            counts = counts_for_budget(num_patches, num_to_keep(keep, num_patches), len(blocks))
            kept = [count - self.fuse for count in counts]
            before = [num_patches, *counts[:-1]]
            unchanged = [block for block, count, old in zip(blocks, counts, before, strict=True) if count == old]
        else:
            kept, unchanged = [], []
            for block in blocks:
                kept.append(math.ceil(self.keep_rate * num_patches))
                if kept[-1] == num_patches:
                    unchanged.append(block)
                else:
                    num_patches = kept[-1] + self.fuse
        self._num_kept = {block: n for block, n in zip(blocks, kept, strict=True) if block not in unchanged}

    def acts_in(self, block: int) -> bool:
        return block in self._num_kept

    def reduce(self, x: Tensor, view: BlockView) -> Reduced | None:
        return keep_attended(
            x, view.size, view.class_attention, self._num_kept[view.index], view.num_prefix, fuse=self.fuse
        )


def keep_attended(
    x: Tensor, size: Tensor, attention: Tensor, num_keep: int, num_prefix: int, *, fuse: bool = True
) -> Reduced:
    """Keeps the `num_keep` patches with the highest attention, in descending order, and fuses the others.

    The fused token stands at the place of the most attended of those that it took.

    Args:
        x: `[B, N, D]`.
        size: `[B, N]`.
        attention: `[B, N]`, the score of every token; the first `num_prefix` are not looked at.
        num_keep: patches kept, fewer than there are.
        num_prefix: tokens in front that stay as they are.
        fuse: add the fused token.
    """
    batch, num_tokens = size.shape
    order_BP = num_prefix + stable_order(attention[:, num_prefix:], descending=True)
    others_Bm = order_BP[:, num_keep:]
    prefix_Bp = torch.arange(num_prefix, device=x.device).expand(batch, -1)
    anchor_BK = torch.cat([prefix_Bp, order_BP[:, :num_keep]], dim=1)
    new_x, new_size = take_rows(x, anchor_BK), size.gather(1, anchor_BK)
    if fuse:
        weight_Bm1 = attention.gather(1, others_Bm)[..., None]
        fused_B1D = (take_rows(x, others_Bm).float() * weight_Bm1).sum(1, keepdim=True).to(x.dtype)
        new_x = torch.cat([new_x, fused_B1D], dim=1)
        new_size = torch.cat([new_size, size.gather(1, others_Bm).sum(1, keepdim=True)], dim=1)
        anchor_BK = torch.cat([anchor_BK, others_Bm[:, :1]], dim=1)
    new_place_BK = torch.arange(anchor_BK.shape[1], device=x.device).expand(batch, -1)
    without = anchor_BK.shape[1] - 1 if fuse else -1
    target_BN = torch.full((batch, num_tokens), without, device=x.device).scatter(1, anchor_BK, new_place_BK)
    return Reduced(x=new_x, size=new_size, target=target_BN, anchor=anchor_BK)


def blocks_of_depth(num_blocks: int) -> list[int]:
    """A quarter, half and three quarters of the depth: 3, 6, 9 of 12. Fewer in a tower of fewer than four blocks."""
    return sorted({num_blocks * quarter // 4 for quarter in (1, 2, 3)})


def counts_for_budget(num_patches: int, num_keep: int, num_steps: int) -> list[int]:
    """Patch tokens after each step: the same factor every time, rounded, and `num_keep` after the last."""
    factor = num_keep / num_patches
    return [round(num_patches * factor ** (step / num_steps)) for step in range(1, num_steps)] + [num_keep]
