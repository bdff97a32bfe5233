"""`tokensieve process SOURCE --out DIR`: a folder, glob or manifest of clips, one row each."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

from tokensieve.commands.output import load_answering, print_json, read_options
from tokensieve.errors import BadOption, MediaError, TokensieveError

MB = 1 << 20
MAX_RUNS = 1000  # that the record remembers
ENGINES = ("local", "ray")


def run(options) -> int:
    """The exit code is that of a medium that could not be used if any row failed."""
    from tokensieve.datasets.limits import Limits
    from tokensieve.datasets.sampling import Sampling
    from tokensieve.datasets.video import BACKENDS
    from tokensieve.pipeline.batch.folder import Folder
    from tokensieve.pipeline.batch.inputs import find_inputs
    from tokensieve.pipeline.batch.tasks import with_questions

    frames = read_options(options)
    if frames.get("backend", "pyav") not in BACKENDS:
        raise BadOption(f"--backend must be one of {', '.join(BACKENDS)}, got {options.backend!r}.")
    Sampling(**{name: value for name, value in frames.items() if name != "backend"})
    for name in ("workers", "ahead_mb", "memory_mb", "batch", "rows", "seconds", "max_new_tokens"):
        if options[name] is not None and options[name] <= 0:
            raise BadOption(f"--{name} must be above 0, got {options[name]}.")
    _check_engine(options)
    limits = Limits(timeout_s=options.timeout_s, memory_bytes=options.memory_mb * MB)
    found = find_inputs(options.source, allow_outside=options.allow_outside, limit=options.limit)
    inputs = with_questions(found.inputs, options.task, options.question)
    folder = Folder(options.out)
    with folder.locked(), _engine(options, partial(_step, options, frames, limits)) as engine:
        fingerprint = folder.admit(engine.made_with, engine.schema, mix=options.mix)
        to_do, counts = folder.resume(inputs, retry_failed=options.retry_failed)
        _tell(counts, found.skipped)
        given = {"limits": limits, "read_options": frames, "ahead_bytes": options.ahead_mb * MB}
        given |= {"max_rows": options.rows, "max_s": options.seconds}
        progress = _work(options, partial(engine.run, to_do, folder, fingerprint, **given), len(inputs), len(to_do))
        record = folder.finish(_facts(options, folder, found, inputs, counts, progress, fingerprint, engine.facts()))
    if progress.stopped:
        raise KeyboardInterrupt
    if options.json:
        print_json(record)
    else:
        _print(record, options.out)
    return MediaError.exit_code if record["rows"]["failed"] else 0


def _step(options, frames, limits):
    """The step of the task, and all that its rows follow from."""
    from tokensieve.export.manifest import NAME
    from tokensieve.pipeline.batch.identity import onnx_options, torch_options

    task = {"source": os.path.abspath(options.source), "task": options.task, "questions": list(options.question)}
    task["read_options"] = frames
    task["limits"] = {
        name: value for name, value in asdict(limits).items() if name not in ("timeout_s", "memory_bytes")
    }
    is_exported = os.path.isfile(os.path.join(options.model, NAME))
    if options.task == "features":
        if is_exported:
            raise BadOption(
                f"{options.model!r} is an exported model, which does not tell where its tokens are.",
                hint="Take features with the PyTorch model, or the task answer.",
            )
        from tokensieve.pipeline.batch.feature_step import FeatureStep

        vlm, _ = load_answering(options)
        return FeatureStep(vlm, dtype=options.feature_dtype), torch_options(vlm, **task, stored=options.feature_dtype)
    if options.feature_dtype != "float32":
        raise BadOption(f"--feature_dtype is for the task features, not {options.task}.")
    task["max_new_tokens"] = options.max_new_tokens
    vlm, budget = load_answering(options)
    if is_exported:
        from tokensieve.pipeline.batch.onnx_step import OnnxStep

        step = OnnxStep(vlm, budget, max_new_tokens=options.max_new_tokens)
        return step, onnx_options(vlm, options.model, budget, **task)
    from tokensieve.pipeline.batch.answer_step import AnswerStep

    step = AnswerStep(vlm, batch=options.batch, max_new_tokens=options.max_new_tokens)
    return step, torch_options(vlm, **task)


def _check_engine(options) -> None:
    if options.engine not in ENGINES:
        raise BadOption(f"--engine must be one of {', '.join(ENGINES)}, got {options.engine!r}.")
    if options.address is not None and options.engine != "ray":
        raise BadOption("--address is of a Ray cluster.", hint="Add --engine ray.")
    if options.engine == "ray" and (options.device or "").startswith("cuda:"):
        raise BadOption(
            f"--device {options.device} names one GPU, and Ray gives every actor one of its own.", hint="Say cuda."
        )


@contextmanager
def _engine(options, make) -> Iterator:
    """Yields what has the step, or the actors that have it: `run`, `schema`, `made_with` and `facts`."""
    if options.engine == "local":
        yield _LocalEngine(make, options.workers or min(os.cpu_count() or 1, 16))
        return
    from tokensieve.pipeline.batch.ray_engine import RayEngine, connected

    with connected(options.address):
        yield RayEngine(make, options.workers, use_gpu=options.device in (None, "cuda"))


class _LocalEngine:
    """`batch.engine` in the form of `RayEngine`."""

    def __init__(self, make, workers: int):
        self.step, self.made_with = make()
        self.schema, self.workers = self.step.schema, workers

    def run(self, inputs, folder, fingerprint: str, *, max_rows: int, max_s: float, **given):
        from tokensieve.pipeline.batch.engine import run as run_engine

        writer = folder.writer(self.schema, fingerprint, max_rows=max_rows, max_s=max_s)
        return run_engine(inputs, self.step, writer, workers=self.workers, **given)

    def facts(self) -> dict[str, object]:
        return {"engine": "local", "workers": self.workers}


def _work(options, run_engine, num_inputs: int, num_to_do: int):
    """Runs the engine; on a GPU that is full, one sentence."""
    try:
        with _stopping() as stop, _progress(num_inputs, num_inputs - num_to_do, options.json) as report:
            return run_engine(stop=stop, report=report)
    except Exception as error:
        if not isinstance(error, getattr(sys.modules.get("torch"), "OutOfMemoryError", ())):
            raise
        raise TokensieveError(
            "The GPU has no memory left; rows in finished parts are kept.",
            hint="Go on with the same command and a smaller --batch.",
        ) from None


def _facts(options, folder, found, inputs, counts, progress, fingerprint: str, engine) -> dict[str, object]:
    """What the record says of the job, and of this run of it."""
    from tokensieve.pipeline.batch.identity import versions

    seconds = max(progress.seconds, 1e-9)
    this = {
        "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "options": fingerprint,
        **engine,
        "batch": options.batch,
        "rows": progress.num_rows,
        **{name: count for name, count in counts.items() if name != "done"},
        "seconds": round(progress.seconds, 3),
        "clips_per_s": round(progress.num_rows / seconds, 3),
        "model_waited_s": round(progress.wait_s, 3),
        "stopped": progress.stopped,
        "versions": versions(),
    }
    before = folder.record().get("runs", [])
    return {
        "format": 1,
        "task": options.task,
        "source": options.source,
        "inputs": len(inputs),
        "skipped": found.skipped,
        "finished": not progress.stopped,
        "runs": [*before, this][-MAX_RUNS:],
    }


@contextmanager
def _stopping() -> Iterator:
    """Yields a function that says whether to stop: after the first Ctrl-C or SIGTERM. The second one acts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number, _) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in before:
        signal.signal(number, stop)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(num_inputs: int, num_done: int, disable: bool) -> Iterator:
    """Yields a function that takes the engine's progress and moves a bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("clips"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn(
            "{task.fields[rate]:.1f} clips/s, {task.fields[saved]:.0%} of tokens saved, {task.fields[failed]} failed"
        ),
    ]
    with Progress(*columns, console=Console(stderr=True), disable=disable) as bar:
        task = bar.add_task("", total=num_inputs, completed=num_done, rate=0.0, saved=0.0, failed=0)

        def report(progress) -> None:
            saved = 1 - progress.tokens / progress.tokens_full if progress.tokens_full else 0.0
            bar.update(
                task,
                completed=num_done + progress.num_rows,
                rate=progress.num_rows / max(progress.seconds, 1e-9),
                saved=saved,
                failed=progress.counts["failed"],
            )

        yield report


def _tell(counts: dict[str, int], skipped: dict[str, int]) -> None:
    """What a user would not expect, one line each."""
    lines = [f"{number} {reason} in the folder were passed over" for reason, number in skipped.items()]
    if counts["changed"]:
        lines.append(f"{counts['changed']} files have changed since their rows were made; they are done again")
    if counts["damaged"]:
        lines.append(f"{counts['damaged']} damaged parts were set aside; their clips are done again")
    for line in lines:
        print(f"tokensieve: {line}.", file=sys.stderr)


def _print(record: dict, out: str) -> None:
    rows, ledger, this = record["rows"], record["ledger"], record["runs"][-1]
    full, kept = ledger["visual_tokens_full"], ledger["visual_tokens"]
    saved = f", {1 - kept / full:.0%} of {full} visual tokens saved" if full else ""
    print(
        f"{rows['ok']} ok, {rows['partial']} partial, {rows['failed']} failed{saved}; {this['clips_per_s']:g} clips/s."
    )
    failures = f", failures in {os.path.join(out, 'failures.parquet')}" if rows["failed"] else ""
    print(f"Rows are in {os.path.join(out, 'parts')}{failures}.")
