"""Questions to train a policy on: generated clips, or a manifest of your own, in an order that can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from tokensieve.datasets.frames import Frames
from tokensieve.errors import BadOption


@dataclass(frozen=True)
class Asked:
    """A clip and what is asked about it. `load()` reads or draws its frames.

    Attributes:
        id: names the clip.
        questions, answers: of equal length; an answer may be None.
        source: path of a video or image, or (split, index, seed) of a generated clip.
    """

    id: str
    questions: tuple[str, ...]
    answers: tuple[str | None, ...]
    source: Path | tuple[str, int, int]

    def load(self, num_frames: int | None = None) -> Frames:
        """The frames; generated clips have 8."""
        if isinstance(self.source, tuple):
            from tokensieve.datasets.clip_files import clip_frames
            from tokensieve.datasets.clips import make_clip

            return clip_frames(make_clip(*self.source))
        from tokensieve.datasets import read_media

        return read_media(self.source, **({} if num_frames is None else {"num_frames": num_frames}))


def generated(split: str, count: int, seed: int = 0) -> list[Asked]:
    """The first clips of a split of the generated data, each with all its questions."""
    from tokensieve.datasets.clips import make_clip

    clips = [make_clip(split, i, seed) for i in range(count)]
    return [
        Asked(c.id, tuple(q.text for q in c.questions), tuple(q.answer for q in c.questions), (split, i, seed))
        for i, c in enumerate(clips)
    ]


def read_manifest(path: str | Path) -> list[Asked]:
    """Clips of a JSONL manifest with `video` (relative to it), `question` and, where there is one, `answer`.

    Raises:
        BadOption: the file is missing or empty, or has a line that is not such a row or whose video is missing; the
            line is named.
    """
    path = Path(path)
    if not path.is_file():
        raise BadOption(f"There is no manifest {str(path)!r}.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise BadOption(f"{str(path)!r} is not UTF-8 text.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            video, question, answer = row["video"], row["question"], row.get("answer")
            if not all(map(isinstance, (video, question, answer), (str, str, str | float | int | None))):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadOption(
                f"Line {number} of {str(path)!r} is no row ({type(error).__name__}).",
                hint='A row is a JSON object with the texts "video", "question" and, for most rewards, "answer".',
            ) from None
        if not os.path.exists(path.parent / video):
            raise BadOption(f"Line {number} of {str(path)!r} names a video that is not there: {video!r}.")
        rows.append((video, question, answer))
    if not rows:
        raise BadOption(f"The manifest {str(path)!r} is empty.")
    clips = []
    for video, group in groupby(sorted(rows, key=lambda row: row[0]), key=lambda row: row[0]):
        mine = list(group)
        answers = tuple(None if a is None else str(a) for _, _, a in mine)
        clips.append(Asked(video, tuple(q for _, q, _ in mine), answers, path.parent / video))
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
        manifest: JSONL of your own training questions; None for generated clips.
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
