"""Tiny random models of every supported family, with inputs as their processors would make them.

Attention weights are enlarged so that attention is sharp and a wrong position shows in the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

IMAGE, VIDEO, PAD, EOS, BOUNDARY = 95, 94, 0, 93, 90
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=EOS,
)
VIT = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=16
)


@dataclass(frozen=True)
class TinyFamily:
    """`build()` makes the model; `sample(generator, i)` the ids and pixels of prompt `i`."""

    build: Callable[[], torch.nn.Module]
    sample: Callable[[torch.Generator, int], dict]


FAMILIES: dict[str, TinyFamily] = {}


def _family(name: str, sample):
    def register(build):
        FAMILIES[name] = TinyFamily(build, sample)
        return build

    return register


def make_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[name].build().eval()
    for parameter_name, parameter in model.named_parameters():
        if (
            "vision" not in parameter_name
            and "visual" not in parameter_name
            and any(f"{p}_proj.weight" in parameter_name for p in "qkvo")
        ):
            parameter.data *= 12
    model.generation_config.pad_token_id = PAD
    return model


def make_inputs(name: str, batch: int) -> dict[str, torch.Tensor]:
    """A batch of prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(7)
    samples = [FAMILIES[name].sample(generator, i) for i in range(batch)]
    longest = max(len(s["input_ids"]) for s in samples)
    inputs = {}
    for key in samples[0]:
        if key in ("input_ids", "mm_token_type_ids", "token_type_ids"):
            rows = [s[key] for s in samples]
            inputs[key] = torch.tensor([[PAD] * (longest - len(r)) + r for r in rows])
        else:
            inputs[key] = torch.cat([s[key] for s in samples])
    lengths = torch.tensor([[len(s["input_ids"])] for s in samples])
    inputs["attention_mask"] = (torch.arange(longest)[None] >= longest - lengths).long()
    return inputs


def _text(generator, count: int) -> list[int]:
    return torch.randint(2, 80, (count,), generator=generator).tolist()


def _prompt(generator, i: int, blocks: list[list[int]]) -> list[int]:
    """Text, then every visual block followed by text; prompt `i` is longer by `i` tokens."""
    ids = _text(generator, 3 + i)
    for block in blocks:
        ids += block + _text(generator, 3)
    return ids + _text(generator, 2)


def _pixels(generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def _image_sample(tokens: int, shape: tuple[int, ...], count: int = 1, key: str = "pixel_values"):
    def sample(generator, i):
        ids = _prompt(generator, i, [[IMAGE] * tokens] * count)
        return {"input_ids": ids, key: _pixels(generator, count, *shape)}

    return sample


def _typed(sample, key: str, visual: dict[int, int], suffix: int | None = None):
    """Adds token types: `visual` maps placeholder ids to types, text is 0 (the last `suffix` tokens 1)."""

    def typed(generator, i):
        inputs = sample(generator, i)
        types = [visual.get(t, 0) for t in inputs["input_ids"]]
        if suffix:
            types[-suffix:] = [1] * suffix
        return inputs | {key: types}

    return typed


def _clip():
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(**VIT)


def _siglip(**changes):
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**(VIT | changes), vision_use_head=False)


def _llama():
    from transformers import LlamaConfig

    return LlamaConfig(**TEXT)


def _qwen2():
    from transformers import Qwen2Config

    return Qwen2Config(**TEXT)


@_family("llava", _image_sample(16, (3, 16, 16), count=2))
def _llava():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=_clip(), text_config=_llama(), image_token_index=IMAGE)
    )


PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48], [48, 16]]
# Original sizes whose tiling cuts padding off: (height, width) -> tiles, rows and columns of the high-resolution view
_SIZES = [(20, 30), (60, 21)]


