"""Reading what `tokensieve process` wrote: Parquet files, of which those count that no other one replaces."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tokensieve.errors import BadOption

if TYPE_CHECKING:
    import pyarrow.dataset

PARTS = "parts"
REPLACES = b"tokensieve_replaces"  # in a part's metadata: JSON list of the names of parts whose rows it takes over


def open_results(folder: str | os.PathLike) -> pyarrow.dataset.Dataset:
    """All finished rows of a batch job as an Arrow dataset, one row an input; nothing is read or sorted yet.

    Works on a running or killed job as well: parts appear whole, and one that is being replaced does not count twice.

    Args:
        folder: what `tokensieve process --out` named.

    Raises:
        BadOption: no such job, none of its rows is finished, or a damaged part.

    Example:
        >>> open_results("out").to_table(columns=["path", "answers"]).to_pandas()
    """
    import pyarrow.dataset

    parts = Path(folder) / PARTS
    if not parts.is_dir():
        raise BadOption(f"{str(folder)!r} holds no results of `tokensieve process`.", hint="Name the folder of --out.")
    live = [path for path, replaced in live_parts(parts) if not replaced]
    if not live:
        raise BadOption(f"No row of {str(folder)!r} is finished yet.", hint="Start the job again, or wait.")
    return pyarrow.dataset.dataset([str(path) for path in live], format="parquet")


def live_parts(parts: Path) -> list[tuple[Path, bool]]:
    """Every part of a folder in the order of their names, and whether another part replaces it.

    Raises:
        BadOption: a part without a readable end.
    """
    names = sorted(path for path in parts.glob("part-*.parquet"))
    replaced = {name for path in names for name in replaced_by(path)}
    return [(path, path.name in replaced) for path in names]


def replaced_by(path: Path) -> list[str]:
    """Names of the parts that the part takes over from.

    Raises:
        BadOption: it is no Parquet file, or says something else there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = json.loads((pq.read_schema(path).metadata or {}).get(REPLACES, b"[]"))
        if not isinstance(names, list):
            raise ValueError
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise BadOption(
            f"The part {str(path)!r} is damaged ({type(error).__name__}).",
            hint="Start the job again: it sets the part aside and does its clips once more.",
        ) from None
    return [str(name) for name in names]
