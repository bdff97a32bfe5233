"""InternVL, SmolVLM and Idefics3: an image is a row of equal tiles, each with a raster of its own."""

# Shape legend: n visual tokens of an item, K tiles, M tokens a tile, V width entering the projector

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.compression import Projector, in_dtype_of_input
from tokensieve.compression.tokens import identity
from tokensieve.pipeline.families.base import (
    Family,
    ItemLayout,
    num_class_tokens,
    register_family,
    square,
)
from tokensieve.pipeline.tower_recorder import PatchMap


def tiled_layout(features, inputs_KMV, projector_fn, patches: PatchMap) -> ItemLayout:
    """One item of K tiles; both families append the view of the whole image (crop 0) after its tiles."""
    tiles, per_tile = inputs_KMV.shape[:2]
    crop_K = (torch.arange(tiles) + 1) % tiles
    return ItemLayout(
        features=features,
        grids=(square(per_tile),) * tiles,
        crop=crop_K.repeat_interleave(per_tile).to(features.device),
        projector=Projector(inputs=inputs_KMV.flatten(0, 1), fn=projector_fn, to_tokens=identity),
        patches=patches,
    )


def shuffled_rows(shuffle, tiles: int):
    """`to_rows` of a tower whose patches are joined by `shuffle`, `[K, P, C]` to `[K, M, C * joined]`."""

    def to_rows(values: Tensor) -> Tensor:
        maps = values.float().unflatten(0, (tiles, -1))
        return shuffle(maps).unflatten(-1, (-1, values.shape[1])).mean(-2).flatten(0, 1)

    return to_rows


@register_family("internvl")
class InternVL(Family):
    """The prompt holds one unbroken run of placeholders an image (a video: one a frame), whatever its tiles."""

    def layouts(self, base, modality, out, inputs, seen):
        per_tile = out.pooler_output.shape[1]
        is_visual = (inputs["input_ids"] == base.config.image_token_id).int()
        edges = torch.nn.functional.pad(is_visual, (1, 1)).diff(dim=1)
        starts, ends = (edges == 1).nonzero()[:, 1], (edges == -1).nonzero()[:, 1]
        tiles = ((ends - starts) // per_tile).tolist()
        fn = in_dtype_of_input(base.multi_modal_projector)

        def shuffle(maps: Tensor) -> Tensor:
            side = round(maps.shape[1] ** 0.5)
            return base.pixel_shuffle(maps.unflatten(1, (side, side)), base.config.downsample_ratio).flatten(1, 2)

        layouts, first = [], 0
        for features, x_KMV in zip(out.pooler_output.split(tiles), seen.split(tiles), strict=True):
            count = len(x_KMV)
            patches = PatchMap(
                start=first,
                stop=first + count,
                num_prefix=num_class_tokens(base),
                to_rows=shuffled_rows(shuffle, count),
            )
            first += count
            layouts.append(tiled_layout(features.flatten(0, 1), x_KMV, fn, patches))
        return layouts

    def tower_blocks(self, base, modality):
        return base.vision_tower.encoder.layer


@register_family("smolvlm", "idefics3")
class SmolVLM(Family):
    """An item is all that a sample shows: the processor does not say where one image's tiles end.

    The projector is linear, so every token is equally sensitive and ZOO-Prune selects by diversity alone.
    """

    projector_path = "connector"
    tower_path = "vision_model"

    def layouts(self, base, modality, out, inputs, seen):
        connector = base.connector
        x_KMV = connector.pixel_shuffle(seen, connector.scale_factor)
        per_tile = x_KMV.shape[1]
        tiles = [len(features) // per_tile for features in out.pooler_output]
        fn = in_dtype_of_input(connector.modality_projection)

        def shuffle(maps: Tensor) -> Tensor:
            return connector.pixel_shuffle(maps, connector.scale_factor)

        layouts, first = [], 0
        for features, x in zip(out.pooler_output, x_KMV.split(tiles), strict=True):
            patches = PatchMap(start=first, stop=first + len(x), num_prefix=0, to_rows=shuffled_rows(shuffle, len(x)))
            first += len(x)
            layouts.append(tiled_layout(features, x, fn, patches))
        return layouts
