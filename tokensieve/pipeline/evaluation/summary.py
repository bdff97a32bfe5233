"""What an evaluation found, setting by setting: summary.json, and timings.json for all that differs between runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tokensieve.pipeline.evaluation.statistics import mean_interval, paired_difference
from tokensieve.pipeline.machine import processor_name

Rows = Mapping[str, list]


def summarise(answers: pa.Table, scores: Sequence[str], **facts: object) -> dict[str, object]:
    """The numbers of summary.json, the same for the same answers.

    Args:
        answers: of `Store.finish`, setting 0 being all tokens.
        scores: names of the scores; the first is the main one.
        **facts: put in front: tokensieve, model, data.

    A score of a setting is the mean over the questions it applies to, with its 95 % interval from a bootstrap over
    clips and its paired difference against all tokens, on the questions that have a score in both. Questions that
    failed have no score: they are counted as `failed`.
    """
    numbers = sorted(set(answers["setting"].to_pylist()))
    settings = [_columns(answers, number) for number in numbers]
    return {
        **facts,
        "clips": len(set(settings[0]["clip"])),
        "questions": len(settings[0]["id"]),
        "scores": list(scores),
        "main_score": scores[0],
        "settings": [
            _setting(number, rows, settings[0], scores) for number, rows in zip(numbers, settings, strict=True)
        ],
    }


def summarise_timings(timings: pa.Table, answers: pa.Table, device: str = "cpu") -> dict[str, object]:
    """The numbers of timings.json: median seconds per question of every phase, failed questions left out.

    `total` is the median of the questions' totals, not the sum of the medians.
    """
    settings = []
    for number in sorted(set(timings["setting"].to_pylist())):
        rows, errors = _columns(timings, number), _columns(answers, number)["error"]
        phases = ("read", "encode", "select", "generate")
        seconds_NP = np.array(
            [[rows[f"{phase}_s"][i] for phase in phases] for i, error in enumerate(errors) if error is None]
        )
        medians: dict[str, float | None] = dict.fromkeys((*phases, "total"))
        if len(seconds_NP):
            medians = dict(zip(phases, np.median(seconds_NP, 0).tolist(), strict=True))
            medians["total"] = float(np.median(seconds_NP.sum(1)))
        settings.append({"setting": number, "seconds": medians})
    return {"machine": machine(device), "settings": settings}


def machine(device: str) -> str:
    """The processor, threads or GPU, and the versions that times depend on."""
    processor = processor_name()
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return f"{gpu}{processor}, {os.cpu_count()} CPUs, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def _columns(table: pa.Table, setting: int) -> Rows:
    return table.filter(pc.equal(table["setting"], setting)).drop_columns(["setting"]).to_pydict()


def _setting(number: int, rows: Rows, full: Rows, scores: Sequence[str]) -> dict[str, object]:
    return {
        "setting": number,
        "method": rows["method"][0] or None,
        "keep": rows["keep"][0],
        **{name: _mean(rows[name]) for name in ("visual_tokens", "visual_tokens_full", "prompt_tokens")},
        "failed": sum(error is not None for error in rows["error"]),
        "scores": {name: _score(rows, full, name) for name in scores},
        "kinds": _kinds(rows, scores[0]),
    }


def _score(rows: Rows, full: Rows, name: str) -> dict[str, object]:
    values, clips = _known(rows[name], rows["clip"])
    if not values:
        return {"mean": None, "low": None, "high": None, "n": 0, "difference": None}
    score = {**mean_interval(values, clips)._asdict(), "n": len(values), "difference": None}
    if rows is not full:
        pairs = list(zip(rows[name], full[name], strict=True))
        both, clips = _known([None if None in pair else pair for pair in pairs], rows["clip"])
        if both:
            score["difference"] = paired_difference(*map(list, zip(*both, strict=True)), clips)._asdict()
    return score


def _kinds(rows: Rows, score: str) -> dict[str, dict[str, object]]:
    kinds: dict[str, list[float]] = {}
    for kind, value in zip(rows["kind"], rows[score], strict=True):
        if kind is not None and value is not None:
            kinds.setdefault(kind, []).append(value)
    return {kind: {"mean": _mean(kinds[kind]), "n": len(kinds[kind])} for kind in sorted(kinds)}


def _known(values: Sequence, clips: Sequence[str]) -> tuple[list, list[str]]:
    known = [(value, clip) for value, clip in zip(values, clips, strict=True) if value is not None]
    return [value for value, _ in known], [clip for _, clip in known]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
