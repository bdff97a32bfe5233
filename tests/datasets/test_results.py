"""Reading the results of a batch job; its writer is tested in tests/pipeline/batch."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokensieve.datasets import open_results
from tokensieve.datasets.results import REPLACES
from tokensieve.errors import BadOption


def part(folder, name, keys, replaces=None):
    metadata = None if replaces is None else {REPLACES: json.dumps(replaces).encode()}
    path = folder / "parts" / f"part-{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"key": keys}).replace_schema_metadata(metadata), path)
    return path.name


def keys(folder):
    return sorted(open_results(folder).to_table()["key"].to_pylist())


def test_rows_of_all_parts_but_replaced_ones(tmp_path):
    first = part(tmp_path, "1", ["a", "b"])
    part(tmp_path, "2", ["c"])
    (tmp_path / "parts" / "5.tmp").write_bytes(b"half a part")
    assert keys(tmp_path) == ["a", "b", "c"]
    second = part(tmp_path, "3", ["a"], replaces=[first])
    assert keys(tmp_path) == ["a", "c"]
    (tmp_path / "parts" / first).unlink()
    part(tmp_path, "4", ["x"], replaces=[second])
    assert keys(tmp_path) == ["c", "x"]
    assert open_results(str(tmp_path)).count_rows() == 2


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no results"), ({}, "No row"), ({"part-1.parquet": b"PAR1 but no more"}, "damaged")]
)
def test_nothing_to_read(content, words, tmp_path):
    if content is not None:
        (tmp_path / "parts").mkdir()
        for name, data in content.items():
            (tmp_path / "parts" / name).write_bytes(data)
    with pytest.raises(BadOption, match=words):
        open_results(tmp_path)


@pytest.mark.parametrize("replaces", ["{}", "[", "1"])
def test_nonsense_in_the_metadata(replaces, tmp_path):
    path = tmp_path / "parts" / part(tmp_path, "1", ["a"])
    pq.write_table(pa.table({"key": ["a"]}).replace_schema_metadata({REPLACES: replaces.encode()}), path)
    with pytest.raises(BadOption, match="damaged"):
        open_results(tmp_path)
