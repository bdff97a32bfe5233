"""The local engine: decoders ahead, one model, parts as they fill. It knows neither the model nor the files."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tokensieve.datasets.limits import Limits
from tokensieve.pipeline.batch.ahead import Ahead, decode
from tokensieve.pipeline.batch.inputs import Input
from tokensieve.pipeline.batch.parts import PartWriter
from tokensieve.pipeline.batch.rows import FAILED, OK, PARTIAL, Row
from tokensieve.pipeline.batch.tasks import Step, feed

IDLE_S = 1.0  # after so long without a decoded clip the model does what it has


@dataclass(kw_only=True)
class Progress:
    """What a run has done so far.

    Attributes:
        counts: rows by status.
        tokens_full, tokens: visual tokens before and after compression, over all questions.
        seconds: since its start.
        wait_s: seconds of them in which the model waited for a decoder.
        stopped: whether it was asked to stop before the end.
    """

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys((OK, PARTIAL, FAILED), 0))
    tokens_full: int = 0
    tokens: int = 0
    seconds: float = 0.0
    wait_s: float = 0.0
    stopped: bool = False

    @property
    def num_rows(self) -> int:
        return sum(self.counts.values())

    def include(self, other: Progress) -> None:
        """Adds what was done and waited for elsewhere."""
        for status, count in other.counts.items():
            self.counts[status] += count
        self.tokens += other.tokens
        self.tokens_full += other.tokens_full
        self.wait_s += other.wait_s

    def count(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.counts[row["status"]] += 1
            kept = [number for number in row.get("visual_tokens", ()) if number is not None]
            self.tokens += sum(kept)
            self.tokens_full += len(kept) * (row.get("visual_tokens_full") or 0)


def run(
    inputs: Sequence[Input],
    step: Step,
    writer: PartWriter,
    *,
    limits: Limits,
    read_options: Mapping[str, object],
    workers: int,
    ahead_bytes: int,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[Progress], None] = lambda _: None,
) -> Progress:
    """Works through the inputs; every row is in a part when this returns.

    Args:
        inputs: those without a row.
        step: decoded clips to rows.
        writer: rows to parts.
        limits: budget of every file.
        read_options: of `read_media`.
        workers: decoders at once.
        ahead_bytes: bound on decoded frames in memory, apart from one clip a worker.
        stop: once it says true, what is in hand is finished and nothing else started.
        report: called after every clip.
    """
    progress, start = Progress(), time.monotonic()
    ahead = Ahead(inputs, lambda given: decode(given, limits, read_options), workers, ahead_bytes)

    def take(rows: Sequence[Row]) -> None:
        progress.count(rows)
        writer.add(rows)
        progress.seconds = time.monotonic() - start
        report(progress)

    try:
        while not stop():
            before = time.monotonic()
            try:
                found = ahead.next(stop, IDLE_S)
            except TimeoutError:
                take(step.finish())
                continue
            finally:
                progress.wait_s += time.monotonic() - before
            if found is None:
                break
            take(feed(step, *found))
            ahead.release(found[1])
        take(step.finish())
    except Exception:
        writer.flush()  # finished rows are safe whatever went wrong
        raise
    finally:
        ahead.close()
    writer.flush()
    progress.stopped = progress.num_rows < len(inputs)
    return progress
