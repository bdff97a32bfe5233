"""`tokensieve train cacovid|distil` as a person types it, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.pipeline.policy.training import _few_questions  # noqa: F401
from tokensieve.cli import main
from tokensieve.policies import load_policy

TINY = [
    "--data.clips=2",
    "--data.val_clips=1",
    "--data.batch=1",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.enable_progress_bar=false",
    "--model.val_keeps=[0.1]",
]
SUBSETS = ["--model.token_subsets=4", "--model.frame_subsets=2", "--model.rounds=2", "--model.reward=loglik"]


def train(kind: str, *words: str) -> int:
    return main(["train", kind, *TINY, *(SUBSETS if kind == "cacovid" else ()), *words])


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clips")
    assert main(["clips", "--out", str(folder), "--count", "1"]) == 0
    return str(folder / "test-0-000000.mp4")


@pytest.mark.parametrize("kind", ["cacovid", "rank", "distil"])
def test_train_then_answer(kind, clip, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--max_steps=2", "--trainer.val_check_interval=1", "--trainer.enable_progress_bar=true", "--json"]
    assert train(kind, f"--out={out}", *words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["policy"] == str(out / "policy") and record["steps"] == 2
    assert {"loss", "val_match_keep0.1"} <= record["metrics"].keys()
    assert {p.name for p in out.iterdir()} == {"policy", "checkpoints", "logs"}
    arguments = ["answer", clip, "Which digit is red?", "--method", "cacovid", "--keep", "0.1", "--json"]
    said = []
    for _ in range(2):
        assert main([*arguments, "--policy", str(out / "policy")]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0]["visual_tokens"] == {"full": 289, "kept": 30}  # 29 of 288, and the newline
    assert said[0]["answer"] == said[1]["answer"]


def test_a_manifest_of_ones_own(tmp_path, capsys):
    assert main(["clips", "--out", str(tmp_path / "own"), "--count", "2"]) == 0
    manifest = f"--data.manifest={tmp_path / 'own' / 'manifest.jsonl'}"
    assert train("distil", f"--out={tmp_path / 'out'}", "--max_steps=1", manifest) == 0
    assert f"--policy {tmp_path / 'out' / 'policy'}" in capsys.readouterr().out
    assert load_policy(tmp_path / "out" / "policy").frame_head is None


def test_a_crash_costs_one_interval_and_resuming_costs_no_number(tmp_path, monkeypatch, capsys):
    """Three updates a batch, so that no end of a batch is a multiple of the interval."""
    from tokensieve.pipeline.policy.cacovid import CacovidModule

    words = ["--max_steps=12", "--save_every=4", "--model.rounds=3", "--model.objective.advantage=rloo"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train("cacovid", f"--out={straight}", *words) == 0
    logged = (straight / "logs" / "version_0" / "config.yaml").read_text()

    starts = []

    def power_cut(self, *_):
        starts.append(self.global_step)
        if starts == [0, 3, 6, 9]:
            raise RuntimeError("power")

    monkeypatch.setattr(CacovidModule, "on_train_batch_start", power_cut)
    with pytest.raises(RuntimeError, match="power"):
        train("cacovid", f"--out={stopped}", *words)
    last = stopped / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 6
    assert not (stopped / "policy").exists()

    assert train("cacovid", f"--out={stopped}", *words) == 2
    assert "--resume" in capsys.readouterr().err
    assert train("cacovid", f"--out={stopped}", "--resume", *words) == 0
    assert starts[4:] == [6, 9]
    one, other = load_policy(straight / "policy").state_dict(), load_policy(stopped / "policy").state_dict()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert yaml.safe_load(logged)["model"]["rounds"] == 3
    assert len(list((stopped / "logs").iterdir())) == 2  # curves of both parts


def test_a_finished_training_can_be_made_longer(tmp_path):
    out = f"--out={tmp_path}"
    assert train("distil", out, "--max_steps=1") == 0
    assert train("distil", out, "--max_steps=3", "--resume") == 0
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    assert state["PolicyData"] == {"steps_done": 3}


def test_yaml_in_and_out(tmp_path, capsys):
    words = ["--model.rounds=4", "--model.objective.advantage=rloo", "--max_steps=7", "--data.seed=3"]
    with pytest.raises(SystemExit) as end:
        main(["train", "cacovid", *words, "--print_config"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert config["model"]["rounds"] == 4 and config["model"]["objective"]["advantage"] == "rloo"
    assert config["model"]["objective"]["count_empty_rows"] is True  # the rest stays CaCoVID's
    assert config["max_steps"] == 7 and config["data"]["seed"] == 3 and "seed_everything" in config
    path = tmp_path / "config.yaml"
    path.write_text(printed)
    with pytest.raises(SystemExit):
        main(["train", "cacovid", "--config", str(path), "--print_config"])
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit):
        main(["train", "cacovid", "--config", str(path), "--max_steps=9", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == config | {"max_steps": 9}


def test_the_config_that_was_used_runs_again(tmp_path):
    assert train("distil", f"--out={tmp_path / 'one'}", "--max_steps=1", "--model.noise=0.5") == 0
    used = tmp_path / "one" / "logs" / "version_0" / "config.yaml"
    assert main(["train", "distil", "--config", str(used), f"--out={tmp_path / 'two'}"]) == 0
    one, two = (load_policy(tmp_path / name / "policy").state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_callbacks_and_loggers_of_ones_own(tmp_path):
    words = ["--trainer.callbacks+=Timer", "--trainer.callbacks.interval=step", "--trainer.logger=false"]
    assert train("distil", f"--out={tmp_path}", "--max_steps=1", *words) == 0
    assert not (tmp_path / "logs").exists() and (tmp_path / "checkpoints" / "last.ckpt").exists()
    callbacks = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    assert any("Timer" in name for name in callbacks)


@pytest.mark.parametrize(
    "kind, words, message",
    [
        ("cacovid", ["--max_steps=0"], "max_steps and save_every must be above 0"),
        ("cacovid", ["--save_every=0"], "max_steps and save_every must be above 0"),
        ("cacovid", ["--max_steps=many"], "max_steps"),
        ("cacovid", ["--model.scorer=heavy"], "scorer must be one of"),
        ("cacovid", ["--model.scorr=light"], "model.scorr"),
        ("cacovid", ["--model.reward=matsch"], "Did you mean 'match'"),
        ("cacovid", ["--model.objective.advantage=grop"], "Did you mean 'grpo'"),
        ("cacovid", ["--resume"], "no checkpoint"),
        ("cacovid", ["--config=nowhere.yaml"], "nowhere.yaml"),
        ("distil", ["--data.manifest=nowhere.jsonl"], "no manifest 'nowhere.jsonl'"),
        ("distil", ["--data.batch=0"], "batch must be above 0"),
        ("distil", ["--trainer.precision=bf16-true"], "precision must be one of"),
        ("distil", ["--trainer.accumulate_grad_batches=2"], "gradient accumulation is not supported"),
        ("distil", ["--trainer.gradient_clip_val=1.0"], "gradient clipping is not supported"),
        ("distil", ["--model.divergence=kl"], "divergence must be"),
        ("distil", ["--model.rounds=2"], "model.rounds"),
        ("distil", ["--model.model=nowhere"], "nowhere"),
    ],
)
def test_bad_options_end_with_2_and_a_reason(kind, words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train(kind, "--out=out", *words) == 2
    said = capsys.readouterr()
    assert message in said.err and "tokensieve: " in said.err and "Traceback" not in said.err
    assert not Path("out/policy").exists() and not Path("out/checkpoints").exists()


def test_errors_as_json(tmp_path, capsys):
    assert train("distil", f"--out={tmp_path}", "--model.divergence=kl", "--json") == 2
    assert "divergence" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_hostile_yaml_is_refused(tmp_path, capsys):
    path = tmp_path / "bomb.yaml"
    path.write_text("a: &a [x]\nmodel: *a\n")
    assert main(["train", "cacovid", "--config", str(path)]) == 2
    assert "aliases" in capsys.readouterr().err


def test_interrupting(tmp_path, monkeypatch, capsys):
    from tokensieve.pipeline.policy.distil import DistilModule

    def ctrl_c(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(DistilModule, "learn", ctrl_c)
    assert train("distil", f"--out={tmp_path}", "--max_steps=1") == 130
    assert "tokensieve: interrupted" in capsys.readouterr().err


def test_a_folder_named_like_a_trainer_is_a_folder(monkeypatch):
    from tokensieve import cli

    ran = []
    monkeypatch.setitem(
        cli.TRAINERS, "tiny", cli.TRAINERS["tiny"]._replace(run=lambda options: ran.append(options.out) or 0)
    )
    assert main(["train", "tiny", "--out", "distil"]) == 0 and ran == ["distil"]


def test_a_policy_needs_its_method(clip, capsys):
    assert main(["answer", clip, "Which digit is red?", "--policy", "nowhere"]) == 2
    assert "--method cacovid" in capsys.readouterr().err


def test_help_names_both_trainers(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "cacovid" in said and "distil" in said
