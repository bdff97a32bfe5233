"""LLaVA, and the families that, like it, give one square raster an image: PaliGemma, Gemma 3, Video-LLaVA."""

# Shape legend: n visual tokens of an item, P rows entering the projector, V width of the vision tower, T frames

from __future__ import annotations

import torch

from tokensieve.compression import Projector, in_dtype_of_input
from tokensieve.pipeline.families.base import (
    Family,
    ItemLayout,
    identity,
    register_family,
    square,
    two_layer_mlp,
)


@register_family("llava")
class Llava(Family):
    def layouts(self, base, modality, out, inputs, seen):
        module = base.multi_modal_projector
        return [
            ItemLayout(
                features=features,
                grids=(square(len(features)),),
                projector=Projector(
                    inputs=x_PV, fn=in_dtype_of_input(module), to_tokens=identity, mlp=two_layer_mlp(module)
                ),
            )
            for features, x_PV in zip(out.pooler_output, seen, strict=True)
        ]


@register_family("paligemma")
class PaliGemma(Llava):
    forward_position_offset = 1  # positions start at 1; `generate` adds that one by itself
    causal_prompt = False


@register_family("gemma3")
class Gemma3(Family):
    """The projector averages square blocks of patches before it projects, so its rows are the averages."""

    def layouts(self, base, modality, out, inputs, seen):
        module = base.multi_modal_projector
        side = module.patches_per_image
        pooled = module.avg_pool(seen.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)

        norm = in_dtype_of_input(module.mm_soft_emb_norm)

        def project(x):
            return norm(x) @ module.mm_input_projection_weight.to(x.dtype)

        return [
            ItemLayout(
                features=features,
                grids=(square(len(features)),),
                projector=Projector(inputs=x_PV, fn=project, to_tokens=identity),
            )
            for features, x_PV in zip(out.pooler_output, pooled, strict=True)
        ]


@register_family("video_llava")
class VideoLlava(Llava):
    """Videos arrive as one item a frame, class token in front: joined to one item, class tokens always kept."""

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
            )
            for i in range(num_videos)
        ]
