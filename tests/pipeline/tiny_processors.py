"""The real transformers processor of every family, small enough for the tiny models and built without a download.

Tokenizers know the 256 bytes and the special tokens of the family, nothing else. Chat templates are short ones in
the family's published style.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch

from tests.pipeline.tiny_families import BOUNDARY, EOS, IMAGE, PAD, PINPOINTS, VIDEO, make_model
from tokensieve.pipeline.vlm import VLM

END = BOUNDARY + 1
FIRST_BYTE = 100
SIDE = 16  # pixels; the tiny towers cut it into 4 x 4 patches
FIXED = {"size": {"height": SIDE, "width": SIDE}}
CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
NATIVE = {"patch_size": 4, "size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}}
# Qwen3-VL's video size counts the pixels of all frames together.
NATIVE_VIDEO = {"patch_size": 4, "size": {"shortest_edge": 16 * 16, "longest_edge": 8 * 32 * 32}}


@dataclass(frozen=True)
class Recipe:
    """How to make a family's processor.

    `tokens` are the special tokens and their ids, `names` their names in the tokenizer's config.
    """

    build: Callable
    tokens: dict[str, int]
    template: str
    names: dict[str, str] = field(default_factory=dict)
    model: str = ""


_PARTS = (
    "{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{ part['text'] }}"
    "{%- else -%}{{ SHOW[part['type']] }}{%- endif -%}{%- endfor -%}"
)


def _template(show: dict[str, str], opening: str, closing: str, generation: str, start: str = "") -> str:
    """Messages as `opening` + parts + `closing`, with `SHOW` in place of pictures."""
    literal = "{" + ", ".join(f"{k!r}: {v!r}" for k, v in show.items()) + "}"
    body = "{%- for message in messages -%}" + opening + _PARTS + closing + "{%- endfor -%}"
    ending = "{%- if add_generation_prompt -%}" + generation + "{%- endif -%}"
    return "{%- set SHOW = " + literal + " -%}" + start + body + ending


def _chatml(show: dict[str, str]) -> str:
    return _template(
        show,
        "{{ '<|im_start|>' + message['role'] + '\n' }}",
        "{{ '<|im_end|>\n' }}",
        "{{ '<|im_start|>assistant\n' }}",
    )


def _vicuna(show: dict[str, str]) -> str:
    return _template(show, "{{ message['role'].upper() + ': ' }}", "{{ ' ' }}", "{{ 'ASSISTANT:' }}")


PLAIN = {"image": "<image>\n", "video": "<video>\n"}
PLAIN_TOKENS = {"<image>": IMAGE, "<video>": VIDEO, "</s>": EOS}
CHATML_TOKENS = {"<image>": IMAGE, "<video>": VIDEO, "<|im_start|>": 92, "<|im_end|>": EOS}


def _clip_tokens(**more):
    return {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, **more}


def _llava(tokenizer, template):
    from transformers import CLIPImageProcessor, LlavaProcessor

    return LlavaProcessor(CLIPImageProcessor(**CROPPED), tokenizer, chat_template=template, **_clip_tokens())


def _llava_next(tokenizer, template):
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    images = LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **CROPPED)
    return LlavaNextProcessor(images, tokenizer, chat_template=template, **_clip_tokens())


def _llava_next_video(tokenizer, template):
    from transformers import LlavaNextImageProcessor, LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

    return LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(**CROPPED),
        image_processor=LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **CROPPED),
        tokenizer=tokenizer,
        chat_template=template,
        **_clip_tokens(),
    )


def _llava_onevision(tokenizer, template):
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=PINPOINTS, **FIXED),
        video_processor=LlavaOnevisionVideoProcessor(**FIXED),
        tokenizer=tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_1",
        chat_template=template,
    )


def _video_llava(tokenizer, template):
    from transformers import VideoLlavaImageProcessor, VideoLlavaProcessor, VideoLlavaVideoProcessor

    return VideoLlavaProcessor(
        image_processor=VideoLlavaImageProcessor(**CROPPED),
        video_processor=VideoLlavaVideoProcessor(**CROPPED),
        tokenizer=tokenizer,
        chat_template=template,
        **_clip_tokens(),
    )


def _qwen(processor: str, video_processor: str, video_size: dict):
    def build(tokenizer, template):
        import transformers

        return getattr(transformers, processor)(
            image_processor=transformers.Qwen2VLImageProcessor(**NATIVE),
            tokenizer=tokenizer,
            video_processor=getattr(transformers, video_processor)(**video_size),
            chat_template=template,
        )

    return build


def _internvl(tokenizer, template):
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(max_patches=2, crop_to_patches=True, **FIXED),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(**FIXED),
        image_seq_length=4,
        chat_template=template,
    )


TILED = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}


def _smolvlm(tokenizer, template):
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    return SmolVLMProcessor(
        SmolVLMImageProcessor(**TILED),
        tokenizer,
        SmolVLMVideoProcessor(
            **TILED, video_sampling={"video_size": {"longest_edge": SIDE}, "max_frames": 8, "fps": 1}
        ),
        image_seq_len=4,
        chat_template=template,
    )


def _idefics3(tokenizer, template):
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    return Idefics3Processor(Idefics3ImageProcessor(**TILED), tokenizer, image_seq_len=4, chat_template=template)


def _gemma3(tokenizer, template):
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    return Gemma3Processor(Gemma3ImageProcessor(**FIXED), tokenizer, chat_template=template, image_seq_length=4)


def _paligemma(tokenizer, template):
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    images = SiglipImageProcessor(**FIXED)
    images.image_seq_length = 16
    return PaliGemmaProcessor(images, tokenizer, chat_template=template)


QWEN_SHOW = {m: f"<|vision_start|><|{m}_pad|><|vision_end|>" for m in ("image", "video")}
QWEN_TOKENS = {
    "<|vision_start|>": BOUNDARY,
    "<|vision_end|>": END,
    "<|im_start|>": 92,
    "<|im_end|>": EOS,
    "<|image_pad|>": IMAGE,
    "<|video_pad|>": VIDEO,
}
IDEFICS_TOKENS = {
    "<image>": IMAGE,
    "<video>": VIDEO,
    "<fake_token_around_image>": BOUNDARY,
    "<global-img>": END,
    "<|im_start|>": 92,
    "<end_of_utterance>": EOS,
    **{f"<row_{r}_col_{c}>": 80 + 2 * r + c for r in (1, 2) for c in (1, 2)},
}
IDEFICS_TEMPLATE = _template(
    {"image": "<image>", "video": "<video>"},
    "{{ message['role'].capitalize() + ': ' }}",
    "{{ '<end_of_utterance>\n' }}",
    "{{ 'Assistant:' }}",
    start="{{ '<|im_start|>' }}",
)

RECIPES: dict[str, Recipe] = {
    "llava": Recipe(_llava, PLAIN_TOKENS, _vicuna(PLAIN)),
    "llava_next": Recipe(_llava_next, PLAIN_TOKENS, _vicuna(PLAIN)),
    "llava_next_video": Recipe(_llava_next_video, PLAIN_TOKENS, _vicuna(PLAIN)),
    "llava_onevision": Recipe(_llava_onevision, CHATML_TOKENS, _chatml(PLAIN), model="llava_onevision-video"),
    "video_llava": Recipe(_video_llava, PLAIN_TOKENS, _vicuna(PLAIN)),
    "qwen2_vl": Recipe(_qwen("Qwen2VLProcessor", "Qwen2VLVideoProcessor", NATIVE), QWEN_TOKENS, _chatml(QWEN_SHOW)),
    "qwen2_5_vl": Recipe(
        _qwen("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", NATIVE), QWEN_TOKENS, _chatml(QWEN_SHOW)
    ),
    "qwen3_vl": Recipe(
        _qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor", NATIVE_VIDEO), QWEN_TOKENS, _chatml(QWEN_SHOW)
    ),
    "internvl": Recipe(
        _internvl,
        {"<img>": BOUNDARY, "</img>": END, "<|im_start|>": 92, "<|im_end|>": EOS}
        | {"<IMG_CONTEXT>": IMAGE, "<video>": VIDEO},
        _chatml({"image": "<IMG_CONTEXT>\n", "video": "<video>\n"}),
        names={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "smolvlm": Recipe(_smolvlm, IDEFICS_TOKENS, IDEFICS_TEMPLATE),
    "idefics3": Recipe(_idefics3, IDEFICS_TOKENS, IDEFICS_TEMPLATE),
    "gemma3": Recipe(
        _gemma3,
        {"<start_of_image>": BOUNDARY, "<end_of_image>": END, "<image_soft_token>": IMAGE}
        | {"<start_of_turn>": 92, "<end_of_turn>": EOS},
        _template(
            {"image": "<start_of_image>"},
            "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}",
            "{{ '<end_of_turn>\n' }}",
            "{{ '<start_of_turn>model\n' }}",
        ),
        names={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    ),
    "paligemma": Recipe(
        _paligemma, {"<image>": IMAGE, "<eos>": EOS}, "", names={"image_token": "<image>"}
    ),  # published without a chat template
}
# Families whose processor has a path of its own for videos.
VIDEO_FAMILIES = [
    "llava_next_video",
    "llava_onevision",
    "video_llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "smolvlm",
]


def make_tokenizer(name: str):
    """Bytes at 100 .. 355, the family's special tokens at the ids the tiny models know, fillers between."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    recipe = RECIPES[name]
    special = {"<pad>": PAD, "<bos>": 1} | recipe.tokens
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = special | {byte: FIRST_BYTE + i for i, byte in enumerate(alphabet)}
    taken = set(vocabulary.values())
    assert len(taken) == len(vocabulary), "two tokens share an id"
    vocabulary |= {f"<unused{i}>": i for i in range(FIRST_BYTE) if i not in taken}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([t for t in vocabulary if vocabulary[t] < FIRST_BYTE])
    eos = next(t for t, i in special.items() if i == EOS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token=eos,
        extra_special_tokens=recipe.names,
    )


