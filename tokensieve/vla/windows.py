"""What an agent meets in episodes of a grid world: windows that begin at any step, as a new plan may be due at any."""

# Shape legend: S steps of all episodes, B windows, T longest window, R remembered frames, H height, W width in pixels

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tokensieve.datasets.trajectories.episodes import Episodes
from tokensieve.datasets.trajectories.tiles import render_grids
from tokensieve.errors import BadOption
from tokensieve.vla.memory import Memory
from tokensieve.vla.trunks import NO_ACTION, Trunks


class Windows:
    """One window of at most T steps per step of some episodes; pictures are drawn when a batch is asked for.

    Actions are the expert's; the previous action is the one taken, which may be another where the expert was disturbed.

    Args:
        episodes: of a grid world.
        length: T.
        which: range of episodes; None for all.

    Raises:
        BadOption: there is no such range, or T is below 1.
    """

    def __init__(self, episodes: Episodes, length: int, which: range | None = None):
        which = range(len(episodes)) if which is None else which
        if length < 1 or not which or which.step != 1 or not 0 <= which.start < which.stop <= len(episodes):
            raise BadOption(
                f"Need windows of at least 1 step and a range within {len(episodes)} episodes, got {length}, {which}."
            )
        self.episodes, self.length = episodes, length
        borders = episodes.starts[which.start : which.stop + 1]
        self._start_S = np.arange(borders[0], borders[-1])
        owners_S = np.repeat(np.arange(which.start, which.stop), np.diff(borders))
        self._owner_S, self._end_S = owners_S, episodes.starts[owners_S + 1]

    def __len__(self) -> int:
        return len(self._start_S)

    def trunks(self, places: Tensor) -> Trunks:
        """The windows number `places` `[B]`; padding is at the end."""
        starts_B, steps_T = self._start_S[places.numpy()], np.arange(self.length)
        steps_BT = starts_B[:, None] + steps_T
        mask_BT = steps_BT < self._end_S[places.numpy()][:, None]
        steps_BT = np.where(mask_BT, steps_BT, starts_B[:, None])
        begins_BT = steps_BT == self.episodes.starts[self._owner_S[places.numpy()]][:, None]
        actions = self.episodes.actions[steps_BT].astype(np.int64)
        previous = np.where(begins_BT, NO_ACTION, self.episodes.taken[steps_BT - 1].astype(np.int64))
        return Trunks(
            frames=self._drawn(steps_BT, mask_BT),
            actions=torch.from_numpy(np.where(mask_BT, actions, 0))[..., None],
            previous=torch.from_numpy(np.where(mask_BT, previous, 0))[..., None],
            mask=torch.from_numpy(mask_BT),
        )

    def frames(self, places: Tensor) -> Tensor:
        """What is seen where the windows begin, `[B, H, W, 3]` uint8."""
        return torch.from_numpy(render_grids(self.episodes.grids[self._start_S[places.numpy()]]))

    def memory(self, places: Tensor, lags: Sequence[int]) -> Memory | None:
        """What was seen `lags` steps before the windows begin; None without lags."""
        if not lags:
            return None
        steps_BR = self._start_S[places.numpy()][:, None] - np.asarray(lags)
        there_BR = steps_BR >= self.episodes.starts[self._owner_S[places.numpy()]][:, None]
        return Memory(frames=self._drawn(steps_BR, there_BR), there=torch.from_numpy(there_BR))

    def instructions(self, places: Tensor) -> list[str]:
        """What was asked in the windows' episodes."""
        return self.episodes.missions[self._owner_S[places.numpy()]].tolist()

    def _drawn(self, steps: np.ndarray, mask: np.ndarray) -> Tensor:
        """Frames `[..., H, W, 3]` of steps `[...]`, zero where the mask is False."""
        frames = np.zeros((*mask.shape, *_size(self.episodes)), dtype=np.uint8)
        frames[mask] = render_grids(self.episodes.grids[steps[mask]])
        return torch.from_numpy(frames)


class _Shuffled(IterableDataset):
    def __init__(self, count: int, batch: int, seed: int):
        self.count, self.batch, self.seed = count, min(batch, count), seed

    def __iter__(self) -> Iterator[Tensor]:
        draw = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(self.count, generator=draw)
            for first in range(0, self.count - self.batch + 1, self.batch):
                yield order[first : first + self.batch]


def endless_batches(make: Callable[[Tensor], object], count: int, batch: int, seed: int) -> DataLoader:
    """`make(places)` of `batch` random places below `count`, for ever; every epoch in an order of its own.

    Raises:
        BadOption: there is nothing, or `batch` is below 1.
    """
    if count < 1 or batch < 1:
        raise BadOption(f"Need something to take batches of, of at least 1, got {count} and {batch}.")
    return DataLoader(_Shuffled(count, batch, seed), batch_size=None, collate_fn=make)


def batches_once(make: Callable[[Tensor], object], count: int, batch: int) -> DataLoader:
    """`make(places)` of all places in order, for validation."""
    return DataLoader(torch.arange(count).split(batch), batch_size=None, collate_fn=make)


def _size(episodes: Episodes) -> tuple[int, ...]:
    return render_grids(episodes.grids[:1]).shape[1:]
