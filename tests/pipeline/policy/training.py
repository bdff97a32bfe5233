"""A training that takes seconds: the shipped model, a few clips with one or two questions each."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch

from tokensieve.pipeline.policy.cacovid import CacovidModule
from tokensieve.pipeline.policy.data import Asked, PolicyData, generated
from tokensieve.pipeline.policy.distil import DistilModule
from tokensieve.pipeline.policy.last_checkpoint import LastCheckpoint
from tokensieve.pipeline.policy.ranking import RankingModule

KINDS = {
    "cacovid": (CacovidModule, dict(rounds=2, token_subsets=4, frame_subsets=2, rate=0.02, reward="loglik")),
    "rank": (RankingModule, dict(subsets=4)),
    "distil": (DistilModule, dict(first_heat=0.3, last_heat=0.2, noise=3.0)),
}


def few_questions(split: str, count: int, seed: int = 0) -> list[Asked]:
    """Generated clips with one or two of their questions, in turn."""
    return [
        Asked(clip.id, clip.questions[-1 - i % 2 :], clip.answers[-1 - i % 2 :], clip.source)
        for i, clip in enumerate(generated(split, count, seed))
    ]


@pytest.fixture(autouse=True)
def _few_questions(monkeypatch):
    monkeypatch.setattr("tokensieve.pipeline.policy.data.generated", few_questions)


def make_module(kind: str, **options):
    module_class, own = KINDS[kind]
    return module_class(**{**own, **options})


def fit(module, max_steps: int, *, data: PolicyData | None = None, out: Path | None = None, **options) -> L.Trainer:
    """Trains on the CPU; with `out`, a checkpoint is written every 2 steps."""
    callbacks = [*options.pop("callbacks", ()), *([LastCheckpoint(out / "last.ckpt", 2)] if out else ())]
    ckpt_path = options.pop("ckpt_path", None)
    defaults = dict(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=bool(out),
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer = L.Trainer(max_steps=max_steps, callbacks=callbacks, **(defaults | options))
    trainer.fit(module, datamodule=data or PolicyData(clips=3, batch=1), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def weights(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.policy.state_dict().items()}


def judged_by(monkeypatch, trainer):
    """A function that sets who judges in a trainer's file; it returns the list of what was asked."""
    asked = []

    def use(judge):
        def subset_rewards(scorer, sample, mask_GN, kind):
            asked.append(mask_GN)
            return judge(scorer, sample, mask_GN, kind)

        monkeypatch.setattr(trainer, "subset_rewards", subset_rewards)
        return asked

    return use
