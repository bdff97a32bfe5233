"""Many short grid-world episodes in a handful of arrays, and the file they are kept in.

A file is what `numpy.savez_compressed` writes (a zip of .npy files), so other tools can open it. Reading trusts none of
it: names, types and sizes are checked before anything is unpacked, and nothing can be unpickled.

Shape legend: S steps of all episodes one after the other, E episodes
"""

from __future__ import annotations

import math
import os
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokensieve.datasets.sources import check_path
from tokensieve.datasets.trajectories.tiles import VIEW, check_grids, render_grids
from tokensieve.datasets.trajectories.trajectory import Trajectory
from tokensieve.errors import BadOption

ACTIONS = ("left", "right", "forward", "pickup", "drop", "toggle", "done")
STEP_S = 1.0  # a grid world has no clock
MAX_FILE_BYTES = 4 << 30  # of the arrays when unpacked: about 27 million steps

# name -> kind of dtype, largest bytes an entry, shape with letters of the legend
_FORM = {
    "grids": ("u", 1, ("S", VIEW, VIEW, 3)),
    "actions": ("u", 1, ("S",)),
    "taken": ("u", 1, ("S",)),
    "starts": ("i", 8, ("E+1",)),
    "seeds": ("i", 8, ("E",)),
    "levels": ("U", 4 * 200, ("E",)),
    "missions": ("U", 4 * 1000, ("E",)),
}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Episodes:
    """Episodes of one kind of world; `episodes[k]` is a Trajectory, its pictures drawn when asked for.

    Raises:
        BadOption: arrays that don't fit together.
    """

    grids: np.ndarray
    """What the agent sees before each step, uint8 [S, 7, 7, 3] (see `tiles`)."""
    actions: np.ndarray
    """What the expert says to do, numbers of ACTIONS, uint8 [S]: the label."""
    taken: np.ndarray
    """What was done, uint8 [S]: not always the label when the expert was disturbed."""
    starts: np.ndarray
    """Episode k is the steps starts[k] up to starts[k + 1], int64 [E + 1]."""
    seeds: np.ndarray
    """Of the world of each episode, int64 [E]."""
    levels: np.ndarray
    """Name of the world's level, text [E]."""
    missions: np.ndarray
    """What was asked, text [E]."""

    def __post_init__(self):
        arrays = {name: getattr(self, name) for name in _FORM}
        for name, values in arrays.items():
            if not isinstance(values, np.ndarray):
                raise BadOption(f"{name} must be an array, got {type(values).__name__}.")
            _check_form(name, values.dtype, values.shape)
        num_steps, num_episodes = len(self.grids), len(self.seeds)
        lengths = {"S": num_steps, "E": num_episodes, "E+1": num_episodes + 1}
        for name, (_, _, shape) in _FORM.items():
            if len(arrays[name]) != lengths[shape[0]]:
                raise BadOption(f"{name} must have {lengths[shape[0]]} entries ({shape[0]}), got {len(arrays[name])}.")
        if self.starts[0] != 0 or self.starts[-1] != num_steps or (np.diff(self.starts) < 1).any():
            raise BadOption(f"starts must rise from 0 to the number of steps, {num_steps}.")
        check_grids(self.grids)
        for name in ("actions", "taken"):
            if num_steps and arrays[name].max() >= len(ACTIONS):
                raise BadOption(f"{name} must be below {len(ACTIONS)}, got {arrays[name].max()}.")

    @classmethod
    def join(cls, parts: Sequence[Episodes]) -> Episodes:
        """All episodes of the parts, in their order."""
        if not parts:
            raise BadOption("There is nothing to join.")
        joined = {name: np.concatenate([getattr(p, name) for p in parts]) for name in _FORM if name != "starts"}
        lengths = np.concatenate([np.diff(part.starts) for part in parts])
        return cls(**joined, starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> Trajectory:
        """Episode `index`: actions "action" and "taken", the camera "view" (56x56) and, as info, "grid"."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} episodes, no number {index}")
        index %= len(self)
        steps = slice(int(self.starts[index]), int(self.starts[index + 1]))
        grids = self.grids[steps]
        return Trajectory(
            name=f"{self.levels[index]}-{self.seeds[index]}",
            timestamps_s=np.arange(len(grids)) * STEP_S,
            actions={"action": self.actions[steps], "taken": self.taken[steps]},
            cameras={"view": lambda start, stop: render_grids(grids[start:stop])},
            instruction=str(self.missions[index]),
            info={"grid": grids},
        )

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"Episodes({len(self)} with {len(self.grids)} steps, levels {sorted(set(self.levels.tolist()))})"


def write_episodes(path: str | os.PathLike, episodes: Episodes) -> None:
    """Write `episodes` to one `.npz`; the file appears whole or not at all."""
    path = Path(os.path.abspath(check_path(path)))
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".npz", delete=False) as file:
        try:
            np.savez_compressed(file, **{name: getattr(episodes, name) for name in _FORM})
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def read_episodes(path: str | os.PathLike, *, max_bytes: int = MAX_FILE_BYTES) -> Episodes:
    """Read what `write_episodes` wrote.

    Args:
        path: The file.
        max_bytes: Of all arrays together when unpacked.

    Raises:
        BadOption: no such file, another one, a damaged one, or too large a one.
    """
    path = Path(check_path(path))
    try:
        with zipfile.ZipFile(path) as archive:
            return Episodes(**_unpack(archive, max_bytes))
    except BadOption as error:
        raise BadOption(f"{str(path)!r} holds no episodes: {error.message}", error.hint) from None
    except FileNotFoundError:
        raise BadOption(f"There is no file {str(path)!r}.") from None
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
        raise BadOption(f"{str(path)!r} holds no episodes, or damaged ones ({type(error).__name__}).") from None
    except Exception as error:  # zlib.error and whatever else a packer raises
        raise BadOption(f"{str(path)!r} holds damaged episodes ({type(error).__name__}).") from None


def _unpack(archive: zipfile.ZipFile, max_bytes: int) -> dict[str, np.ndarray]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if set(entries) != {f"{name}.npy" for name in _FORM} or len(archive.infolist()) != len(_FORM):
        raise BadOption(f"it must consist of {', '.join(_FORM)}, got {', '.join(sorted(entries))[:200]}.")
    size = sum(entry.file_size for entry in entries.values())
    if size > max_bytes:
        raise BadOption(f"its arrays take {size} bytes, {max_bytes} are allowed.", "Raise max_bytes if you trust it.")
    return {name: _array(archive, entries[f"{name}.npy"], name) for name in _FORM}


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> np.ndarray:
    """One array; the header is believed only where it agrees with the size of the entry."""
    with archive.open(entry) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise BadOption(f"{name} is in a version of .npy that numpy uses for other things only.")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=2000)
        _check_form(name, dtype, shape)
        size = math.prod(shape) * dtype.itemsize
        if is_fortran or size != entry.file_size - file.tell():
            raise BadOption(f"the header of {name} does not fit its size.")
        values = np.frombuffer(file.read(size), dtype=dtype).reshape(shape)
    if dtype.kind == "U" and values.size and values.view(np.uint32).max() > 0x10FFFF:
        raise BadOption(f"{name} is no text.")
    return values


def _check_form(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    kind, most_bytes, form = _FORM[name]
    exact = kind == "U" or dtype.itemsize == most_bytes
    if dtype.kind != kind or not exact or dtype.itemsize > most_bytes or not dtype.isnative:
        raise BadOption(f"{name} must be of kind {kind!r} with at most {most_bytes} bytes an entry, got {dtype}.")
    if len(shape) != len(form) or shape[1:] != form[1:] or min(shape, default=0) < 0:
        raise BadOption(f"{name} must be {list(form)}, got {list(shape)}.")
