"""Rows of tables that others wrote: JSONL, CSV, Parquet, and the folders in which Hugging Face datasets come.

Untrusted input: nothing is unpickled or fetched, text tables have a largest size, and binary ones are read a few rows
at a time and checked before their buffers are believed. The `datasets` library is not needed. Folders that are read:

- what `Dataset.save_to_disk` writes: Arrow streams beside `state.json`; one such folder per split in a `DatasetDict`
- a dataset repository of Parquet shards: `data/test-00000-of-00002.parquet`, `test.parquet`, `test/0000.parquet`
- an image or video folder: files beside `metadata.jsonl`, `.csv` or `.parquet`, in the folder or in one per split
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokensieve.errors import BadOption

MAX_TEXT_BYTES = 1 << 30  # of a JSONL or CSV file
_BATCH_ROWS = 16  # rows of a binary table in memory at once
_SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row and where it stands."""

    where: str
    """For messages: "Line 3 of 'a.jsonl'", "Row 2 of 'a.parquet'" (rows count from 0, as in a data frame)."""
    values: dict[str, object]
    """By column, of the columns asked for; without those that are empty."""
    columns: tuple[str, ...]
    """All columns there are."""


def read_rows(path: Path, columns: Collection[str]) -> Iterator[Row]:
    """Rows of one file; other columns than those asked for are not read where the format allows.

    Raises:
        BadOption: no such file, an extension that is not read, or a file that is not of the format it claims.
    """
    if not path.is_file():
        raise BadOption(f"There is no manifest {str(path)!r}.", hint="Give a file, or the folder of a dataset.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BadOption(
            f"{str(path)!r} is no manifest by its extension.", hint=f"These are read: {', '.join(_READERS)}."
        )
    yield from reader(path, columns)


def dataset_files(folder: Path, split: str | None) -> tuple[list[Path], Path]:
    """The files of one split of a dataset folder, in order, and the folder that paths in them are relative to.

    Raises:
        BadOption: no dataset, several splits and none chosen, no such split, or one that is in several folders.
    """
    for find in (_saved, _with_metadata, _shards):
        try:
            splits = find(folder)
        except OSError:
            raise BadOption(f"The folder {str(folder)!r} may not be read by this user.") from None
        if splits:
            files = _one_split(folder, splits, split)
            return files, files[0].parent if find is _with_metadata else folder
    raise BadOption(
        f"The folder {str(folder)!r} is no dataset.",
        hint="It must hold state.json (save_to_disk), metadata.jsonl (image folder) or .parquet files; "
        "or give the manifest file itself.",
    )


def _one_split(folder: Path, splits: dict[str, list[Path]], split: str | None) -> list[Path]:
    names = ", ".join(sorted(filter(None, splits)))
    if split is None and len(splits) == 1:
        (split,) = splits
    if split is None:
        raise BadOption(f"{str(folder)!r} has the splits {names}.", hint="Choose one with split.")
    if split not in splits:
        raise BadOption(
            f"{str(folder)!r} has no split {split!r}.", hint=f"There are: {names}." if names else "It has no splits."
        )
    homes = sorted({_home(file, split) for file in splits[split]})
    if len(homes) > 1:
        shown = ", ".join(repr(str(home)) for home in homes[:3])
        raise BadOption(
            f"The split {split!r} is in {len(homes)} folders, so it is not clear which data are meant.",
            hint=f"Give one of them as the source: {shown}{', ...' if len(homes) > 3 else ''}.",
        )
    return splits[split]


def _home(file: Path, split: str) -> Path:
    return file.parent.parent if file.parent.name == split else file.parent


def _saved(folder: Path) -> dict[str, list[Path]]:
    """Files of what save_to_disk wrote, by split; "" where there are no splits."""
    if (folder / "dataset_dict.json").is_file():
        names = _listed(folder / "dataset_dict.json", lambda content: content["splits"])
        return {name: _arrow_files(folder / name) for name in names}
    return {"": _arrow_files(folder)} if (folder / "state.json").is_file() else {}


def _arrow_files(folder: Path) -> list[Path]:
    names = _listed(folder / "state.json", lambda content: [file["filename"] for file in content["_data_files"]])
    return [folder / name for name in names]


def _listed(path: Path, pick: Callable) -> list[str]:
    """Plain names in a small JSON file."""
    try:
        names = pick(json.loads(path.read_text(encoding="utf-8")))
        if not names or any(Path(name).name != name or name in ("", ".", "..") for name in names):
            raise ValueError
        return list(names)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise BadOption(
            f"{str(path)!r} does not list what belongs to the dataset.", hint="Save it again with save_to_disk."
        ) from None


def _with_metadata(folder: Path) -> dict[str, list[Path]]:
    here = _metadata_files(folder)
    if here:
        return {"": here}
    return {sub.name: found for sub in sorted(folder.iterdir()) if sub.is_dir() and (found := _metadata_files(sub))}


