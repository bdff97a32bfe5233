"""How the rows that leave the projector become the tokens of one image or video, in numpy alone.

What the torch families read off the model's own packing (`pipeline/families/`) is worked out here from sizes: the
rasters, which placeholder gets which token, and for LLaVA-OneVision the linear map from projector rows to tokens.
"""

# Shape legend: N candidate tokens, n placeholders of an item, R projector rows that a token is mixed from,
#               P patches of a frame, T frames, L prompt length, h w height and width of a raster

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tokensieve.errors import BadOption

NEWLINE = -1  # in `slots`: a structural token that is no candidate
_TAPS = 4  # rows per token of every linear map, whatever it needs: the graph sees one width


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """The tokens of one image or video before anything is dropped.

    Attributes:
        grids: `(frames, height, width)` per raster block of the candidates.
        crop: `[N]` int64, tile of each candidate (0 = base view).
        slots: `[n]` int64, the candidate at each placeholder, or `NEWLINE`.
        inputs: inputs of the vision graph that come with it.
    """

    grids: tuple[tuple[int, int, int], ...]
    crop: np.ndarray
    slots: np.ndarray
    inputs: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """N, the candidates."""
        return len(self.crop)


def pack_frames(num_frames: int, side: int) -> Packing:
    """Frames of `side * side` tokens each, as one block: LLaVA, and videos of SmolVLM."""
    return _plain(((num_frames, side, side),), np.zeros(num_frames * side * side, dtype=np.int64))


def pack_tiles(num_tiles: int, side: int) -> Packing:
    """Tiles of one image, the view of the whole (crop 0) last: SmolVLM."""
    crop = (np.arange(num_tiles, dtype=np.int64) + 1) % num_tiles
    return _plain(((1, side, side),) * num_tiles, crop.repeat(side * side))


