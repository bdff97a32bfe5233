"""Behaviour cloning puts into the code what the frames do not tell the decoder."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from tests.vla.fixture import config, trunks
from tokensieve.errors import BadOption
from tokensieve.vla import BehaviourModule, BehaviourTokeniser, cut_trunks, join_trunks

COLOURS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=torch.uint8)


def hindsight(count: int, seed: int):
    """Trunks of one action each, repeated; only the last frame shows which, by its colour."""
    draw = torch.Generator().manual_seed(seed)
    parts = []
    for action in torch.randint(0, 4, (count,), generator=draw).tolist():
        frames = torch.randint(0, 50, (4, 16, 16, 3), generator=draw, dtype=torch.uint8)
        frames[3] = COLOURS[action]
        parts.append(cut_trunks(frames, torch.full((4, 1), action), 4))
    return join_trunks(parts)


def loader(data, batch_size=32):
    return DataLoader(range(len(data)), batch_size, collate_fn=lambda rows: data[rows], shuffle=False)


def trainer(tmp_path, **options):
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_true_codes_beat_shuffled_ones(tmp_path):
    """In so few steps some colours may still share a code, and then 3 of 4 actions are right at best."""
    wide = config(num_actions=(4,), levels=(8, 8, 8, 6, 5), width=32)
    module = BehaviourModule(wide, lr=3e-3, warmup_steps=10, seed=1)
    run = trainer(tmp_path, max_steps=100, precision="bf16-mixed")
    run.fit(module, loader(hindsight(256, seed=1)))
    (seen,) = run.validate(module, loader(hindsight(128, seed=2)), verbose=False)
    assert seen["val_accuracy"] > 0.7 and seen["val_accuracy"] - seen["val_accuracy_shuffled"] > 0.3
    assert seen["val_codes"] >= 3 and seen["val_loss"] < 1
    module.tokeniser.save_pretrained(tmp_path / "tokeniser")
    read = BehaviourTokeniser.from_pretrained(tmp_path / "tokeniser")
    assert torch.equal(read.digits(trunks(num_actions=(4,))), module.tokeniser.eval().digits(trunks(num_actions=(4,))))


def test_training_repeats_itself(tmp_path):
    states = []
    for seed in (0, 0, 1):
        module = BehaviourModule(config(num_actions=(4,)), seed=seed)
        trainer(tmp_path, max_steps=3).fit(module, loader(hindsight(64, seed=1)))
        states.append(module.tokeniser.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["encoder.out.weight"], states[2]["encoder.out.weight"])


def test_the_rate_rises_then_falls_to_nothing(tmp_path):
    module, rates = BehaviourModule(config(num_actions=(4,)), lr=0.5, warmup_steps=4), []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(tmp_path, max_steps=10, callbacks=[Watch()]).fit(module, loader(hindsight(64, seed=1)))
    expected = [min((i + 1) / 5, (10 - i) / 10) / 2 for i in range(10)]
    assert rates == pytest.approx(expected)


def test_what_is_refused(tmp_path):
    for options in ({"lr": 0.0}, {"lr": float("inf")}, {"weight_decay": -1.0}, {"warmup_steps": -1}, {"seed": -1}):
        with pytest.raises(BadOption):
            BehaviourModule(config(), **options)
    with pytest.raises(BadOption, match="max_steps"):
        trainer(tmp_path, max_epochs=-1).fit(BehaviourModule(config(num_actions=(4,))), loader(hindsight(8, seed=1)))
