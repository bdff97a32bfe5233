"""Parts: Parquet files named by their own content, which together are the journal of a batch job.

A part is written beside its place, forced to the disk and moved there, so that it is there as a whole or not at all.
Its name is the SHA-256 of its bytes, so a damaged one is known. Rows leave in the same way: a part without them is
written that names the one it replaces, and only then is that one removed. A kill between the two leaves both, and the
replaced one no longer counts. So at every moment each key has one row at most.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tokensieve.datasets.results import REPLACES, live_parts
from tokensieve.errors import BadOption, TokensieveError
from tokensieve.pipeline.batch.rows import Row, size_bytes, table_of

DAMAGED = "damaged"
TEMPORARY = ".tmp"
MAX_BYTES = 64 << 20  # of the rows that wait for their part
_READ_BYTES = 1 << 20


def write_part(parts: Path, table: pa.Table, *, tag: str = "", replaces: Sequence[str] = ()) -> Path:
    """Puts a table into the folder as a part; the same table with the same `replaces` is the same part.

    Args:
        parts: the folder.
        table: at least one row.
        tag: told apart by this, several processes write at once.
        replaces: names of parts that no longer count from now on.

    Raises:
        TokensieveError: the disk is full or may not be written.
    """
    metadata = {REPLACES: json.dumps(list(replaces)).encode()} if replaces else None
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    content = sink.getvalue()
    path = parts / f"part-{hashlib.sha256(content).hexdigest()[:32]}.parquet"
    temporary = parts / f"{os.getpid()}{tag}{TEMPORARY}"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(parts)
    except OSError as error:
        raise TokensieveError(
            f"{str(path)!r} cannot be written: {error.strerror or type(error).__name__}.",
            hint="Make room or allow writing there, then give the same command to go on.",
        ) from None
    return path


def clean(parts: Path) -> list[str]:
    """Ends what a killed run left half done; only for the one who holds the folder's lock.

    Removes files that never became parts and parts that are replaced, and moves parts that are not what their names say
    to `damaged` beside the folder, so that their inputs are done again.

    Returns:
        Names of the parts set aside.
    """
    for path in parts.glob(f"*{TEMPORARY}"):
        path.unlink()
    damaged = [path for path in sorted(parts.glob("part-*.parquet")) if _content_name(path) != path.name]
    for path in damaged:
        (parts.parent / DAMAGED).mkdir(exist_ok=True)
        os.replace(path, parts.parent / DAMAGED / path.name)
    for path, replaced in live_parts(parts):
        if replaced:
            path.unlink()
    _sync_folder(parts)
    return [path.name for path in damaged]


def read_columns(parts: Path, columns: Sequence[str]) -> pa.Table:
    """Some columns of all rows that count, part by part in the order of names; `part` names the part of each row."""
    tables = []
    for path, replaced in live_parts(parts):
        if not replaced:
            try:
                table = pq.read_table(path, columns=list(columns), partitioning=None)
            except (OSError, ValueError, pa.ArrowException) as error:
                raise BadOption(f"The part {str(path)!r} cannot be read ({type(error).__name__}).") from None
            name = pa.array([path.name] * len(table), pa.string())
            tables.append(table.replace_schema_metadata(None).append_column("part", name))
    return pa.concat_tables(tables) if tables else pa.table({name: [] for name in (*columns, "part")})


def forget(parts: Path, rows: Iterable[tuple[str, int]]) -> None:
    """Takes rows out, so that their inputs are to be done again.

    Args:
        parts: the folder.
        rows: name of the part and place in it.
    """
    by_part: dict[str, set[int]] = {}
    for name, place in rows:
        by_part.setdefault(name, set()).add(place)
    for name, places in by_part.items():
        table = pq.read_table(parts / name, partitioning=None)
        left = [place for place in range(len(table)) if place not in places]
        if left:
            write_part(parts, table.take(pa.array(left, pa.int64())), replaces=[name])
        (parts / name).unlink()
    _sync_folder(parts)


@dataclass(kw_only=True)
class PartWriter:
    """Gathers rows and writes them as parts.

    Attributes:
        parts: the folder.
        schema: of the rows.
        options: fingerprint of the options, a column of every row.
        max_rows, max_s: a part is written when so many rows wait, or the first one for so long.
        tag: as in `write_part`.
    """

    parts: Path
    schema: pa.Schema
    options: str
    max_rows: int = 256
    max_s: float = 30.0
    tag: str = ""
    clock: Callable[[], float] = time.monotonic
    _rows: list[Row] = field(default_factory=list)
    _bytes: int = 0
    _since: float = 0.0

    def add(self, rows: Iterable[Row]) -> None:
        """Takes rows; they are safe once the part is written."""
        for row in rows:
            if not self._rows:
                self._since = self.clock()
            self._rows.append(row)
            self._bytes += size_bytes(row)
            if len(self._rows) >= self.max_rows or self._bytes >= MAX_BYTES:
                self.flush()
        if self._rows and self.clock() - self._since >= self.max_s:
            self.flush()

    def flush(self) -> None:
        """Writes what waits."""
        if self._rows:
            write_part(self.parts, table_of(self._rows, self.schema, self.options), tag=self.tag)
            self._rows, self._bytes = [], 0


def _content_name(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return f"part-{digest.hexdigest()[:32]}.parquet"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
