"""Muon for the weight matrices, AdamW for everything else, behind one optimizer interface."""

from __future__ import annotations

import math

import lightning as L
import torch
from torch import Tensor, nn


def muon_adamw(module: nn.Module, lr: float, weight_decay: float = 0.01) -> list[torch.optim.Optimizer]:
    """Two optimizers for a transformer: Muon (Jordan et al. 2024) on hidden matrices, AdamW on the rest.

    Embeddings, heads, biases, norms and convolutions go to AdamW, as Muon's authors advise. With
    `match_rms_adamw` both take the same learning rate.
    """
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices, rest = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            hidden = parameter.ndim == 2 and id(parameter) not in embeddings and "head" not in name
            (matrices if hidden else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98)),
    ]


def take_step(module: L.LightningModule, loss: Tensor, max_norm: float | None = None) -> None:
    """One step of all optimizers and schedules of a manually optimised module, gradients clipped if asked."""
    for optimizer in module.optimizers():
        optimizer.zero_grad()
    module.manual_backward(loss)
    if max_norm is not None:
        nn.utils.clip_grad_norm_(module.parameters(), max_norm)
    for optimizer, schedule in zip(module.optimizers(), module.lr_schedulers(), strict=True):
        optimizer.step()
        schedule.step()


def warm_up_then_cosine(optimizer: torch.optim.Optimizer, total_steps: int, warmup: float = 0.05):
    """A schedule that rises linearly for a share `warmup` of the steps and falls as a cosine to 1 %."""
    rise = max(1, round(warmup * total_steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        done = min(1.0, (step - rise) / max(1, total_steps - rise))
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