def make_processor(name: str):
    recipe = RECIPES[name]
    return recipe.build(make_tokenizer(name), recipe.template or None)


def make_vlm(name: str) -> VLM:
    """The tiny model of the family with a vocabulary as large as its tokenizer's, and its processor."""
    processor = make_processor(name)
    model = make_model(RECIPES[name].model or name)
    torch.manual_seed(1)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    return VLM(model, processor, name=f"tiny-{name}")


def noise(frames: int, height: int = 20, width: int = 28, seed: int = 0) -> np.ndarray:
    """`[frames, height, width, 3]` uint8: noise that moves one pixel a frame."""
    field = np.random.default_rng(seed).integers(0, 256, (height, width + frames, 3), dtype=np.uint8)
    return np.stack([field[:, t : t + width] for t in range(frames)])


def letters_only(vlm: VLM) -> list[int]:
    """Ids to suppress so that an answer is lower-case letters: it survives decoding and encoding unchanged."""
    allowed = set(vlm.processor.tokenizer.convert_tokens_to_ids([chr(c) for c in range(ord("a"), ord("z") + 1)]))
    return [i for i in range(len(vlm.processor.tokenizer)) if i not in allowed]


@cache
def shared_vlm(name: str) -> VLM:
    """`make_vlm` once per process; for tests that change nothing but the compression."""
    return make_vlm(name)
