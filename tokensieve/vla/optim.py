"""The optimizer of all trainings in this room."""

from __future__ import annotations

import math

import lightning as L
import torch
from torch import nn

from tokensieve.errors import BadOption


def check_rates(lr: float, weight_decay: float, warmup_steps: int) -> None:
    """Raises BadOption unless they are an optimizer's."""
    if not 0 < lr < math.inf or not 0 <= weight_decay < math.inf or warmup_steps < 0:
        given = f"{lr}, {weight_decay} and {warmup_steps}"
        raise BadOption(f"Need a finite lr above 0; weight_decay and warmup_steps from 0; got {given}.")


def adamw_with_linear_decay(
    module: L.LightningModule, network: nn.Module, lr: float, weight_decay: float, warmup_steps: int
) -> dict[str, object]:
    """AdamW; the rate rises over `warmup_steps` and falls linearly to 0 at the last step of the module's trainer."""
    total = module.trainer.estimated_stepping_batches
    if not 0 < total < math.inf:
        raise BadOption("The rate falls until the last step.", hint="Give the Trainer max_steps or max_epochs.")
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)

    def factor(step: int) -> float:
        return min((step + 1) / (warmup_steps + 1), max(0.0, (total - step) / total))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
