"""Where the patches of a reduced tower went: which token stands where, and which token owns which patch."""

# Shape legend: B images, P patches, K patch tokens left, S prefix tokens, C any width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class TowerTrace:
    """What became of the patches of the last forward, or of its first blocks. Prefix tokens are not counted.

    Attributes:
        anchor: `[B, K]` int64, the patch (raster index) that each token left stands at; all different.
        owner: `[B, P]` int64, the token in [0, K) that each patch went into, -1 for a dropped patch.
        size: `[B, K]` float32, how many patches each token stands for.
        num_prefix: S, the tokens in front that are no patches.
        tokens_per_block: tokens (prefix included) that enter the first block, then those that leave each block.
    """

    anchor: Tensor
    owner: Tensor
    size: Tensor
    num_prefix: int
    tokens_per_block: tuple[int, ...]

    def anchor_mask(self) -> Tensor:
        """`[B, P]` bool, True at the patches that a token stands at: K in every row."""
        return torch.zeros_like(self.owner, dtype=torch.bool).scatter(1, self.anchor, True)

    def unmerge(self, values: Tensor) -> Tensor:
        """Spreads `[B, S + K, C]` (the tower's own order) over the raster: `[B, S + P, C]`, gradients included.

        Every patch gets the row of its owner: the token it was merged or fused into. A dropped patch gets zeros.

        Raises:
            ValueError: `values` does not have S + K rows.
        """
        if values.shape[1] != self.num_prefix + self.anchor.shape[1]:
            raise ValueError(
                f"The trace is of {self.num_prefix} + {self.anchor.shape[1]} tokens, got {values.shape[1]} rows."
            )
        index_BP = (self.owner.clamp(min=0) + self.num_prefix)[..., None].expand(-1, -1, values.shape[-1])
        rows = values.gather(1, index_BP).masked_fill((self.owner < 0)[..., None], 0)
        return torch.cat([values[:, : self.num_prefix], rows], dim=1)
