"""Every question under every setting, clip by clip, into a folder that an interrupted run goes on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tokensieve import __version__
from tokensieve.datasets.manifest import Record
from tokensieve.errors import BadOption
from tokensieve.pipeline.evaluation.asking import ask
from tokensieve.pipeline.evaluation.identity import run_options
from tokensieve.pipeline.evaluation.protocol import Clip, Protocol, check_scores, clips_of
from tokensieve.pipeline.evaluation.store import SUMMARY, SUMMARY_TIMINGS, Store, write_json
from tokensieve.pipeline.evaluation.summary import summarise, summarise_timings
from tokensieve.pipeline.vlm import VLM

_WARM_UPS = 3  # clips tried until one can be read


def evaluate(
    vlm: VLM,
    records: Sequence[Record],
    protocol: Protocol,
    out: str | Path,
    *,
    batch: int = 8,
    data: str = "",
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, object]:
    """Answers, scores and times every question under every setting.

    A clip is read once, and encoded once for all methods that leave the tower as it is; once more for those that look
    into the tower, because recording takes time, and once for every tower stage. A clip is done when its part is in
    `out`; a run with the same options goes on from there.
    A clip that cannot be read, a question that cannot be asked and a method that refuses a clip leave rows with an
    error and without a score. See `store.py` for the files.

    Args:
        vlm: a loaded model; its compression is taken off.
        records: questions with accepted answers.
        protocol: settings, scores and how to ask.
        out: a new folder, or that of an interrupted run with the same options.
        batch: prompts that go through the language model together. It changes no result, and may differ when a run
            is taken up again.
        data: what to call the questions in the files.
        command: what the user typed, for the report.
        progress: called with the number of finished clips and of failed rows.

    Returns:
        What is in `out/summary.json`.

    Raises:
        BadOption: options that do not fit the questions, a method without the policy it needs, a folder of another
            run, or a damaged part.
        UnsupportedModel: a method cannot work in this model.
    """
    if batch < 1:
        raise BadOption(f"batch must be above 0, got {batch}.")
    scores = check_scores(protocol, records)
    protocol = replace(protocol, settings=tuple(setting.apply(vlm) for setting in protocol.settings))
    vlm.compress(None)
    vlm.model.eval()
    clips = clips_of(records)
    store = Store(Path(out), run_options(vlm, records, protocol, scores, data), scores, command)
    with store.locked():
        keys = {c.number: [(s, r.id) for s in range(len(protocol.settings)) for r in c.records] for c in clips}
        parts = {c.number: store.read_part(c.number, keys[c.number]) for c in clips if store.part(c.number).exists()}
        to_do = [clip for clip in clips if clip.number not in parts]
        failed = sum(len(part) - part["error"].null_count for part in parts.values())
        if progress:
            progress(len(parts), failed)
        warm_up(vlm, to_do, protocol, scores, batch)
        for group in grouped(to_do, batch):
            for number, rows in ask(vlm, group, protocol, scores, batch).items():
                store.write_part(number, rows)
                parts[number] = store.read_part(number, keys[number])
                failed += sum(row["error"] is not None for row in rows)
            if progress:
                progress(len(parts), failed)
        vlm.compress(None)
        answers, timings = store.finish([parts[clip.number] for clip in clips])
        summary = summarise(answers, scores, tokensieve=__version__, model=vlm.name, data=data)
        write_json(store.folder / SUMMARY, summary)
        write_json(store.folder / SUMMARY_TIMINGS, summarise_timings(timings, answers, vlm.model.device.type))
    return summary


def grouped(clips: Sequence[Clip], batch: int) -> Iterator[list[Clip]]:
    """Clips with enough questions to fill a batch: no more are held in memory than that takes."""
    group: list[Clip] = []
    for clip in clips:
        group.append(clip)
        if sum(len(c.records) for c in group) >= batch:
            yield group
            group = []
    if group:
        yield group


def warm_up(vlm: VLM, clips: Sequence[Clip], protocol: Protocol, scores: Sequence[str], batch: int) -> None:
    """Runs everything once, so that no timed question pays for what is done at first use."""
    for clip in clips[:_WARM_UPS]:
        (rows,) = ask(vlm, [clip], protocol, scores, batch).values()
        if any(row["error"] is None for row in rows):
            return
