"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: native-resolution grids, 2 x 2 patches merged to a token, M-RoPE, deepstack."""

# Shape legend: N visual tokens of an item, G patches joined into a token (4), V width of the vision tower,
#               I items

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.compression import Projector, in_dtype_of_input
from tokensieve.compression.tokens import identity
from tokensieve.pipeline.families.base import Family, ItemLayout, frame_times, register_family
from tokensieve.pipeline.tower_recorder import PatchMap


@register_family("qwen2_vl", "qwen3_vl")
class QwenVL(Family):
    """The merger sees 4 patches a token, in raster order of tokens (Qwen2.5-VL: see below)."""

    projector_path = "visual.merger"
    tower_path = "visual"

    def tower_blocks(self, base, modality):
        return base.visual.blocks

    def raster_order(self, base, grid_I3: Tensor) -> Tensor | None:
        """Where each token of the raster order stands in the merger's output; None if that is raster order."""
        return None

    def layouts(self, base, modality, out, inputs, seen):
        merger = base.visual.merger
        merge = base.visual.spatial_merge_size
        grid_I3 = inputs[f"{modality}_grid_thw"]
        lengths = [len(features) for features in out.pooler_output]
        x_NGV = seen.view(sum(lengths), merge**2, -1)
        order = self.raster_order(base, grid_I3)
        if order is not None:
            x_NGV = x_NGV[order]
        deepstack = getattr(out, "deepstack_features", None) or ()

        merged = in_dtype_of_input(merger)

        def fn(x: Tensor) -> Tensor:  # [..., P, G, V] -> [..., P, D]
            return merged(x.reshape(-1, x.shape[-1])).view(*x.shape[:-2], -1)

        def patches(first: int, count: int) -> PatchMap:
            """Patches of `count` tokens from token `first` on; they are in the tower's order, the rows are not."""
            local = None if order is None else order[first : first + count] - first

            def to_rows(values: Tensor) -> Tensor:
                rows = values.float().unflatten(0, (count, merge**2)).mean(1)
                return rows if local is None else rows[local]

            per_token = merge**2
            return PatchMap(start=first * per_token, stop=(first + count) * per_token, num_prefix=0, to_rows=to_rows)

        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        return [
            ItemLayout(
                features=features,
                patches=patches(starts[i], lengths[i]),
                grids=((int(t), int(h) // merge, int(w) // merge),),
                times_s=frame_times(inputs, "second_per_grid_ts", i, int(t)) if modality == "video" else None,
                projector=Projector(inputs=x, fn=fn, to_tokens=identity),
                deepstack=tuple(layer[i] for layer in deepstack),
            )
            for i, (features, x, (t, h, w)) in enumerate(
                zip(out.pooler_output, x_NGV.split(lengths), grid_I3, strict=True)
            )
        ]


@register_family("qwen2_5_vl")
class Qwen2_5_VL(QwenVL):
    """The merger runs in window order and only its output is put back in raster order."""

    def raster_order(self, base, grid_I3):
        from transformers.vision_utils import get_vision_window_index

        visual = base.visual
        window_index, _ = get_vision_window_index(
            grid_I3, visual.spatial_merge_size, visual.window_size, visual.patch_size
        )
        return torch.argsort(window_index.to(grid_I3.device))
