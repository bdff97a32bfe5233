"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: any-resolution images, and videos pooled frame by frame."""

# Shape legend: n visual tokens of an item, N candidates, P patches (rows entering the projector), T frames,
#               C channels, V width of the vision tower

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokensieve.compression import Projector, in_dtype_of_input
from tokensieve.compression.tokens import identity
from tokensieve.pipeline.families.base import (
    Family,
    ItemLayout,
    num_class_tokens,
    register_family,
    square,
    two_layer_mlp,
)
from tokensieve.pipeline.tower_recorder import PatchMap


@register_family("llava_next")
class LlavaNext(Family):
    """Base view, then the high-resolution view with padding cut off and a learned newline after every row."""

    join_frames = False  # two rasters an image

    def pack(self, base, maps: list[Tensor], image_sizes: Tensor, newline: Tensor) -> list[Tensor]:
        """The model's own packing, run on `[tiles, P, C]` maps instead of features: one `[n, C]` an image."""
        return base.pack_image_features(
            maps,
            image_sizes,
            vision_feature_select_strategy=base.config.vision_feature_select_strategy,
            image_newline=newline,
        )[0]

    def layouts(self, base, modality, out, inputs, seen):
        module = base.multi_modal_projector
        sizes = inputs["image_sizes"]
        layouts, first = [], 0
        for i, features in enumerate(out.pooler_output):
            tiles = _num_tiles(base, inputs, i)
            x_KPV = seen[first : first + tiles]
            patches = PatchMap(start=first, stop=first + tiles, num_prefix=num_class_tokens(base), to_rows=identity)
            first += tiles
            size = sizes[i : i + 1]
            # One-hot maps of the tiles: packed like features they tell where each token came from.
            owner = torch.eye(tiles).repeat_interleave(x_KPV.shape[1], 0).view(tiles, -1, tiles)
            packed = self.pack(base, [owner], size, torch.full((tiles,), torch.nan))[0]
            structural = packed.isnan().any(-1).to(features.device)
            crop = packed[~structural.cpu()].argmax(-1).to(features.device)
            _, height, width = square(x_KPV.shape[1])
            num_high = int((~structural).sum()) - height * width
            rows = int(structural.sum())
            grids = ((1, height, width),) + (((1, rows, num_high // rows),) if tiles > 1 else ())

            def to_tokens(values: Tensor, tiles=tiles, size=size, structural=structural) -> Tensor:
                channels = values.shape[1:].numel()
                maps = values.float().reshape(tiles, -1, channels)
                newline = torch.zeros(channels, device=maps.device)
                return self.pack(base, [maps], size, newline)[0][~structural].view(-1, *values.shape[1:])

            layouts.append(
                ItemLayout(
                    features=features,
                    grids=grids,
                    structural=structural,
                    crop=crop,
                    patches=patches,
                    projector=Projector(
                        inputs=x_KPV.flatten(0, 1),
                        fn=in_dtype_of_input(module),
                        to_tokens=to_tokens,
                        mlp=two_layer_mlp(module),
                    ),
                )
            )
        return layouts


@register_family("llava_next_video")
class LlavaNextVideo(LlavaNext):
    """Images as LLaVA-NeXT; videos are pooled 2 x 2 before the projector and carry no newlines."""

    def layouts(self, base, modality, out, inputs, seen):
        if modality == "image":
            return super().layouts(base, modality, out, inputs, seen)
        module = base.multi_modal_projector
        num_videos, num_frames = inputs["pixel_values_videos"].shape[:2]
        _, height, width = square(seen.shape[1])
        x = seen.unflatten(0, (num_videos, num_frames)).flatten(1, 2)

        def to_rows(values: Tensor) -> Tensor:
            maps = values.float().unflatten(0, (num_frames, -1)).transpose(1, 2)
            side = round(maps.shape[-1] ** 0.5)
            stride = base.config.spatial_pool_stride
            pooled = nn.functional.avg_pool2d(maps.unflatten(2, (side, side)), stride)
            return pooled.flatten(2).transpose(1, 2).flatten(0, 1)

        return [
            ItemLayout(
                features=features,
                grids=((num_frames, height, width),),
                patches=_frames(base, i, num_frames, to_rows),
                projector=Projector(
                    inputs=x[i], fn=in_dtype_of_input(module), to_tokens=identity, mlp=two_layer_mlp(module)
                ),
            )
            for i, features in enumerate(out.pooler_output)
        ]


@register_family("llava_onevision")
class LlavaOnevision(LlavaNext):
    """Images as LLaVA-NeXT, shrunk when large; videos are pooled after the projector, one newline at the end."""

    def pack(self, base, maps, image_sizes, newline):
        return base.pack_image_features(
            maps, image_sizes, image_newline=newline, vision_aspect_ratio=base.config.vision_aspect_ratio
        )[0]

    def layouts(self, base, modality, out, inputs, seen):
        if modality == "image":
            return super().layouts(base, modality, out, inputs, seen)
        module = base.multi_modal_projector
        num_videos, num_frames, num_patches = *inputs["pixel_values_videos"].shape[:2], seen.shape[1]
        num_tokens = out.pooler_output.shape[1]
        _, height, width = square((num_tokens - 1) // num_frames)
        structural = torch.arange(num_tokens, device=seen.device) == num_tokens - 1
        x = seen.unflatten(0, (num_videos, num_frames)).flatten(1, 2)

        def to_tokens(values: Tensor) -> Tensor:
            maps = values.float().reshape(num_frames, num_patches, -1)
            return base.apply_pooling(maps).reshape(-1, *values.shape[1:])

        return [
            ItemLayout(
                features=features,
                grids=((num_frames, height, width),),
                structural=structural,
                patches=_frames(base, i, num_frames, identity),
                projector=Projector(
                    inputs=x[i], fn=in_dtype_of_input(module), to_tokens=to_tokens, mlp=two_layer_mlp(module)
                ),
            )
            for i, features in enumerate(out.pooler_output)
        ]


def _frames(base, video: int, num_frames: int, to_rows) -> PatchMap:
    start = video * num_frames
    return PatchMap(start=start, stop=start + num_frames, num_prefix=num_class_tokens(base), to_rows=to_rows)


def _num_tiles(base, inputs, i: int) -> int:
    """Tiles of image `i`, the base view included; in a sample with several images OneVision makes none."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    counts = inputs.get("batch_num_images")
    if counts is not None:
        counts = [int(c) for c in counts]
        if [c for c in counts for _ in range(c)][i] > 1:
            return 1
    return image_size_to_num_patches(
        image_size=inputs["image_sizes"][i],
        grid_pinpoints=base.config.image_grid_pinpoints,
        patch_size=base.config.vision_config.image_size,
    )
