"""Gathering decoded pictures, from this process or another, into one array.

Shape legend: T frames, H height, W width
"""

from __future__ import annotations

import numpy as np

from tokensieve.datasets.limits import Limits
from tokensieve.errors import BadMedia, MediaTooLarge


class Collector:
    """Gathers pictures of one size into one array that is allocated once."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._data: np.ndarray | None = None
        self._times_s: list[float] = []

    @property
    def num_pictures(self) -> int:
        return len(self._times_s)

    def room(self, time_s: float, height: int, width: int, most: int) -> np.ndarray:
        """Where the next picture's pixels go."""
        if self._data is None:
            self._limits.check_total(most, width, height)
            try:
                self._data = np.empty((most, height, width, 3), dtype=np.uint8)
            except MemoryError:
                raise MediaTooLarge(
                    f"There is no memory for {most} frames of {width}x{height}.",
                    "Ask for fewer frames or use max_side.",
                ) from None
        if self._data.shape[1:3] != (height, width) or self.num_pictures >= len(self._data):
            raise BadMedia("The pictures of the source do not fit together.")
        self._times_s.append(time_s)
        return self._data[self.num_pictures - 1]

    def add(self, time_s: float, pixels: np.ndarray, most: int) -> None:
        """The same for a decoder in this process."""
        self.room(time_s, *pixels.shape[:2], most)[...] = pixels

    def result(self, order: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Frames and times in the order asked for."""
        times_s = np.array(self._times_s, dtype=np.float64)
        if order == list(range(len(self._data))) and len(order) == self.num_pictures:
            return self._data, times_s
        self._limits.check_total(len(order), self._data.shape[2], self._data.shape[1])
        return self._data[order], times_s[order]
