"""Asks the questions about a few clips under every setting, and scores and times the answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tokensieve.compression import Plan
from tokensieve.datasets.frames import Frames
from tokensieve.datasets.manifest import Record
from tokensieve.errors import TokensieveError
from tokensieve.pipeline.evaluation.answers import Said, answer_all, choice_logliks
from tokensieve.pipeline.evaluation.prompts import encode_clip
from tokensieve.pipeline.evaluation.protocol import LIKELIHOOD, Clip, Protocol
from tokensieve.pipeline.evaluation.scores import choice_likelihood, get_score
from tokensieve.pipeline.evaluation.settings import Setting
from tokensieve.pipeline.results import Prepared
from tokensieve.pipeline.vlm import VLM

Row = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A question under one encoding; `prompt` is an error where it cannot be asked."""

    clip: Clip
    record: Record
    prompt: Prepared | TokensieveError
    read_s: float


def ask(vlm: VLM, clips: Sequence[Clip], protocol: Protocol, scores: Sequence[str], batch: int) -> dict[int, list[Row]]:
    """Rows of every clip by its number, by setting and then by question."""
    loaded = [(clip, *_load(clip, protocol)) for clip in clips]
    encodings: dict[tuple[str, bool], list[int]] = {}
    for number, setting in enumerate(protocol.settings):
        encodings.setdefault(setting.encoding, []).append(number)
    rows: dict[tuple[int, int], list[Row]] = {}
    for members in encodings.values():
        tower = protocol.settings[members[0]].tower
        needs = frozenset().union(*(protocol.settings[number].needs for number in members))
        vlm.compress(tower)
        asked = []
        for clip, frames, read_s in loaded:
            if isinstance(frames, TokensieveError):
                prompts = [frames] * len(clip.records)
            else:
                prompts = encode_clip(vlm, frames, [protocol.prompt(record) for record in clip.records], needs)
            asked += [
                _Asked(clip=clip, record=record, prompt=prompt, read_s=read_s)
                for record, prompt in zip(clip.records, prompts, strict=True)
            ]
        for number in members:
            for one, row in zip(asked, _under(vlm, asked, protocol, number, scores, batch), strict=True):
                rows.setdefault((one.clip.number, number), []).append(row)
    return {
        clip.number: [row for number in range(len(protocol.settings)) for row in rows[clip.number, number]]
        for clip in clips
    }


def _load(clip: Clip, protocol: Protocol) -> tuple[Frames | TokensieveError, float]:
    start = time.perf_counter()
    try:
        return clip.records[0].load(**protocol.read_options), time.perf_counter() - start
    except TokensieveError as error:
        return error, 0.0


def _under(
    vlm: VLM, asked: Sequence[_Asked], protocol: Protocol, number: int, scores: Sequence[str], batch: int
) -> list[Row]:
    """A row for every question under one setting."""
    setting = protocol.settings[number]
    setting.apply(vlm)
    known: dict[int, tuple[list[Plan], float]] = {}
    reads_question = "question" in setting.needs
    chosen = [_select(vlm, one, {} if reads_question else known) for one in asked]
    able = [i for i, choice in enumerate(chosen) if not isinstance(choice, TokensieveError)]
    said: dict[int, Said | TokensieveError] = dict(
        zip(
            able,
            answer_all(
                vlm,
                [asked[i].prompt for i in able],
                [chosen[i][0] for i in able],
                batch=batch,
                max_new_tokens=protocol.max_new_tokens,
            ),
            strict=True,
        )
    )
    rows = []
    for i, one in enumerate(asked):
        row = _blank(number, setting, one.record)
        try:
            row |= _outcome(vlm, one, protocol, setting, scores, chosen[i], said.get(i))
        except TokensieveError as error:
            row["error"] = f"{type(error).__name__}: {error.message}"
        rows.append(row)
    return rows


def _outcome(
    vlm: VLM,
    one: _Asked,
    protocol: Protocol,
    setting: Setting,
    scores: Sequence[str],
    chosen: tuple[list[Plan], float] | TokensieveError,
    said: Said | TokensieveError | None,
) -> Row:
    """What a question that got an answer adds to its row; raises what kept it from getting one."""
    for failure in (chosen, said):
        if isinstance(failure, TokensieveError):
            raise failure
    plans, select_s = chosen
    return {
        "said": said.text,
        **{score: _score(vlm, score, protocol, one, said.text, plans) for score in scores},
        "visual_tokens": said.visual_tokens,
        "visual_tokens_full": sum(len(item.slots) for item in one.prompt.items),
        "prompt_tokens": said.prompt_tokens,
        "kept": _kept(one.prompt, plans) if setting.chooses_before_decoder else None,
        "read_s": one.read_s,
        "encode_s": one.prompt.seconds["encode"],
        "select_s": select_s,
        "generate_s": said.seconds,
    }


def _select(
    vlm: VLM, one: _Asked, known: dict[int, tuple[list[Plan], float]]
) -> tuple[list[Plan], float] | TokensieveError:
    """Which tokens stay, and the seconds that took; once a clip for methods that do not read the question."""
    if isinstance(one.prompt, TokensieveError):
        return one.prompt
    if one.clip.number not in known:
        try:
            again = vlm.reselect(one.prompt)
        except TokensieveError as error:
            return error
        known[one.clip.number] = again.plans, again.seconds["select"]
    return known[one.clip.number]


def _score(vlm: VLM, name: str, protocol: Protocol, one: _Asked, said: str, plans: Sequence[Plan]) -> float | None:
    record = one.record
    if not protocol.applies(name, record):
        return None
    if name != LIKELIHOOD:
        return get_score(name)(said, record.answers, record.choices)
    logliks = choice_logliks(vlm, one.prompt, plans, protocol.continuations(record))
    return choice_likelihood(*logliks, record.answers, record.choices)


def _kept(prompt: Prepared, plans: Sequence[Plan]) -> list[int]:
    """Kept tokens, counted through all items of the prompt."""
    kept, first = [], 0
    for item, plan in zip(prompt.items, plans, strict=True):
        kept += [first + index for index in plan.kept.tolist()]
        first += len(item.tokens)
    return kept


def _blank(number: int, setting: Setting, record: Record) -> Row:
    return {
        "setting": number,
        "method": setting.method,
        "keep": float(setting.keep),
        "clip": record.clip,
        "id": record.id,
        "question": record.question,
        "kind": record.kind,
        "answers": list(record.answers),
        "choices": list(record.choices),
        "error": None,
    }
