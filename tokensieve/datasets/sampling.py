"""Which frames to take: from timestamps only, in exact arithmetic, never from index / fps.

The frame *shown* at time t is the last one with pts <= t. Example, 8 frames of a clip with pts
0 .. 249: targets 0, 249/7, 2*249/7, ..., 249, so the first and the last frame are always among them.

Shape legend: N frames in the file, T frames asked for
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tokensieve.datasets.limits import Limits
from tokensieve.errors import BadMedia, BadOption

DEFAULT_NUM_FRAMES = 8
SHORT_POLICIES = ("repeat", "fewer", "error")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What the caller asked for, validated."""

    num_frames: int | None = None
    """Frames spread evenly in time, both ends included; 8 when neither this nor fps is given."""
    fps: float | None = None
    """Frames per second, counted from the start of the range."""
    start_s: float | None = None
    """Start of the range in seconds since the first frame; None is the first frame."""
    end_s: float | None = None
    """End of the range; None is the end of the file."""
    short: str = "repeat"
    """What to do when one frame would be returned twice: repeat it, return fewer, or raise an error."""

    def __post_init__(self):
        if self.num_frames is not None and self.fps is not None:
            raise BadOption(f"Give num_frames or fps, not both (got {self.num_frames!r} and {self.fps!r}).")
        if self.num_frames is None and self.fps is None:
            object.__setattr__(self, "num_frames", DEFAULT_NUM_FRAMES)
        if self.num_frames is not None:
            object.__setattr__(self, "num_frames", whole("num_frames", self.num_frames, least=1))
        for name in ("fps", "start_s", "end_s"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _finite(name, value))
        if self.fps is not None and not 1e-6 <= self.fps <= 1e6:
            raise BadOption(f"fps must lie between 1e-6 and 1e6 frames per second, got {self.fps!r}.")
        if (self.start_s or 0.0) < 0:
            raise BadOption(f"start_s must be 0 or more seconds, got {self.start_s!r}.")
        if self.end_s is not None and self.end_s <= (self.start_s or 0.0):
            raise BadOption(f"end_s must be greater than start_s, got start_s={self.start_s!r}, end_s={self.end_s!r}.")
        if self.short not in SHORT_POLICIES:
            raise BadOption(f"short must be one of {', '.join(SHORT_POLICIES)}, got {self.short!r}.")


@dataclass(frozen=True, kw_only=True)
class Picks:
    """Which of the file's frames were chosen."""

    index: np.ndarray
    """Positions among the file's frames in display order, ascending, may repeat, int64 [T]."""
    notes: tuple[str, ...] = ()
    """What could not be met."""


def pick(sampling: Sampling, pts: np.ndarray, end_pts: int, time_base: Fraction, limits: Limits) -> Picks:
    """Choose frames. `pts` is ascending int64 [N] in units of `time_base` seconds; `end_pts` is when the last one
    disappears."""
    first, last = int(pts[0]), int(pts[-1])
    duration_s = (end_pts - first) * time_base
    start_s = _exact(sampling.start_s or 0.0)
    if start_s >= duration_s:
        raise BadOption(f"start_s={sampling.start_s} lies after the end of the video at {float(duration_s):.3f} s.")
    notes = []
    end_s = duration_s if sampling.end_s is None else _exact(sampling.end_s)
    frame_s = duration_s / len(pts)
    if end_s > duration_s + frame_s:  # one frame of slack: durations in headers are rounded
        notes.append(f"asked up to {sampling.end_s:g} s, but the video ends at {float(duration_s):.3f} s: truncated")
    end_s = min(end_s, duration_s)

    if sampling.num_frames is not None:
        limits.check_count(sampling.num_frames)
        last_s = min((last - first) * time_base, end_s)
        targets_s = _evenly(min(start_s, last_s), last_s, sampling.num_frames)
        if start_s > last_s:  # the range lies within the last frame
            targets_s = [start_s] * sampling.num_frames
    else:
        fps = _exact(sampling.fps)
        count = max(1, math.ceil((end_s - start_s) * fps))
        limits.check_count(count)
        targets_s = [start_s + Fraction(k) / fps for k in range(count)]
    shown = np.array([first + math.floor(t / time_base) for t in targets_s], dtype=np.int64)
    return Picks(index=np.searchsorted(pts, shown, side="right") - 1, notes=tuple(notes))


def apply_short(order: list[int], short: str) -> list[int]:
    """Apply the policy for frames that would be returned more than once; `order` is ascending."""
    distinct = sorted(set(order))
    if short == "repeat" or len(distinct) == len(order):
        return order
    if short == "fewer":
        return distinct
    raise BadMedia(
        f"{len(order)} frames were asked for, but only {len(distinct)} different ones can be had in that range.",
        "Ask for fewer frames, or use short='repeat' or short='fewer'.",
    )


def whole(name: str, value, *, least: int) -> int:
    """A whole number of at least `least`, or BadOption."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise BadOption(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return number


def _finite(name: str, value) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool | str | bytes) or not math.isfinite(number):
        raise BadOption(f"{name} must be a finite number, got {value!r}.")
    return number


def _evenly(start_s: Fraction, last_s: Fraction, num_frames: int) -> list[Fraction]:
    if num_frames == 1:
        return [(start_s + last_s) / 2]
    return [start_s + (last_s - start_s) * k / (num_frames - 1) for k in range(num_frames)]


def _exact(value: float) -> Fraction:
    """The simple fraction a float stands for: 0.3 means 3/10, not the double just below it, which would show the
    frame before the one at 0.3 s."""
    return Fraction(value).limit_denominator(10**7)
