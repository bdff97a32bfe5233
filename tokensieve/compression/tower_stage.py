"""What a method inside a vision tower sees of a block, and what it answers: which tokens go on, and made of what.

A tower method shortens the sequence between the attention and the MLP of some blocks. It is a `TowerStage`: an
object without a model. `tokensieve.pipeline.towers` runs it in the towers of open_clip, timm and transformers and
keeps the books (which patch went where); the stage only looks at tensors.

Per forward of the tower the stage is called in this order:

    begin(...)                                                   once
    for every block:  acts_in(block) -> extra_tokens(block, x)   [attention]
                      reduce(x, view) if it acts                 [MLP]
                      after_block(block, x)
"""

# Shape legend: B images, N tokens that enter (prefix included), K tokens that go on, E extra tokens, H heads, D width,
#               d head

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def take_rows(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    """`[B, K, D]`: the rows of every image at its own places. Copies whole rows, where `gather` goes by elements."""
    first_B1 = x_BND.shape[1] * torch.arange(x_BND.shape[0], device=x_BND.device)[:, None]
    rows = x_BND.flatten(0, 1).index_select(0, (first_B1 + index_BK).flatten())
    return rows.view(*index_BK.shape, x_BND.shape[-1])


def stable_order(x: Tensor, *, descending: bool = False) -> Tensor:
    """Indices that sort the last dimension; equal values stay in their order, in an ONNX graph as well."""
    if torch.compiler.is_exporting():  # ONNX has no stable sort, but its TopK takes the lower index first
        return x.topk(x.shape[-1], dim=-1, largest=descending).indices
    return x.sort(dim=-1, descending=descending, stable=True).indices


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockView:
    """What a block shows between its attention and its MLP.

    Attributes:
        index: the block, counted from 0.
        num_blocks: how many blocks may reduce: the budget is to be met after block `num_blocks - 1`.
        num_prefix: tokens in front that are no patches (class token, registers); they must stay, and stay in front.
        size: `[B, N]` float32, how many of the tower's own tokens each token stands for (1 until merged).
        class_attention: `[B, N]` float32, attention from the class token to every token, mean over heads. In a tower
            without a class token: attention received, mean over heads and queries (no gradient). None unless the
            stage needs "attention". Columns of extra tokens are left out and the rest is not renormalised.
        head_attention: `[B, H, N]`, the same before the mean over heads. None unless the stage needs "attention".
        keys: `[B, N, d]` float32 without gradient, mean over heads, after a key norm, before scaling. None unless
            the stage needs "keys".
    """

    index: int
    num_blocks: int
    num_prefix: int
    size: Tensor
    class_attention: Tensor | None = None
    head_attention: Tensor | None = None
    keys: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Reduced:
    """The shorter sequence.

    Attributes:
        x: `[B, K, D]`, prefix first, then patches in any order.
        size: `[B, K]` float32, the summed size of what each new token took.
        target: `[B, N]` int64, the new token that took each old one, -1 where it was dropped.
        anchor: `[B, K]` int64, the old token that each new one stands at: all different, one that it took.
    """

    x: Tensor
    size: Tensor
    target: Tensor
    anchor: Tensor


class TowerStage:
    """Base of the methods inside a vision tower: overwrite what the method does.

    A stage serves one tower and one forward at a time; what `begin` sets is its state for that forward.

    Attributes:
        needs: some of {"attention", "keys"}: what `BlockView` must hold.
        proportional: adds log size to the attention logits of every token, in this and all later blocks.
        averages: a new token is the size-weighted mean of what it took, so that average pooling weighs by size.
    """

    needs: frozenset[str] = frozenset()
    proportional: bool = False
    averages: bool = False

    def begin(self, *, num_tokens: int, num_prefix: int, num_blocks: int, keep: float | int, batch: int) -> None:
        """Called at the start of every forward.

        Args:
            num_tokens: N at the first block, prefix included.
            num_prefix: tokens in front that are no patches.
            num_blocks: how many blocks may reduce.
            keep: patch tokens left at the end, a share in (0, 1] or a number (see `budget.num_to_keep`).
            batch: B.
        """

    def acts_in(self, block: int) -> bool:
        """Whether `reduce` or `extra_tokens` is to be called in this block (which costs the view)."""
        return False

    def extra_tokens(self, block: int, x: Tensor) -> Tensor | None:
        """`[B, E, D]` to put in front of the block's input `x` `[B, N, D]` for its attention only, or None.

        They go through the block's first norm, are keys, values and queries like any token, and their output rows
        are thrown away. Asked only where the stage acts.
        """
        return None

    def extra_bias(self, block: int) -> Tensor | None:
        """`[B, E]` to add to the attention logits that the extra tokens get as keys, or None. Asked after them."""
        return None

    def reduce(self, x: Tensor, view: BlockView) -> Reduced | None:
        """The sequence for the MLP and all that follows, from `x` `[B, N, D]` after attention and its residual.

        None leaves it as it is. Asked only where the stage acts.
        """
        return None

    def after_block(self, block: int, x: Tensor) -> None:
        """Told what every block gave, `[B, N, D]`, whether the stage acts there or not."""
