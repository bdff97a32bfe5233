"""Frames to pixels as each family's processor makes them, with numpy and PIL alone.

The settings are those that `save_pretrained` wrote into `processor_config.json`; the steps are those of the
processors that run with torch. Without resampling the results are equal; each resampling may differ by a grey level,
or two with Lanczos, because PIL rounds otherwise than torchvision.
"""

# Shape legend: T frames or tiles, H W height and width, P patches, V numbers a patch

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export.packing import best_resolution

MAX_PIXELS = 1 << 26  # of one resized frame: far above what any processor asks for, far below what memory holds
_SMOLVLM_LONGEST = 4096


def plain_pixels(frames_THW3: np.ndarray, config: Mapping) -> np.ndarray:
    """Every frame resized and cropped alike, `[T, 3, h, w]` float32: LLaVA, and videos of LLaVA-OneVision.

    Args:
        frames_THW3: uint8.
        config: of the image or video processor.

    Raises:
        UnsupportedModel: the settings are not those of such a processor.
    """
    if config.get("do_pad"):
        raise UnsupportedModel("This processor pads pictures to a square, which the runtime cannot do.")
    frames = list(frames_THW3)
    if config.get("do_resize"):
        size = _setting(config, "size")
        frames = [_resize(frame, _target(frame, size), config) for frame in frames]
    if config.get("do_center_crop"):
        crop = _setting(config, "crop_size")
        frames = [_center_crop(frame, _whole(crop, "height"), _whole(crop, "width")) for frame in frames]
    return normalise(np.stack(frames), config)


def anyres_pixels(frame_HW3: np.ndarray, config: Mapping) -> np.ndarray:
    """The whole image, then its tiles, `[T, 3, h, w]` float32: images of LLaVA-OneVision.

    Raises:
        UnsupportedModel: the settings are not those of such a processor.
    """
    size = _setting(config, "size")
    tile = _whole(size, "height")
    whole = (tile, _whole(size, "width"))
    height, width = frame_HW3.shape[:2]
    tall, wide = best_resolution((height, width), _setting(config, "image_grid_pinpoints"))
    if wide / width < tall / height:
        inner = min(math.ceil(height * (wide / width)), tall), wide
    else:
        inner = tall, min(math.ceil(width * (tall / height)), wide)
    resized = _resize(frame_HW3, inner, config)
    top, left = (tall - inner[0]) // 2, (wide - inner[1]) // 2
    canvas = np.zeros((tall, wide, 3), dtype=np.uint8)
    canvas[top : top + inner[0], left : left + inner[1]] = resized
    tiles = [
        _resize(canvas[y : y + tile, x : x + tile], whole, config)
        for y in range(0, tall, tile)
        for x in range(0, wide, tile)
    ]
    return normalise(np.stack([_resize(frame_HW3, whole, config), *tiles]), config)


def split_pixels(frame_HW3: np.ndarray, config: Mapping) -> tuple[np.ndarray, int, int]:
    """Tiles of an image and then the whole of it, `[T, 3, h, w]` float32, with rows and columns: images of SmolVLM.

    Rows and columns are 0 where the image is not split.

    Raises:
        UnsupportedModel: the settings are not those of such a processor.
    """
    frame = _resize_longest(frame_HW3, config) if config.get("do_resize") else frame_HW3
    tile = _whole(_setting(config, "max_image_size"), "longest_edge")
    if not config.get("do_image_splitting"):
        return normalise(_resize(frame, (tile, tile), config)[None], config), 0, 0
    height, width = frame.shape[:2]
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * ratio) / tile) * tile
    frame = _resize(frame, (height, width), config)
    rows, columns = height // tile, width // tile
    if rows == columns == 1:
        return normalise(frame[None], config), 0, 0
    tiles = frame.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    return normalise(np.concatenate([tiles, _resize(frame, (tile, tile), config)[None]]), config), rows, columns


def squared_pixels(frames_THW3: np.ndarray, config: Mapping) -> np.ndarray:
    """Every frame made a square, `[T, 3, h, w]` float32: videos of SmolVLM.

    Raises:
        UnsupportedModel: the settings are not those of such a processor.
    """
    frames = list(frames_THW3)
    if config.get("do_resize"):
        tile = _whole(_setting(config, "max_image_size"), "longest_edge")
        frames = [_resize(_resize_longest(frame, config), (tile, tile), config) for frame in frames]
    return normalise(np.stack(frames), config)


