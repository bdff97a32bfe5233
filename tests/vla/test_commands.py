"""From nothing to a roll-out with the command line: the whole loop, small; and what each command refuses."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from tokensieve.cli import main
from tokensieve.datasets import read_video

pytest.importorskip("minigrid")
LEVELS = "BabyAI-ActionObjDoor-v0,BabyAI-GoToLocal-v0"


def run(capsys, *words):
    """The JSON object that a command prints."""
    assert main(["vla", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, *words, code=2):
    assert main(["vla", *map(str, words)]) == code
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Episodes, a tokeniser and three models, each trained for a few steps; and what the commands said."""
    folder, said = tmp_path_factory.mktemp("vla"), {}

    def step(name, *words):
        from contextlib import redirect_stdout
        from io import StringIO

        out = StringIO()
        with redirect_stdout(out):
            assert main(["vla", *map(str, words), "--json"]) == 0
        said[name] = json.loads(out.getvalue().splitlines()[-1])

    data = folder / "data.npz"
    step("collect", "collect", "--level", LEVELS, "--episodes", 600, "--out", data)
    of = ["--data", data, "--batch", 32]
    step("tokenise", "tokenise", *of, "--trunk_length", 8, "--steps", 110, "--out", folder / "tokeniser")
    with_codes = [*of, "--tokeniser", folder / "tokeniser"]
    step("planner", "train", *with_codes, "--steps", 30, "--out", folder / "planner")
    dropping = ["--visual", "patches", "--start", folder / "planner", "--method", "random", "--keep", "49,12"]
    step("patches", "train", *with_codes, "--steps", 3, "--lr", 1e-6, *dropping, "--out", folder / "patches")
    step("cloning", "train", *of, "--steps", 10, "--model", "cloning", "--out", folder / "cloning")
    return folder, said


def test_everything_learns(made):
    folder, said = made
    assert said["collect"] == {"data": str(folder / "data.npz"), "episodes": 600, "steps": said["collect"]["steps"]}
    tokeniser = said["tokenise"]["metrics"]
    assert tokeniser["val_accuracy"] > tokeniser["val_accuracy_shuffled"] + 0.02 and tokeniser["val_codes"] > 10
    # Over 19 behaviour tokens chance says a digit right once in six times, and a code once in 240.
    assert said["planner"]["metrics"]["val_digits"] > 0.4 and said["planner"]["metrics"]["val_exact"] > 0.02
    assert said["cloning"]["metrics"]["val_accuracy"] > 0.4
    for name in ("tokeniser", "planner", "cloning"):
        assert (folder / name / "logs" / "metrics.csv").is_file()


def test_the_loop_runs_and_is_filmed(made, capsys):
    folder, _ = made
    acts = ["--planner", folder / "planner", "--tokeniser", folder / "tokeniser", "--level", LEVELS]
    film = folder / "episodes.mp4"
    found = run(capsys, "rollout", *acts, "--episodes", 16, "--max_steps", 12, "--video", film)
    assert found["episodes"] == 16 and 0 <= found["low"] <= found["success"] <= found["high"] <= 1
    assert 0.25 <= found["calls_per_step"] < 0.4 and found["visual_tokens"] == 4 and found["named_kept"] is None
    assert read_video(film).data.shape[1:] == (336, 600, 3)
    again = run(capsys, "rollout", *acts, "--episodes", 16, "--max_steps", 12)
    assert {**again, "video": str(film)} == found
    every = run(capsys, "rollout", *acts, "--episodes", 4, "--max_steps", 6, "--replan", 1)
    assert every["calls_per_step"] == 1
    for control in ("instructions", "codes"):
        assert run(capsys, "rollout", *acts, "--episodes", 4, "--max_steps", 4, "--control", control)["episodes"] == 4
    assert main(["vla", "rollout", *map(str, acts), "--episodes", "2", "--max_steps", "2"]) == 0
    assert "of 2 episodes succeeded" in capsys.readouterr().out


