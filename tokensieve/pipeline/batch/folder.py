"""The folder of a batch job: who may write, which inputs are done, and the record and failures made at the end."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokensieve.datasets.results import PARTS
from tokensieve.errors import BadOption
from tokensieve.pipeline.batch.inputs import Input
from tokensieve.pipeline.batch.parts import DAMAGED, PartWriter, clean, forget, read_columns
from tokensieve.pipeline.batch.rows import FAILED, LEDGER
from tokensieve.pipeline.evaluation.store import write_json, write_whole

RUN, FAILURES, LOCK = "run.json", "failures.parquet", ".lock"
FAILURE_COLUMNS = ("key", "id", "path", "stage", "error_type", "message", "retryable")
MAX_RUN_BYTES = 16 << 20
_OWN = (RUN, FAILURES, LOCK, PARTS, DAMAGED)
_JOURNAL = ("key", "version", "id", "path", "status")


class Folder:
    """The folder that `--out` names.

    Args:
        folder: made if it is not there.

    Raises:
        BadOption: a file, a folder that holds something else, or one that cannot be written.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.parts = self.folder / PARTS
        if self.folder.exists() and not self.folder.is_dir():
            raise BadOption(f"--out must be a folder, and {str(folder)!r} is a file.")
        if self.folder.is_dir():
            names = [entry.name.removesuffix(".tmp") for entry in self.folder.iterdir()]
            if others := sorted(set(names) - set(_OWN)):
                raise BadOption(f"{str(folder)!r} holds other files, such as {others[0]!r}.", hint="Name a new folder.")
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadOption(f"{str(folder)!r} cannot be written: {error.strerror}.") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One job at a time: the lock goes with the process, however that ends.

        Raises:
            BadOption: another process has it.
        """
        import fcntl

        try:
            file = open(self.folder / LOCK, "a")
        except OSError as error:
            raise BadOption(f"{str(self.folder)!r} cannot be written: {error.strerror}.") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                name = str(self.folder)
                raise BadOption(f"Another job is writing into {name!r}.", hint="Wait for its end.") from None
            yield

    def admit(self, options: Mapping[str, object], schema: pa.Schema, *, mix: bool = False) -> str:
        """Checks that rows made with these options may go in, and notes the options; to be called with the lock.

        Args:
            options: all that rows follow from, as JSON can hold it.
            schema: of the rows.
            mix: let rows of other options stay; each row has the fingerprint of its own.

        Returns:
            The fingerprint of the options.

        Raises:
            BadOption: other options without `mix`, or rows with other columns.
        """
        options = json.loads(json.dumps(options))
        fingerprint = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]
        record = self.record()
        if not record and any(self.parts.glob("part-*.parquet")):
            raise BadOption(f"{str(self.folder)!r} has finished parts but no {RUN}.", hint="Give --out a new folder.")
        known = record.get("options", {})
        if known and fingerprint not in known and not mix:
            (*_, before) = known.values()
            raise BadOption(
                f"{str(self.folder)!r} was made with other options ({_differences(before, options)}).",
                hint="Give --out a new folder, the same options, or --mix to keep what is there and do the rest.",
            )
        columns = [f"{field.name}: {field.type}" for field in schema]
        if known and record.get("columns") != columns:
            raise BadOption(
                f"The rows in {str(self.folder)!r} have other columns.",
                hint="Give --out a new folder; --mix cannot help.",
            )
        self.update({"columns": columns, "options": {**known, fingerprint: options}})
        return fingerprint

    def record(self) -> dict[str, object]:
        """What `run.json` says; empty where there is none.

        Raises:
            BadOption: it cannot be read.
        """
        path = self.folder / RUN
        if not path.exists():
            return {}
        try:
            if path.stat().st_size > MAX_RUN_BYTES:
                raise ValueError
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or not isinstance(found.get("options"), dict):
                raise ValueError
        except (OSError, ValueError, RecursionError):
            raise BadOption(f"{str(path)!r} cannot be read.", hint="Give --out a new folder.") from None
        return found

    def update(self, facts: Mapping[str, object]) -> dict[str, object]:
        """Writes `run.json` anew with these facts."""
        record = {**self.record(), **facts}
        write_json(self.folder / RUN, record)
        return record

    def resume(self, inputs: Sequence[Input], *, retry_failed: bool = False) -> tuple[list[Input], dict[str, int]]:
        """The inputs without a row, after what a killed job left is cleaned up; to be called with the lock.

        The row of an input whose file has changed since is taken out, as are second rows of a key, which only another
        writer of parts can have made.

        Args:
            inputs: all.
            retry_failed: take out the rows of failed inputs, too.

        Returns:
            The inputs to do, and how many were "done", "changed" or "retried" and parts "damaged".
        """
        damaged = clean(self.parts)
        wanted = {one.key: one.version for one in inputs}
        seen, out = set(), []
        counts = {"done": 0, "changed": 0, "retried": 0, "damaged": len(damaged)}
        for key, version, status, where in self._journal():
            changed = key in wanted and wanted[key] != version
            retried = retry_failed and key in wanted and status == FAILED and not changed
            if key in seen or changed or retried:
                out.append(where)
                counts["changed"] += changed
                counts["retried"] += retried
            else:
                seen.add(key)
        forget(self.parts, out)
        to_do = [one for one in inputs if one.key not in seen]
        counts["done"] = len(inputs) - len(to_do)
        return to_do, counts

    def undone(self, inputs: Sequence[Input]) -> list[Input]:
        """The inputs without a row, or whose file has changed since; changes nothing, so that it needs no lock."""
        done = {key: version for key, version, _, _ in self._journal()}
        return [one for one in inputs if done.get(one.key) != one.version]

    def drop_repeated(self) -> None:
        """Takes out second rows of a key: samplers of distributed training repeat inputs to even out the processes."""
        seen, out = set(), []
        for key, _, _, where in self._journal():
            if key in seen:
                out.append(where)
            seen.add(key)
        forget(self.parts, out)

    def _journal(self) -> Iterator[tuple[str, str, str, tuple[str, int]]]:
        """Key, version, status and place of every row."""
        table = read_columns(self.parts, _JOURNAL)
        place, before = 0, None
        columns = (table[name].to_pylist() for name in ("key", "version", "status", "part"))
        for key, version, status, part in zip(*columns, strict=True):
            place = place + 1 if part == before else 0
            before = part
            yield key, version, status, (part, place)

    def writer(self, schema: pa.Schema, options: str, **limits) -> PartWriter:
        """A writer of parts; `limits` as of `PartWriter`."""
        return PartWriter(parts=self.parts, schema=schema, options=options, **limits)

    def finish(self, facts: Mapping[str, object]) -> dict[str, object]:
        """Makes `failures.parquet` and the record from the rows that are there, and returns the record."""
        rows = read_columns(self.parts, (*FAILURE_COLUMNS, "status", *LEDGER))
        failed = rows.filter(pc.equal(rows["status"], FAILED)).select(FAILURE_COLUMNS) if len(rows) else rows.select([])
        write_whole(self.folder / FAILURES, lambda path: pq.write_table(_sorted(failed), path))
        statuses = rows["status"].to_pylist()
        counts = {status: statuses.count(status) for status in ("ok", "partial", "failed")}
        return self.update({"rows": {"total": len(statuses), **counts}, "ledger": _ledger(rows), **facts})


def _sorted(failed: pa.Table) -> pa.Table:
    if not failed.column_names:
        kinds = dict.fromkeys(FAILURE_COLUMNS, pa.string()) | {"retryable": pa.bool_()}
        return pa.schema(kinds).empty_table()
    return failed.sort_by([("path", "ascending"), ("key", "ascending")])


def _ledger(rows: pa.Table) -> dict[str, int]:
    """Sums over all questions; a clip's full visual tokens count once a question, as those kept do."""
    if not len(rows):
        return dict.fromkeys(LEDGER, 0)
    sums = {name: pc.sum(pc.list_flatten(rows[name])).as_py() or 0 for name in LEDGER[1:]}
    asked = pc.list_value_length(rows["visual_tokens"])
    return {LEDGER[0]: pc.sum(pc.multiply(rows[LEDGER[0]], asked)).as_py() or 0, **sums}


def _differences(before: object, now: Mapping[str, object]) -> str:
    before = before if isinstance(before, Mapping) else {}
    names = [*now, *(name for name in before if name not in now)]
    other = [name for name in names if before.get(name) != now.get(name)]
    return "; ".join(f"{name}: {_short(before.get(name))} there, {_short(now.get(name))} now" for name in other)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
