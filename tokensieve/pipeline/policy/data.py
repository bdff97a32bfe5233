"""Questions to train a policy on: generated clips, or a manifest of your own, in an order that can be resumed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from tokensieve.datasets.frames import Frames
from tokensieve.datasets.manifest import Record, generated_records, read_records
from tokensieve.errors import BadOption


@dataclass(frozen=True)
class Asked:
    """A clip and what is asked about it.

    Attributes:
        id: names the clip.
        questions, answers: of equal length; an answer may be None.
        source: a record of the clip, which can read it.
    """

    id: str
    questions: tuple[str, ...]
    answers: tuple[str | None, ...]
    source: Record

    def load(self) -> Frames:
        """The frames: 8, or one of an image."""
        return self.source.load()


def generated(split: str, count: int, seed: int = 0) -> list[Asked]:
    """The first clips of a split of the generated data, each with all its questions."""
    return _by_clip(generated_records(split, count, seed))


def read_manifest(path: str | Path) -> list[Asked]:
    """Clips of a manifest or dataset folder, ordered by name; the first of several accepted answers counts.

    Raises:
        BadOption: as `read_records`; answers may be missing.
    """
    return _by_clip(read_records(path, needs=("question",)))


def _by_clip(records: list[Record]) -> list[Asked]:
    def part(record: Record) -> tuple:
        return record.clip, record.start_s or 0.0, record.end_s or math.inf

    clips = []
    for (clip, *_), group in groupby(sorted(records, key=part), key=part):
        mine = list(group)
        answers = tuple(record.answers[0] if record.answers else None for record in mine)
        clips.append(Asked(clip, tuple(record.question for record in mine), answers, mine[0]))
    return clips


def source_of_draws(seed: int, place: int, question: int) -> torch.Generator:
    """The randomness for one question of the clip that is number `place` of the whole training."""
    (mixed,) = np.random.SeedSequence((seed, place, question)).generate_state(1)
    return torch.Generator().manual_seed(int(mixed))


class Stream(IterableDataset):
    """Batches of clips for ever, each epoch in an order of its own; batch `t` is the same whenever training starts."""

    def __init__(self, clips: list[Asked], batch: int, seed: int, rank: int = 0, world: int = 1, start: int = 0):
        self.clips, self.batch, self.seed = clips, batch, seed
        self.rank, self.world, self.start = rank, world, start

    def __iter__(self) -> Iterator[list[Asked]]:
        step = self.start
        while True:
            first = (step * self.world + self.rank) * self.batch
            yield [self.clips[self._at(first + j)] for j in range(self.batch)]
            step += 1

    def _at(self, index: int) -> int:
        epoch, place = divmod(index, len(self.clips))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return int(torch.randperm(len(self.clips), generator=generator)[place])


class PolicyData(L.LightningDataModule):
    """Training and validation questions.

    Args:
        manifest: your own training questions (JSONL, CSV, Parquet or a dataset folder); None for generated clips.
        val_manifest: the same for validation.
        clips: generated training clips.
        val_clips: generated validation clips.
        batch: clips a step and process, each with all its questions.
        seed: of the order.
    """

    def __init__(
        self,
        manifest: str | None = None,
        val_manifest: str | None = None,
        clips: int = 2000,
        val_clips: int = 100,
        batch: int = 2,
        seed: int = 0,
    ):
        super().__init__()
        for name, value in (("clips", clips), ("val_clips", val_clips), ("batch", batch)):
            if value < 1:
                raise BadOption(f"{name} must be above 0, got {value}.")
        if seed < 0:
            raise BadOption(f"seed must be from 0 up, got {seed}.")
        self.manifest, self.val_manifest = manifest, val_manifest
        self.num_clips, self.num_val, self.batch, self.seed = clips, val_clips, batch, seed
        self.steps_done = 0

    def setup(self, stage: str) -> None:
        self.train = read_manifest(self.manifest) if self.manifest else generated("train", self.num_clips)
        if self.manifest and not self.val_manifest:
            self.val = []
        else:
            self.val = read_manifest(self.val_manifest) if self.val_manifest else generated("val", self.num_val)

    @property
    def val_has_answers(self) -> bool:
        """Whether there is a right answer to every validation question."""
        return all(answer is not None for clip in self.val for answer in clip.answers)

    def train_dataloader(self) -> DataLoader:
        stream = Stream(
            self.train,
            self.batch,
            self.seed,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            start=self.steps_done,
        )
        return DataLoader(stream, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        chunks = [self.val[i : i + self.batch] for i in range(0, len(self.val), self.batch)]
        return DataLoader(chunks, batch_size=None)  # the Trainer shares them out among processes

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch  # names of clips, not tensors

    def state_dict(self) -> dict[str, int]:
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps_done = state["steps_done"]
