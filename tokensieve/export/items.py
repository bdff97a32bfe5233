"""One image or video per family: its pixels, its tokens and what stands for it in the prompt."""

# Shape legend: T frames, N candidate tokens, L prompt length

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tokensieve.datasets.frames import Frames
from tokensieve.errors import TokensieveError, UnsupportedModel
from tokensieve.export import images, packing
from tokensieve.export.folder import AGAIN
from tokensieve.export.packing import Packing
from tokensieve.export.prompts import SMOLVLM_VIDEO_TEMPLATE, Words, clip_text, tiles_text
from tokensieve.pipeline.prompt import TICKS_PER_S


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """What the vision graph and the prompt need of one clip.

    Attributes:
        pixels: pixel inputs of the vision graph.
        packing: its tokens; some of the graph's inputs come with them.
        as_video: whether the chat template shows a video, or as many images as there are frames.
        texts: what replaces the placeholders in the rendered prompt, one by one.
        word: the token that those texts repeat, one for each token of the item.
        interval: positions between two token frames where positions have three axes, else None.
        template: a chat template that overrides the checkpoint's own.
    """

    pixels: dict[str, np.ndarray]
    packing: Packing
    as_video: bool
    texts: Sequence[str]
    word: str
    interval: float | None = None
    template: str | None = None


def make_item(family: str, clip: Frames, processor: Mapping, model: Mapping, words: Words) -> Item:
    """Prepares one clip: an image if it has one frame, else a video.

    Args:
        family: `config.model_type`.
        clip: what to show.
        processor: `processor_config.json`.
        model: `Manifest.model`.
        words: the tokens that stand for pictures.

    Raises:
        UnsupportedModel: the family is not known here, or a setting that it needs is missing.
        BadOption: the model cannot take a picture of this shape.
    """
    check_family(family)
    try:
        return _FAMILIES[family](clip, processor, model, words)
    except TokensieveError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:  # settings are JSON from anywhere
        raise UnsupportedModel(
            f"The exported folder lacks a setting of {family}, or one makes no sense ({type(error).__name__}).",
            hint=AGAIN,
        ) from error


def check_family(family: str) -> None:
    """Raises UnsupportedModel unless models of this family can be run."""
    if family not in _FAMILIES:
        raise UnsupportedModel(f"Exported models are of {', '.join(sorted(_FAMILIES))}, got {family!r}.", hint=AGAIN)


def _llava(clip: Frames, processor: Mapping, model: Mapping, words: Words) -> Item:
    side = _side(model)
    return Item(
        pixels={"pixel_values": images.plain_pixels(clip.data, processor["image_processor"])},
        packing=packing.pack_frames(clip.num_frames, side),
        as_video=False,
        texts=[words.image * side**2] * clip.num_frames,
        word=words.image,
    )


def _llava_onevision(clip: Frames, processor: Mapping, model: Mapping, words: Words) -> Item:
    side = _side(model)
    if clip.num_frames > 1:
        pixels = images.plain_pixels(clip.data, processor["video_processor"])
        packed, word = packing.pack_pooled_video(clip.num_frames, side), words.video
    else:
        pixels = images.anyres_pixels(clip.data[0], processor["image_processor"])
        packed = packing.pack_anyres(
            (clip.height, clip.width),
            model["image_grid_pinpoints"],
            tile=pixels.shape[-1],
            side=side,
            most=int(str(model["vision_aspect_ratio"]).removeprefix("anyres_max_")),
        )
        word = words.image
    return Item(
        pixels={"pixel_values": pixels},
        packing=packed,
        as_video=clip.num_frames > 1,
        texts=[word * len(packed.slots)],
        word=word,
    )


def _smolvlm(clip: Frames, processor: Mapping, model: Mapping, words: Words) -> Item:
    side = _side(model)
    if clip.num_frames > 1:
        return Item(
            pixels={"pixel_values": images.squared_pixels(clip.data, processor["video_processor"])},
            packing=packing.pack_frames(clip.num_frames, side),
            as_video=True,
            texts=[clip_text(words, clip, side**2)],
            word=words.image,
            template=SMOLVLM_VIDEO_TEMPLATE,
        )
    pixels, rows, columns = images.split_pixels(clip.data[0], processor["image_processor"])
    return Item(
        pixels={"pixel_values": pixels},
        packing=packing.pack_tiles(len(pixels), side),
        as_video=False,
        texts=[tiles_text(words, rows, columns, side**2)],
        word=words.image,
    )


def _qwen2_5_vl(clip: Frames, processor: Mapping, model: Mapping, words: Words) -> Item:
    is_video = clip.num_frames > 1
    config = processor["video_processor" if is_video else "image_processor"]
    pixels, grid = images.patch_pixels(clip.data, config)
    packed = packing.pack_patches(grid, merge=model["merge"], window=model["window"], patch=model["patch"])
    word = words.video if is_video else words.image
    interval = 1.0
    if is_video:
        seconds = np.float32(config["temporal_patch_size"] / _frames_per_s(clip))
        interval = float(np.float32(model["tokens_per_second"]) * seconds)
    return Item(
        pixels={"pixel_values": pixels},
        packing=packed,
        as_video=is_video,
        texts=[word * packed.num_tokens],
        word=word,
        interval=interval,
    )


_FAMILIES: dict[str, Callable[[Frames, Mapping, Mapping, Words], Item]] = {
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": _qwen2_5_vl,
    "smolvlm": _smolvlm,
}


def _side(model: Mapping) -> int:
    return math.isqrt(model["patches_per_tile"])


def _frames_per_s(clip: Frames) -> float:
    """As the processor finds it, from frame numbers on a clock of microseconds."""
    spacing_s = float(np.diff(clip.times_s).mean())
    ticks = max(1, round(spacing_s * clip.num_frames * TICKS_PER_S))
    return clip.num_frames / ticks * TICKS_PER_S
