"""Training of a planner with Lightning: prefix language modelling of behaviour tokens, for any `BehaviourPlanner`."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor

from tokensieve.compression import check_keep
from tokensieve.errors import BadOption
from tokensieve.vla.memory import Memory
from tokensieve.vla.optim import adamw_with_linear_decay, check_rates
from tokensieve.vla.planner_config import BehaviourPlanner

Batch = tuple[Tensor, list[str], Tensor] | tuple[Tensor, list[str], Tensor, Memory | None]
"""Frames `[B, H, W, 3]` uint8, B instructions, digits `[B, d]` and, of planners that have one, the memory."""


class PlannerModule(L.LightningModule):
    """A planner in training; batches are `(frames, instructions, digits)`, or these and a `Memory`.

    Validation logs the share of codes whose every digit is the tokeniser's (`val_exact`), and of digits (`val_digits`).

    Args:
        planner: `Planner` or `VLMPlanner`; all weights of its network learn.
        lr: peak learning rate. The paper trains LLaVA at 1.4e-5.
        weight_decay: the paper's is 0.
        warmup_steps: over which the rate rises; after them it falls linearly to 0 at the trainer's `max_steps`.
        keeps: of a planner with compression: budgets of which every step draws one; it is validated and left with the
            first. None: the planner's own.
        seed: of these draws.

    Raises:
        BadOption: a rate, budget or number is not one, or there are budgets but no compression.
    """

    def __init__(
        self,
        planner: BehaviourPlanner,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        keeps: Sequence[float | int] = (),
        seed: int = 0,
    ):
        super().__init__()
        check_rates(lr, weight_decay, warmup_steps)
        if keeps and getattr(getattr(planner, "config", None), "method", None) is None:
            raise BadOption("Budgets are drawn for a small planner with a method.", hint="Call planner.compress first.")
        self._planner, self.network = [planner], planner.network  # in a list, so that it is no submodule twice
        self.network.train()  # what was read from disk is in evaluation mode, and Lightning leaves that as it is
        self.keeps = [check_keep(keep) for keep in keeps]
        self.lr, self.weight_decay, self.warmup_steps, self.seed = lr, weight_decay, warmup_steps, seed

    @property
    def planner(self) -> BehaviourPlanner:
        """What was given."""
        return self._planner[0]

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if self.keeps:
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
            keep = self.keeps[int(torch.randint(len(self.keeps), (), generator=draw))]
            self.planner.compress(self.planner.config.method, keep, seed=draw.initial_seed())
        loss = self.planner.loss(*batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch[0]))
        return loss

    def on_validation_start(self) -> None:
        self.on_train_end()

    def on_train_end(self) -> None:
        """Sets the first of the budgets, with which the planner is validated and left."""
        if self.keeps:
            self.planner.compress(self.planner.config.method, self.keeps[0])

    def validation_step(self, batch: Batch, _) -> None:
        frames, instructions, digits, *memory = batch
        right_Bd = self.planner.plan(frames, instructions, *memory).digits == digits
        for name, value in (("val_exact", right_Bd.all(-1)), ("val_digits", right_Bd)):
            self.log(name, value.float().mean(), prog_bar=True, batch_size=len(frames), sync_dist=True)

    def configure_optimizers(self):
        return adamw_with_linear_decay(self, self.network, self.lr, self.weight_decay, self.warmup_steps)
