"""Training on episodes of BabyAI levels, start to end: behaviour tokeniser, planner, cloning baseline.

Steps are counted, not seconds, and every draw has a seed, so that a run can be repeated. On a CPU in bfloat16 where
PyTorch's autocast allows it.
"""

# Shape legend: S windows, d digits of a code

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from tokensieve.datasets.trajectories.episodes import Episodes
from tokensieve.errors import BadOption
from tokensieve.vla.cloning import CloningConfig, CloningModule, CloningPolicy
from tokensieve.vla.config import BehaviourConfig
from tokensieve.vla.module import BehaviourModule
from tokensieve.vla.planner import Planner
from tokensieve.vla.planner_config import BehaviourPlanner
from tokensieve.vla.planner_module import Batch, PlannerModule
from tokensieve.vla.tokeniser import BehaviourTokeniser
from tokensieve.vla.trunks import Trunks
from tokensieve.vla.windows import Windows, batches_once, endless_batches

VAL_EPISODES, VAL_WINDOWS = 1000, 2048  # at most, and never more than a tenth of the episodes
CHUNK = 256  # windows tokenised at once


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and how fast.

    Attributes:
        steps: optimizer steps.
        batch: windows a step.
        lr: peak learning rate.
        warmup_steps: over which it rises.
        seed: of weights, order and draws.
        logs: folder for `logs/metrics.csv`; None for none.
        show_progress: a bar on standard error.

    Raises:
        BadOption: a number is out of range.
    """

    steps: int
    batch: int = 128
    lr: float = 1e-3
    warmup_steps: int = 100
    seed: int = 0
    logs: Path | None = None
    show_progress: bool = False

    def __post_init__(self):
        if self.steps < 1 or self.batch < 2 or self.seed < 0:
            given = f"{self.steps}, {self.batch} and {self.seed}"
            raise BadOption(f"Need steps from 1, a batch from 2 and a seed from 0, got {given}.")


def babyai_config(**changes) -> BehaviourConfig:
    """Options for episodes of BabyAI levels: windows of 4 steps, 240 codes, a new plan every 4 steps.

    Not the paper's: with windows this short the encoder must see actions, or the last of them shows nowhere.
    """
    given = {
        "levels": (8, 6, 5),
        "trunk_length": 4,
        "replan_interval": 4,
        "encoder_sees_actions": True,
        "decoder_sees_previous_action": True,
    }
    return BehaviourConfig(**given | changes)


def train_tokeniser(
    episodes: Episodes, config: BehaviourConfig, training: Training
) -> tuple[BehaviourTokeniser, dict[str, float]]:
    """A behaviour tokeniser, and its validation: see `BehaviourModule`.

    Raises:
        BadOption: fewer than two episodes.
    """
    module = BehaviourModule(config, lr=training.lr, warmup_steps=training.warmup_steps, seed=training.seed)
    train, val = split_windows(episodes, config.trunk_length)
    metrics = _fit(module, training, train, train.trunks, val, val.trunks)
    return module.tokeniser.eval(), metrics


def train_planner(
    planner: BehaviourPlanner,
    episodes: Episodes,
    tokeniser: BehaviourTokeniser,
    training: Training,
    *,
    keeps: tuple[float | int, ...] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Teaches a planner the codes that the tokeniser gives to what the expert did next; returns its validation.

    Args:
        planner: changed.
        episodes: to learn from.
        tokeniser: trained.
        training: see there.
        keeps: see `PlannerModule`.
        progress: called as progress(num_done, num_windows) while windows are tokenised.

    Raises:
        BadOption: planner and tokeniser have different levels, or fewer than two episodes.
    """
    if planner.levels != tokeniser.config.levels:
        raise BadOption(f"Planner and tokeniser have levels {planner.levels} and {tokeniser.config.levels}.")
    module = PlannerModule(planner, lr=training.lr, warmup_steps=training.warmup_steps, keeps=keeps, seed=training.seed)
    train, val = split_windows(episodes, tokeniser.config.trunk_length)
    train_digits = all_digits(tokeniser, train, None, progress)
    val_digits = all_digits(tokeniser, val, VAL_WINDOWS, progress)

    def examples(windows: Windows, digits: Tensor, places: Tensor) -> Batch:
        memory = windows.memory(places, planner.memory)
        return windows.frames(places), windows.instructions(places), digits[places], memory

    # A VLM goes to a GPU if there is one; the small planner is faster where it is.
    accelerator = "cpu" if isinstance(planner, Planner) else "auto"
    make_train, make_val = partial(examples, train, train_digits), partial(examples, val, val_digits)
    metrics = _fit(module, training, train, make_train, val, make_val, accelerator)
    planner.network.eval()
    return metrics


def train_cloning(
    episodes: Episodes, config: CloningConfig, training: Training
) -> tuple[CloningPolicy, dict[str, float]]:
    """The baseline, and its validation: see `CloningModule`.

    Raises:
        BadOption: fewer than two episodes.
    """
    policy = CloningPolicy(config, seed=training.seed)
    module = CloningModule(policy, lr=training.lr, warmup_steps=training.warmup_steps)
    train, val = split_windows(episodes, config.window)

    def examples(windows: Windows, places: Tensor) -> tuple[Trunks, list[str]]:
        return windows.trunks(places), windows.instructions(places)

    metrics = _fit(module, training, train, partial(examples, train), val, partial(examples, val))
    return policy.eval(), metrics


def split_windows(episodes: Episodes, length: int) -> tuple[Windows, Windows]:
    """Windows to learn from, and those of the last tenth of the episodes, at most 1000, to validate with.

    Raises:
        BadOption: fewer than two episodes.
    """
    if len(episodes) < 2:
        raise BadOption(f"Need at least two episodes, one of them to validate with, got {len(episodes)}.")
    first = len(episodes) - min(VAL_EPISODES, max(1, len(episodes) // 10))
    return Windows(episodes, length, range(first)), Windows(episodes, length, range(first, len(episodes)))


@torch.no_grad()
def all_digits(
    tokeniser: BehaviourTokeniser,
    windows: Windows,
    most: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Digits `[S, d]` int64 of all windows, or of the first `most`."""
    count, parts = min(len(windows), len(windows) if most is None else most), []
    for places in torch.arange(count).split(CHUNK):
        with torch.autocast("cpu", torch.bfloat16):  # as in training, for codes near a border
            parts.append(tokeniser.digits(windows.trunks(places)))
        if progress is not None:
            progress(int(places[-1]) + 1, count)
    return torch.cat(parts)


def _fit(module, training: Training, train, make_train, val, make_val, accelerator: str = "cpu") -> dict[str, float]:
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        precision="bf16-mixed",
        max_steps=training.steps,
        gradient_clip_val=1.0,
        logger=False if training.logs is None else CSVLogger(training.logs, name="logs", version=""),
        log_every_n_steps=10,
        val_check_interval=training.steps,  # once, at the end
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=training.show_progress,
        callbacks=[RichProgressBar(console_kwargs={"stderr": True})] if training.show_progress else None,
    )
    seen = batches_once(make_val, min(len(val), VAL_WINDOWS), training.batch)
    try:
        trainer.fit(module, endless_batches(make_train, len(train), training.batch, training.seed), seen)
    except SystemExit:  # how Lightning ends after Ctrl-C
        raise KeyboardInterrupt from None
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
