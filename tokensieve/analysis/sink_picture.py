"""A picture of a sink report: key mass and norm of every visual token in its place, sinks outlined."""

# Shape legend: H heads, N visual tokens, T frames, h x w tokens a frame

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tokensieve.analysis.sinks import SinkReport
from tokensieve.compression.sink_guard import KEY_MASS, NORM_Z
from tokensieve.errors import BadOption
from tokensieve.pipeline.picture import contact_sheet

_PAPER, _INK, _FADED, _OUTLINE = (250, 250, 248), (24, 50, 110), (120, 120, 126), (226, 74, 20)
_EDGE = (205, 205, 203)
_GAP, _CAPTION, _LABEL = 4, 20, 240  # pixels: between maps, below one, and the width that a label needs


def draw_sinks(
    report: SinkReport, grids: Sequence[tuple[int, int, int]], *, title: str = "", side: int = 240, columns: int = 2
):
    """Two maps for every frame of every raster block, dark where the number is high; returns a PIL image.

    On the left the key mass, the largest over heads (its square root, so that tokens between sinks stay visible), on
    the right the robust z of the norm, if the report has it. Dark means twice the threshold or more. Sinks are
    outlined: on the left those by key mass, on the right those by norm.

    Args:
        report: of one item (B = 1), such as `tower_sinks` makes.
        grids: `(frames, height, width)` per raster block, `tokens.grids`.
        title: above the two lines of explanation.
        side: pixels of the longer side of a map, or more (3 pixels a token at least).
        columns: frames side by side.

    Raises:
        BadOption: the report is of a batch, or its tokens do not fill the grids.
    """
    num_tokens = sum(t * h * w for t, h, w in grids)
    if report.key_mass.shape[0] != 1 or report.key_mass.shape[-1] != num_tokens:
        raise BadOption(
            f"The picture needs a report of 1 item with {num_tokens} tokens (grids {tuple(grids)}), got "
            f"{report.key_mass.shape[0]} with {report.key_mass.shape[-1]}.",
            hint="Make it with tower_sinks, and give the grids of the same tokens.",
        )
    mass_N = report.key_mass[0].amax(0).cpu().numpy()
    shade_N = np.sqrt((mass_N / (2 * KEY_MASS)).clip(0, 1))
    maps = [("key mass", shade_N, mass_N, report.by_mass[0].cpu().numpy(), "{:.2f}")]
    note = f"key mass: largest over heads, square-root scale, dark = {2 * KEY_MASS:g} and above"
    if report.norm_z is not None:
        z_N = report.norm_z[0].cpu().numpy()
        shade_N = (z_N / (2 * NORM_Z)).clip(0, 1)
        maps.append(("norm z", shade_N, z_N, report.by_norm[0].cpu().numpy(), "{:.1f}"))
        note += f"\nnorm z: robust z of the norm of the hidden state, dark = {2 * NORM_Z:g} and above"
    cell = max(3, side // max(max(h, w) for _, h, w in grids))
    size = (cell * max(w for _, _, w in grids), cell * max(h for _, h, _ in grids))
    tiles, start = [], 0
    for block, (num_frames, height, width) in enumerate(grids):
        for frame in range(num_frames):
            part = slice(start, start + height * width)
            start = part.stop
            where = f"frame {frame}" if len(grids) == 1 else f"block {block}"
            drawn = []
            for name, shade, value, is_sink, form in maps:
                shade_hw, is_sink_hw = shade[part].reshape(height, width), is_sink[part].reshape(height, width)
                label = f"{where}, {name} up to {form.format(value[part].max())}"
                drawn.append(_tile(shade_hw, is_sink_hw, cell, size, label))
            tiles.append(np.concatenate(drawn, axis=1))
    return contact_sheet(np.stack(tiles), f"{title}\n{note}" if title else note, columns)


def _tile(shade_hw: np.ndarray, is_sink_hw: np.ndarray, cell: int, size: tuple[int, int], label: str) -> np.ndarray:
    """One map with its label below; `shade_hw` in [0, 1], `cell` pixels a token, on paper of `size` (width, height)."""
    from PIL import Image, ImageDraw, ImageFont

    colours = np.array(_PAPER) + shade_hw[..., None] * (np.array(_INK) - np.array(_PAPER))
    picture = Image.fromarray(colours.round().astype(np.uint8))
    height, width = (n * cell for n in shade_hw.shape)
    font = ImageFont.load_default(size=12)
    count = "1 sink" if is_sink_hw.sum() == 1 else f"{is_sink_hw.sum()} sinks"
    tile = Image.new("RGB", (max(size[0], _LABEL) + 2 * _GAP, size[1] + _CAPTION), _PAPER)
    tile.paste(picture.resize((width, height), Image.NEAREST), (0, 0))
    draw = ImageDraw.Draw(tile)
    draw.rectangle((0, 0, width - 1, height - 1), outline=_EDGE)
    for y, x in zip(*is_sink_hw.nonzero(), strict=True):
        corners = (x * cell, y * cell, x * cell + cell - 1, y * cell + cell - 1)
        draw.rectangle(corners, outline=_OUTLINE, width=math.ceil(cell / 8))
    draw.text((1, size[1] + 3), label, fill=_FADED, font=font)
    ink = _OUTLINE if is_sink_hw.any() else _FADED
    draw.text((tile.width - 3 * _GAP, size[1] + 3), count, fill=ink, font=font, anchor="ra")
    return np.asarray(tile)
