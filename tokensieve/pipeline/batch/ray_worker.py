"""What an actor of the Ray engine does: the local engine, on one batch of inputs after the other. It knows no Ray.

Ray runs a batch again when the process that had it dies, or when its result is lost. Marks in the folder of parts tell
the second attempt of the first one: it leaves out what has a row already and takes the rest one by one, so that a death
has one input to blame. An input that has been alone in hand at two deaths gets a failed row, and the batch goes on.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from tokensieve.datasets.limits import Limits
from tokensieve.errors import BadOption, TokensieveError
from tokensieve.pipeline.batch import engine
from tokensieve.pipeline.batch.folder import RUN, Folder
from tokensieve.pipeline.batch.inputs import Failure, Input
from tokensieve.pipeline.batch.parts import TEMPORARY
from tokensieve.pipeline.batch.rows import FAILED, OK, PARTIAL, failed_row
from tokensieve.pipeline.batch.tasks import Step

MAX_DEATHS = 2  # of an input that was alone in hand, and of an actor while it loads the model
QUARANTINED = Failure(
    stage="answer",
    error_type="Quarantined",
    message="The process of the model died twice with nothing else in hand, so the file is left alone.",
)
RESULT = pa.schema(
    {
        **dict.fromkeys((OK, PARTIAL, FAILED, "tokens", "tokens_full"), pa.int64()),
        "wait_s": pa.float64(),
        "error": pa.binary(),
    }
)

Make = Callable[[], tuple[Step, Mapping[str, object]]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every actor is told.

    Attributes:
        id: begins the names of all marks of one round of the job.
        cwd: the driver's working directory, which paths may be relative to.
        make: loads the step, and says all that its rows follow from.
        made_with: what it said when the job began.
        folder, options, max_rows, max_s: where rows go, as of `Folder.writer`.
        limits, read_options, workers, ahead_bytes: as of `engine.run`.
    """

    id: str
    cwd: str
    make: Make
    made_with: Mapping[str, object]
    folder: str
    options: str
    max_rows: int
    max_s: float
    limits: Limits
    read_options: Mapping[str, object]
    workers: int
    ahead_bytes: int

    def mark(self, parts: Path, name: str) -> Path:
        """A file that ends with the job, as what a killed writer leaves does."""
        return parts / f"{self.id}-{name}{TEMPORARY}"

    def stop(self, parts: Path) -> Path:
        """The file that tells all actors to finish what they have in hand."""
        return self.mark(parts, "stop")


def describe(make: Make, cwd: str) -> tuple[pa.Schema, Mapping[str, object]]:
    """Columns of the rows and all that they follow from, asked of a machine that will make them.

    Raises:
        BadOption: as of `enter`, and all that `make` does.
    """
    enter(cwd)
    step, made_with = make()
    return step.schema, made_with


def enter(cwd: str) -> None:
    """Goes where relative paths begin.

    Raises:
        BadOption: it is not there.
    """
    try:
        os.chdir(cwd)
    except OSError:
        raise BadOption(
            f"The working directory {cwd!r} is not on the node {platform.node()!r}.",
            hint="Give the command in a folder that all nodes of the cluster share under one path.",
        ) from None


def begin(mark: Path) -> int:
    """Notes that something is begun, and returns how often it was before this."""
    with open(mark, "ab") as file:
        before = file.tell()
        file.write(b".")
    return before


@contextmanager
def begun(mark: Path) -> Iterator[int]:
    """As `begin`, and takes the note back at the end: only a process that dies in between leaves it there."""
    try:
        yield begin(mark)
    finally:
        mark.unlink(missing_ok=True)


class Worker:
    """Loads the step once, then makes rows, batch by batch.

    Errors are not raised but told in the result, because Ray would wrap them, and hide their class and hint.

    Args:
        job: what to do.
        name: no other worker of any machine may have it, but one that is started again after a death keeps it.
    """

    def __init__(self, job: Job, name: str):
        self.job, self.error = job, None
        try:
            self._prepare(name)
        except Exception as error:
            self.error = error

    def _prepare(self, name: str) -> None:
        job = self.job
        enter(job.cwd)
        if not os.path.isfile(os.path.join(job.folder, RUN)):
            raise BadOption(
                f"The folder {job.folder!r} is not on the node {platform.node()!r}.",
                hint="--out must be on a disk that all nodes of the cluster share under one path.",
            )
        self.folder = Folder(job.folder)
        with begun(job.mark(self.folder.parts, name)) as deaths:
            if deaths >= MAX_DEATHS:
                raise TokensieveError(
                    f"The process that loads the model has died {deaths} times on the node {platform.node()!r}.",
                    hint="Check its memory; finished rows are kept.",
                )
            self.step, made_with = job.make()
        if other := [name for name, value in made_with.items() if job.made_with.get(name) != value]:
            raise BadOption(
                f"The node {platform.node()!r} would make other rows than the first one: {', '.join(other)} differ.",
                hint="All nodes need the same versions, model and kind of device.",
            )
        limits = {"max_rows": job.max_rows, "max_s": job.max_s, "tag": f"-{name}"}
        self.writer = self.folder.writer(self.step.schema, job.options, **limits)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """One row that says what was done.

        Args:
            batch: a column `inputs` with one row: a list of them, pickled by the driver, as Ray itself sends objects.
        """
        progress, error = engine.Progress(), self.error
        try:
            if error is None:
                self._do(pickle.loads(batch["inputs"][0].as_py()), progress)
        except Exception as found:
            error = found
        told = {**progress.counts, "tokens": progress.tokens, "tokens_full": progress.tokens_full}
        told |= {"wait_s": progress.wait_s, "error": None if error is None else pickle.dumps(error)}
        return pa.Table.from_pylist([told], RESULT)

    def _do(self, inputs: Sequence[Input], progress: engine.Progress) -> None:
        # The mark stays when the batch is done: its result may be lost later, and then nothing is left to do.
        if not begin(self.job.mark(self.folder.parts, _name(inputs))):
            self._run(inputs, progress)
            return
        for one in self.folder.undone(inputs):
            if self._stopped():
                return
            with begun(self.job.mark(self.folder.parts, one.key)) as deaths:
                if deaths < MAX_DEATHS:
                    self._run([one], progress)
                else:
                    rows = [failed_row(one, QUARANTINED)]
                    progress.count(rows)
                    self.writer.add(rows)
                    self.writer.flush()

    def _run(self, inputs: Sequence[Input], progress: engine.Progress) -> None:
        job = self.job
        done = engine.run(
            inputs,
            self.step,
            self.writer,
            limits=job.limits,
            read_options=job.read_options,
            workers=job.workers,
            ahead_bytes=job.ahead_bytes,
            stop=self._stopped,
        )
        progress.include(done)

    def _stopped(self) -> bool:
        return self.job.stop(self.folder.parts).exists()


def _name(inputs: Sequence[Input]) -> str:
    return hashlib.sha256("".join(one.key for one in inputs).encode()).hexdigest()[:32]
