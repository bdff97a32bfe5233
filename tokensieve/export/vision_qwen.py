"""Encoder of Qwen2.5-VL for a graph: patches of equal frames in any resolution, full and window attention.

The model sorts patches into windows and back, with lengths as Python numbers. Attention does not care for the order, so
here patches stay as the processor gives them and a mask says who shares a window.
"""

# Shape legend: T frames, n patches of a frame, P = T * n, V width of the tower, G patches joined into a token (4),
#               N = P / G tokens, H heads, d width of a head

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tokensieve.export.encoded import Encoded


class QwenEncoder(nn.Module):
    """`pixel_values` `[P, colours * time * height * width]` to `Encoded`; tokens in raster order, frame by frame.

    Attributes:
        pixel_inputs: the graph inputs it reads: `patch_place` `[n, 2]` int64 is row and column of each patch of one
            frame, `patch_window` `[n]` int64 the number of its window.
    """

    pixel_inputs = ("pixel_values", "patch_place", "patch_window")
    newline = None

    def __init__(self, model: nn.Module, record: bool):
        super().__init__()
        tower = model.model.visual
        self.patches = tower.patch_embed.proj
        self.rotary, self.blocks, self.merger = tower.rotary_pos_emb, tower.blocks, tower.merger
        self.full = frozenset(tower.fullatt_block_indexes)
        self.per_token = tower.spatial_merge_unit
        self.record = record
        half = self.patches.weight.dtype != torch.float32
        self.probe = copy.deepcopy(self.merger).float() if half else self.merger  # methods probe in float32

    def forward(self, inputs: Mapping[str, Tensor]) -> Encoded:
        place_n2, window_n = inputs["patch_place"], inputs["patch_window"]
        weight = self.patches.weight.flatten(1)  # the kernel covers the patch: a product, not a convolution
        hidden_TnV = nn.functional.linear(inputs["pixel_values"].to(weight.dtype), weight).reshape(
            -1, place_n2.shape[0], weight.shape[0]
        )
        rotation = self.rotary(hidden_TnV, place_n2)
        shared_nn = window_n == window_n[:, None]
        last = len(self.blocks) - 1
        found = {}
        for i, block in enumerate(self.blocks):
            query, key, value = _heads(block, hidden_TnV, rotation)
            logits_THnn = query @ key.transpose(-1, -2) * block.attn.scaling
            if i not in self.full:
                low = torch.finfo(logits_THnn.dtype).min
                logits_THnn = torch.where(shared_nn, logits_THnn, low)
            share_THnn = logits_THnn.float().softmax(-1)
            if self.record and i == last:
                group_n = shared_nn.sum(0) if i not in self.full else torch.full_like(window_n, 1) * window_n.shape[0]
                received_Tn = share_THnn.mean(1).sum(1) / group_n
                found = {
                    "salience": self._per_token_mean(received_Tn[..., None])[:, 0],
                    "keys": self._per_token_mean(key.float().mean(1)),
                }
            mixed_TnV = (share_THnn.to(value.dtype) @ value).transpose(1, 2).flatten(2)
            hidden_TnV = hidden_TnV + block.attn.proj(mixed_TnV)
            hidden_TnV = hidden_TnV + block.mlp(block.norm2(hidden_TnV))
        rows_PV = hidden_TnV.flatten(0, 1)
        return Encoded(
            features=self.merger(rows_PV).float(),
            rows=rows_PV.float().unflatten(0, (-1, self.per_token)),
            project=self._project,
            **found,
        )

    def _per_token_mean(self, values_TnC: Tensor) -> Tensor:
        """`[N, C]`."""
        return values_TnC.flatten(0, 1).unflatten(0, (-1, self.per_token)).mean(1)

    def _project(self, rows: Tensor) -> Tensor:
        """`[..., N, G, V]` to `[..., N, D]`."""
        return self.probe(rows.reshape(-1, rows.shape[-1])).reshape(*rows.shape[:-2], -1)


def _heads(block: nn.Module, hidden_TnV: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, `[T, H, n, d]`."""
    attention = block.attn
    parts_TnHd = attention.qkv(block.norm1(hidden_TnV)).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    query, key, value = (part.transpose(1, 2) for part in parts_TnHd)
    return _rotated(query, rotation), _rotated(key, rotation), value


def _rotated(x_THnd: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Halves paired, in float32 as the model does it."""
    cos_nd, sin_nd = rotation
    x = x_THnd.float()
    first, second = x.chunk(2, dim=-1)
    return (x * cos_nd + torch.cat([-second, first], dim=-1) * sin_nd).to(x_THnd.dtype)
