"""`tokensieve process` as a person and as a script use it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.pipeline.batch.conftest import many_clips
from tokensieve.cli import main
from tokensieve.datasets import open_results
from tokensieve.pipeline.batch import engine

FAST = ["--num_frames", "1", "--max_new_tokens", "2", "--device", "cpu"]
ASK = ["--question", "Which digit is red?", *FAST]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Five clips, not to be changed."""
    return many_clips(tmp_path_factory.mktemp("clips"), 5)


@pytest.fixture
def own_clips(tmp_path):
    """Three clips to break."""
    return many_clips(tmp_path / "in", 3)


@pytest.fixture(autouse=True, scope="module")
def _loaded_once():
    """The model is loaded once for all commands of this module, which take its compression off again."""
    from tokensieve.pipeline import loader

    vlm, real = loader.load("tiny", device="cpu"), loader.load
    loader.load = lambda name="tiny", **options: vlm if name == "tiny" else real(name, **options)
    yield
    loader.load = real
    vlm.compress(None)


def process(source, out, *more):
    return main(["process", str(source), "--out", str(out), *more])


def rows(out):
    return {row["path"]: row for row in open_results(out).to_table().to_pylist()}


def test_a_folder(clips, tmp_path, capsys):
    out = tmp_path / "out"
    assert process(clips, out, *ASK, "--method", "zoprune") == 0
    printed = capsys.readouterr()
    assert "5 ok, 0 partial, 0 failed, 7" in printed.out and "visual tokens saved" in printed.out
    assert "5/5" in printed.err and "of tokens saved" in printed.err and "0 failed" in printed.err
    found = rows(out)
    assert len(found) == 5 and all(row["status"] == "ok" and len(row["answers"]) == 1 for row in found.values())
    record = json.loads((out / "run.json").read_text())
    assert record["rows"] == {"total": 5, "ok": 5, "partial": 0, "failed": 0} and record["finished"]
    assert record["ledger"]["visual_tokens_full"] == sum(row["visual_tokens_full"] for row in found.values())
    assert record["ledger"]["visual_tokens"] == sum(row["visual_tokens"][0] for row in found.values())
    (run,) = record["runs"]
    assert run["rows"] == 5 and run["clips_per_s"] > 0 and run["versions"]["tokensieve"]
    failures = pq.read_table(out / "failures.parquet")
    assert len(failures) == 0 and {"path", "stage", "error_type", "message"} <= set(failures.column_names)
    assert {path.name for path in out.iterdir()} == {"parts", "run.json", "failures.parquet", ".lock"}


