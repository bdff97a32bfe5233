"""LeRobot datasets, versions 2.1 and 3.0, as trajectories; the `lerobot` library is not needed.

What is where is told in `lerobot_meta`. Numbers are read with pyarrow an episode at a time, pictures when asked for, at
the times the rows name, with the same hardened video reader as everything else.

Shape legend: T steps, H height, W width, 3 RGB
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tokensieve.datasets.limits import Limits
from tokensieve.datasets.sampling import whole
from tokensieve.datasets.sources import check_inside, check_path
from tokensieve.datasets.trajectories.columns import column_names, read_columns, read_pictures
from tokensieve.datasets.trajectories.lerobot_meta import Episode, Meta, Piece, read_meta
from tokensieve.datasets.trajectories.minestudio import refuse_minestudio
from tokensieve.datasets.trajectories.steps_video import read_steps
from tokensieve.datasets.trajectories.trajectory import Trajectory
from tokensieve.datasets.video import read_folder
from tokensieve.errors import BadOption, MediaError

_KEPT_APART = ("timestamp", "episode_index")  # checked, and not repeated in `info`
_SINGLE = (*_KEPT_APART, "frame_index", "index", "task_index")  # one number a row, whatever shape is claimed
_PICTURES = ("video", "image")


def open_lerobot(
    folder: str | os.PathLike,
    *,
    max_side: int | None = None,
    tolerance_s: float = 1e-4,
    limits: Limits | None = None,
) -> LeRobotDataset:
    """Open a LeRobot dataset folder; reads what is under `meta/`.

    Args:
        folder: The one that holds `meta/info.json`.
        max_side: Scale pictures down while decoding so that no side is longer.
        tolerance_s: How far a picture's time may lie from its row's.
        limits: Budget for each reading of pictures.

    Raises:
        BadOption: not such a dataset, another version, or contents that contradict each other.
        MediaNotAllowed: a file is a link out of the dataset.
    """
    folder = Path(os.path.abspath(check_path(folder)))
    refuse_minestudio(folder)
    if isinstance(tolerance_s, bool) or not isinstance(tolerance_s, int | float) or not 0 < tolerance_s < 1:
        raise BadOption(f"tolerance_s must lie between 0 and 1 second, got {tolerance_s!r}.")
    return LeRobotDataset(
        meta=read_meta(folder),
        max_side=None if max_side is None else whole("max_side", max_side, least=1),
        tolerance_s=float(tolerance_s),
        limits=limits or Limits(),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class LeRobotDataset:
    """A sequence of trajectories; see `open_lerobot`."""

    meta: Meta
    """What the dataset says about itself."""
    max_side: int | None
    tolerance_s: float
    limits: Limits

    def __len__(self) -> int:
        return len(self.meta.episodes)

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: int) -> Trajectory:
        """The episode at that place: its numbers are read now, its pictures when asked for.

        Returns:
            A trajectory with the actions "action" (and "action.*"), arrays [T, *shape of the feature]; a camera for
            each feature of pictures; every other feature as info, the dataset's own numbers as [T]; and, as the
            instruction, the task of the first step.

        Raises:
            BadOption: the file of rows is missing, damaged, or contradicts `meta/`.
        """
        if not -len(self) <= place < len(self):
            raise IndexError(f"there are {len(self)} episodes, no number {place}")
        meta, episode = self.meta, self.meta.episodes[place]
        check_inside(os.path.realpath(episode.rows.path), str(meta.root), str(episode.rows.path))
        there = column_names(episode.rows.path)
        wanted, notes = {key: () for key in _KEPT_APART}, []
        for key, feature in meta.features.items():
            if feature.dtype in _PICTURES:
                if feature.is_depth:
                    notes.append(f"{key!r} holds distances and is not read")
            elif key not in there:
                raise BadOption(f"{str(episode.rows.path)!r} has no column {key!r}.", "Get the whole dataset again.")
            else:
                wanted[key] = () if key in _SINGLE else feature.shape
        columns = read_columns(episode.rows.path, wanted, int(episode.rows.start), episode.length)
        notes += [f"column {key!r} is of a kind that is not read" for key in wanted if key not in columns]
        times_s = self._times_s(columns, episode)
        cameras = {key: f for key, f in meta.features.items() if f.dtype in _PICTURES and not f.is_depth}
        given = {key: values for key, values in columns.items() if key not in _KEPT_APART}
        instruction, said = _instruction(columns, episode, meta)
        return Trajectory(
            name=f"{meta.folder.name}-{episode.index}",
            timestamps_s=times_s,
            actions={key: values for key, values in given.items() if _is_action(key)},
            cameras={
                key: partial(self._video, episode.videos[key], times_s)
                if feature.dtype == "video"
                else partial(self._images, episode.rows, key)
                for key, feature in cameras.items()
            },
            instruction=instruction,
            info={key: values for key, values in given.items() if not _is_action(key)},
            notes=(*notes, *said),
        )

    def __repr__(self) -> str:
        return (
            f"LeRobotDataset({self.meta.folder.name!r}, {self.meta.version}, {len(self)} episodes at {self.meta.fps:g} "
            f"steps/s, features {list(self.meta.features)})"
        )

    def _times_s(self, columns: dict[str, np.ndarray], episode: Episode) -> np.ndarray:
        where = f"Episode {episode.index} in {str(episode.rows.path)!r}"
        for key in _KEPT_APART:
            if key not in columns or columns[key].dtype.kind not in "iuf":
                raise BadOption(f"{where} has no numbers in {key!r}.")
        others = columns["episode_index"] != episode.index
        if others.any():
            raise BadOption(
                f"{where}: row {int(others.argmax())} belongs to episode {columns['episode_index'][others][0]}.",
                "meta/ and data/ contradict each other; get the dataset again.",
            )
        return columns["timestamp"].astype(np.float64)

    def _video(self, piece: Piece, times_s: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Pictures shown at piece.start + times_s[start:stop], each within the tolerance of its time."""
        wanted_s = piece.start + times_s[start:stop]
        return read_steps(
            piece.path,
            wanted_s,
            fps=self.meta.fps,
            # rows keep times in 32 bits, which are coarser than the tolerance after some minutes
            tolerance_s=self.tolerance_s + float(np.spacing(np.float32(times_s[stop - 1]))),
            limits=self.limits,
            max_side=self.max_side,
            root=self.meta.root,
        )

    def _images(self, rows: Piece, key: str, start: int, stop: int) -> np.ndarray:
        """Encoded pictures of the rows, decoded by the hardened reader of folders."""
        self.limits.check_count(stop - start)
        with tempfile.TemporaryDirectory(prefix="tokensieve-") as folder:
            pictures = read_pictures(rows.path, key, int(rows.start) + start, stop - start)
            for number, picture in enumerate(pictures):  # the name says nothing: the reader looks at the bytes
                Path(folder, f"{number:07d}.png").write_bytes(picture)
            try:
                frames = read_folder(folder, num_frames=stop - start, max_side=self.max_side, limits=self.limits)
            except MediaError as error:
                what = f"{str(rows.path)!r}, column {key!r}, steps {start} to {stop}"
                raise type(error)(f"{what}: {error.message.replace(folder + os.sep, '')}", error.hint) from None
        return frames.data


def _is_action(key: str) -> bool:
    return key == "action" or key.startswith("action.")


def _instruction(columns: dict[str, np.ndarray], episode: Episode, meta: Meta) -> tuple[str | None, list[str]]:
    """The task of the first step, and a note where there are more."""
    numbers = columns.get("task_index")
    if numbers is None:
        tasks = list(episode.tasks)
    else:
        in_order = list(dict.fromkeys(numbers.ravel().tolist()))
        unknown = [number for number in in_order if number not in meta.tasks]
        if unknown:
            raise BadOption(f"Episode {episode.index} has task {unknown[0]}, of which meta/ says nothing.")
        tasks = [meta.tasks[number] for number in in_order]
    more = [f"it has {len(tasks)} tasks; the instruction is the first one"] if len(tasks) > 1 else []
    return (tasks[0] or None) if tasks else None, more
