"""Parts: whole or not there, named by what is in them, and never two rows of a key, wherever a kill strikes."""

from __future__ import annotations

import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from tokensieve.datasets import open_results
from tokensieve.errors import TokensieveError
from tokensieve.pipeline.batch import parts as parts_module
from tokensieve.pipeline.batch.parts import PartWriter, clean, forget, read_columns, write_part
from tokensieve.pipeline.batch.rows import answer_schema, feature_schema, table_of


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "parts").mkdir()
    return tmp_path


def rows(*keys):
    return [{"key": key, "version": "1-1", "status": "ok", "answers": [f"about {key}"]} for key in keys]


def table(*keys):
    return table_of(rows(*keys), answer_schema(), "abc")


def keys(folder):
    return sorted(read_columns(folder / "parts", ["key"])["key"].to_pylist())


def names(folder):
    return sorted(path.name for path in (folder / "parts").iterdir())


def test_a_part_is_named_by_its_content(folder):
    path = write_part(folder / "parts", table("a", "b"))
    assert write_part(folder / "parts", table("a", "b")) == path and names(folder) == [path.name]
    assert write_part(folder / "parts", table("a", "c")) != path
    assert keys(folder) == ["a", "a", "b", "c"]


def test_forgotten_rows(folder):
    first, second = write_part(folder / "parts", table("a", "b", "c")), write_part(folder / "parts", table("d"))
    forget(folder / "parts", [(first.name, 1), (second.name, 0)])
    assert keys(folder) == ["a", "c"] and len(names(folder)) == 1 and first.name not in names(folder)
    assert open_results(folder).to_table()["answers"].to_pylist() == [["about a"], ["about c"]]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(12))
def test_killed_at_every_step(step, folder, monkeypatch):
    """Every call that touches the disk in turn is the last one; then the folder is taken up again."""
    first = write_part(folder / "parts", table("a", "b", "c"))
    count = 0

    def dying(call):
        def wrapper(*arguments, **options):
            nonlocal count
            if count == step:
                raise Killed
            count += 1
            return call(*arguments, **options)

        return wrapper

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "unlink", "open"):
            patch.setattr(parts_module.os, name, dying(getattr(os, name)))
        try:
            write_part(folder / "parts", table("d"))
            forget(folder / "parts", [(first.name, 1)])
        except Killed:
            pass
        else:
            assert count <= step
    seen = keys(folder)  # a reader that comes before the restart
    assert seen in (["a", "b", "c"], ["a", "b", "c", "d"], ["a", "c", "d"])
    assert clean(folder / "parts") == []
    assert keys(folder) == seen and not [name for name in names(folder) if name.endswith(".tmp")]
    assert sorted(open_results(folder).to_table()["key"].to_pylist()) == seen
    if "b" in seen:
        place = next(p for p in read_columns(folder / "parts", ["key"]).to_pylist() if p["key"] == "b")["part"]
        forget(folder / "parts", [(place, 1)])
    assert "b" not in keys(folder)


def test_the_steps_above_cover_everything(folder, monkeypatch):
    """The last two of them must come after the end, else the list of steps is too short."""
    count = 0

    def counting(call):
        def wrapper(*arguments, **options):
            nonlocal count
            count += 1
            return call(*arguments, **options)

        return wrapper

    first = write_part(folder / "parts", table("a", "b", "c"))
    for name in ("fsync", "replace", "unlink", "open"):
        monkeypatch.setattr(parts_module.os, name, counting(getattr(os, name)))
    write_part(folder / "parts", table("d"))
    forget(folder / "parts", [(first.name, 1)])
    assert 8 <= count < 12


def test_damaged_parts_are_set_aside(folder):
    good, bad = write_part(folder / "parts", table("a")), write_part(folder / "parts", table("b"))
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes(content)
    (folder / "parts" / "17.tmp").write_bytes(b"half")
    assert clean(folder / "parts") == [bad.name]
    assert names(folder) == [good.name] and (folder / "damaged" / bad.name).exists() and keys(folder) == ["a"]


def test_a_full_disk_is_one_sentence(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts_module.os, "fsync", full)
    with pytest.raises(TokensieveError, match="No space left"):
        write_part(folder / "parts", table("a"))
    monkeypatch.undo()
    assert keys(folder) == []


def test_when_the_writer_writes(folder):
    now = [0.0]
    writer = PartWriter(
        parts=folder / "parts", schema=answer_schema(), options="abc", max_rows=3, max_s=10, clock=lambda: now[0]
    )
    writer.add(rows("a", "b"))
    assert names(folder) == []
    now[0] = 9.0
    writer.add([])
    assert names(folder) == []
    now[0] = 10.0
    writer.add([])
    assert keys(folder) == ["a", "b"]
    writer.add(rows("c", "d", "e", "f"))
    assert keys(folder) == ["a", "b", "c", "d", "e"]
    writer.flush()
    writer.flush()
    assert keys(folder) == ["a", "b", "c", "d", "e", "f"] and len(names(folder)) == 3


def test_large_rows_make_small_parts(folder, monkeypatch):
    monkeypatch.setattr(parts_module, "MAX_BYTES", 10_000)
    writer = PartWriter(parts=folder / "parts", schema=feature_schema(4, "float32"), options="abc")
    features = np.ones((1000, 4), np.float32)
    writer.add([{"key": "a", "features": features}, {"key": "b", "features": features}])
    assert len(names(folder)) == 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features_come_back_as_they_went_in(folder, dtype):
    features = np.arange(12, dtype=dtype).reshape(3, 4)
    filled = {"key": "a", "features": features, "positions": np.zeros((3, 4), np.int32), "pooled": features[0]}
    schema = feature_schema(4, dtype)
    given = [{"key": "x"}, filled, {"key": "y"}, {**filled, "key": "b", "features": features[:1]}]
    write_part(folder / "parts", table_of(given, schema, "abc"))
    read = open_results(folder).to_table()
    assert read.schema.field("features").type.value_type.list_size == 4
    assert [row["features"] is None for row in read.to_pylist()] == [True, False, True, False]
    back = read["features"].combine_chunks()
    assert np.array_equal(np.array(back[1].as_py(), dtype), features)
    assert np.array_equal(np.array(back[3].as_py(), dtype), features[:1])
    assert read["pooled"][0].as_py() is None and read["pooled"][1].as_py() == features[0].tolist()
    assert read["options"].to_pylist() == ["abc"] * 4


def test_files_of_one_content_are_equal_byte_by_byte(folder, tmp_path):
    (tmp_path / "other").mkdir()
    one, other = write_part(folder / "parts", table("a")), write_part(tmp_path / "other", table("a"))
    assert one.read_bytes() == other.read_bytes() and pq.read_table(other).num_rows == 1
