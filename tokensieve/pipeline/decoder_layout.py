"""Where the tokens of a batch of prompts stand once some of them have left: indices, masks, and what must follow.

Rows of a batch keep different counts. The tokens that stay are moved to the right end of rows as long as the longest,
as padding on the left does; the places in front of shorter rows hold any dropped tokens and are masked as keys.
"""

# Shape legend: B prompts, S tokens of the full prompt, T tokens of a row now, K keys, Q queries, h mask heads (1 or H)

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Which tokens of the full prompts are there, and in which column.

    Attributes:
        stays: `[B, S]` bool, tokens of the full prompts that are there; padding is not.
        index: `[B, T]` int64, full column of every column now; None for the full prompt itself.
        real: `[B, T]` bool, False for padding and for the places in front of shorter rows.
    """

    stays: Tensor
    index: Tensor | None
    real: Tensor

    @classmethod
    def full(cls, valid_BS: Tensor) -> Layout:
        """Nothing dropped yet; `valid_BS` is False at padding."""
        return cls(valid_BS, None, valid_BS)

    def keeping(self, stays_BS: Tensor) -> Layout:
        """The layout with only the marked tokens, which must be among those that stay here."""
        longest = int(stays_BS.sum(-1).max())
        order_BS = stays_BS.int().sort(dim=-1, stable=True).indices
        index_BT = order_BS[:, stays_BS.shape[1] - longest :]
        return Layout(stays_BS, index_BT, stays_BS.gather(1, index_BT))

    def columns(self, row: int, full_N: Tensor) -> Tensor:
        """`[N]`: where tokens of one prompt that stay, given by full column, stand now."""
        if self.index is None:
            return full_N
        rank_S = self.stays[row].cumsum(0) - 1
        return rank_S[full_N] + self.index.shape[1] - int(self.stays[row].sum())

    def order_to(self, later: Layout) -> Tensor:
        """`[B, T']`: columns of this layout that make up the later one."""
        if self.index is None:
            return later.index
        first_B1 = self.index.shape[1] - self.stays.sum(-1, keepdim=True)
        rank_BS = self.stays.cumsum(-1) - 1 + first_B1
        return rank_BS.gather(1, later.index).clamp(min=0)  # a place in front may hold anything

    def take(self, values: Tensor, dim: int) -> Tensor:
        """What runs along the full prompt, `[B or 1, ..., S, ...]` with S at `dim`, in the columns of now."""
        if self.index is None:
            return values
        return take(values.expand(len(self.index), *values.shape[1:]), self.index, dim)

    def take_mask(self, mask: Tensor | None, attention: str) -> Tensor | None:
        """The attention mask of the full prompt cut to the columns of now.

        Args:
            mask: None (causal), `[B, S]` of keys (Flash), or `[B or 1, h, S, S]`, bool or additive.
            attention: name of the attention implementation, for where a mask must be made.
        """
        if self.index is None:
            return mask
        if mask is None:
            if self.real.all():
                return None
            return self.real if is_flash(attention) else prefix_mask(self.real, self.real.shape[1])
        if mask.ndim == 2:
            return self.take(mask, 1).bool() & self.real
        mask = mask.expand(len(self.index), *mask.shape[1:])
        row_B11 = torch.arange(len(mask), device=mask.device)[:, None, None]
        cut_BTTh = mask[row_B11, :, self.index[:, :, None], self.index[:, None, :]]
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return cut_BTTh.permute(0, 3, 1, 2).masked_fill(~self.real[:, None, None, :], hidden).contiguous()

    def put_back(self, values_BTD: Tensor) -> Tensor:
        """`[B, S, D]` with the tokens at their full columns, zeros where a token left or is padding."""
        if self.index is None:
            return values_BTD
        out = values_BTD.new_zeros(*self.stays.shape, values_BTD.shape[-1])
        return out.masked_scatter(self.stays[..., None], values_BTD[self.real])


def take(values: Tensor, index_BT: Tensor, dim: int) -> Tensor:
    """Gathers `[B, ..., S, ...]` along `dim` with one list of indices per row: `[B, ..., T, ...]`."""
    shape = [1] * values.ndim
    shape[0], shape[dim] = index_BT.shape
    index = index_BT.view(shape).expand(*values.shape[:dim], -1, *values.shape[dim + 1 :])
    return values.gather(dim, index)


def is_flash(attention: str) -> bool:
    """Whether an attention implementation takes a 2-D mask of keys."""
    return "flash" in attention and "paged" not in attention


def prefix_mask(real_BK: Tensor, num_queries: int, window: int | None = None) -> Tensor:
    """`[B, 1, Q, K]` bool: each of the last Q tokens sees itself and the real keys before it (within the window)."""
    num_keys = real_BK.shape[1]
    key_K = torch.arange(num_keys, device=real_BK.device)
    query_Q1 = key_K[num_keys - num_queries :, None]
    sees_QK = key_K <= query_Q1
    if window is not None:
        sees_QK = sees_QK & (key_K > query_Q1 - window)
    return real_BK[:, None, None, :] & sees_QK


def decode_mask(
    real_BK: Tensor, num_queries: int, attention: str, dtype: torch.dtype, window: int | None = None
) -> Tensor | None:
    """The mask for tokens after the prompt, in the form that an attention implementation takes.

    Args:
        real_BK: keys that may be seen, the new tokens' own included.
        num_queries: Q, new tokens in this forward.
        attention: name of the attention implementation.
        dtype: of the hidden states, for an additive mask.
        window: sliding window of the layer, or None.
    """
    if is_flash(attention):
        return None if real_BK.all() else real_BK
    if num_queries == 1 and real_BK.all():
        return None
    mask = prefix_mask(real_BK, num_queries, window)
    if attention == "eager":
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return mask
