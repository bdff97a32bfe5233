"""The folder of an evaluation: what it was asked for, finished clips, and the files made of them at the end.

Every file is written beside its place, forced to the disk and moved there, so that a kill at any moment leaves whole
files only, and at most a `.tmp` that the next run writes over. A clip that has a part is finished. Parts carry the
fingerprint of the options they were made with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tokensieve.errors import BadOption, TokensieveError

RUN, PARTS, ANSWERS, TIMINGS = "run.json", "parts", "answers.parquet", "timings.parquet"
SUMMARY, SUMMARY_TIMINGS = "summary.json", "timings.json"
KEYS = {"setting": pa.int32(), "method": pa.string(), "keep": pa.float64(), "clip": pa.string(), "id": pa.string()}
SAID = {
    "question": pa.string(),
    "kind": pa.string(),
    "answers": pa.list_(pa.string()),
    "choices": pa.list_(pa.string()),
    "said": pa.string(),
}
COUNTS = {
    "visual_tokens": pa.int32(),
    "visual_tokens_full": pa.int32(),
    "prompt_tokens": pa.int32(),
    "kept": pa.list_(pa.int32()),
    "error": pa.string(),
}
SECONDS = {name: pa.float64() for name in ("read_s", "encode_s", "select_s", "generate_s")}
_FINGERPRINT = b"tokensieve_evaluation"


class Store:
    """One evaluation folder.

    Args:
        folder: made if it is not there.
        options: all that the results follow from, as JSON can hold it.
        scores: names of the scores, columns of their own.
        command: kept beside the options; another one does not matter.

    Raises:
        BadOption: the folder belongs to a run with other options, or holds something else.
    """

    def __init__(self, folder: Path, options: Mapping[str, object], scores: Sequence[str], command: str = ""):
        self.folder = folder
        self.options = json.loads(json.dumps(options))
        self.fingerprint = hashlib.sha256(json.dumps(self.options, sort_keys=True).encode()).hexdigest()
        self.answers = pa.schema({**KEYS, **SAID, **{name: pa.float64() for name in scores}, **COUNTS})
        self.timings = pa.schema({**KEYS, **SECONDS})
        self.schema = pa.unify_schemas([self.answers, self.timings]).with_metadata(
            {_FINGERPRINT: self.fingerprint.encode()}
        )
        check_folder(folder)
        try:
            (folder / PARTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadOption(f"{str(folder)!r} cannot be written: {error.strerror}.") from None
        if (folder / RUN).exists():
            self._check_options()
        elif any((folder / PARTS).glob("*.parquet")):
            raise BadOption(f"{str(folder)!r} has finished parts but no {RUN}.", hint="Give --out a new folder.")
        else:
            write_json(folder / RUN, {"command": command, **self.options})

    def _check_options(self) -> None:
        path = self.folder / RUN
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(before, dict):
                raise ValueError
        except (OSError, ValueError, RecursionError):
            raise BadOption(f"{str(path)!r} cannot be read.", hint="Give --out a new folder.") from None
        before.pop("command", None)
        names = [*self.options, *(name for name in before if name not in self.options)]
        other = [name for name in names if before.get(name) != self.options.get(name)]
        if other:
            differences = "; ".join(
                f"{n}: {_short(before.get(n))} there, {_short(self.options.get(n))} now" for n in other
            )
            raise BadOption(
                f"{str(self.folder)!r} belongs to a run with other options ({differences}).",
                hint="Give --out a new folder, or the same options to go on with that run.",
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time: the lock goes with the process, however that ends.

        Raises:
            BadOption: another run has it.
        """
        import fcntl

        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise BadOption(f"Another run is writing into {str(self.folder)!r}.", hint="Wait for its end.") from None
        finally:
            os.close(descriptor)

    def part(self, number: int) -> Path:
        """Where the rows of clip `number` are once it is finished."""
        return self.folder / PARTS / f"{number:06d}.parquet"

    def write_part(self, number: int, rows: Sequence[Mapping[str, object]]) -> None:
        """The rows of one clip: all columns of answers and timings."""
        table = pa.Table.from_pylist(list(rows), self.schema)
        write_whole(self.part(number), lambda path: pq.write_table(table, path))

    def read_part(self, number: int, keys: Sequence[tuple[int, str]]) -> pa.Table:
        """What `write_part` wrote.

        Args:
            number: of the clip.
            keys: setting and question id of every row that must be there, in order.

        Raises:
            BadOption: the file is damaged, or of another run.
        """
        path = self.part(number)
        try:
            table = pq.read_table(path, partitioning=None)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise BadOption(f"The part {str(path)!r} is damaged ({type(error).__name__}).", hint=_REDO) from None
        mark = (table.schema.metadata or {}).get(_FINGERPRINT)
        if mark != self.fingerprint.encode() or not table.schema.equals(self.schema):
            raise BadOption(f"The part {str(path)!r} is of another run.", hint=_REDO)
        found = list(zip(table["setting"].to_pylist(), table["id"].to_pylist(), strict=True))
        if found != list(keys):
            raise BadOption(f"The part {str(path)!r} holds rows of another clip.", hint=_REDO)
        return table

    def finish(self, parts: Sequence[pa.Table]) -> tuple[pa.Table, pa.Table]:
        """Writes answers.parquet and timings.parquet, sorted by setting, and returns both."""
        whole = pa.concat_tables(parts).replace_schema_metadata(None)
        # Stable: within a setting clips stay in their order.
        order = sorted(range(len(whole)), key=whole["setting"].to_pylist().__getitem__)
        whole = whole.take(pa.array(order, pa.int64())).combine_chunks()
        tables = whole.select(self.answers.names), whole.select(self.timings.names)
        for name, table in zip((ANSWERS, TIMINGS), tables, strict=True):
            write_whole(self.folder / name, lambda path, table=table: pq.write_table(table, path))
        return tables


_REDO = "Delete it, and its clip is done again."


def check_folder(folder: Path) -> None:
    """Raises BadOption unless an evaluation can be written here: a new or empty folder, or one of a run."""
    if folder.exists() and not folder.is_dir():
        raise BadOption(f"--out must be a folder, and {str(folder)!r} is a file.")
    if folder.is_dir() and not (folder / RUN).exists():
        others = [entry.name for entry in folder.iterdir() if entry.name not in (RUN + ".tmp", PARTS)]
        if others:
            raise BadOption(f"{str(folder)!r} holds other files, such as {others[0]!r}.", hint="Name a new folder.")


def write_json(path: Path, value: object) -> None:
    """As UTF-8 text, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make the file, and puts it in its place once it is on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise TokensieveError(
            f"{str(path)!r} cannot be written: {error.strerror or type(error).__name__}.",
            hint="Make room or allow writing there, then give the same command to go on.",
        ) from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
