"""Plain cloning reads the instruction at every step, and acts step by step as it was trained window by window."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from tests.vla.fixture import episode
from tokensieve.errors import BadOption
from tokensieve.vla import CloningConfig, CloningModule, CloningPolicy, cut_trunks, join_trunks

SMALL = {"words": ("go", "left", "right"), "num_numbers": 4, "frame_size": (16, 16), "width": 16, "window": 4}
SMALL |= {"num_channels": 4, "num_layers": 2, "num_heads": 2}


def test_it_learns_what_the_instruction_says(tmp_path):
    frames, _ = episode(4)  # the same for both instructions: only the words tell what to do
    texts = ["go left" if i % 2 else "go right" for i in range(16)]
    told = torch.tensor([i % 2 for i in range(16)]).repeat_interleave(4)
    trunks = join_trunks([cut_trunks(frames, told[4 * i : 4 * i + 4], 4) for i in range(16)])
    module = CloningModule(CloningPolicy(CloningConfig(**SMALL)), lr=1e-2, warmup_steps=5)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = L.Trainer(default_root_dir=tmp_path, max_epochs=25, accelerator="cpu", enable_model_summary=False, **options)
    run.fit(module, DataLoader([(trunks, texts)], batch_size=None))
    (seen,) = run.validate(module, DataLoader([(trunks, texts)], batch_size=None), verbose=False)
    assert seen["val_accuracy"] > 0.95
    (other,) = run.validate(module, DataLoader([(trunks, texts[1:] + texts[:1])], batch_size=None), verbose=False)
    assert other["val_accuracy"] < 0.05


def test_step_by_step_is_as_in_training(tmp_path):
    policy = CloningPolicy(CloningConfig(**SMALL), seed=1).eval()
    frames, actions = episode(4)
    texts = ["go left"]
    with torch.no_grad():
        (whole,) = policy(cut_trunks(frames, actions, 4), texts)
        numbers, history = policy.instruct(texts), None
        for step in range(4):
            action, history = policy.act(frames[step : step + 1], numbers, history=history)
            assert action.tolist() == [[int(whole[0, step].argmax())]]
    draws = [policy.act(frames, numbers.expand(4, -1), generator=torch.Generator().manual_seed(2))[0] for _ in "ab"]
    assert torch.equal(*draws)
    policy.save_pretrained(tmp_path)
    read = CloningPolicy.from_pretrained(tmp_path)
    assert read.config == policy.config and torch.equal(read.instruct(texts), policy.instruct(texts))


def test_what_is_refused():
    for options in ({"words": ()}, {"num_numbers": 0}, {"num_numbers": 31}, {"num_numbers": 2.0}, {"window": 0}):
        with pytest.raises(BadOption):
            CloningConfig(**SMALL | options)
    policy = CloningPolicy(CloningConfig(**SMALL))
    with pytest.raises(BadOption, match="never read up"):
        policy.instruct(["go up"])
    with pytest.raises(BadOption):
        CloningModule(policy, lr=0.0)
