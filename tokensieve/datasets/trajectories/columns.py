"""Some rows of some columns of a Parquet file, as numpy arrays, with nothing believed that the file says of itself.

Shape legend: T rows
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tokensieve.errors import BadOption

MAX_ROWS = 1 << 31  # of a file
MAX_VALUES = 1 << 30  # of the columns and row groups that are read
_BATCH_ROWS = 1024
_PICTURE_ROWS = 16
_MAX_TEXT = 10_000  # characters of one value


def column_names(path: Path) -> list[str]:
    """Names of a file's columns.

    Raises:
        BadOption: no such file, or a damaged one.
    """
    with _open(path) as file:
        return list(file.schema_arrow.names)


def read_columns(path: Path, shapes: dict[str, tuple[int, ...]], start: int, count: int) -> dict[str, np.ndarray]:
    """Rows `start` up to `start + count` of the columns in `shapes`, each [T, *shape]; texts are [T].

    Columns of other things than numbers, truth values and texts are left out of the result.

    Raises:
        BadOption: no such rows or column, empty cells, values of another shape, or a damaged file.
    """
    import pyarrow as pa

    batches = list(_batches(path, list(shapes), start, count, _BATCH_ROWS))
    table = pa.Table.from_batches(batches)
    found = {}
    for name, shape in shapes.items():
        values = _to_numpy(table.column(name).combine_chunks(), shape, f"{str(path)!r}: column {name!r}")
        if values is not None:
            found[name] = values
    return found


def read_pictures(path: Path, name: str, start: int, count: int) -> Iterator[bytes]:
    """Encoded pictures of rows `start` up to `start + count`: a column of {bytes, path}, as Hugging Face's Image.

    Raises:
        BadOption: see `read_columns`; also where a picture is not in the file itself.
    """
    for batch in _batches(path, [name], start, count, _PICTURE_ROWS):
        for cell in batch.column(0).to_pylist():
            picture = cell.get("bytes") if isinstance(cell, dict) else cell
            if not isinstance(picture, bytes) or not picture:
                raise BadOption(f"{str(path)!r}: column {name!r} does not hold the pictures themselves.")
            yield picture


def _batches(path: Path, names: list[str], start: int, count: int, batch_rows: int) -> Iterator:
    """Record batches that together are the wanted rows; only the row groups that hold some are read."""
    with _open(path) as file:
        missing = [name for name in names if name not in file.schema_arrow.names]
        if missing:
            raise BadOption(f"{str(path)!r} has no column {missing[0]!r}.")
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        if any(size < 0 for size in sizes) or sum(sizes) > MAX_ROWS:
            raise BadOption(f"{str(path)!r} has too many rows; at most {MAX_ROWS} are read.")
        if not 0 <= start <= start + count <= sum(sizes):
            raise BadOption(f"{str(path)!r} has {sum(sizes)} rows; rows {start} to {start + count} are asked for.")
        ends = np.cumsum(sizes)
        groups = [g for g, end in enumerate(ends) if end > start and end - sizes[g] < start + count]
        _check_values(file, names, groups, path)
        at, num_found = int(ends[groups[0]] - sizes[groups[0]]) if groups else 0, 0
        for batch in file.iter_batches(batch_rows, row_groups=groups, columns=names, use_threads=False):
            first, past = max(start - at, 0), min(start + count - at, batch.num_rows)
            at += batch.num_rows
            if first < past:
                part = batch.slice(first, past - first)
                part.validate(full=True)  # offsets that point out of their buffers would read foreign memory
                num_found += part.num_rows
                yield part
        if num_found != count:
            raise BadOption(f"{str(path)!r} holds {num_found} of rows {start} to {start + count}: it is damaged.")


def _check_values(file, names: list[str], groups: list[int], path: Path) -> None:
    """A few bytes of Parquet can stand for billions of equal values."""
    num_values = 0
    for group in groups:
        about = file.metadata.row_group(group)
        for place in range(about.num_columns):
            column = about.column(place)
            if any(column.path_in_schema == name or column.path_in_schema.startswith(f"{name}.") for name in names):
                num_values += column.num_values
    if num_values > MAX_VALUES:
        raise BadOption(f"{str(path)!r} has {num_values} values where {MAX_VALUES} are read at most.")


def _to_numpy(column, shape: tuple[int, ...], where: str) -> np.ndarray | None:
    import pyarrow as pa
    import pyarrow.compute as pc

    num_rows = len(column)
    while isinstance(column.type, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        if len(pc.unique(column.value_lengths())) > 1:  # an empty cell has a length of its own
            raise BadOption(f"{where} must hold lists of one length, all of shape {list(shape)}.")
        column = column.flatten()
    if column.null_count:
        raise BadOption(f"{where} has empty cells.")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        if len(column) and pc.max(pc.utf8_length(column)).as_py() > _MAX_TEXT:
            raise BadOption(f"{where} has texts of more than {_MAX_TEXT} characters.")
        return np.array(column.to_pylist(), dtype=np.str_)
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        return None
    if len(column) != num_rows * math.prod(shape):
        raise BadOption(f"{where} has {len(column)} values in {num_rows} rows; each should be {list(shape)}.")
    return column.to_numpy(zero_copy_only=False).reshape(num_rows, *shape)


@contextmanager
def _open(path: Path):
    """A ParquetFile; whatever is said of a damaged one, in one line without the library's words."""
    import pyarrow.parquet as pq

    if not path.is_file():
        raise BadOption(f"There is no file {str(path)!r}.", hint="Get the whole dataset again.")
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
    except BadOption:
        raise
    except MemoryError:
        raise BadOption(f"{str(path)!r} needs more memory than there is.") from None
    except Exception as error:
        raise BadOption(f"{str(path)!r} is damaged or not Parquet ({type(error).__name__}).") from None
