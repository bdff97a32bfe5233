"""One episode: what was seen, what was done, when, and what was asked for.

Step t holds the picture *before* action t. Pictures are often far larger than everything else (five minutes of 640x360
take 4 GB), so a camera is either an array or a function that reads a window of pictures when asked.

Shape legend: T steps, H height, W width, 3 RGB
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from tokensieve.errors import BadOption

FrameReader = Callable[[int, int], np.ndarray]
"""Called as reader(start, stop); returns uint8 [stop - start, H, W, 3]."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Trajectory:
    """An episode, checked when built.

    Raises:
        BadOption: no steps, arrays of different lengths, times that do not rise, or pictures of another form.
    """

    name: str
    """Names the episode in messages."""
    timestamps_s: np.ndarray
    """When each step happens, float64 [T], rising, in seconds since the episode's start (0 or a little later)."""
    actions: Mapping[str, np.ndarray]
    """Named arrays [T, ...]: what was done at each step."""
    cameras: Mapping[str, np.ndarray | FrameReader]
    """Named pictures, uint8 [T, H, W, 3], or readers of a window of them; may be empty."""
    instruction: str | None = None
    """What the episode was asked to do; None where nobody said."""
    info: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Further named arrays [T, ...] about each step."""
    notes: tuple[str, ...] = ()
    """One sentence for each thing that was lost or changed."""

    def __post_init__(self):
        times_s = self.timestamps_s
        if not isinstance(times_s, np.ndarray) or times_s.dtype != np.float64 or times_s.ndim != 1 or not len(times_s):
            raise BadOption(f"{self.name}: timestamps_s must be float64 [T], T at least 1, got {_form(times_s)}.")
        if not np.isfinite(times_s).all() or times_s[0] < 0 or (np.diff(times_s) <= 0).any():
            raise BadOption(f"{self.name}: timestamps_s must be finite, not negative, and rise from step to step.")
        if not self.actions:
            raise BadOption(f"{self.name}: a trajectory needs at least one array of actions.")
        for kind in ("actions", "info"):
            for key, values in getattr(self, kind).items():
                if not isinstance(values, np.ndarray) or values.shape[:1] != times_s.shape or values.dtype == object:
                    raise BadOption(
                        f"{self.name}: {kind}[{key!r}] must be an array of numbers or texts, one entry for each of the "
                        f"{len(times_s)} steps, got {_form(values)}."
                    )
        for key, pictures in self.cameras.items():
            if not callable(pictures):
                _check_pictures(pictures, len(times_s), f"{self.name}: camera {key!r}")
        for kind in ("actions", "info", "cameras"):
            object.__setattr__(self, kind, MappingProxyType(dict(getattr(self, kind))))
        object.__setattr__(self, "notes", tuple(self.notes))

    def __len__(self) -> int:
        return len(self.timestamps_s)

    def frames(self, start: int = 0, stop: int | None = None, *, camera: str | None = None) -> np.ndarray:
        """Pictures of the steps from `start` up to `stop` (left out; None is the end): uint8 [stop - start, H, W, 3].

        Args:
            start, stop: 0 <= start < stop <= T.
            camera: which one; None where there is a single one.

        Raises:
            BadOption: no such steps or camera, or a reader that returns something else than it should.
            MediaError: the pictures cannot be read.
        """
        stop = len(self) if stop is None else stop
        if not 0 <= start < stop <= len(self):
            raise BadOption(
                f"{self.name} has steps 0 to {len(self)}, the last left out; there is no window from {start} to {stop}."
            )
        if camera is None and len(self.cameras) == 1:
            (camera,) = self.cameras
        if camera not in self.cameras:
            given = "none was chosen" if camera is None else f"there is no {camera!r}"
            raise BadOption(f"{self.name} has the cameras {', '.join(self.cameras) or '(none)'}; {given}.")
        pictures = self.cameras[camera]
        if not callable(pictures):
            return pictures[start:stop]
        found = pictures(start, stop)
        _check_pictures(found, stop - start, f"{self.name}: the reader of camera {camera!r} for {start} to {stop}")
        return found

    def window(self, start: int, stop: int) -> Trajectory:
        """The steps from `start` up to `stop` as a trajectory; nothing is read. Past the end it is shorter.

        Streaming is `for start in range(0, len(t), 128): part = t.window(start, start + 128)`.
        """
        if not 0 <= start < min(stop, len(self)):
            raise BadOption(f"{self.name} has {len(self)} steps; there is no window from {start} to {stop}.")
        part = slice(start, min(stop, len(self)))
        return Trajectory(
            name=self.name,
            timestamps_s=self.timestamps_s[part],
            actions={key: values[part] for key, values in self.actions.items()},
            cameras={
                key: _later(pictures, start) if callable(pictures) else pictures[part]
                for key, pictures in self.cameras.items()
            },
            instruction=self.instruction,
            info={key: values[part] for key, values in self.info.items()},
            notes=self.notes,
        )

    def __repr__(self) -> str:
        actions = ", ".join(f"{key} {_form(values)}" for key, values in self.actions.items())
        return (
            f"Trajectory({self.name!r}, {len(self)} steps in {self.timestamps_s[-1]:.3f} s, {actions}, "
            f"cameras {list(self.cameras)}, {self.instruction!r})"
        )


def _later(reader: FrameReader, offset: int) -> FrameReader:
    return lambda start, stop: reader(offset + start, offset + stop)


def _form(values: object) -> str:
    return f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__


def _check_pictures(pictures: object, num_steps: int, what: str) -> None:
    is_array = isinstance(pictures, np.ndarray) and pictures.dtype == np.uint8 and pictures.ndim == 4
    if not is_array or len(pictures) != num_steps or pictures.shape[-1] != 3:
        raise BadOption(f"{what} must be uint8 [{num_steps}, H, W, 3], got {_form(pictures)}.")
