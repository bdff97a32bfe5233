"""`tokensieve eval` as a person and as a script use it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tokensieve.cli import main
from tokensieve.compression import list_methods

FAST = ["--max_new_tokens", "4", "--device", "cpu"]
SAME = ("answers.parquet", "summary.json")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Two clips with two questions each, and a file that is no video."""
    folder = tmp_path_factory.mktemp("clips")
    assert main(["clips", "--out", str(folder), "--count", "2"]) == 0
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    (folder / "broken.mp4").write_bytes(b"not a video")
    rows = [*rows[:2], rows[0] | {"id": "broken", "video": "broken.mp4"}, *rows[-2:]]
    path = folder / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(manifest, out, *more: str) -> int:
    return main(["eval", "--data", str(manifest), "--out", str(out), "--methods", "zoprune", *FAST, *more])


def test_generated_clips_by_default(tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(
            ["eval", "--methods", "zoprune,tome:0.5+fastv", "--keep", "1,0.5", "--limit", "1", "--out", str(out), *FAST]
        )
        == 0
    )
    printed = capsys.readouterr()
    assert "all tokens" in printed.out and "tome:0.5+fastv" in printed.out and "report.html" in printed.out
    assert "1/1" in printed.err and "0 failed rows" in printed.err
    assert {path.name for path in out.iterdir()} == {
        *("run.json", "parts", "answers.parquet", "timings.parquet", "summary.json", "timings.json", "report.html")
    }
    summary = json.loads((out / "summary.json").read_text())
    assert [(s["method"], s["keep"]) for s in summary["settings"]] == [
        (None, 1),
        ("zoprune", 0.5),
        ("tome:0.5+fastv", 0.5),
    ]
    assert summary["data"] == "generated clips, split test" and summary["questions"] == 4
    command = json.loads((out / "run.json").read_text())["command"]
    assert command.startswith("tokensieve eval --model tiny --methods zoprune,tome:0.5+fastv --keep 1,0.5 --limit 1 ")
    page = (out / "report.html").read_text()
    assert (
        "tome:0.5+fastv" in page and "data:image/jpeg" in page or summary["settings"][0]["scores"]["exact"]["mean"] == 1
    )


def test_a_bad_video_costs_its_row_and_the_exit_code(manifest, tmp_path, capsys):
    assert run(manifest, tmp_path / "out", "--json") == 3
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["clips"], summary["questions"]) == (3, 5)
    assert [s["failed"] for s in summary["settings"]] == [1, 1]
    assert all(s["scores"]["exact"]["n"] == 4 for s in summary["settings"]) and "Traceback" not in err
    rows = pq.read_table(tmp_path / "out" / "answers.parquet").to_pylist()
    assert [row["id"] for row in rows if row["error"]] == ["broken"] * 2
    assert run(manifest, tmp_path / "out") == 3  # a finished run says so again
    assert "failed" in capsys.readouterr().out


def test_nothing_but_bad_videos(tmp_path, capsys):
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    (tmp_path / "all.csv").write_text("video,question,answer\nbroken.mp4,What?,1\nbroken.mp4,Which?,2\n")
    assert run(tmp_path / "all.csv", tmp_path / "out", "--keep", "0.5,0.25") == 3
    assert "Traceback" not in capsys.readouterr().err and (tmp_path / "out" / "report.html").exists()


@pytest.mark.timeout(1200)  # a second interpreter is started; on a busy machine that takes its time
def test_killed_and_taken_up_again(manifest, tmp_path):
    """A real kill of a real process, at the first finished clip; the rest with another batch size."""
    assert run(manifest, tmp_path / "whole", "--batch", "1") == 3
    cut = tmp_path / "cut"
    command = [sys.executable, "-m", "tokensieve.cli", "eval", "--data", str(manifest), "--out", str(cut)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--methods", "zoprune", *FAST, "--batch", "1"], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        while not list(cut.glob("parts/*.parquet")) and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 1 <= len(list(cut.glob("parts/*.parquet"))) <= 3
    assert run(manifest, cut, "--batch", "4") == 3
    for name in SAME:
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_all_methods_if_none_is_named(manifest, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "tokensieve.pipeline.evaluation.run.evaluate", lambda *a, **k: seen.append(a[2]) or {"settings": []}
    )
    monkeypatch.setattr("tokensieve.commands.evaluate._report", lambda *_: tmp_path)
    arguments = ["eval", "--data", str(manifest), "--out", str(tmp_path / "out"), "--json", "--limit", "1"]
    assert main([*arguments, "--keep", "0.5"]) == 0
    names = [setting.method for setting in seen[0].settings]
    assert names[0] == "" and {"zoprune", "tome", "fastv"} < set(names)
    left_out = [m.name for m in list_methods() if m.name not in names]
    assert all(f"{name} is left out: " in capsys.readouterr().err for name in left_out)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--methods", "zoprun"], 2, "Did you mean 'zoprune'"),
        (["--methods", "zoprune", "--policy", "/no/such"], 2, "--policy needs a method"),
        (["--methods", "zoprune+evs"], 2, "one method in each place"),
        (["--keep", "0"], 2, "fraction in (0, 1]"),
        (["--keep", "few"], 2, "keep"),
        (["--limit", "0"], 2, "--limit"),
        (["--batch", "0"], 2, "batch"),
        (["--scores", "exat"], 2, "Did you mean 'exact'"),
        (["--scores", "choice-letter"], 2, "no question has choices"),
        (["--choices", "shown"], 2, "listed"),
        (["--data", "/no/such.jsonl"], 2, "/no/such.jsonl"),
        (["--split", "trial"], 2, "train"),
        (["--model", "no/such-model"], 2, "no/such-model"),
        (["--options.stp", "1", "--methods", "zoprune"], 2, "'stp'"),
        (["--metods", "zoprune"], 2, "Did you mean --methods"),
        (["--num_frames", "0"], 2, "num_frames"),
        (["--fps", "2"], 2, "Generated clips are drawn"),
        (["--backend", "vlc"], 2, "backend"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_use_is_one_sentence(arguments, code, words, tmp_path, capsys):
    methods = [] if "--methods" in arguments else ["--methods", "uniform"]
    limit = [] if "--limit" in arguments else ["--limit", "1"]
    limit = [] if "--data" in arguments else limit
    assert main(["eval", "--out", str(tmp_path / "out"), *methods, *limit, *arguments]) == code
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and len(err.strip().splitlines()[-1]) > 0


def test_other_options_and_other_folders_are_refused(tmp_path, capsys):
    out = str(tmp_path / "out")
    arguments = ["eval", "--methods", "uniform", "--limit", "1", "--out", out, *FAST]
    assert main(arguments) == 0
    assert main([*arguments, "--keep", "0.5"]) == 2
    assert "settings: " in capsys.readouterr().err
    assert main([*arguments[:-6], "--out", str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err


def test_options_from_a_file(tmp_path, capsys):
    config = tmp_path / "eval.yaml"
    config.write_text("methods: [uniform, random]\nkeep: [0.5, 0.25]\nlimit: 1\nmax_new_tokens: 4\njson: true\n")
    assert main(["eval", "--config", str(config), "--out", str(tmp_path / "out")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert len(summary["settings"]) == 5