def test_fewer_patches(made, capsys):
    folder, _ = made
    planner, patches = (load_file(folder / name / "model.safetensors") for name in ("planner", "patches"))
    # It began with the planner's weights and hardly moved.
    torch.testing.assert_close(patches["head.weight"], planner["head.weight"], rtol=0, atol=1e-5)
    acts = ["--planner", folder / "patches", "--tokeniser", folder / "tokeniser", "--episodes", 6, "--max_steps", 5]
    assert run(capsys, "rollout", *acts)["visual_tokens"] == 49
    few = run(capsys, "rollout", *acts, "--method", "norm-diversity", "--keep", 4)
    assert few["visual_tokens"] == 4 and few["named_in_view"] > 0 and 0 <= few["named_kept"] < 1


def test_those_without_a_planner(made, capsys):
    folder, _ = made
    short = ["--episodes", 6, "--max_steps", 5]
    assert run(capsys, "rollout", "--planner", folder / "cloning", *short)["calls_per_step"] == 1
    assert run(capsys, "rollout", "--planner", "random", *short)["calls_per_step"] == 0


@pytest.mark.slow
def test_a_vision_language_model(made, capsys):
    folder, _ = made
    words = ["--data", folder / "data.npz", "--tokeniser", folder / "tokeniser", "--out", folder / "vlm"]
    found = run(
        capsys, "train", *words, "--model", "tiny", "--method", "uniform", "--keep", 0.1, "--steps", 2, "--batch", 2
    )
    assert found["steps"] == 2
    acts = ["--planner", folder / "vlm", "--tokeniser", folder / "tokeniser", "--method", "zoprune", "--keep", 20]
    found = run(capsys, "rollout", *acts, "--episodes", 2, "--max_steps", 5)
    assert found["visual_tokens"] == 20 + 12  # the ends of the picture's rows always stay


def test_what_is_refused(made, capsys, tmp_path):
    folder, _ = made
    data, tok, plan = (folder / name for name in ("data.npz", "tokeniser", "planner"))
    assert "exists already" in refused(capsys, "collect", "--out", data)
    assert "*.npz" in refused(capsys, "collect", "--out", tmp_path / "data")
    assert "no BabyAI level" in refused(capsys, "collect", "--level", "Go", "--out", tmp_path / "a.npz")
    assert "exists already" in refused(capsys, "tokenise", "--data", data, "--out", plan)
    assert "no file" in refused(capsys, "tokenise", "--data", tmp_path / "a.npz", "--out", tmp_path / "b")
    new = ["--data", data, "--out", tmp_path / "b"]
    assert "steps from 1" in refused(capsys, "tokenise", *new, "--steps", 0)
    assert "level must" in refused(capsys, "tokenise", *new, "--levels", 1)
    assert "--tokeniser DIR" in refused(capsys, "train", *new)
    assert "for planners" in refused(capsys, "train", *new, "--model", "cloning", "--tokeniser", tok)
    assert "--start" in refused(capsys, "train", *new, "--model", "cloning", "--start", plan)
    assert "a Planner" in refused(capsys, "train", *new, "--tokeniser", tok, "--start", tok, code=4)
    assert "--method" in refused(capsys, "train", *new, "--tokeniser", tok, "--keep", 0.5)
    assert "patches" in refused(capsys, "train", *new, "--tokeniser", tok, "--method", "uniform", "--keep", 12)
    assert "holds a BehaviourTokeniser" in refused(capsys, "rollout", "--planner", tok, "--tokeniser", tok)
    assert "--tokeniser DIR" in refused(capsys, "rollout", "--planner", plan)
    acts = ["--planner", plan, "--tokeniser", tok]
    assert "--control" in refused(capsys, "rollout", *acts, "--control", "all")
    assert "*.mp4" in refused(capsys, "rollout", *acts, "--video", tmp_path / "v.avi")
    assert "--method" in refused(capsys, "rollout", *acts, "--keep", 4)
    assert "at least 1 step" in refused(capsys, "rollout", *acts, "--replan", -1)
    assert "for planners" in refused(capsys, "rollout", "--planner", "random", "--tokeniser", tok)
    assert "BehaviourTokeniser" in refused(capsys, "rollout", "--planner", plan, "--tokeniser", plan, code=4)
    assert "no folder" in refused(capsys, "rollout", "--planner", tmp_path / "nothing", "--tokeniser", tok)


def test_without_minigrid_the_extra_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "minigrid", None)
    assert "tokensieve[vla]" in refused(capsys, "collect", "--out", tmp_path / "a.npz")
