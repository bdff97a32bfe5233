"""Records from every kind of manifest and dataset folder, and one clear line for each way to get one wrong."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.datasets.conftest import encode, pictures
from tokensieve.datasets import manifest, tables
from tokensieve.datasets.clip_files import write_clips
from tokensieve.datasets.manifest import Record, generated_records, read_records
from tokensieve.errors import BadMedia, BadOption, MediaNotAllowed


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A folder with two pictures."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


def row(**more):
    return {"image": "a.png", "question": "What?", "answer": "red"} | more


def jsonl(folder, *rows, name="m.jsonl"):
    path = folder / name
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def csv_file(folder, text, name="m.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def parquet(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def refused(source, *parts, **options):
    """The error, which is one line that holds all `parts`."""
    with pytest.raises(BadOption) as caught:
        read_records(source, **options)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600 + len(str(source)), line
    for part in parts:
        assert part in line, line
    return line


# what is read


def test_every_column_of_a_row(folder):
    full = row(
        id="q1", image=None, video="./b.png", answer=["red", 2, 2.5], start_s=1, end_s=2.5, kind="colour", other=[1]
    )
    (record,) = read_records(jsonl(folder, full))
    assert record == Record(
        id="q1",
        source=folder / "b.png",
        question="What?",
        answers=("red", "2", "2.5"),
        start_s=1.0,
        end_s=2.5,
        kind="colour",
        clip="b.png",
        root=folder,
    )


def test_only_what_is_needed_must_be_there(folder):
    path = jsonl(folder, {"path": "a.png"}, b"", b"  ", {"file_name": "b.png", "question": ""})
    first, second = read_records(path, needs=())
    assert (first.id, first.question, first.answers, first.choices) == ("row-000000", None, (), ())
    assert (first.start_s, first.end_s, first.kind, first.clip) == (None, None, None, "a.png")
    assert (second.id, second.source, second.question) == ("row-000001", folder / "b.png", None)


@pytest.mark.parametrize(
    "names, field, want",
    [
        ({"answers": ["a", "b", "a"]}, "answers", ("a", "b")),
        ({"answers": ["a", None, ""]}, "answers", ("a",)),
        ({"answers": "a|b"}, "answers", ("a", "b")),
        ({"answer": "a|b"}, "answers", ("a|b",)),
        ({"answer": "[1]"}, "answers", ("[1]",)),
        ({"answer": " a "}, "answers", ("a",)),
        ({"answer": 3.0}, "answers", ("3",)),
        ({"answer": "red", "answers": ["blue"]}, "answers", ("blue",)),
        ({"start": 1, "end": "2.5"}, "start_s", 1.0),
        ({"start": 1, "end": "2.5"}, "end_s", 2.5),
        ({"category": "x"}, "kind", "x"),
        ({"question_type": 4}, "kind", "4"),
        ({"id": 7}, "id", "7"),
        ({"image": None, "video": "b.png", "path": "a.png"}, "clip", "b.png"),
    ],
)
def test_other_names_and_forms(names, field, want, folder):
    rows = row(**names) if "answers" not in names or "answer" in names else {**row(), **names, "answer": None}
    (record,) = read_records(jsonl(folder, rows))
    assert getattr(record, field) == want


@pytest.mark.parametrize("name", ["choices", "options"])
@pytest.mark.parametrize(
    "answer, choices, want",
    [
        ("dog", ["cat", "dog"], "dog"),
        ("DOG ", ["cat", "dog"], "dog"),
        ("B", ["cat", "dog"], "dog"),
        ("(b).", ["cat", "dog"], "dog"),
        (1, ["cat", "dog"], "dog"),
        (1.0, ["cat", "dog"], "dog"),
        ("1", ["cat", "dog"], "dog"),
        (1, [1, 2, 4], "2"),  # a number is a place
        (4, [1, 2, 4], "4"),  # unless there is no such place
        ("4", [1, 2, 4], "4"),
        ("mg", ["Mg", "mg"], "mg"),
        ("C. red", ["A. blue", "B. green", "C. red"], "red"),
        ("red", ["(A) blue", "(B) red"], "red"),
        ("B. red", ["blue", "red"], "red"),
        ("A", ["A. M.", "noon"], "A. M."),  # not all have letters
        ("b", '["a|c", "b, d"]', "b, d"),
        ("green", "red| green |blue", "green"),
    ],
)
def test_the_right_choice(name, answer, choices, want, folder):
    (record,) = read_records(jsonl(folder, row(answer=answer, **{name: choices})))
    assert record.answers == (want,) and want in record.choices
    assert not any(choice.startswith(("(A)", "C.")) for choice in record.choices)


def test_all_right_choices(folder):
    (record,) = read_records(jsonl(folder, row(answer=["A", 2], choices=["x", "y", "z"])))
    assert record.answers == ("x", "z") and record.choices == ("x", "y", "z")
    (record,) = read_records(jsonl(folder, row(choices=[])))
    assert record.answers == ("red",) and record.choices == ()


def test_csv_is_read_as_jsonl(folder):
    text = (
        "\ufeffid,image,question,answer,options,start_s\r\n"
        'q1,a.png,"One, or\ntwo?",B,"[""x, y"", ""z""]",\r\n'
        "\r\n"
        "q2,b.png,Three?,4,2|4,1.5\r\n"
    )
    first, second = read_records(csv_file(folder, text))
    assert (first.id, first.question, first.answers, first.choices) == ("q1", "One, or\ntwo?", ("z",), ("x, y", "z"))
    assert (second.answers, second.start_s, first.start_s) == (("4",), 1.5, None)


def test_parquet_with_paths_and_with_pictures(folder):
    rows = [row(answer=None, answers=["x", "y"], choices=[]), row(image="b.png", answers=["z"], answer=None)]
    first, second = read_records(parquet(folder / "m.parquet", rows))
    assert first.answers == ("x", "y") and second.source == folder / "b.png"
    rows = [{**row(), "image": {"bytes": png(i // 2), "path": "gone.png"}} for i in range(3)]
    a, b, c = read_records(parquet(folder / "m.parquet", rows))
    assert a.source == png(0) and a.source is b.source and c.source == png(1)
    assert a.clip == b.clip != c.clip and (a.id, c.id) == ("row-000000", "row-000002")
    (record,) = read_records(parquet(folder / "m.parquet", [{**row(), "image": png()}]))
    assert record.source == png() and record.root is None
    rows = [{**row(), "image": {"bytes": None, "path": "a.png"}}]
    assert read_records(parquet(folder / "m.parquet", rows))[0].source == folder / "a.png"


def test_any_character_in_a_question(folder):
    odd = "one\u2028two\x85three\x0cfour\u0000"
    assert read_records(jsonl(folder, row(question=odd)))[0].question == odd


def test_our_own_clips(tmp_path):
    path = write_clips("val", 1, tmp_path)
    written, drawn = read_records(path), generated_records("val", 1)
    facts = [[(r.id, r.question, r.answers, r.kind) for r in records] for records in (written, drawn)]
    assert facts[0] == facts[1] and len(facts[0]) == 4
    assert {r.clip for r in drawn} == {"val-0-000000"} and {r.clip for r in written} == {"val-0-000000.mp4"}
    assert [r.source for r in generated_records("val", 2, seed=3)][-1] == ("val", 1, 3)
    with pytest.raises(BadOption, match="positive"):
        generated_records("val", 0)
    with pytest.raises(BadOption, match="split"):
        generated_records("nothing", 1)


# limit


def test_reading_ends_with_the_last_clip_of_the_limit(folder):
    path = jsonl(folder, row(id=0), row(id=1), row(id=2, image="b.png"), row(id=3), b"{")
    assert [r.id for r in read_records(path, limit=1)] == ["0", "1"]
    refused(path, "Line 5", limit=2)
    assert len(read_records(jsonl(folder, row(), row()), limit=5)) == 2
    refused(jsonl(folder, row()), "limit must be above 0, got 0", limit=0)


def test_pictures_after_the_limit_are_not_read(folder):
    """The second half of the pictures is overwritten with zeros."""
    rng = np.random.default_rng(0)
    rows = [{**row(), "image": rng.bytes(1 << 16)} for _ in range(64)]
    path = parquet(folder / "m.parquet", rows, row_group_size=16, use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(bytes(1000))
    before = pa.total_allocated_bytes()
    records = read_records(path, limit=20)
    assert [r.source for r in records] == [r["image"] for r in rows[:20]]
    assert pa.total_allocated_bytes() - before < 1 << 20
    refused(path, "m.parquet", "damaged")


def test_sizes_are_bounded(folder, monkeypatch):
    path = jsonl(folder, row(), row(image="b.png"), row())
    monkeypatch.setattr(manifest, "MAX_RECORDS", 2)
    refused(path, "Line 3", "at most 2", "limit")
    assert len(read_records(path, limit=1)) == 1
    monkeypatch.setattr(tables, "MAX_TEXT_BYTES", 20)
    refused(path, "bytes", "20")
    monkeypatch.undo()
    monkeypatch.setattr(manifest, "MAX_MEDIA_BYTES", int(2.5 * len(png())))
    rows = [{**row(), "image": png(i)} for i in (0, 0, 1, 2)]
    assert len(read_records(parquet(folder / "m.parquet", rows[:3]))) == 3
    refused(parquet(folder / "m.parquet", rows), "Row 3", '"image"', "GiB")


# dataset folders


def save_to_disk(folder, rows, shards=1):
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    step = -(-len(rows) // shards)
    for i, name in enumerate(names):
        part = table.slice(i * step, step)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, part.schema) as stream:
            stream.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def picture_rows(*answers):
    return [{**row(answer=answer), "image": {"bytes": png(i), "path": None}} for i, answer in enumerate(answers)]


def answers_of(source, **options):
    return ["".join(record.answers) for record in read_records(source, **options)]


def test_what_save_to_disk_writes(tmp_path):
    source = save_to_disk(tmp_path / "one", picture_rows(*"abcde"), shards=2)
    assert answers_of(source) == list("abcde") and answers_of(source, limit=4) == list("abcd")
    assert [r.id for r in read_records(source)][-1] == "row-000004"
    refused(source, "no split 'test'", split="test")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["one", "two"]}')
    save_to_disk(tmp_path / "two", picture_rows("x"))
    assert answers_of(tmp_path, split="two") == ["x"]
    refused(tmp_path, "one, two", "split")
    refused(tmp_path, "'three'", "one, two", split="three")


def test_shards_of_a_dataset_repository(tmp_path):
    for i, answer in enumerate("ab"):
        parquet(tmp_path / "data" / f"test-{i:05d}-of-00002.parquet", picture_rows(answer))
    assert answers_of(tmp_path) == ["a", "b"]
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", picture_rows("c"))
    parquet(tmp_path / ".cache" / "data" / "test-00000-of-00001.parquet", picture_rows("d"))
    assert answers_of(tmp_path, split="test") == ["a", "b"] and answers_of(tmp_path, split="train") == ["c"]
    refused(tmp_path, "splits test, train")
    refused(tmp_path, "no split 'val'", split="val")


@pytest.mark.parametrize(
    "names", [["test.parquet"], ["data/test.parquet"], ["c/test/0000.parquet", "c/test/0001.parquet"]]
)
def test_other_names_of_shards(names, tmp_path):
    for i, name in enumerate(names):
        parquet(tmp_path / name, picture_rows(str(i)))
    assert answers_of(tmp_path, split="test") == [str(i) for i in range(len(names))]


def test_one_split_in_two_folders(tmp_path):
    for name in ("art", "music"):
        parquet(tmp_path / name / "test-00000-of-00001.parquet", picture_rows(name))
    refused(tmp_path, "in 2 folders", "art", "music", split="test")
    assert answers_of(tmp_path / "art") == ["art"]


def test_a_folder_of_images_with_metadata(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "c.png").write_bytes(png())
    jsonl(folder, {"file_name": "sub/c.png", "question": "?", "answer": 1}, name="metadata.jsonl")
    (record,) = read_records(folder)
    assert record.source == folder / "sub" / "c.png" and record.load().num_frames == 1
    (folder / "metadata.csv").write_text("x")
    refused(folder, "metadata.jsonl and metadata.csv")
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,question,answer\nb.png,?,2\n")
    assert answers_of(folder) == ["2"]
    (folder / "metadata.csv").rename(folder / "sub" / "metadata.csv")
    refused(folder, "metadata.csv'", "'b.png'", "not there", split="sub")
    (folder / "b.png").rename(folder / "sub" / "b.png")
    assert answers_of(folder) == ["2"]


def test_a_snapshot_in_the_hub_cache_links_to_its_blobs(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    for made in (blobs, snapshot / "data"):
        made.mkdir(parents=True)
    (blobs / "1").write_bytes(png())
    (snapshot / "a.png").symlink_to("../../blobs/1")
    jsonl(snapshot, row(), name="metadata.jsonl")
    (record,) = read_records(snapshot)
    assert record.load().num_frames == 1
    parquet(blobs / "2", picture_rows("x"))
    (snapshot / "metadata.jsonl").unlink()
    (snapshot / "data" / "test-00000-of-00001.parquet").symlink_to("../../../blobs/2")
    assert answers_of(snapshot) == ["x"]
    blobs.rename(tmp_path / "other")
    (snapshot / "data" / "test-00000-of-00001.parquet").unlink()
    (snapshot / "data" / "test-00000-of-00001.parquet").symlink_to(tmp_path / "other" / "2")
    refused(snapshot, "link out of")


@pytest.mark.parametrize(
    "state", ["{", "[]", "{}", '{"_data_files": []}', '{"_data_files": [{"filename": "../x.arrow"}]}']
)
def test_a_saved_dataset_that_lists_nothing_good(state, tmp_path):
    save_to_disk(tmp_path, picture_rows("x"))
    (tmp_path / "state.json").write_text(state)
    refused(tmp_path, "state.json", "save_to_disk")


# what is refused


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"image": None}, ['"video" or "image" or "path" or "file_name" is empty', "image, question, answer"]),
        ({"question": None}, ['"question" is empty']),
        ({"question": "  "}, ['"question" is empty']),
        ({"answer": None}, ['"answers" or "answer" is empty']),
        ({"answer": [None, ""]}, ['"answer" is empty']),
        ({"question": 3}, ['column "question"', "text, got 3"]),
        ({"question": ["a"]}, ['column "question"', "text, got ['a']"]),
        ({"question": "\ud800"}, ['column "question"', "Unicode"]),
        ({"answer": {"a": 1}}, ['column "answer"', "text or a number or a list", "{'a': 1}"]),
        ({"answer": True}, ['column "answer"', "True"]),
        ({"answer": [["a"]]}, ['column "answer"', "['a']"]),
        ({"answer": float("nan")}, ['column "answer"', "nan"]),
        ({"answer": 10**400}, ['column "answer"']),
        ({"id": ["x"]}, ['column "id"', "['x']"]),
        ({"kind": {"a": 1}}, ['column "kind"']),
        ({"category": False}, ['column "category"', "False"]),
        ({"image": ["a.png"]}, ['column "image"', "['a.png']"]),
        ({"image": 3}, ['column "image"', "got 3"]),
        ({"image": "c.png"}, ['column "image"', "not there: 'c.png'"]),
        ({"image": "x" * 10_000}, ['column "image"', "not there"]),
        ({"image": "a\0.png"}, ['column "image"', "path of a file"]),
        ({"image": "y" * 40_000}, ['column "image"']),
        ({"image": "../a.png"}, ['column "image"', "inside the manifest's folder", "'../a.png'", "allow_outside"]),
        ({"image": "sub/../../a.png"}, ["inside the manifest's folder"]),
        ({"image": "/etc/passwd"}, ["inside the manifest's folder", "'/etc/passwd'"]),
        ({"image": "https://x.org/a.png"}, ["URL", "'https://x.org/a.png'"]),
        ({"image": "file:/etc/passwd"}, ["URL"]),
        ({"video": "b.png"}, ['both "video" and "image"']),
        ({"start_s": "00:10"}, ['column "start_s"', "seconds from 0 up, got '00:10'"]),
        ({"start": -1}, ['column "start"', "got -1"]),
        ({"end": float("inf")}, ['column "end"', "inf"]),
        ({"end": True}, ['column "end"', "True"]),
        ({"end_s": [1]}, ['column "end_s"']),
        ({"start_s": 2, "end_s": 2}, ['column "end_s"', "after the start at 2 s, got 2"]),
        ({"choices": ["red"]}, ['column "choices"', "2 to 26 different"]),
        ({"choices": ["red", "red"]}, ['column "choices"', "different"]),
        ({"choices": list(range(27))}, ['column "choices"', "2 to 26"]),
        ({"choices": ["red", None]}, ['column "choices"', "None"]),
        ({"choices": {"A": "red"}}, ['column "choices"']),
        ({"choices": '["red"'}, ['column "choices"', "JSON list"]),
        ({"options": ["blue", "green"]}, ['column "answer"', "A to B", "0 to 1", "'red'"]),
        ({"options": ["x", "y"], "answer": "C"}, ['column "answer"', "'C'"]),
        ({"options": ["x", "y"], "answer": 2}, ['column "answer"', "got 2"]),
        ({"options": ["x", "y"], "answer": -1}, ['column "answer"', "got -1"]),
        ({"options": ["B", "A"], "answer": "A"}, ['column "answer"', "'B' or 'A'"]),
        ({"options": ["1", "2"], "answer": "1"}, ['column "answer"', "'1' or '2'"]),
    ],
)
def test_a_bad_row(change, parts, folder):
    refused(jsonl(folder, row(), row(**change)), "Line 2 of", "m.jsonl", *parts)


def test_missing_columns(folder):
    refused(jsonl(folder, {"question": "?"}), "Line 1", '"video" or "image" or', "is missing", "columns are: question")
    refused(jsonl(folder, {"image": "a.png"}), '"question" is missing')
    refused(jsonl(folder, {}), "is missing", "none")
    refused(csv_file(folder, "image,label\na.png,1\n"), "Line 2", '"question" is missing', "image, label")
    refused(parquet(folder / "m.parquet", [{"label": 1, "text": "x"}]), "Row 0", "is missing", "label, text")
    path = jsonl(folder, row())
    refused(path, '"choices" or "options" is missing', needs=("choices",))
    assert read_records(jsonl(folder, {"image": "a.png", "question": "?"}), needs=("question",))


@pytest.mark.parametrize(
    "line", [b"{", b"[1]", b"3", b'"image"', b"null", b"[" * 10_000, b'{"a": ' + b"1" * 5000 + b"}"]
)
def test_a_line_that_is_no_row(line, folder):
    refused(jsonl(folder, row(), line), "Line 2 of", "JSON")


def test_what_is_no_manifest(folder):
    refused(folder / "nothing.jsonl", "no manifest", "nothing.jsonl")
    refused(folder / "nothing", "no manifest")
    refused(folder, "no dataset", "metadata.jsonl", ".parquet")
    (folder / "m.xlsx").write_text("")
    refused(folder / "m.xlsx", "m.xlsx", ".jsonl, .csv, .parquet")
    os.mkfifo(folder / "p.jsonl")
    refused(folder / "p.jsonl", "no manifest")
    refused(jsonl(folder, row()), "Only dataset folders have splits", split="test")


def test_what_is_empty(folder):
    refused(jsonl(folder, b"", b" "), "is empty")
    refused(csv_file(folder, ""), "is empty")
    refused(csv_file(folder, "image,question,answer\n\n"), "is empty")
    path = folder / "m.parquet"
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in row()}), path)
    refused(path, "is empty")


def test_ids_differ(folder):
    refused(jsonl(folder, row(id="x"), row(), row(id="x")), "Line 3", "id 'x'", "line 1")
    refused(jsonl(folder, row(id="row-000001"), row()), "Line 2", "'row-000001'", "line 1")
    rows = [{**row(), "id": 1}, {**row(), "id": 1}]
    refused(parquet(folder / "m.parquet", rows), "Row 1", "id '1'", "row 0")


def test_what_is_not_utf8(folder):
    refused(jsonl(folder, row(), b'{"question": "\xff"}'), "Line 2", "UTF-8")
    refused(csv_file(folder, b"image,question,answer\na.png,?,r\na.png,\xff,r\n"), "Line 3", "UTF-8")


def test_bad_csv(folder):
    head = "image,question,answer\n"
    refused(csv_file(folder, head + "a.png,?\n"), "Line 2", "2 fields", "3", "quotes")
    refused(csv_file(folder, head + "a.png,red, green,x\n"), "Line 2", "4 fields")
    refused(csv_file(folder, head + 'a.png,?,r\na.png,"never\nclosed,x\n'), "Line 3", "not CSV")
    refused(csv_file(folder, head + f"a.png,{'x' * 200_000},r\n"), "Line 2", "not CSV", "limit")
    refused(csv_file(folder, "image,answer,answer\na.png,?,r\n"), "two columns 'answer'")


@pytest.mark.parametrize("name", ["m.parquet", "m.arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 100, b"\xff" * 100, b"\x80\x04cos\nsystem\n."])
def test_what_is_no_binary_table(name, content, folder):
    (folder / name).write_bytes(content)
    refused(folder / name, name, "damaged")


def test_a_table_beyond_the_memory(folder, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(tables, "_batch_rows", fail)
    refused(parquet(folder / "m.parquet", [row()]), "m.parquet", "more memory than there is")


def test_offsets_that_leave_their_buffer(tmp_path):
    """Read unchecked, this hands out memory of the process, or kills it."""
    source = save_to_disk(tmp_path, [row(question="q" * 1234)])
    (path,) = tmp_path.glob("*.arrow")
    ends = np.array([0, 1234], np.int32).tobytes()
    data = path.read_bytes()
    at = data.rindex(ends)  # sizes of buffers, in front of all buffers, may look the same
    path.write_bytes(data[:at] + np.array([0, 1 << 30], np.int32).tobytes() + data[at + len(ends) :])
    refused(source, ".arrow", "damaged")


def test_text_in_a_table_that_is_not_utf8(folder):
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"image": ["a.png"], "question": bad, "answer": ["x"]}), folder / "m.parquet")
    refused(folder / "m.parquet", "damaged")


@pytest.mark.parametrize("outside", ["../{name}", "{folder}"])
def test_paths_outside_when_they_are_allowed(outside, folder):
    path = jsonl(folder, row(image=outside.format(name=f"{folder.name}/a.png", folder=folder / "a.png")))
    refused(path, "inside the manifest's folder")
    (record,) = read_records(path, allow_outside=True)
    assert record.load().num_frames == 1 and record.root is None


def test_links_out_of_the_folder(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "c.png").write_bytes(png())
    (folder / "c.png").symlink_to(other / "c.png")
    (folder / "d.png").symlink_to("a.png")
    path = jsonl(folder, row(image="c.png"))
    refused(path, "inside the manifest's folder", "link")
    assert read_records(path, allow_outside=True)[0].load().num_frames == 1
    (record,) = read_records(jsonl(folder, row(image="d.png")))
    (folder / "d.png").unlink()
    (folder / "d.png").symlink_to(other / "c.png")  # between reading the manifest and the picture
    with pytest.raises(MediaNotAllowed):
        record.load()


# loading


def test_the_part_asked_about_is_read(tmp_path):
    encode(tmp_path / "v.mp4", pictures(50))
    ask = {"video": "v.mp4", "question": "?", "answer": 1}
    part, whole = read_records(jsonl(tmp_path, ask | {"start": 0.5, "end": 1.0}, ask))
    assert part.load(num_frames=2).times_s.tolist() == [0.48, 1.0]  # shown at 0.5 s, and at the end
    assert whole.load().num_frames == 8 and whole.load(fps=2).num_frames == 4
    assert part.load(num_frames=2, start_s=0.0).times_s[0] == 0.48  # the question's part holds


def test_bytes_are_decoded_as_files_are(tmp_path):
    record = Record(id="q", source=png(200), clip="c")
    frames = record.load()
    assert frames.data.shape == (1, 4, 6, 3) and (frames.data == 200).all() and frames.source == "c"
    video = Record(id="q", source=encode(tmp_path / "v.mp4", pictures(10)).read_bytes())
    assert video.load(num_frames=3).num_frames == 3 and video.clip == "q"
    with pytest.raises(BadMedia) as caught:
        Record(id="q", source=b"no picture at all", clip="c").load()
    assert "'c'" in str(caught.value) and "/tmp" not in str(caught.value)  # the same words in every run


def test_generated_clips_are_drawn(tmp_path):
    record = generated_records("val", 1)[0]
    assert record.load().num_frames == 8 and record.load(num_frames=4).num_frames == 4
    with pytest.raises(BadOption, match="no fps"):
        record.load(fps=2)
