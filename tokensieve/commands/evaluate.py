"""`tokensieve eval --methods zoprune,tome+zoprune --keep 0.5,0.25 --out DIR`: how well and how fast methods answer."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tokensieve.commands.output import print_json, read_options
from tokensieve.errors import BadOption, MediaError, TokensieveError

GENERATED = 100  # clips without --data and --limit
_OPTIONS = (  # those that answers follow from
    *("model", "methods", "keep", "data", "split", "limit", "scores", "choices", "max_new_tokens", "policy"),
    *("positions", "seed", "dtype", "num_frames", "fps", "start_s", "end_s", "backend"),
)


def run(options) -> int:
    """The exit code is that of a medium that could not be used if any row failed."""
    from torch import OutOfMemoryError

    from tokensieve.compression import list_methods
    from tokensieve.pipeline.evaluation.protocol import Protocol, clips_of
    from tokensieve.pipeline.evaluation.run import evaluate
    from tokensieve.pipeline.evaluation.settings import make_settings, usable
    from tokensieve.pipeline.evaluation.store import check_folder
    from tokensieve.pipeline.loader import load

    out = Path(options.out)
    check_folder(out)
    settings = make_settings(
        options.methods or [method.name for method in list_methods()],
        options.keep,
        policy=options.policy,
        options=options.options,
        positions=options.positions,
        seed=options.seed,
    )
    protocol = Protocol(
        settings=tuple(settings),
        scores=tuple(options.scores),
        choices=options.choices,
        max_new_tokens=options.max_new_tokens,
        read_options=read_options(options),
    )
    records, data = _records(options)
    clips = clips_of(records)[: options.limit]
    records = [record for clip in clips for record in clip.records]
    vlm = load(options.model, device=options.device, dtype=options.dtype)
    if not options.methods:
        able, left_out = usable(vlm, protocol.settings)
        protocol = replace(protocol, settings=tuple(able))
        for method, reason in left_out.items():
            print(f"tokensieve: {method} is left out: {reason}", file=sys.stderr)
    try:
        with _progress(len(clips), disable=options.json) as progress:
            summary = evaluate(
                vlm,
                records,
                protocol,
                out,
                batch=options.batch,
                data=data,
                command=_command(options),
                progress=progress,
            )
    except OutOfMemoryError:
        raise TokensieveError(
            "The GPU has no memory left; finished clips are kept.",
            hint="Go on with the same command and a smaller --batch, or start a new folder with fewer frames.",
        ) from None
    report = _report(vlm, records, protocol, out)
    if options.json:
        print_json(summary)
    else:
        _print(summary, report)
    return MediaError.exit_code if any(setting["failed"] for setting in summary["settings"]) else 0


def _records(options):
    """The questions and what to call them."""
    from tokensieve.datasets.manifest import generated_records, read_records

    if options.limit is not None and options.limit < 1:
        raise BadOption(f"--limit must be above 0, got {options.limit}.")
    if options.data is None:
        split = options.split or "test"
        records = generated_records(split, options.limit or GENERATED)
        records[0].load(**read_options(options))  # drawn clips take few options: say so before anything starts
        return records, f"generated clips, split {split}"
    return read_records(options.data, split=options.split, limit=options.limit), Path(options.data).resolve().name


def _command(options) -> str:
    """The command that gives the same answers, for the report."""
    words = ["tokensieve", "eval"]
    for name in _OPTIONS:
        if options[name] not in (None, []):
            value = options[name]
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    words += [word for name, value in options.options.items() for word in (f"--options.{name}", str(value))]
    return f"{shlex.join(words)} --out DIR"


def _report(vlm, records, protocol, out: Path) -> Path:
    from tokensieve.pipeline.evaluation.extremes import draw_extremes, extreme_clips
    from tokensieve.pipeline.evaluation.report import write_report

    by_id = {record.id: record for record in records}
    return write_report(out, draw_extremes(vlm, by_id, extreme_clips(out), **protocol.read_options))


@contextmanager
def _progress(num_clips: int, disable: bool) -> Iterator:
    """Yields the callback of `evaluate`, which moves a bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("clips"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]} failed rows"),
    ]
    with Progress(*columns, console=Console(stderr=True), disable=disable) as bar:
        task = bar.add_task("", total=num_clips, failed=0)
        yield lambda done, failed: bar.update(task, completed=done, failed=failed)


def _print(summary, report: Path) -> None:
    import json

    from rich.console import Console
    from rich.table import Table

    timings = json.loads((report.parent / "timings.json").read_text(encoding="utf-8"))
    score = summary["main_score"]
    any_failed = any(setting["failed"] for setting in summary["settings"])
    heads = ["keep", "tokens", f"{score}, %", "interval", "change", "seconds"] + ["failed"] * any_failed
    table = Table("method", header_style="bold", title=_title(summary))
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for setting, timed in zip(summary["settings"], timings["settings"], strict=True):
        found = setting["scores"][score]
        cells = [
            setting["method"] or "all tokens",
            f"{setting['keep']:g}",
            _text(setting["visual_tokens"], ".0f"),
            _text(found["mean"], ".1f", 100),
            f"{_text(found['low'], '.1f', 100)}–{_text(found['high'], '.1f', 100)}",
            _difference(found["difference"]),
            _text(timed["seconds"]["total"], ".3f"),
        ]
        table.add_row(*cells, *[str(setting["failed"])] * any_failed)
    console = Console()
    console.print(table)
    console.print(
        "Intervals: 95 %. Change: against all tokens; * if its interval leaves out 0. Seconds: median, read to answer."
    )
    print(f"Everything is in {report.parent}; open {report} in a browser.")  # rich would break the path


def _title(summary) -> str:
    return f"{summary['model']}, {summary['data']}: {summary['questions']} questions about {summary['clips']} clips"


def _difference(difference) -> str:
    if difference is None:
        return "-"
    low, high = difference["low"], difference["high"]
    return _text(difference["mean"], "+.1f", 100) + ("*" if low is not None and (low > 0 or high < 0) else "")


def _text(value: float | None, form: str, factor: float = 1) -> str:
    return "-" if value is None else f"{factor * value:{form}}"
