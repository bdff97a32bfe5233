"""Pictures of what the model still looks at: dropped places are dimmed, kept ones stay as they are."""

# Shape legend: T frames of the clip, t frames of tokens, h x w tokens a frame, H x W pixels

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tokensieve.compression import Plan
from tokensieve.pipeline.adapter import VisualItem

VIEWS = ("whole view", "high-resolution view")  # of an image that some models look at twice
DIM = 0.35  # brightness of dropped places
_PAPER, _INK, _FADED = (250, 250, 248), (30, 30, 34), (120, 120, 126)
_GAP, _CAPTION = 6, 22  # pixels between pictures, and below one


def kept_masks(item: VisualItem, plan: Plan) -> list[np.ndarray]:
    """`[t, h, w]` bool per raster block of an item: True where a token stays."""
    mask = plan.mask().cpu()
    blocks = mask.split([t * h * w for t, h, w in item.tokens.grids])
    return [block.view(grid).numpy() for block, grid in zip(blocks, item.tokens.grids, strict=True)]


def shown_masks(items: Sequence[VisualItem], plans: Sequence[Plan], num_frames: int) -> list[np.ndarray]:
    """`[t, h, w]` bool per raster that can be drawn over the frames of one prompt: those that span the whole picture.

    A video is one raster of many frames. An image has one or two; of more, tiles, only the view of the whole (crop 0).
    """
    pairs = list(zip(items, plans, strict=True))
    if num_frames > 1 and len(pairs) == num_frames:  # frames that stayed separate images: their base views
        return [np.concatenate([kept_masks(item, plan)[0] for item, plan in pairs])]
    return [mask for item, plan in pairs for mask in _whole_views(item, kept_masks(item, plan))]


def _whole_views(item: VisualItem, masks: list[np.ndarray]) -> list[np.ndarray]:
    if len(masks) <= len(VIEWS):
        return masks
    firsts = [0, *np.cumsum([mask.size for mask in masks])[:-1]]
    return [mask for mask, first in zip(masks, firsts, strict=True) if item.tokens.crop[first] == 0]


def seen_area(frames: np.ndarray, processor) -> np.ndarray:
    """The part of `[T, H, W, 3]` frames that the processor lets through: a centred square where it crops."""
    image_processor = getattr(processor, "video_processor", None) or getattr(processor, "image_processor", None)
    if not getattr(image_processor, "do_center_crop", None):
        return frames
    side = min(frames.shape[1:3])
    top, left = (frames.shape[1] - side) // 2, (frames.shape[2] - side) // 2
    return frames[:, top : top + side, left : left + side]


def draw_kept(frames: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Dims the dropped places of a clip.

    Args:
        frames: `[T, H, W, 3]` uint8.
        mask: `[t, h, w]` bool; if t < T, each token frame covers T / t frames (temporal patches).

    Returns:
        `[T, H, W, 3]` uint8.
    """
    num_frames, height, width = frames.shape[:3]
    which = np.arange(num_frames) * len(mask) // num_frames
    rows = np.arange(height) * mask.shape[1] // height
    columns = np.arange(width) * mask.shape[2] // width
    bright = np.where(mask[which][:, rows][:, :, columns], 1.0, DIM)[..., None]
    grey = frames.mean(-1, keepdims=True)
    shown = np.where(bright < 1, grey, frames) * bright  # colour goes too, so that bright clips read as well
    return shown.round().astype(np.uint8)


def captioned_frames(
    frames: np.ndarray, mask: np.ndarray, *, labels: Sequence[str] = (), width: int = 240
) -> np.ndarray:
    """Every frame with its dropped places dimmed and, below it, its label and how many tokens it kept.

    Args:
        frames: `[T, H, W, 3]` uint8.
        mask: `[t, h, w]` bool.
        labels: a word for each frame, its time for one; frame numbers when left out.
        width: pixels each frame is shown at.

    Returns:
        `[T, height + caption, width, 3]` uint8.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=13)
    height = max(1, round(width * frames.shape[1] / frames.shape[2]))
    resample = Image.NEAREST if frames.shape[2] * 2 <= width else Image.LANCZOS
    tiles = []
    for i, picture in enumerate(draw_kept(frames, mask)):
        tile = Image.new("RGB", (width, height + _CAPTION), _PAPER)
        tile.paste(Image.fromarray(picture).resize((width, height), resample))
        draw = ImageDraw.Draw(tile)
        token_frame = mask[i * len(mask) // len(frames)]
        draw.text((2, height + 3), labels[i] if labels else f"frame {i}", fill=_FADED, font=font)
        count = f"{int(token_frame.sum())} of {token_frame.size}"
        draw.text((width - 2, height + 3), count, fill=_INK, font=font, anchor="ra")
        tiles.append(np.asarray(tile))
    return np.stack(tiles)


def contact_sheet(tiles: np.ndarray, title: str = "", columns: int = 4):
    """Lays `[T, H, W, 3]` pictures side by side under a title of one or more lines; returns a PIL image."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=16)
    lines = title.split("\n") if title else []
    num_tiles, height, width = tiles.shape[:3]
    columns = min(columns, num_tiles)
    rows = math.ceil(num_tiles / columns)
    head = 10 + 22 * len(lines) if lines else 0
    sheet_width = max(columns * (width + _GAP), *(int(font.getlength(line)) + 2 * _GAP for line in lines or [""]))
    sheet = Image.new("RGB", (sheet_width + _GAP, head + rows * (height + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((_GAP + 2, 6 + 22 * i), line, fill=_INK, font=font)
    for i, tile in enumerate(tiles):
        corner = (_GAP + (i % columns) * (width + _GAP), head + _GAP + (i // columns) * (height + _GAP))
        sheet.paste(Image.fromarray(tile), corner)
    return sheet
