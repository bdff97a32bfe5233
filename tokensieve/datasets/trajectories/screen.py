"""What VPT's released loader does to a recorded picture: draw the mouse cursor, then scale to the policy's size.

Shape legend: T pictures, H height, W width, 3 RGB, 4 RGB and opacity
"""

from __future__ import annotations

import numpy as np

from tokensieve.errors import BadOption

CURSOR_SIZE = 16
PLAYED_HEIGHT = 720  # the game's window; cursor positions are in its pixels


def arrow_cursor() -> np.ndarray:
    """An arrow whose tip is at the top left, uint8 [16, 16, 4]: white with a black rim, transparent around it.

    Ours, drawn here: as large as the picture that comes with VPT, but not the same pixels.
    """
    row, column = np.mgrid[:CURSOR_SIZE, :CURSOR_SIZE]
    # two edges from the tip, one straight down and one at 45 degrees; the third closes the head
    inside = np.minimum.reduce([column, row - column, 15 - row - column // 2])
    cursor = np.zeros((CURSOR_SIZE, CURSOR_SIZE, 4), dtype=np.uint8)
    cursor[inside >= 0, 3] = 255
    cursor[inside >= 1, :3] = 255
    return cursor


def check_cursor(cursor: np.ndarray) -> np.ndarray:
    """`cursor`, or BadOption when it isn't uint8 [16, 16, 4]."""
    if not isinstance(cursor, np.ndarray) or cursor.dtype != np.uint8 or cursor.shape != (CURSOR_SIZE, CURSOR_SIZE, 4):
        given = f"{cursor.dtype} {list(cursor.shape)}" if isinstance(cursor, np.ndarray) else type(cursor).__name__
        raise BadOption(f"cursor must be uint8 [{CURSOR_SIZE}, {CURSOR_SIZE}, 4] (RGB and opacity), got {given}.")
    return cursor


def draw_cursor(frame: np.ndarray, cursor: np.ndarray, x: float, y: float) -> None:
    """Blend `cursor` over `frame`, uint8 [H, W, 3], in place, with its tip at the pixel of the played position (x, y).

    Positions are in pixels of the 720-line window; the tip is truncated to a whole pixel, and what lies outside the
    picture is cut off.
    """
    scale = frame.shape[0] / PLAYED_HEIGHT
    left, top = int(x * scale), int(y * scale)
    first_row, first_column = max(0, -top), max(0, -left)
    over = cursor[first_row : frame.shape[0] - top, first_column : frame.shape[1] - left]
    if left >= frame.shape[1] or top >= frame.shape[0] or over.size == 0:
        return
    top, left = top + first_row, left + first_column
    under = frame[top : top + over.shape[0], left : left + over.shape[1]]
    opacity = over[..., 3:] / 255.0
    under[:] = (under * (1 - opacity) + over[..., :3] * opacity).astype(np.uint8)


def resize_bilinear(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale uint8 [T, H, W, 3] to `size` (height, width) by plain bilinear interpolation.

    As in OpenCV's INTER_LINEAR, each new pixel looks at four old ones however much is scaled down: no smoothing, which
    is what VPT's policies were trained on. INFERRED: within one grey level of OpenCV, whose weights have 11 bits.
    """
    # one axis after the other: rows first, so that the second pass works on fewer
    return np.rint(_resample(_resample(frames, size[0], axis=1), size[1], axis=2)).astype(np.uint8)


def _resample(frames: np.ndarray, length: int, axis: int) -> np.ndarray:
    before = frames.shape[axis]
    place = np.clip((np.arange(length, dtype=np.float32) + 0.5) * (before / length) - 0.5, 0, before - 1)
    low = place.astype(np.int64)
    weight = (place - low).reshape(-1, *[1] * (frames.ndim - axis - 1)).astype(np.float32)
    high = np.minimum(low + 1, before - 1)
    return frames.take(low, axis) * (1 - weight) + frames.take(high, axis) * weight
