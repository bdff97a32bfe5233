"""`tokensieve export`, and `answer` with what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokensieve.cli import main
from tokensieve.export.manifest import NAME, Manifest


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clips")
    assert main(["clips", "--out", str(folder), "--count", "1"]) == 0
    return str(folder / "test-0-000000.mp4")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("exported") / "tiny")
    assert main(["export", "--method", "norm-diversity", "--out", out]) == 0
    return out


def answered(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_exported_folder_answers_as_the_model_does(exported, clip, capsys):
    question = "Which digit is red?"
    ours = answered(capsys, "answer", clip, question, "--model", exported)
    theirs = answered(capsys, "answer", clip, question, "--method", "norm-diversity")
    same = ("answer", "visual_tokens", "prompt_tokens", "generated_tokens", "method", "keep")
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    fewer = answered(capsys, "answer", clip, question, "--model", exported, "--keep", "0.1", "--device", "cpu")
    assert fewer["visual_tokens"]["kept"] == 30 and fewer["keep"] == 0.1


def test_what_was_verified_is_on_record(exported):
    verified = Manifest.load(Path(exported)).verified
    assert 0 < verified["differences"]["logits"] < verified["tolerances"]["logits"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "zoprune"], "are fixed"),
        (["--options.step", "0.1"], "are fixed"),
        (["--dtype", "float16"], "are fixed"),
        (["--keep", "0.5,0.25"], "one budget"),
        (["--keep", "0"], "fraction in (0, 1]"),
    ],
)
def test_what_an_exported_model_cannot_change(exported, clip, arguments, message, capsys):
    assert main(["answer", clip, "What?", "--model", exported, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_cuda_is_not_taken_for_granted(exported, clip, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["answer", clip, "What?", "--model", exported, "--device", "cuda"]) == 2
    assert "cuda" in capsys.readouterr().err.lower()


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--method", "fastv"], 4, "decoder"),
        (["--method", "tome"], 4, "tower"),
        (["--method", "holitom"], 4, "holitom"),
        (["--precision", "fp8"], 2, "fp8"),
        (["--tower", "clip"], 2, "LIBRARY:NAME"),
        (["--tower", "timm:no_such_model"], 4, "no_such_model"),
        (["--tower", "timm:vit_tiny_patch16_224", "--keep", "0.5,0.2", "--method", "tome,evit"], 2, "one method"),
    ],
)
def test_what_is_refused_leaves_nothing(arguments, code, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", "--out", str(out), *arguments]) == code
    assert message in capsys.readouterr().err and not out.exists() and not list(tmp_path.iterdir())


def test_a_broken_manifest_is_one_line(exported, clip, tmp_path, capsys):
    (tmp_path / NAME).write_text('{"format": 1')
    assert main(["answer", clip, "What?", "--model", str(tmp_path)]) == 4
    assert "no valid JSON" in capsys.readouterr().err