def pack_patches(grid_thw: Sequence[int], *, merge: int, window: int, patch: int) -> Packing:
    """A grid of patches, `merge * merge` of them a token: Qwen2.5-VL.

    Args:
        grid_thw: token frames, and rows and columns of patches.
        merge: patches a token along one side.
        window: side of an attention window in pixels.
        patch: side of a patch in pixels.
    """
    frames, height, width = (int(size) for size in grid_thw)
    rows, columns = height // merge, width // merge
    # The processor's order: tokens in raster order, the patches of each token side by side.
    y_P, x_P = (
        np.broadcast_to(axis, (rows, columns, merge, merge)).reshape(-1)
        for axis in (
            np.arange(height).reshape(rows, 1, merge, 1),
            np.arange(width).reshape(1, columns, 1, merge),
        )
    )
    reach = window // merge // patch * merge
    windows_x = -(-width // reach)
    inputs = {
        "patch_place": np.stack([y_P, x_P], axis=1).astype(np.int64),
        "patch_window": (y_P // reach * windows_x + x_P // reach).astype(np.int64),
    }
    return _plain(((frames, rows, columns),), np.zeros(frames * rows * columns, dtype=np.int64), inputs)


def pack_pooled_video(num_frames: int, side: int) -> Packing:
    """Frames of `side * side` rows, pooled bilinearly to half the side, and one closing newline: LLaVA-OneVision."""
    half = math.ceil(side / 2)
    place_NR, weight_NR = _resampled(side, side, half, half)
    starts = np.arange(num_frames, dtype=np.int64) * side * side
    count = num_frames * half * half
    return Packing(
        grids=((num_frames, half, half),),
        crop=np.zeros(count, dtype=np.int64),
        slots=np.append(np.arange(count, dtype=np.int64), NEWLINE),
        inputs={
            "rows": (starts[:, None, None] + place_NR).reshape(count, -1),
            "weights": np.tile(weight_NR, (num_frames, 1)),
        },
    )


def pack_anyres(size: Sequence[int], pinpoints: Sequence[Sequence[int]], *, tile: int, side: int, most: int) -> Packing:
    """Base view, then the tiles joined to one raster, padding cut off, a newline after every row: LLaVA-OneVision.

    Args:
        size: height and width of the image in pixels.
        pinpoints: resolutions to choose from, in pixels.
        tile: side of a tile in pixels.
        side: rows of the projector along one side of a tile.
        most: tiles' worth of tokens above which the raster is shrunk.

    Raises:
        BadOption: the image is so thin that its tiles are all padding.
    """
    resolution = best_resolution(size, pinpoints)
    down, across = resolution[0] // tile, resolution[1] // tile
    place_hw = _joined_tiles(down, across, side)
    place_hw = _without_padding(place_hw, size)
    height, width = place_hw.shape
    if not height or not width:
        raise BadOption(f"An image of {size[0]} x {size[1]} pixels is too thin: no token of its tiles would be left.")
    ratio = math.sqrt(height * width / (most * side**2))
    if ratio > 1.1:
        among_NR, weight_NR = _resampled(height, width, int(height // ratio), int(width // ratio))
        height, width = int(height // ratio), int(width // ratio)
        place_NR = place_hw.reshape(-1)[among_NR]
    else:
        place_NR, weight_NR = _single(place_hw.reshape(-1))
    base_NR, base_weight_NR = _single(np.arange(side * side, dtype=np.int64))
    rows_NR = np.concatenate([base_NR, place_NR])
    weights_NR = np.concatenate([base_weight_NR, weight_NR])
    num_base, count = side * side, len(rows_NR)
    lines = np.full((height, width + 1), NEWLINE, dtype=np.int64)
    lines[:, :-1] = np.arange(num_base, count).reshape(height, width)
    return Packing(
        grids=((1, side, side), (1, height, width)),
        crop=_main_tile(rows_NR // num_base, weights_NR, 1 + down * across),
        slots=np.concatenate([np.arange(num_base), lines.reshape(-1)]),
        inputs={"rows": rows_NR, "weights": weights_NR},
    )


def best_resolution(size: Sequence[int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Height and width of the pinpoint that wastes least: most pixels of the image first, then least padding."""
    height, width = size

    def fit(pinpoint: Sequence[int]) -> tuple[int, int]:
        tall, wide = pinpoint
        scale = min(wide / width, tall / height)
        effective = min(int(width * scale) * int(height * scale), height * width)
        return effective, effective - tall * wide

    tall, wide = max(pinpoints, key=fit)
    return int(tall), int(wide)


def mrope_positions(is_visual_L: np.ndarray, grid: Sequence[int], interval: float) -> np.ndarray:
    """`[3, L]` int64: positions of Qwen2.5-VL in time, height and width, for a prompt with one image or video.

    Args:
        is_visual_L: bool, True at its placeholders, which stand side by side.
        grid: token frames, rows, columns.
        interval: positions between two token frames; 1 for an image.
    """
    frames, rows, columns = grid
    length = len(is_visual_L)
    start = int(is_visual_L.argmax())
    # In float32, as the model multiplies: the fraction is cut off, so the last bit can matter.
    times_T = (np.arange(frames, dtype=np.float32) * np.float32(interval)).astype(np.int64)
    visual = np.stack(np.meshgrid(times_T, np.arange(rows), np.arange(columns), indexing="ij")).reshape(3, -1)
    after = length - start - visual.shape[1]
    text = np.arange(after) + start + max(rows, columns)
    parts = [np.tile(np.arange(start), (3, 1)), visual + start, np.tile(text, (3, 1))]
    return np.concatenate(parts, axis=1).astype(np.int64)


def _plain(grids, crop_N: np.ndarray, inputs: dict[str, np.ndarray] | None = None) -> Packing:
    return Packing(grids=grids, crop=crop_N, slots=np.arange(len(crop_N), dtype=np.int64), inputs=inputs or {})


def _single(row_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and weights of tokens that are projector rows as they are."""
    weight_NR = np.zeros((len(row_N), _TAPS), dtype=np.float32)
    weight_NR[:, 0] = 1
    return np.repeat(row_N[:, None], _TAPS, axis=1), weight_NR


def _joined_tiles(down: int, across: int, side: int) -> np.ndarray:
    """`[h, w]`: projector row at each place of the raster that the tiles after the base view form."""
    row = np.arange(down * across * side * side, dtype=np.int64) + side * side
    return row.reshape(down, across, side, side).transpose(0, 2, 1, 3).reshape(down * side, across * side)


def _without_padding(place_hw: np.ndarray, size: Sequence[int]) -> np.ndarray:
    height, width = place_hw.shape
    tall, wide = size
    if wide / tall > width / height:
        padding = (height - int(round(tall * (width / wide), 7))) // 2
        return place_hw[padding : height - padding]
    padding = (width - int(round(wide * (height / tall), 7))) // 2
    return place_hw[:, padding : width - padding]


def _resampled(height: int, width: int, to_height: int, to_width: int) -> tuple[np.ndarray, np.ndarray]:
    """Places `[N, 4]` and weights `[N, 4]` of bilinear resampling (borders not aligned, as torch does by default)."""
    (y_low, y_high, y_part), (x_low, x_high, x_part) = _taps(height, to_height), _taps(width, to_width)
    places, weights = [], []
    for y, y_weight in ((y_low, 1 - y_part), (y_high, y_part)):
        for x, x_weight in ((x_low, 1 - x_part), (x_high, x_part)):
            places.append((y[:, None] * width + x[None]).reshape(-1))
            weights.append((y_weight[:, None] * x_weight[None]).reshape(-1))
    return np.stack(places, axis=1), np.stack(weights, axis=1)


def _taps(size: int, to_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each place of the new axis: the two old ones it lies between, and the share of the second."""
    scale = np.float32(size) / np.float32(to_size)
    # Rounded once, as torch's fused kernels do: where two tiles weigh the same, the last bit says which comes first.
    at = np.maximum(float(scale) * (np.arange(to_size) + 0.5) - 0.5, 0).astype(np.float32)
    low = np.minimum(at.astype(np.int64), size - 1)
    return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32).clip(0, 1)


def _main_tile(tile_NR: np.ndarray, weight_NR: np.ndarray, num_tiles: int) -> np.ndarray:
    """`[N]` int64: the tile that weighs most in each token, the first of equals."""
    share_NK = np.zeros((len(tile_NR), num_tiles), dtype=np.float32)
    for tile_N, weight_N in zip(tile_NR.T, weight_NR.T, strict=True):
        share_NK[np.arange(len(tile_N)), tile_N] += weight_N
    return share_NK.argmax(1)
