"""Where fewer tokens helped and hurt most: the clips of a report, with kept tokens drawn on their frames."""

# Shape legend: T frames of the clip, t frames of tokens, h x w tokens a frame

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tokensieve.errors import TokensieveError

if TYPE_CHECKING:
    from tokensieve.datasets.manifest import Record
    from tokensieve.pipeline.adapter import VisualItem
    from tokensieve.pipeline.vlm import VLM

MAX_FRAMES = 8  # of a clip, spread evenly
MAX_SIDE = 160  # pixels


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One drawn frame: a JPEG, a word about it, and the tokens it kept (None: no map of tokens)."""

    jpeg: bytes
    label: str
    kept: int | None
    full: int | None


@dataclass(frozen=True, kw_only=True)
class ExtremePicture:
    """A question that fewer tokens answered better or worse than all tokens.

    Attributes:
        id, clip, question, answers, choices: of the record; answers are those that count as right.
        said_all, said: what the model said with all tokens and with fewer.
        score_all, score: what that was worth.
        visual_tokens, visual_tokens_full: how many the model saw, and how many there were.
        kept: their indices; None for methods that work inside the tower or the language model.
        frames: the drawing; empty until `draw_extremes` made it, and when the clip could not be read again.
    """

    id: str
    clip: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    said_all: str
    said: str
    score_all: float
    score: float
    visual_tokens: float
    visual_tokens_full: float
    kept: tuple[int, ...] | None
    frames: tuple[Frame, ...] = ()

    @property
    def gain(self) -> float:
        return self.score - self.score_all


@dataclass(frozen=True, kw_only=True)
class Extremes:
    """The outcome of one method at its smallest budget, question by question against all tokens.

    Attributes:
        keep: the budget.
        better, worse, equal: number of questions.
        best, worst: the questions with the largest gain and loss, at most one a clip; ties go by id.
    """

    keep: float
    better: int
    worse: int
    equal: int
    best: tuple[ExtremePicture, ...]
    worst: tuple[ExtremePicture, ...]

    @property
    def unmapped(self) -> bool:
        """Whether the method left no indices of kept tokens to draw."""
        return any(picture.kept is None for picture in (*self.best, *self.worst))


def extreme_clips(out_dir: Path, num_clips: int = 2) -> dict[str, Extremes]:
    """The best and worst clips of every method at its smallest budget, from `summary.json` and `answers.parquet`."""
    import pyarrow.parquet as pq

    summary = json.loads((out_dir / "summary.json").read_text(encoding="utf-8"))
    score = summary["main_score"]
    smallest: dict[str, Mapping] = {}
    for setting in summary["settings"]:
        if setting["visual_tokens"] is None:  # every question failed
            continue
        best = smallest.get(setting["method"])
        if best is None or _size(setting) < _size(best):
            smallest[setting["method"]] = setting
    if None not in smallest:
        return {}
    whole = smallest.pop(None)["setting"]
    path = out_dir / "answers.parquet"

    def rows(setting: int) -> dict[str, dict]:
        table = pq.read_table(path, columns=["id", "clip", score], filters=[("setting", "==", setting)])
        return {row["id"]: row for row in table.to_pylist() if row[score] is not None}

    with_all = rows(whole)
    found = {}
    for method, setting in smallest.items():
        gains = [
            (row[score] - with_all[id_][score], id_, row["clip"])
            for id_, row in rows(setting["setting"]).items()
            if id_ in with_all
        ]
        best = _one_a_clip(sorted((g for g in gains if g[0] > 0), key=lambda g: (-g[0], g[1])), num_clips)
        worst = _one_a_clip(sorted(g for g in gains if g[0] < 0), num_clips)
        better, worse = sum(g[0] > 0 for g in gains), sum(g[0] < 0 for g in gains)
        found[method] = Extremes(
            keep=setting["keep"],
            better=better,
            worse=worse,
            equal=len(gains) - better - worse,
            best=_pictures(path, score, best, setting["setting"], whole),
            worst=_pictures(path, score, worst, setting["setting"], whole),
        )
    return found


def _size(setting: Mapping) -> tuple[float, float]:
    return setting["visual_tokens"], setting["keep"]


def _one_a_clip(gains: Sequence[tuple[float, str, str]], num_clips: int) -> list[str]:
    """The ids of the first gain of each clip."""
    chosen: dict[str, str] = {}
    for _, id_, clip in gains:
        chosen.setdefault(clip, id_)
    return list(chosen.values())[:num_clips]


def _pictures(path: Path, score: str, ids: Sequence[str], setting: int, whole: int) -> tuple[ExtremePicture, ...]:
    import pyarrow.parquet as pq

    if not ids:
        return ()
    wanted = [("setting", "in", [setting, whole]), ("id", "in", ids)]
    rows = {(row["setting"], row["id"]): row for row in pq.read_table(path, filters=wanted).to_pylist()}
    pictures = []
    for id_ in ids:
        row, row_all = rows[setting, id_], rows[whole, id_]
        pictures.append(
            ExtremePicture(
                id=id_,
                clip=row["clip"],
                question=row["question"],
                answers=tuple(row["answers"]),
                choices=tuple(row["choices"]),
                said_all=row_all["said"],
                said=row["said"],
                score_all=row_all[score],
                score=row[score],
                visual_tokens=row["visual_tokens"],
                visual_tokens_full=row["visual_tokens_full"],
                kept=None if row["kept"] is None else tuple(row["kept"]),
            )
        )
    return tuple(pictures)


def draw_extremes(
    vlm: VLM, records_by_id: Mapping[str, Record], extremes: Mapping[str, Extremes], **read_options
) -> dict[str, Extremes]:
    """The same extremes with frames, kept places untouched and dropped ones dimmed. Takes any compression off `vlm`.

    Each clip is read and encoded once more, for the shape of its tokens; `read_options` must be those of the run.
    A clip that cannot be read any more stays without frames.
    """
    vlm.compress(None)
    every = [picture for of in extremes.values() for picture in (*of.best, *of.worst)]
    drawn: dict[tuple[str, tuple[int, ...] | None], tuple[Frame, ...]] = {}
    for id_ in dict.fromkeys(picture.id for picture in every):
        mine = [picture for picture in every if picture.id == id_]
        try:
            prepared = vlm.prepare(records_by_id[id_].load(**read_options), mine[0].question)
        except (TokensieveError, KeyError):
            continue
        for picture in mine:
            drawn[id_, picture.kept] = _frames(prepared, picture.kept, vlm.processor)

    def with_frames(pictures: Sequence[ExtremePicture]) -> tuple[ExtremePicture, ...]:
        return tuple(replace(p, frames=drawn.get((p.id, p.kept), ())) for p in pictures)

    return {
        method: replace(of, best=with_frames(of.best), worst=with_frames(of.worst)) for method, of in extremes.items()
    }


def _frames(prepared, kept: Sequence[int] | None, processor) -> tuple[Frame, ...]:
    from tokensieve.pipeline.picture import draw_kept, seen_area, shown_masks

    (clip,) = prepared.clips
    frames = seen_area(clip.data, processor)
    times = [f"{t:.2f} s" if clip.num_frames > 1 else "" for t in clip.times_s]
    which = np.linspace(0, clip.num_frames - 1, min(clip.num_frames, MAX_FRAMES)).round().astype(int)
    if kept is None:
        return tuple(Frame(jpeg=_jpeg(frames[i]), label=times[i], kept=None, full=None) for i in which)
    drawn = []
    for mask in shown_masks(prepared.items, _plans(prepared.items, kept), clip.num_frames):
        mask_T = mask[np.arange(clip.num_frames) * len(mask) // clip.num_frames]
        for i, picture in zip(which, draw_kept(frames[which], mask_T[which]), strict=True):
            drawn.append(
                Frame(jpeg=_jpeg(picture), label=times[i], kept=int(mask_T[i].sum()), full=int(mask_T[i].size))
            )
    return tuple(drawn)


def _plans(items: Sequence[VisualItem], kept: Sequence[int]):
    """One plan an item from indices that count through all items of a prompt."""
    import torch

    from tokensieve.compression import Plan

    plans, first = [], 0
    for item in items:
        mine = [index - first for index in kept if first <= index < first + len(item.tokens)]
        plans.append(Plan(torch.tensor(mine, dtype=torch.int64), len(item.tokens)))
        first += len(item.tokens)
    return plans


def _jpeg(picture: np.ndarray) -> bytes:
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85, subsampling=0)
    return file.getvalue()
