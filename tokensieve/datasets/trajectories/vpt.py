"""Clips of VPT's contractors: `NAME.mp4` (640x360, 20 pictures a second) beside `NAME.jsonl` (one line a step).

Baker and others, arXiv 2206.11795, released with code; what the log's quirks are is told in `vpt_log` and in
docs/trajectories.md. Pictures are read lazily, a window at a time.

Shape legend: T steps, S recorded pictures, H height, W width, 3 RGB
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tokensieve.datasets.limits import Limits
from tokensieve.datasets.sampling import whole
from tokensieve.datasets.sources import check_path
from tokensieve.datasets.trajectories.minestudio import refuse_minestudio
from tokensieve.datasets.trajectories.screen import arrow_cursor, check_cursor, draw_cursor, resize_bilinear
from tokensieve.datasets.trajectories.steps_video import read_steps
from tokensieve.datasets.trajectories.trajectory import Trajectory
from tokensieve.datasets.trajectories.vpt_log import GUI_MOUSE_SCALES, read_vpt_log
from tokensieve.datasets.video import read_video
from tokensieve.errors import BadOption

STEPS_PER_S = 20
CAMERA = "screen"
_TOLERANCE_S = 0.1 / STEPS_PER_S  # of a picture's time, which containers round
_PIECE = 64  # pictures in memory at their recorded size: 44 MB


@dataclass(frozen=True, kw_only=True, eq=False)
class VPTOptions:
    """How a clip is read. The defaults keep what was recorded; `VPTOptions.as_released()` does as VPT's loader."""

    size: tuple[int, int] | None = (128, 128)
    """Height and width after bilinear scaling; None keeps the recorded size."""
    null_steps: str = "keep"
    """Either "keep", or "drop" the steps in which nothing is pressed or moved, and their pictures. A slot chosen with
    the wheel alone counts as nothing, as in VPT's loader."""
    truncate_camera: bool = False
    """Cut camera angles to whole degrees towards zero."""
    recorder_version: str | None = None
    """Scale mouse motion in menus as this version of the recorder needs ("6.9", say)."""
    cursor: np.ndarray | None = field(default_factory=arrow_cursor)
    """Drawn where the mouse is while a menu is open, uint8 [16, 16, 4]; None draws nothing."""
    limits: Limits = Limits()
    """Budget for each reading of pictures."""

    def __post_init__(self):
        if self.size is not None:
            if not isinstance(self.size, tuple | list) or len(self.size) != 2:
                raise BadOption(f"size must be (height, width) or None, got {self.size!r}.")
            object.__setattr__(self, "size", tuple(whole("size", side, least=1) for side in self.size))
        if self.null_steps not in ("keep", "drop"):
            raise BadOption(f"null_steps must be 'keep' or 'drop', got {self.null_steps!r}.")
        if self.recorder_version is not None and not isinstance(self.recorder_version, str):
            raise BadOption(
                f"recorder_version must be a text such as '6.9', got {self.recorder_version!r}; menus are scaled for "
                f"{', '.join(GUI_MOUSE_SCALES)}, in other versions motion is right as it is."
            )
        if self.cursor is not None:
            check_cursor(self.cursor)

    @classmethod
    def as_released(cls, **changes) -> VPTOptions:
        """What VPT's loader does: null steps dropped, angles truncated. Give it VPT's cursor for the same pixels."""
        return cls(**{"null_steps": "drop", "truncate_camera": True, **changes})


