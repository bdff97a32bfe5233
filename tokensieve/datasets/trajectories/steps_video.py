"""The pictures of consecutive steps from a video, each at its own time or not at all.

Shape legend: T steps, H height, W width, 3 RGB
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tokensieve.datasets.limits import Limits
from tokensieve.datasets.video import read_video
from tokensieve.errors import BadMedia, BadOption


def read_steps(
    path: Path,
    wanted_s: np.ndarray,
    *,
    fps: float,
    tolerance_s: float,
    limits: Limits,
    max_side: int | None = None,
    root: Path | None = None,
) -> np.ndarray:
    """Pictures of a video at `wanted_s`, float64 [T], which are 1/fps apart: uint8 [T, H, W, 3].

    Raises:
        BadMedia: pictures are missing, lost, or further than `tolerance_s` from the times that are wanted.
        MediaError: see `read_video`.
    """
    count, start_s = len(wanted_s), float(wanted_s[0])
    try:
        frames = read_video(
            path,
            fps=fps,
            start_s=start_s + 0.5 / fps,  # half a picture later, where no rounding shows the one before
            end_s=start_s + count / fps,
            max_side=max_side,
            limits=limits,
            root=root,
        )
        found_s = frames.times_s
    except BadOption:  # the video ends before the first of them
        found_s = np.zeros(0)
    if len(found_s) != count or np.abs(found_s - wanted_s).max() > tolerance_s:
        raise BadMedia(
            f"{str(path)!r} does not show {fps:g} pictures a second where they are wanted: {_span(wanted_s)} are "
            f"needed, {_span(found_s)} were found.",
            "Pictures and steps cannot be matched; get the recording itself.",
        )
    return frames.data


def _span(times_s: np.ndarray) -> str:
    return f"{len(times_s)} from {times_s[0]:.4f} to {times_s[-1]:.4f} s" if len(times_s) else "none"