def _anyres_sample(generator, i, shrink_to: int | None = None):
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
        image_size_to_num_patches,
        unpad_image,
    )

    size = torch.tensor([_SIZES[i % 2]])
    tiles = image_size_to_num_patches(size[0], PINPOINTS, 16)
    rows, columns = get_anyres_image_grid_shape(size[0], PINPOINTS, 16)
    high = unpad_image(torch.zeros(1, rows * 4, columns * 4), size[0])[0]
    height, width = high.shape
    if shrink_to and (ratio := (height * width / (shrink_to * 16)) ** 0.5) > 1.1:
        height, width = int(height // ratio), int(width // ratio)
    tokens = 16 + height * (width + 1)
    pixels = torch.zeros(1, 5, 3, 16, 16)
    pixels[0, :tiles] = _pixels(generator, tiles, 3, 16, 16)
    return {"input_ids": _prompt(generator, i, [[IMAGE] * tokens]), "pixel_values": pixels, "image_sizes": size}


@_family("llava_next", _anyres_sample)
def _llava_next():
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=_clip(), text_config=_llama(), image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextForConditionalGeneration(config)


def _video_sample(tokens: int, frames: int, side: int = 16, **extra):
    def sample(generator, i):
        ids = _prompt(generator, i, [[VIDEO] * tokens])
        return {"input_ids": ids, "pixel_values_videos": _pixels(generator, 1, frames, 3, side, side)}

    return sample


@_family("llava_next_video", _video_sample(3 * 4, 3))
def _llava_next_video():
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig(
        vision_config=_clip(),
        text_config=_llama(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        spatial_pool_stride=2,
    )
    return LlavaNextVideoForConditionalGeneration(config)


@_family("llava_onevision-image", partial(_anyres_sample, shrink_to=1))
@_family("llava_onevision-video", _video_sample(4 * 4 + 1, 4))
def _llava_onevision():
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=_qwen2(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_1",  # small enough that the high-resolution view is shrunk
    )
    return LlavaOnevisionForConditionalGeneration(config)


@_family("video_llava", _video_sample(2 * 17, 2))
def _video_llava():
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    config = VideoLlavaConfig(
        vision_config=_clip(), text_config=_llama(), image_token_index=IMAGE, video_token_index=VIDEO
    )
    return VideoLlavaForConditionalGeneration(config)


_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def _qwen_sample(modality: str, grid: tuple[int, int, int], patch: int, one_block_per_frame: bool = False):
    time, height, width = grid
    per_frame = height * width // 4
    token = IMAGE if modality == "image" else VIDEO

    def sample(generator, i):
        grid_i = torch.tensor([[time, height, width + 2 * i]])
        frame_tokens = per_frame + i * height // 2
        blocks = [[token] * frame_tokens] * time if one_block_per_frame else [[token] * frame_tokens * time]
        pixels = _pixels(generator, int(grid_i.prod()), 3 * 2 * patch * patch)
        suffix = "_videos" if modality == "video" else ""
        inputs = {
            "input_ids": _prompt(generator, i, blocks),
            f"pixel_values{suffix}": pixels,
            f"{modality}_grid_thw": grid_i,
        }
        if modality == "video" and not one_block_per_frame:
            inputs["second_per_grid_ts"] = torch.tensor([0.5 + i])
        return inputs

    return _typed(sample, "mm_token_type_ids", {IMAGE: 1, VIDEO: 2})


_QWEN_IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=BOUNDARY, vision_end_token_id=91)
_QWEN_VISION = dict(hidden_size=24, out_hidden_size=32, intermediate_size=32, depth=2, num_heads=2, patch_size=4)
_QWEN_TEXT = {k: v for k, v in TEXT.items() if k not in ("bos_token_id",)} | {"rope_parameters": _MROPE}


@_family("qwen2_vl", _qwen_sample("image", (1, 8, 6), 4))
def _qwen2_vl():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = dict(embed_dim=24, hidden_size=32, depth=2, num_heads=2, mlp_ratio=2, patch_size=4)
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=_QWEN_TEXT, vision_config=vision, **_QWEN_IDS))


@_family("qwen2_5_vl", _qwen_sample("video", (2, 8, 12), 4))
def _qwen2_5_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = dict(
        **_QWEN_VISION,
        window_size=32,
        fullatt_block_indexes=[1],
        tokens_per_second=2,
    )
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=_QWEN_TEXT, vision_config=vision, **_QWEN_IDS)
    )


@_family("qwen3_vl", _qwen_sample("video", (3, 8, 4), 4, one_block_per_frame=True))
def _qwen3_vl():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = dict(
        **_QWEN_VISION,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    )
    text = _QWEN_TEXT | {"head_dim": 8}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN_IDS))


def _internvl_sample(generator, i):
    tiles = [2, 2] if i == 0 else [2]
    ids = _prompt(generator, i, [[IMAGE] * 4 * k for k in tiles])
    return {"input_ids": ids, "pixel_values": _pixels(generator, sum(tiles), 3, 16, 16)}


@_family("internvl", _internvl_sample)
def _internvl():
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

    vision = InternVLVisionConfig(**(VIT | {"image_size": [16, 16], "patch_size": [4, 4]}))
    config = InternVLConfig(vision_config=vision, text_config=_qwen2(), image_token_id=IMAGE, downsample_ratio=0.5)
    return InternVLForConditionalGeneration(config)


def _smolvlm_sample(generator, i):
    tiles = 3 - i
    blocks = [[IMAGE] * 4 for _ in range(tiles)]
    pixels = torch.zeros(1, 3, 3, 16, 16)  # missing tiles are all zero
    pixels[0, :tiles] = _pixels(generator, tiles, 3, 16, 16)
    return {"input_ids": _prompt(generator, i, blocks), "pixel_values": pixels}


@_family("smolvlm", _smolvlm_sample)
def _smolvlm():
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

    vision = SmolVLMVisionConfig(**VIT)
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            vision_config=vision, text_config=_llama(), image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
        )
    )


@_family("idefics3", _smolvlm_sample)
def _idefics3():
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

    vision = Idefics3VisionConfig(**VIT)
    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config=vision, text_config=_llama(), image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
        )
    )


@_family("gemma3", _typed(_image_sample(4, (3, 16, 16), count=2), "token_type_ids", {IMAGE: 1}))
def _gemma3():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    text = Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=512, query_pre_attn_scalar=8)
    config = Gemma3Config(
        text_config=text,
        vision_config=_siglip(),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=BOUNDARY,
        eoi_token_index=91,
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.5)
    return model


@_family("paligemma", _typed(_image_sample(16, (3, 16, 16)), "token_type_ids", {}))
def _paligemma():
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        vision_config=_siglip(projection_dim=32),
        text_config=GemmaConfig(**TEXT, head_dim=8),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    return PaliGemmaForConditionalGeneration(config)