def test_finished_work_is_not_done_again(clips, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert process(clips, out, *ASK, "--limit", "2") == 0
    first = {path.name: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    seen = []
    real = engine.decode
    monkeypatch.setattr(engine, "decode", lambda given, *more: seen.append(given.path) or real(given, *more))
    assert process(clips, out, *ASK, "--batch", "3", "--workers", "1", "--rows", "1") == 0
    assert len(seen) == 3 and not set(seen) & {"clip-000.mp4", "clip-001.mp4"}
    now = {path.name: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert first.items() < now.items() and len(now) == 4 and len(rows(out)) == 5
    assert len(json.loads((out / "run.json").read_text())["runs"]) == 2
    assert process(clips, out, *ASK) == 0 and len(seen) == 3


def test_failed_clips_their_table_and_another_try(own_clips, tmp_path, capsys):
    out = tmp_path / "out"
    whole = (own_clips / "clip-001.mp4").read_bytes()
    broken = own_clips / "new\nline ü.mp4"
    broken.write_bytes(b"not a video")
    (own_clips / "empty.mp4").write_bytes(b"")
    assert process(own_clips, out, *ASK, "--json") == 3
    record = json.loads(capsys.readouterr().out)
    assert record["rows"] == {"total": 5, "ok": 3, "partial": 0, "failed": 2}
    failures = pq.read_table(out / "failures.parquet").to_pylist()
    assert [(row["path"], row["stage"], row["error_type"]) for row in failures] == [
        ("empty.mp4", "decode", "BadMedia"),
        ("new\nline ü.mp4", "decode", "BadMedia"),
    ]
    assert all(str(tmp_path) not in row["message"] for row in failures)
    before = rows(out)
    assert process(own_clips, out, *ASK) == 3  # a finished job says so again
    assert rows(out) == before
    assert process(own_clips, out, *ASK, "--retry_failed") == 3
    assert rows(out) == before and open_results(out).count_rows() == 5
    runs = json.loads((out / "run.json").read_text())["runs"]
    assert [run["rows"] for run in runs] == [5, 0, 2] and runs[-1]["retried"] == 2
    broken.write_bytes(whole)  # another version of the file is done without being told to
    capsys.readouterr()
    assert process(own_clips, out, *ASK) == 3
    assert "1 files have changed" in capsys.readouterr().err
    assert rows(out)["new\nline ü.mp4"]["status"] == "ok" and open_results(out).count_rows() == 5
    assert len(pq.read_table(out / "failures.parquet")) == 1


def test_a_manifest(own_clips, tmp_path):
    manifest = own_clips / "list.jsonl"
    given = [
        {"id": "a", "path": "clip-000.mp4", "questions": ["Which digit is red?", "How many digits are there?"]},
        {"id": "b", "path": "clip-001.mp4", "start_s": 0.5, "end_s": 1.0},
        {"id": "c", "path": "gone.mp4"},
        {"id": "d", "path": "http://127.0.0.1:1/x.mp4"},
        {"id": "e", "path": "../x.mp4"},
        {"id": "f"},
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in given))
    assert process(manifest, tmp_path / "out", *ASK) == 3
    found = {row["id"]: row for row in open_results(tmp_path / "out").to_table().to_pylist()}
    assert len(found["a"]["answers"]) == 2 and found["a"]["questions"][1] == "How many digits are there?"
    assert (found["b"]["start_s"], found["b"]["end_s"]) == (0.5, 1.0) and found["b"]["status"] == "ok"
    assert [found[name]["error_type"] for name in "cde"] == ["MediaNotFound", "MediaNotAllowed", "MediaNotAllowed"]
    assert len(found) == 6 and found["row-000005"]["stage"] == "input"


def test_a_manifest_that_breaks_stops_before_anything(tmp_path, capsys):
    (tmp_path / "bad.csv").write_text("path,question\na.mp4,Why?\nb.mp4\n")
    assert process(tmp_path / "bad.csv", tmp_path / "out", *ASK) == 2
    assert "Line 3" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features(clips, tmp_path, dtype):
    out = tmp_path / "out"
    more = ["--method", "zoprune", "--feature_dtype", dtype, "--num_frames", "2", "--device", "cpu"]
    assert process(clips, out, "--task", "features", *more, "--limit", "2") == 0
    table = open_results(out).to_table()
    assert str(table.schema.field("pooled").type.value_type) == {"float32": "float", "float16": "halffloat"}[dtype]
    row = table.to_pylist()[0]
    assert len(row["features"]) == len(row["positions"]) == len(row["times_s"]) == row["visual_tokens"][0]
    assert set(row["times_s"]) <= {0.0, 1.5} and len(row["features"][0]) == len(row["pooled"]) == 192


def test_captions(clips, tmp_path):
    assert process(clips, tmp_path / "out", "--task", "caption", *FAST, "--limit", "1") == 0
    (row,) = rows(tmp_path / "out").values()
    assert row["questions"] == ["Describe the video."] and row["answers"][0]


def test_other_options_are_refused_unless_told(clips, tmp_path, capsys):
    out = tmp_path / "out"
    assert process(clips, out, *ASK, "--limit", "2") == 0
    assert process(clips, out, *ASK, "--method", "zoprune", "--limit", "3") == 2
    err = capsys.readouterr().err
    assert "other options (stages: [] there, " in err and "--mix" in err
    assert open_results(out).count_rows() == 2
    assert process(clips, out, *ASK, "--method", "zoprune", "--limit", "3", "--mix") == 0
    made_with = [row["options"] for row in sorted(rows(out).values(), key=lambda row: row["path"])]
    assert made_with[0] == made_with[1] != made_with[2]
    known = json.loads((out / "run.json").read_text())["options"]
    assert set(known) == set(made_with) and known[made_with[2]]["stages"][0]["method"] == "zoprune"
    assert process(clips, out, "--task", "features", "--device", "cpu", "--mix") == 2
    assert "other columns" in capsys.readouterr().err


def test_a_damaged_part_is_set_aside(clips, tmp_path, capsys):
    out = tmp_path / "out"
    assert process(clips, out, *ASK, "--rows", "2") == 0
    before = rows(out)
    part = sorted((out / "parts").iterdir())[0]
    part.write_bytes(part.read_bytes()[:-7])
    assert process(clips, out, *ASK) == 0
    assert "1 damaged parts were set aside" in capsys.readouterr().err
    assert rows(out) == before and (out / "damaged" / part.name).exists()


def test_one_job_at_a_time(clips, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert process(clips, out, *ASK) == 2
    assert "Another job is writing" in capsys.readouterr().err


def test_an_interrupt_finishes_what_is_in_hand(clips, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    real = engine.feed

    def interrupting(step, given, frames):
        os.kill(os.getpid(), signal.SIGINT)
        return real(step, given, frames)

    monkeypatch.setattr(engine, "feed", interrupting)
    assert process(clips, out, *ASK, "--batch", "4") == 130
    err = capsys.readouterr().err
    assert err.strip().splitlines()[-1] == "tokensieve: interrupted" and "Traceback" not in err
    assert open_results(out).count_rows() == 1 and not json.loads((out / "run.json").read_text())["finished"]
    monkeypatch.undo()
    assert process(clips, out, *ASK) == 0 and len(rows(out)) == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_interrupt_acts_at_once(clips, tmp_path, monkeypatch):
    def hanging(step, given, frames):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        pytest.fail("not interrupted")

    monkeypatch.setattr(engine, "feed", hanging)
    assert process(clips, tmp_path / "out", *ASK) == 130
    assert not list((tmp_path / "out" / "parts").iterdir())


def test_a_hung_decoder_costs_its_row(own_clips, tmp_path, monkeypatch):
    """Decoders are stopped as soon as they start on one file; the limit is what ends it."""
    from tokensieve.datasets import decode_client

    real = decode_client.Decoder.run

    def stopping(self, job, collector):
        if job.path.endswith("clip-001.mp4"):
            os.kill(self.process.pid, signal.SIGSTOP)
        return real(self, job, collector)

    monkeypatch.setattr(decode_client.Decoder, "run", stopping)
    assert process(own_clips, tmp_path / "out", *ASK, "--timeout_s", "2") == 3
    found = rows(tmp_path / "out")
    assert (found["clip-001.mp4"]["error_type"], found["clip-001.mp4"]["retryable"]) == ("MediaTimeout", True)
    assert found["clip-000.mp4"]["status"] == found["clip-002.mp4"]["status"] == "ok"


def test_four_hours_cost_no_more_than_four_seconds(tmp_path, monkeypatch):
    """14,400 frames; two are asked for, and no more than those cross from the decoder."""
    from tokensieve.datasets import collector, write_video

    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "long.mp4", np.zeros((14_400, 16, 16, 3), np.uint8), fps=1)
    crossed = []
    real = collector.Collector.room
    monkeypatch.setattr(
        collector.Collector, "room", lambda self, *picture: crossed.append(picture[0]) or real(self, *picture)
    )
    options = ["--question", "What?", "--num_frames", "2", "--max_new_tokens", "2", "--device", "cpu"]
    assert process(tmp_path / "in", tmp_path / "out", *options) == 0
    (row,) = rows(tmp_path / "out").values()
    assert (row["num_frames"], row["duration_s"]) == (2, 14_400.0) and crossed == [0.0, 14_399.0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The shipped model as ONNX, with a method."""
    out = tmp_path_factory.mktemp("exported") / "tiny"
    assert main(["export", "--out", str(out), "--method", "zoprune", "--no_verify", "--device", "cpu"]) == 0
    return out


def test_an_exported_model(clips, exported, tmp_path, capsys):
    """Clip by clip, and what PyTorch says; where tokens are it does not tell."""
    onnx, torch = tmp_path / "onnx", tmp_path / "torch"
    assert process(clips, onnx, *ASK, "--model", str(exported), "--limit", "3") == 0
    assert process(clips, torch, *ASK, "--method", "zoprune", "--limit", "3") == 0
    for path, row in rows(onnx).items():
        other = rows(torch)[path]
        for name in ("answers", "visual_tokens_full", "visual_tokens", "prompt_tokens", "generated_tokens", "status"):
            assert row[name] == other[name], name
    assert process(clips, onnx, *ASK, "--model", str(exported), "--limit", "3", "--keep", "0.5") == 2
    assert "keep: 0.25 there, 0.5 now" in capsys.readouterr().err
    assert process(clips, tmp_path / "out", "--task", "features", "--model", str(exported)) == 2
    assert "exported model" in capsys.readouterr().err


def test_options_from_a_file(clips, tmp_path, capsys):
    config = tmp_path / "job.yaml"
    config.write_text("question: ['Why?']\nnum_frames: 1\nmax_new_tokens: 2\nlimit: 1\nmethod: zoprune\njson: true\n")
    assert process(clips, tmp_path / "out", "--config", str(config), "--device", "cpu") == 0
    assert json.loads(capsys.readouterr().out)["rows"]["ok"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "sing"], "must be one of"),
        (["--task", "caption", "--question", "Why?"], "caption"),
        ([], "nothing to ask"),
        (["--question", " "], "empty"),
        (["--question", "Why?", "--batch", "0"], "--batch"),
        (["--question", "Why?", "--rows", "0"], "--rows"),
        (["--question", "Why?", "--limit", "0"], "limit"),
        (["--question", "Why?", "--timeout_s", "0"], "timeout_s"),
        (["--question", "Why?", "--num_frames", "0"], "num_frames"),
        (["--question", "Why?", "--backend", "vlc"], "--backend"),
        (["--question", "Why?", "--method", "zoprun"], "zoprune"),
        (["--question", "Why?", "--feature_dtype", "float16"], "--feature_dtype"),
        (["--task", "features", "--method", "fastv"], "inside the language model"),
        (["--task", "features", "--feature_dtype", "int8"], "float16"),
        (["--question", "Why?", "--retri_failed"], "--retry_failed"),
    ],
    ids=" ".join,
)
def test_bad_use_is_one_sentence(arguments, words, clips, tmp_path, capsys):
    assert process(clips, tmp_path / "out", *arguments) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err


def test_folders_of_others_are_left_alone(clips, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert process(clips, tmp_path, *ASK) == 2 and "holds other files" in capsys.readouterr().err
    assert process(clips, tmp_path / "mine.txt", *ASK) == 2 and "is a file" in capsys.readouterr().err
    out = tmp_path / "out"
    assert process(clips, out, *ASK, "--limit", "1") == 0
    (out / "run.json").unlink()
    assert process(clips, out, *ASK) == 2 and "no run.json" in capsys.readouterr().err
    (out / "run.json").write_text("[]")
    assert process(clips, out, *ASK) == 2 and "cannot be read" in capsys.readouterr().err


def test_from_another_thread(clips, tmp_path):
    """Signals are left to the main thread."""
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(process(clips, tmp_path / "out", *ASK, "--limit", "1", "--json"))
    )
    thread.start()
    thread.join()
    assert codes == [0]
