"""LLaVA, and the families that, like it, give one square raster an image: PaliGemma, Gemma 3, Video-LLaVA."""

# Shape legend: n visual tokens of an item, P rows entering the projector, V width of the vision tower, T frames

from __future__ import annotations

import torch

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


@register_family("llava")
class Llava(Family):
    def num_prefix(self, base) -> int:
        return num_class_tokens(base)

    def layouts(self, base, modality, out, inputs, seen):
        module = base.multi_modal_projector
        return [
            ItemLayout(
                features=features,
                grids=(square(len(features)),),
                projector=Projector(
                    inputs=x_PV, fn=in_dtype_of_input(module), to_tokens=identity, mlp=two_layer_mlp(module)
                ),
                patches=PatchMap(start=i, stop=i + 1, num_prefix=self.num_prefix(base), to_rows=identity),
            )
            for i, (features, x_PV) in enumerate(zip(out.pooler_output, seen, strict=True))
        ]


@register_family("paligemma")
class PaliGemma(Llava):
    forward_position_offset = 1  # positions start at 1; `generate` adds that one by itself
    causal_prompt = causal_visual = False


@register_family("gemma3")
class Gemma3(Family):
    """The projector averages square blocks of patches before it projects, so its rows are the averages."""

    causal_visual = False

    def layouts(self, base, modality, out, inputs, seen):
        module = base.multi_modal_projector
        side = module.patches_per_image
        pooled = module.avg_pool(seen.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)

        norm = in_dtype_of_input(module.mm_soft_emb_norm)

        def to_rows(values):
            return module.avg_pool(values.T.unflatten(1, (side, side))).flatten(1).T

        def project(x):
            return norm(x) @ module.mm_input_projection_weight.to(x.dtype)

        return [
            ItemLayout(
                features=features,
                grids=(square(len(features)),),
                projector=Projector(inputs=x_PV, fn=project, to_tokens=identity),
                patches=PatchMap(start=i, stop=i + 1, num_prefix=0, to_rows=to_rows),
            )
            for i, (features, x_PV) in enumerate(zip(out.pooler_output, pooled, strict=True))
        ]


@register_family("video_llava")
class VideoLlava(Llava):
    """Videos arrive as one item a frame, class token in front: joined to one item, class tokens always kept."""

    def tower(self, base, modality):
        return base.video_tower if modality == "video" else base.image_tower

    def layouts(self, base, modality, out, inputs, seen):
        if modality == "image":
            return super().layouts(base, modality, out, inputs, seen)
        num_videos, num_frames = inputs["pixel_values_videos"].shape[:2]
        module = base.multi_modal_projector
        per_frame = out.pooler_output.shape[1]
        structural = (torch.arange(num_frames * per_frame) % per_frame == 0).to(seen.device)
        _, height, width = square(per_frame - 1)
        frames = out.pooler_output.unflatten(0, (num_videos, num_frames))
        x = seen.unflatten(0, (num_videos, num_frames))
        return [
            ItemLayout(
                features=frames[i].flatten(0, 1),
                grids=((num_frames, height, width),),
                structural=structural,
                projector=Projector(
                    inputs=x[i, :, 1:].flatten(0, 1),
                    fn=in_dtype_of_input(module),
                    to_tokens=identity,
                    mlp=two_layer_mlp(module),
                ),
                patches=PatchMap(start=i * num_frames, stop=(i + 1) * num_frames, num_prefix=1, to_rows=identity),
            )
            for i in range(num_videos)
        ]