def _metadata_files(folder: Path) -> list[Path]:
    found = [folder / f"metadata{suffix}" for suffix in _READERS if (folder / f"metadata{suffix}").is_file()]
    if len(found) > 1:
        raise BadOption(f"{str(folder)!r} has {' and '.join(file.name for file in found)}.", hint="Keep one of them.")
    return found


def _shards(folder: Path) -> dict[str, list[Path]]:
    """Parquet files by split: what stands before "-00000-of-00002", else the folder of a number, else the name."""
    splits = defaultdict(list)
    files = [file for depth in range(3) for file in folder.glob("*/" * depth + "*.parquet")]
    for file in sorted(file for file in files if not any(p.startswith(".") for p in file.relative_to(folder).parts)):
        shard = _SHARD.fullmatch(file.stem)
        splits[shard["split"] if shard else file.parent.name if file.stem.isdigit() else file.stem].append(file)
    return splits


def _jsonl(path: Path, columns: Collection[str]) -> Iterator[Row]:
    with _open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            where = f"Line {number} of {str(path)!r}"
            text = _utf8(line, where)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", type(error).__name__)
                raise BadOption(f"{where} is not JSON ({reason}).", hint="Every line must be a JSON object.") from None
            if not isinstance(row, dict):
                raise BadOption(f"{where} must be a JSON object, got {type(row).__name__}.")
            yield _row(where, row, columns, tuple(row))


def _csv(path: Path, columns: Collection[str]) -> Iterator[Row]:
    with _open_text(path) as lines:
        reader = csv.reader((_utf8(line, f"Line {n} of {str(path)!r}") for n, line in enumerate(lines, 1)), strict=True)
        header: tuple[str, ...] = ()
        while True:
            where = f"Line {reader.line_num + 1} of {str(path)!r}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise BadOption(f"{where} is not CSV ({error}).") from None
            if cells is None:
                return
            if cells and not header:
                header = tuple(cell.strip() for cell in cells)
                _check_names(header, path)
            elif cells and len(cells) != len(header):
                raise BadOption(
                    f"{where} has {len(cells)} fields, the header has {len(header)}.",
                    hint='A field that holds a comma must stand in double quotes: "red, green".',
                )
            elif cells:
                yield _row(where, dict(zip(header, cells, strict=True)), columns, header)


def _parquet(path: Path, columns: Collection[str]) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with _reading(path), pq.ParquetFile(path, memory_map=True) as file:
        names = tuple(file.schema_arrow.names)
        wanted = [name for name in names if name in columns]
        batches = file.iter_batches(_BATCH_ROWS, columns=wanted, use_threads=False)
        yield from _batch_rows(path, names, wanted, batches)


def _arrow(path: Path, columns: Collection[str]) -> Iterator[Row]:
    import pyarrow as pa

    with _reading(path), pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
        names = tuple(stream.schema.names)
        yield from _batch_rows(path, names, [name for name in names if name in columns], stream)


def _batch_rows(path: Path, names: tuple[str, ...], wanted: list[str], batches: Iterable) -> Iterator[Row]:
    _check_names(names, path)
    number = 0
    if not wanted:
        yield _row(f"Row 0 of {str(path)!r}", {}, (), names)
    for batch in batches if wanted else ():
        batch = batch.select(wanted)
        batch.validate(full=True)  # offsets that point out of their buffers would read foreign memory
        for first in range(0, batch.num_rows, _BATCH_ROWS):
            for values in batch.slice(first, _BATCH_ROWS).to_pylist():
                yield _row(f"Row {number} of {str(path)!r}", values, wanted, names)
                number += 1


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet, ".arrow": _arrow}


def _row(where: str, values: dict, columns: Collection[str], names: tuple[str, ...]) -> Row:
    given = {name: values[name] for name in columns if not _is_empty(values.get(name))}
    return Row(where=where, values=given, columns=names)


def _is_empty(value: object) -> bool:
    if isinstance(value, dict):
        return all(part is None for part in value.values())
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _check_names(names: tuple[str, ...], path: Path) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadOption(f"{str(path)!r} has two columns {twice!r}.")


def _open_text(path: Path):
    """Lines as bytes: only a line feed ends one, whatever else Unicode counts as a line end."""
    size = path.stat().st_size
    if size > MAX_TEXT_BYTES:
        raise BadOption(f"{str(path)!r} has {size} bytes; a text manifest may have {MAX_TEXT_BYTES}.")
    try:
        return open(path, "rb")
    except OSError:
        raise BadOption(f"{str(path)!r} may not be read by this user.") from None


def _utf8(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")  # spreadsheets put a mark in front
    except UnicodeDecodeError:
        raise BadOption(f"{where} is not UTF-8 text.", hint="Save the file as UTF-8.") from None


@contextmanager
def _reading(path: Path):
    """Whatever a library says of a damaged file, in one line without its words."""
    try:
        yield
    except BadOption:
        raise
    except MemoryError:
        raise BadOption(f"{str(path)!r} needs more memory than there is.") from None
    except Exception as error:
        raise BadOption(
            f"{str(path)!r} is damaged or not {'Parquet' if path.suffix.lower() == '.parquet' else 'an Arrow stream'} "
            f"({type(error).__name__})."
        ) from None
