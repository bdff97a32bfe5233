"""Densely packed digit images with a label for every patch: what the shipped model's tower learns from.

A clip holds a few digits in 96 x 96 pixels; a mosaic holds about nine, so the tower sees several times as
many digits per image. Cells of 32 x 32 pixels are drawn on a 4 x 4 board and a random 96 x 96 window is
cut out, so that digits fall on the patch grid at every phase.
"""

# Shape legend: B images, C cells (16), S frame size, L board size, G label grid size

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokensieve.datasets.clips import COLOURS, FRAME_SIZE, SHAPES
from tokensieve.datasets.digits import GLYPH_SIZE, digit_ids
from tokensieve.datasets.render import glyph_bank

CELL = 32  # pixels
BOARD = 4  # cells a side
NO_DIGIT, NO_COLOUR, IGNORE = 10, len(COLOURS), -100


@dataclass  # not frozen: Lightning rebuilds batches field by field
class Mosaic:
    """Images `[B, 3, S, S]` float in [0, 1] with the geometry that labels any grid laid over them."""

    images: Tensor
    digit_BC: Tensor  # 0..9, or 10 for a cell without a digit
    colour_BC: Tensor
    centre_BC2: Tensor  # pixels in the cut-out image
    size_BC: Tensor

    def labels(self, grid: int) -> tuple[Tensor, Tensor, Tensor]:
        """Labels at the centres of a `grid x grid` raster.

        Returns digit class `[B, G*G]`, colour class `[B, G*G]` (both -100 where a digit is cut off by the
        image border) and the offset to the digit's centre `[B, G*G, 2]` in units of 16 pixels.
        """
        step = FRAME_SIZE / grid
        line = (torch.arange(grid) + 0.5) * step
        point_P2 = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)
        offset_BPC2 = self.centre_BC2[:, None] - point_P2[None, :, None]
        reach_BC2 = self.size_BC[..., None] * torch.tensor([0.36, 0.5])
        hit_BPC = (offset_BPC2.abs() < reach_BC2[:, None]).all(-1) & (self.digit_BC < NO_DIGIT)[:, None]
        cell_BP = hit_BPC.float().argmax(-1)
        covered_BP = hit_BPC.any(-1)
        inside_BC = ((self.centre_BC2 > 0.4 * self.size_BC[..., None]).all(-1)) & (
            (self.centre_BC2 < FRAME_SIZE - 0.4 * self.size_BC[..., None]).all(-1)
        )
        cut_BP = covered_BP & ~inside_BC.gather(1, cell_BP)

        def pick(value_BC: Tensor, otherwise: int) -> Tensor:
            label = torch.where(covered_BP, value_BC.gather(1, cell_BP), otherwise)
            return label.masked_fill(cut_BP, IGNORE)

        index = cell_BP[..., None, None].expand(-1, -1, 1, 2)
        offset_BP2 = offset_BPC2.gather(2, index)[:, :, 0] / 16
        return pick(self.digit_BC, NO_DIGIT), pick(self.colour_BC, NO_COLOUR), offset_BP2


def make_mosaics(split: str, batch: int, generator: torch.Generator) -> Mosaic:
    """Draws `batch` mosaics from the digit images of `split`; all randomness comes from `generator`."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    cells = BOARD * BOARD
    bank, ids = glyph_bank(), digit_ids(split)
    table = torch.stack([torch.from_numpy(i)[: min(map(len, ids))] for i in ids])  # [10, n]
    label = whole(10, batch, cells)
    glyph = table[label, whole(table.shape[1], batch, cells)]
    fate = torch.rand(batch, cells, generator=generator)
    is_digit, is_shape = fate < 0.7, (fate >= 0.7) & (fate < 0.82)
    glyph = torch.where(is_shape, len(bank) - len(SHAPES) + whole(len(SHAPES), batch, cells), glyph)
    size = torch.where(is_shape, uniform(12, 20, batch, cells), uniform(24, 30, batch, cells))
    slack = (CELL - size) / 2
    shift = (torch.rand(batch, cells, 2, generator=generator) * 2 - 1) * slack[..., None]

    theta = _tilted(uniform, batch, cells) * (CELL / size)[..., None, None]
    theta = torch.cat([theta, -theta @ (shift * 2 / CELL)[..., None]], -1)
    grid = F.affine_grid(theta.view(-1, 2, 3), (batch * cells, 1, CELL, CELL), align_corners=False)
    alpha = F.grid_sample(
        bank[glyph.flatten()].view(-1, 1, GLYPH_SIZE, GLYPH_SIZE), grid, align_corners=False, padding_mode="zeros"
    )
    alpha = alpha.view(batch, cells, CELL, CELL) * (is_digit | is_shape)[..., None, None]
    alpha = alpha ** uniform(0.6, 1.6, batch, cells, 1, 1)  # bolder and thinner strokes

    colour = whole(len(COLOURS), batch, cells)
    rgb = torch.tensor(list(COLOURS.values()))[colour] / 255  # [B, C, 3]
    board_alpha = _tile(alpha[:, :, None])
    board_rgb = F.interpolate(rgb.transpose(1, 2).view(batch, 3, BOARD, BOARD), scale_factor=CELL, mode="nearest")

    side = BOARD * CELL
    base = uniform(0.15, 0.45, batch, 3, 1, 1)
    texture = (base + 0.11 * torch.randn(batch, 3, 10, 10, generator=generator)).clamp(0.02, 0.62)
    texture = F.interpolate(texture, size=(side, side), mode="bilinear", align_corners=True)
    board = texture * (1 - board_alpha) + board_rgb * board_alpha

    corner = whole(side - FRAME_SIZE + 1, batch, 2)
    windows = board.unfold(2, FRAME_SIZE, 1).unfold(3, FRAME_SIZE, 1)  # a view: [B, 3, 33, 33, S, S]
    images = windows[torch.arange(batch), :, corner[:, 1], corner[:, 0]]
    images = images + 0.02 * torch.randn(batch, 1, FRAME_SIZE, FRAME_SIZE, generator=generator)

    column, row = torch.arange(cells) % BOARD, torch.arange(cells) // BOARD
    cell_centre = (torch.stack([column, row], -1) + 0.5) * CELL
    return Mosaic(
        images=images.clamp(0, 1),
        digit_BC=torch.where(is_digit, label, NO_DIGIT),
        colour_BC=torch.where(is_digit, colour, NO_COLOUR),
        centre_BC2=cell_centre + shift - corner[:, None],
        size_BC=size,
    )


def _tilted(uniform, batch: int, cells: int) -> Tensor:
    """`[B, C, 2, 2]`: small random rotations, slants and stretches. Only 1,258 digit images may be trained on;
    this is what keeps the tower from learning them by heart."""
    angle, slant = uniform(-0.2, 0.2, batch, cells), uniform(-0.2, 0.2, batch, cells)
    stretch = uniform(-0.12, 0.12, batch, cells).exp()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(batch, cells)
    rotate = torch.stack([cos, -sin, sin, cos], -1).view(batch, cells, 2, 2)
    shape = torch.stack([stretch, slant, zero, 1 / stretch], -1).view(batch, cells, 2, 2)
    return rotate @ shape


def _tile(cell_BCKHW: Tensor) -> Tensor:
    """`[B, 16, K, 32, 32]` -> `[B, K, 128, 128]`, cells in raster order."""
    batch, _, channels = cell_BCKHW.shape[:3]
    board = cell_BCKHW.view(batch, BOARD, BOARD, channels, CELL, CELL)
    return board.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, BOARD * CELL, BOARD * CELL)
