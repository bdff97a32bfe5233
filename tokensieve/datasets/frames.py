"""Frames never travel without their times.

Shape legend: T frames, H height, W width, 3 RGB
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Frames:
    """Pictures of one source and when each is shown; unpacks as `frames, times_s = ...`."""

    data: np.ndarray
    """RGB pixels, uint8 [T, H, W, 3]."""
    times_s: np.ndarray
    """Presentation time of each picture in seconds since the first picture of the file, float64 [T]."""
    duration_s: float
    """Length of the pictures in the source, until the last one disappears."""
    source: str
    """Where the pictures came from."""
    partial: bool = False
    """True when part of what was asked for is missing or damaged; `notes` says what."""
    notes: tuple[str, ...] = ()
    """One sentence for each thing that was lost or changed."""

    def __post_init__(self):
        if self.data.dtype != np.uint8 or self.data.ndim != 4 or self.data.shape[-1] != 3:
            raise ValueError(f"data must be uint8 [T, H, W, 3], got {self.data.dtype} {list(self.data.shape)}")
        if self.times_s.dtype != np.float64 or self.times_s.shape != self.data.shape[:1]:
            raise ValueError(
                f"times_s must be float64 [{len(self.data)}], one per frame, "
                f"got {self.times_s.dtype} {list(self.times_s.shape)}"
            )
        object.__setattr__(self, "notes", tuple(self.notes))

    @property
    def num_frames(self) -> int:
        return len(self.data)

    @property
    def height(self) -> int:
        return self.data.shape[1]

    @property
    def width(self) -> int:
        return self.data.shape[2]

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.data, self.times_s))

    def __repr__(self) -> str:
        span = f"{self.times_s[0]:.3f}..{self.times_s[-1]:.3f} s" if self.num_frames else "empty"
        lost = f", partial, notes={list(self.notes)}" if self.partial else ""
        return f"Frames(uint8 {list(self.data.shape)}, times {span} of {self.duration_s:.3f} s, {self.source!r}{lost})"
