"""The rows of a batch job: one an input, its columns, and tables of them.

Rows hold what follows from the input and the options alone, no times or places of the run, so that an interrupted run
ends with the very rows of an undisturbed one.
"""

# Shape legend: K kept tokens, D width of the language model

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from tokensieve.datasets.frames import Frames
from tokensieve.errors import BadOption
from tokensieve.pipeline.batch.inputs import Failure, Input, text_of

Row = dict[str, object]
OK, PARTIAL, FAILED = "ok", "partial", "failed"
FLOATS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}

_ALWAYS = {
    "key": pa.string(),
    "version": pa.string(),
    "options": pa.string(),
    "id": pa.string(),
    "path": pa.string(),
    "start_s": pa.float64(),
    "end_s": pa.float64(),
    "questions": pa.list_(pa.string()),
    "status": pa.string(),
    "stage": pa.string(),
    "error_type": pa.string(),
    "message": pa.string(),
    "retryable": pa.bool_(),
    "notes": pa.list_(pa.string()),
    "num_frames": pa.int32(),
    "height": pa.int32(),
    "width": pa.int32(),
    "duration_s": pa.float64(),
    "visual_tokens_full": pa.int32(),
    "visual_tokens": pa.list_(pa.int32()),
    "prompt_tokens": pa.list_(pa.int32()),
    "generated_tokens": pa.list_(pa.int32()),
}
LEDGER = ("visual_tokens_full", "visual_tokens", "prompt_tokens", "generated_tokens")


def answer_schema() -> pa.Schema:
    """Columns of the tasks `answer` and `caption`."""
    return pa.schema({**_ALWAYS, "answers": pa.list_(pa.string())})


def feature_schema(width: int, dtype: str) -> pa.Schema:
    """Columns of the task `features`.

    Args:
        width: D of the features.
        dtype: "float32" or "float16".

    Raises:
        BadOption: another dtype.
    """
    if dtype not in FLOATS:
        raise BadOption(f"Features are stored as {' or '.join(FLOATS)}, got {dtype!r}.")
    vector = pa.list_(pa.from_numpy_dtype(FLOATS[dtype]), width)
    features = {
        "features": pa.list_(vector),
        "positions": pa.list_(pa.list_(pa.int32(), 4)),
        "times_s": pa.list_(pa.float64()),
        "grids": pa.list_(pa.list_(pa.int32(), 3)),
        "pooled": vector,
    }
    return pa.schema({**_ALWAYS, **features})


def input_row(given: Input) -> Row:
    """What is known of every input before it is opened."""
    return {
        "key": given.key,
        "version": given.version,
        "id": text_of(given.id),
        "path": text_of(given.path),
        "start_s": given.start_s,
        "end_s": given.end_s,
        "questions": [text_of(question) for question in given.questions],
        "status": OK,
        "notes": [],
    }


def failed_row(given: Input, failure: Failure, frames: Frames | None = None) -> Row:
    """The row of an input without a result."""
    seen = {} if frames is None else frames_row(frames)
    return {
        **input_row(given),
        **seen,
        "status": FAILED,
        "stage": failure.stage,
        "error_type": failure.error_type,
        "message": text_of(failure.message),
        "retryable": failure.retryable,
    }


def frames_row(frames: Frames) -> Row:
    """What a decoded clip adds."""
    return {
        "status": PARTIAL if frames.partial else OK,
        "notes": [text_of(note) for note in frames.notes],
        "num_frames": frames.num_frames,
        "height": frames.height,
        "width": frames.width,
        "duration_s": float(frames.duration_s),
    }


def size_bytes(row: Row) -> int:
    """About how much a row adds to a part."""
    return 1000 + sum(value.nbytes for value in row.values() if isinstance(value, np.ndarray))


def table_of(rows: Sequence[Mapping[str, object]], schema: pa.Schema, options: str) -> pa.Table:
    """Rows as a table; columns that a row lacks are empty there.

    Args:
        rows: features and positions as numpy arrays `[K, ...]`, everything else as plain types.
        schema: of `answer_schema` or `feature_schema`.
        options: fingerprint of the options they were made with, a column of every row.
    """
    columns = []
    for field in schema:
        values = [options if field.name == "options" else row.get(field.name) for row in rows]
        nested = pa.types.is_list(field.type) and pa.types.is_fixed_size_list(field.type.value_type)
        columns.append(_vectors(values, field.type) if nested else pa.array(values, field.type))
    return pa.table(columns, schema=schema)


def _vectors(values: Sequence[np.ndarray | None], kind: pa.ListType) -> pa.ListArray:
    """A list of vectors in each row, from arrays `[K, D]`, without a Python object a number."""
    vector = kind.value_type
    flat = [np.asarray(value).reshape(-1) for value in values if value is not None]
    numbers = pa.array(np.concatenate(flat) if flat else np.empty(0), vector.value_type)
    ends = np.cumsum([0, *(0 if value is None else len(value) for value in values)])
    offsets = [None if value is None else int(end) for value, end in zip(values, ends[:-1], strict=True)]
    return pa.ListArray.from_arrays(
        pa.array([*offsets, int(ends[-1])], pa.int32()),
        pa.FixedSizeListArray.from_arrays(numbers, vector.list_size),
        type=kind,
    )