def read_vpt(video: str | os.PathLike, options: VPTOptions | None = None) -> Trajectory:
    """One clip. Picture k belongs to line k; where one of the two is longer, the rest of it is left out and noted.

    Args:
        video: The `.mp4`; the `.jsonl` is looked for beside it.
        options: See VPTOptions.

    Returns:
        A trajectory with the actions "buttons" uint8 [T, 20], "camera" float64 [T, 2] (pitch and yaw in degrees) and
        "other_buttons" uint8 [T, 3]; the camera "screen"; and, as info, "is_null", "is_gui_open", "hotbar" and "step"
        (the line in the log, from 0). `vpt_actions.encode_actions` makes the numbers that VPT's policies predict.

    Raises:
        BadOption: no log beside the video, a line in it that is no step, or no step left.
        MediaError: the video cannot be read. Also later, when pictures are asked for.
    """
    options = options or VPTOptions()
    video = Path(check_path(video))
    log = read_vpt_log(
        video.with_suffix(".jsonl"),
        truncate_camera=options.truncate_camera,
        recorder_version=options.recorder_version,
    )
    notes = list(log.notes)
    num_lines, num_pictures = len(log.is_null), _count_pictures(video, options.limits, notes)
    num_steps = min(num_lines, num_pictures)
    if num_lines != num_pictures:
        notes.append(f"the log has {num_lines} steps and the video {num_pictures} pictures: {num_steps} are used")
    step = np.arange(num_steps)
    if options.null_steps == "drop":
        step = step[~log.is_null[:num_steps]]
        if not len(step):
            raise BadOption(f"{str(video)!r}: in none of the {num_steps} steps something is done.")
    return Trajectory(
        name=video.stem,
        timestamps_s=step / STEPS_PER_S,
        actions={
            "buttons": log.buttons[step],
            "camera": log.camera[step],
            "other_buttons": log.other_buttons[step],
        },
        cameras={CAMERA: _Screen(video, options, step, log.cursor_xy[step], log.is_gui_open[step])},
        info={
            "is_null": log.is_null[step],
            "is_gui_open": log.is_gui_open[step],
            "hotbar": log.hotbar[step],
            "step": step,
        },
        notes=tuple(notes),
    )


def vpt_clips(folder: str | os.PathLike) -> list[Path]:
    """The videos of a folder that have a log beside them, by name.

    Raises:
        BadOption: no such folder, none in it, or a MineStudio dataset.
    """
    folder = Path(check_path(folder))
    refuse_minestudio(folder)
    clips = sorted(path for path in folder.glob("*.mp4") if path.with_suffix(".jsonl").is_file())
    if not clips:
        raise BadOption(f"{str(folder)!r} holds no NAME.mp4 with a NAME.jsonl beside it.")
    return clips


def _count_pictures(video: Path, limits: Limits, notes: list[str]) -> int:
    first = read_video(video, num_frames=1, start_s=0, end_s=1e-3, limits=limits, max_side=16)
    notes += first.notes
    return round(first.duration_s * STEPS_PER_S)


class _Screen:
    """Reads a window of steps: the recorded pictures, the cursor where a menu is open, scaled."""

    def __init__(self, video: Path, options: VPTOptions, step, cursor_xy, is_gui_open):
        self.video, self.options = video, options
        self.step, self.cursor_xy, self.is_gui_open = step, cursor_xy, is_gui_open

    def __call__(self, start: int, stop: int) -> np.ndarray:
        pieces, first = [], start
        while first < stop:  # by recorded pictures, not by steps: dropped ones may lie between
            past = int(np.searchsorted(self.step, self.step[first] + _PIECE))
            pieces.append(self._piece(first, min(past, stop)))
            first = past
        return np.concatenate(pieces)

    def _piece(self, start: int, stop: int) -> np.ndarray:
        step = self.step[start:stop]
        recorded = read_steps(
            self.video,
            np.arange(step[0], step[-1] + 1) / STEPS_PER_S,
            fps=STEPS_PER_S,
            tolerance_s=_TOLERANCE_S,
            limits=self.options.limits,
        )
        frames = recorded[step - step[0]]
        if self.options.cursor is not None:
            for k in np.flatnonzero(self.is_gui_open[start:stop]):
                draw_cursor(frames[k], self.options.cursor, *self.cursor_xy[start + k])
        return frames if self.options.size is None else resize_bilinear(frames, self.options.size)
