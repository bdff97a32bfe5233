"""What a job works through: folders, globs and manifests, and rows that cannot be used."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokensieve.errors import BadOption
from tokensieve.pipeline.batch.inputs import MISSING, Failure, find_inputs, text_of
from tokensieve.pipeline.batch.tasks import DESCRIBE, with_questions


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def ids(source, **options):
    return [one.id for one in find_inputs(source, **options).inputs]


def manifest(folder, *rows):
    path = folder / "clips.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder(tmp_path):
    touch(tmp_path, "b.mp4", "a/z.MKV", "a/y.webm", "notes.txt", ".hidden.mp4", "new\nline ü.mp4", "concat:a|b.mp4")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = find_inputs(tmp_path)
    assert sorted(one.id for one in found.inputs) == sorted(
        ["a/y.webm", "a/z.MKV", "b.mp4", "concat:a|b.mp4", "new\nline ü.mp4"]
    )
    assert found.skipped == {
        "links to folders": 1,
        "hidden files": 1,
        "files that are no videos by their extension": 1,
    }
    assert all(one.root == tmp_path and one.file.exists() for one in found.inputs)
    assert ids(tmp_path, limit=2) == ["b.mp4", "concat:a|b.mp4"]
    assert find_inputs(tmp_path, allow_outside=True).inputs[0].root is None


def test_a_glob_and_a_single_file(tmp_path):
    touch(tmp_path, "in/a.mp4", "in/deep/b.dat", "in/c.txt")
    assert ids(tmp_path / "in" / "*.mp4") == ["a.mp4"]
    found = find_inputs(tmp_path / "in" / "**" / "*.[dt]*").inputs
    assert [one.id for one in found] == ["c.txt", "deep/b.dat"] and found[0].root == tmp_path / "in"
    assert ids(tmp_path / "in" / "a.mp4") == ["a.mp4"]


def test_keys_follow_from_what_is_asked_and_versions_from_the_file(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    (first, second) = find_inputs(tmp_path).inputs
    assert first.key != second.key and len(first.key) == 32
    assert find_inputs(tmp_path, questions=["Why?"]).inputs[0].key != first.key
    os.utime(tmp_path / "a.mp4", ns=(1, 1))
    again = find_inputs(tmp_path).inputs[0]
    assert (again.key, again.version) == (first.key, "1-1") and first.version != "1-1"
    (tmp_path / "a.mp4").write_bytes(b"xy")
    assert find_inputs(tmp_path).inputs[0].version.startswith("2-")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_manifests(tmp_path, kind):
    touch(tmp_path, "v/a.mp4", "v/b.mp4")
    rows = [
        {"id": "one", "path": "v/a.mp4", "question": "Why?", "start": 1.5, "end": 2},
        {"id": "two", "path": "v/b.mp4", "question": None, "start": None, "end": None},
    ]
    path = tmp_path / f"m.{kind}"
    if kind == "jsonl":
        path = manifest(tmp_path, *rows)
    elif kind == "csv":
        path.write_text("id,path,question,start,end\none,v/a.mp4,Why?,1.5,2\ntwo,v/b.mp4,,,\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    one, two = find_inputs(path, questions=["What?", "Who?"]).inputs
    assert (one.id, one.path, one.questions, one.start_s, one.end_s) == ("one", "v/a.mp4", ("Why?",), 1.5, 2)
    assert (two.questions, two.start_s, two.end_s, two.file) == (("What?", "Who?"), None, None, tmp_path / "v/b.mp4")


def test_several_questions_in_a_row(tmp_path):
    rows = [{"path": "a", "questions": ["Why?", "Who?"]}, {"path": "b", "questions": '["How?"]'}]
    first, second = find_inputs(manifest(tmp_path, *rows)).inputs
    assert first.questions == ("Why?", "Who?") and second.questions == ("How?",) and first.id == "a"


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"id": "x"}, "BadOption", '"path"'),
        ({"path": 3}, "BadOption", "path of a file"),
        ({"path": "a", "end": -1}, "BadOption", "seconds"),
        ({"path": "a", "start": 2, "end": 1}, "BadOption", "after the start"),
        ({"path": "a", "question": 7}, "BadOption", "text"),
        ({"path": "a", "questions": [1]}, "BadOption", "list of texts"),
        ({"path": "a", "question": "x", "questions": ["y"]}, "BadOption", "both"),
        ({"path": "http://127.0.0.1/a.mp4"}, "MediaNotAllowed", "URL"),
        ({"path": "concat:a|b"}, "MediaNotAllowed", "URL"),
        ({"path": "a\0b"}, "BadOption", "NUL"),
        ({"path": "../a.mp4"}, "MediaNotAllowed", "outside"),
        ({"path": "/etc/passwd"}, "MediaNotAllowed", "outside"),
    ],
    ids=str,
)
def test_a_bad_row_is_an_input_with_a_failure(row, kind, words, tmp_path):
    bad, good = find_inputs(manifest(tmp_path, row, {"path": "good.mp4"}), questions=["Why?"]).inputs
    assert good.failure is None and bad.file is None
    assert (bad.failure.stage, bad.failure.error_type) == ("input", kind) and words in bad.failure.message


def test_a_missing_file_is_an_input(tmp_path):
    (one,) = find_inputs(manifest(tmp_path, {"path": "gone.mp4"})).inputs
    assert one.failure is None and one.version == MISSING


def test_outside_paths_if_allowed(tmp_path):
    (one,) = find_inputs(manifest(tmp_path, {"path": "/etc/passwd"}), allow_outside=True).inputs
    assert one.failure is None and str(one.file) == "/etc/passwd" and one.root is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"path": "a"}\n{"path": \n', "Line 2 of"),
        ('{"path": "a"}\n{"path": "b"}\n{"path": "a"}\n', "Line 3 of"),
        ("", "empty"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_an_error(content, words, tmp_path):
    (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(BadOption, match=words) as caught:
        find_inputs(tmp_path / "m.jsonl")
    if "Line 3" in words:
        assert "Line 1 of" in caught.value.message and "id of its own" in caught.value.hint


@pytest.mark.parametrize("source", ["http://host/a", "no/such", "no/such/*.mp4", ""])
def test_no_source(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadOption):
        find_inputs(source)
    with pytest.raises(BadOption, match="no clip"):
        find_inputs(tmp_path)


def test_what_the_tasks_ask(tmp_path):
    rows = [{"path": "a", "question": "Why?"}, {"path": "b"}, {"path": "c", "questions": ["x", "y"]}, {"path": 1}]
    inputs = find_inputs(manifest(tmp_path, *rows)).inputs
    assert [one.questions for one in with_questions(inputs, "caption")[:3]] == [(DESCRIBE,)] * 3
    answer = with_questions(inputs, "answer")
    assert "no question" in answer[1].failure.message and answer[0].failure is answer[2].failure is None
    assert with_questions(inputs, "answer", ["Who?"])[1].questions == ("Who?",)
    features = with_questions(inputs, "features")
    assert features[1].questions == (DESCRIBE,) and "one question" in features[2].failure.message
    assert features[3].failure == inputs[3].failure
    for task, questions, words in (
        ("sing", [], "must be one of"),
        ("caption", ["Why?"], "caption"),
        ("answer", [" "], "empty"),
    ):
        with pytest.raises(BadOption, match=words):
            with_questions(inputs, task, questions)
    with pytest.raises(BadOption, match="nothing to ask"):
        with_questions(inputs[1:2], "answer")


def test_errors_of_others_keep_their_text_to_themselves():
    failure = Failure.of("encode", RuntimeError("secret at 0xdeadbeef"))
    assert failure.error_type == "RuntimeError" and "secret" not in failure.message


def test_names_that_are_no_unicode():
    name = os.fsdecode(b"\xff\xfe.mp4")
    assert text_of(name) == r"\xff\xfe.mp4" and text_of("ü\n") == "ü\n"
