"""Pixels of generated clips: every mover tinted and laid over a drifting texture, in one batched pass."""

# Shape legend: B clips, T frames, M clips that have the mover being drawn, S frame size, W window size,
#               G glyph size

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokensieve.datasets.clips import COLOURS, FRAME_SIZE, NUM_FRAMES, SHAPES, Clip
from tokensieve.datasets.digits import GLYPH_SIZE, glyphs

WINDOW = 32  # pixels; no mover is larger
DRIFT = 28  # pixels that a texture may drift to either side


@lru_cache(maxsize=1)
def glyph_bank() -> Tensor:
    """Opacity masks `[1797 + 4, G, G]`: all digits, then the distractor shapes in the order of `SHAPES`."""
    y, x = np.mgrid[0:GLYPH_SIZE, 0:GLYPH_SIZE] / (GLYPH_SIZE - 1) * 2 - 1
    shapes = {
        "disc": x**2 + y**2 < 0.8,
        "square": np.maximum(abs(x), abs(y)) < 0.75,
        "cross": np.minimum(abs(x), abs(y)) < 0.25,
        "triangle": (y < 0.8) & (abs(x) < (y + 0.9) / 2),
    }
    masks = np.stack([shapes[name] for name in SHAPES]).astype(np.float32)
    return torch.from_numpy(np.concatenate([glyphs(), masks]))


def frame_times(num_frames: int = NUM_FRAMES) -> Tensor:
    """`[T]` times as fractions of the clip, both ends included."""
    return torch.linspace(0, 1, num_frames)


def render_clips(clips: Sequence[Clip], times: Tensor | None = None) -> Tensor:
    """Renders clips at the given times (fractions of the clip): `[B, T, S, S, 3]` uint8.

    Deterministic: the texture and its noise are drawn from each clip's `background_seed`.
    """
    times_T = frame_times() if times is None else times
    frame_BTCSS = _backgrounds(clips, times_T)
    # A margin as wide as a window lets a mover stand at the very edge without special cases.
    canvas_BTCSS = F.pad(frame_BTCSS, (WINDOW,) * 4)
    for m in range(max(len(clip.movers) for clip in clips)):
        _draw_mover(canvas_BTCSS, clips, m, times_T)
    inner = slice(WINDOW, WINDOW + FRAME_SIZE)
    frame_BTCSS = canvas_BTCSS[..., inner, inner]
    return (frame_BTCSS.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2)


def _backgrounds(clips: Sequence[Clip], times_T: Tensor) -> Tensor:
    """`[B, T, 3, S, S]`: a smooth colour texture per clip that drifts by up to `DRIFT` pixels, plus fixed noise."""
    size = FRAME_SIZE
    coarse, fine, drift = [], [], []
    for clip in clips:
        rng = np.random.default_rng(clip.background_seed)
        base = rng.uniform(0.15, 0.45, size=(3, 1, 1))
        coarse.append(np.clip(base + rng.normal(0, 0.11, size=(3, 12, 12)), 0.02, 0.62))
        fine.append(rng.normal(0, 0.02, size=(1, size, size)))
        drift.append(rng.uniform(-DRIFT, DRIFT, size=2))
    side = size + 2 * DRIFT
    texture = F.interpolate(torch.from_numpy(np.stack(coarse)).float(), (side, side), mode="bilinear")
    corner_BT2 = torch.from_numpy(np.stack(drift)).float()[:, None] * (times_T[None, :, None] * 2 - 1)
    corner_BT2 = corner_BT2.round().long() + DRIFT
    windows = texture.unfold(2, size, 1).unfold(3, size, 1)  # a view: [B, 3, 2 DRIFT + 1, 2 DRIFT + 1, S, S]
    b = torch.arange(len(clips))[:, None]
    frame_BTCSS = windows[b, :, corner_BT2[..., 1], corner_BT2[..., 0]]
    return frame_BTCSS + torch.from_numpy(np.stack(fine)).float()[:, None]


def _draw_mover(canvas_BTCSS: Tensor, clips: Sequence[Clip], m: int, times_T: Tensor) -> None:
    """Blends every clip's m-th mover into the padded canvas, in place; clips without one are left alone."""
    num_digits = len(glyph_bank()) - len(SHAPES)
    owners = [b for b, clip in enumerate(clips) if m < len(clip.movers)]
    movers = [clips[b].movers[m] for b in owners]
    rows = torch.tensor([v.glyph if v.label >= 0 else num_digits + v.glyph for v in movers])
    colour_M3 = torch.tensor([COLOURS[v.colour] for v in movers]) / 255
    geometry = torch.tensor([(v.size, *v.start, *v.end, v.on, v.off) for v in movers])
    size_M1, x0_M1, y0_M1, x1_M1, y1_M1, on_M1, off_M1 = geometry.T[..., None]
    centre_MT2 = torch.stack([x0_M1 + (x1_M1 - x0_M1) * times_T, y0_M1 + (y1_M1 - y0_M1) * times_T], -1)
    corner_MT2 = (centre_MT2 - WINDOW / 2).floor()

    # Only a window around the mover is sampled, not the frame: a ninth of the pixels.
    scale_MT = (WINDOW / size_M1).expand(-1, len(times_T))
    theta = torch.zeros(*scale_MT.shape, 2, 3)
    theta[..., 0, 0] = theta[..., 1, 1] = scale_MT
    theta[..., 2] = scale_MT[..., None] * (1 - 2 * (centre_MT2 - corner_MT2) / WINDOW)
    grid = F.affine_grid(theta.flatten(0, 1), (theta[..., 0, 0].numel(), 1, WINDOW, WINDOW), align_corners=False)
    masks = glyph_bank()[rows].repeat_interleave(len(times_T), 0)[:, None]
    alpha = F.grid_sample(masks, grid, align_corners=False, padding_mode="zeros")
    visible_MT = (times_T >= on_M1) & (times_T < off_M1)
    alpha_MTWW = alpha.view(*scale_MT.shape, WINDOW, WINDOW) * visible_MT[..., None, None]

    first_MT2 = corner_MT2.long() + WINDOW
    line = torch.arange(WINDOW)
    b = torch.tensor(owners)[:, None, None, None, None]
    t = torch.arange(len(times_T))[:, None, None, None]
    c = torch.arange(3)[:, None, None]
    y = (first_MT2[..., 1, None] + line)[:, :, None, :, None]
    x = (first_MT2[..., 0, None] + line)[:, :, None, None, :]
    alpha_MT1WW = alpha_MTWW[:, :, None]
    under = canvas_BTCSS[b, t, c, y, x]
    canvas_BTCSS[b, t, c, y, x] = under * (1 - alpha_MT1WW) + colour_M3[:, None, :, None, None] * alpha_MT1WW