def patch_pixels(frames_THW3: np.ndarray, config: Mapping) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Patches in groups of a token, `[P, V]` float32, and their grid: images and videos of Qwen2.5-VL.

    The last frame is repeated until the frames fill whole temporal patches.

    Raises:
        BadOption: an image more than 200 times as long as wide.
        UnsupportedModel: the settings are not those of such a processor.
    """
    patch, merge, depth = (_whole(config, name) for name in ("patch_size", "merge_size", "temporal_patch_size"))
    frames = list(frames_THW3)
    if config.get("do_resize"):
        target = smart_size(*frames[0].shape[:2], len(frames), config)
        frames = [_resize(frame, target, config) for frame in frames]
    frames += [frames[-1]] * (-len(frames) % depth)
    x = normalise(np.stack(frames), config)
    times, rows, columns = len(frames) // depth, x.shape[2] // patch, x.shape[3] // patch
    x = x.reshape(times, depth, 3, rows // merge, merge, patch, columns // merge, merge, patch)
    patches_PV = x.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(times * rows * columns, -1)
    return np.ascontiguousarray(patches_PV), (times, rows, columns)


def smart_size(height: int, width: int, num_frames: int, config: Mapping) -> tuple[int, int]:
    """Height and width that Qwen2.5-VL resizes to: whole tokens, pixels within bounds, shape nearly kept.

    Raises:
        BadOption: more than 200 times as long as wide.
        UnsupportedModel: the settings are not those of such a processor.
    """
    if max(height, width) > 200 * min(height, width):
        raise BadOption(f"This model takes no picture more than 200 times as long as wide, got {height} x {width}.")
    size = _setting(config, "size")
    fewest, most = _whole(size, "shortest_edge"), _whole(size, "longest_edge")
    factor = _whole(config, "patch_size") * _whole(config, "merge_size")
    if config.get("cap_pixels_per_frame"):
        all_frames = int(_whole(config, "max_video_tokens") * factor * factor * 0.9)
        most = max(min(most, all_frames * _whole(config, "temporal_patch_size") // num_frames), int(fewest * 1.05))
    to_height, to_width = round(height / factor) * factor, round(width / factor) * factor
    if to_height * to_width > most:
        beta = math.sqrt((height * width) / most)
        to_height = max(factor, math.floor(height / beta / factor) * factor)
        to_width = max(factor, math.floor(width / beta / factor) * factor)
    elif to_height * to_width < fewest:
        beta = math.sqrt(fewest / (height * width))
        to_height = math.ceil(height * beta / factor) * factor
        to_width = math.ceil(width * beta / factor) * factor
    return to_height, to_width


def normalise(frames_THW3: np.ndarray, config: Mapping) -> np.ndarray:
    """uint8 `[T, H, W, 3]` to float32 `[T, 3, H, W]`, rescaled and normalised in one step as torch's processors do."""
    x = frames_THW3.transpose(0, 3, 1, 2).astype(np.float32)
    scale = float(config.get("rescale_factor") or 1 / 255)
    if config.get("do_normalize"):
        factor = 1 / scale if config.get("do_rescale") else 1.0
        mean, std = (
            (np.asarray(_setting(config, name), dtype=np.float32) * np.float32(factor)).reshape(-1, 1, 1)
            for name in ("image_mean", "image_std")
        )
        return (x - mean) / std
    return x * np.float32(scale) if config.get("do_rescale") else x


def _target(frame_HW3: np.ndarray, size: Mapping) -> tuple[int, int]:
    """Height and width from a size of the kind {"height", "width"} or {"shortest_edge"}."""
    if size.get("height") and size.get("width"):
        return _whole(size, "height"), _whole(size, "width")
    short = _whole(size, "shortest_edge")
    if size.get("longest_edge"):
        raise UnsupportedModel("This processor bounds both edges of a picture, which the runtime cannot do.")
    height, width = frame_HW3.shape[:2]
    if width <= height:
        return int(short * height / width), short
    return short, int(short * width / height)


def _resize_longest(frame_HW3: np.ndarray, config: Mapping) -> np.ndarray:
    """The longest edge brought to what the processor wants, the other one kept even."""
    size = _setting(config, "size")
    if not size.get("longest_edge"):
        return _resize(frame_HW3, (_whole(size, "height"), _whole(size, "width")), config)
    longest = min(_whole(size, "longest_edge"), _SMOLVLM_LONGEST)
    height, width = frame_HW3.shape[:2]
    ratio = width / height
    if width >= height:
        other = int(longest / ratio)
        target = max(other + other % 2, 1), longest
    else:
        other = int(longest * ratio)
        target = longest, max(other + other % 2, 1)
    return _resize(frame_HW3, target, config)


def _resize(frame_HW3: np.ndarray, target: tuple[int, int], config: Mapping) -> np.ndarray:
    if frame_HW3.shape[:2] == target:
        return frame_HW3
    if not 0 < target[0] * target[1] <= MAX_PIXELS:
        raise UnsupportedModel(
            f"The processor's settings ask for a picture of {target[0]} x {target[1]} pixels.",
            hint="Check processor_config.json, or give a picture of a more usual shape.",
        )
    resample = config.get("resample")
    if resample not in list(Image.Resampling):
        raise UnsupportedModel(f"The processor's setting 'resample' must be a number of PIL, got {resample!r}.")
    image = Image.fromarray(np.ascontiguousarray(frame_HW3))
    # Along the width first, as torchvision does; Pillow starts with either axis and rounds and clips in between.
    for width, height in ((target[1], frame_HW3.shape[0]), (target[1], target[0])):
        image = image.resize((width, height), Image.Resampling(resample))
    return np.asarray(image)


def _center_crop(frame_HW3: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of a frame, filled up with black where it is too small."""
    tall, wide = max(height - frame_HW3.shape[0], 0), max(width - frame_HW3.shape[1], 0)
    frame = np.pad(frame_HW3, ((tall // 2, (tall + 1) // 2), (wide // 2, (wide + 1) // 2), (0, 0)))
    top, left = int((frame.shape[0] - height) / 2), int((frame.shape[1] - width) / 2)
    return frame[top : top + height, left : left + width]


def _setting(config: Mapping, name: str):
    value = config.get(name)
    if not isinstance(value, Mapping | Sequence) or isinstance(value, str):
        raise UnsupportedModel(
            f"The processor's setting {name!r} is missing or of a wrong kind: {value!r}.",
            hint="Export the model again with `tokensieve export`.",
        )
    return value


def _whole(config: Mapping, name: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise UnsupportedModel(
            f"The processor's setting {name!r} must be a whole number above 0, got {value!r}.",
            hint="Export the model again with `tokensieve export`.",
        )
    return value
