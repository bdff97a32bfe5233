"""A plan says which tokens stay; one function applies it to anything that runs along the token axis."""

# Shape legend: N tokens in, K tokens kept

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """Kept tokens of one image or video: `kept` is `[K]` int64, strictly rising, each in [0, num_tokens)."""

    kept: Tensor
    num_tokens: int

    def __post_init__(self) -> None:
        kept = self.kept
        if kept.ndim != 1 or kept.dtype != torch.int64:
            raise ValueError(f"Plan.kept must be a 1-D int64 tensor, got {tuple(kept.shape)} {kept.dtype}.")
        if len(kept) and (kept[0] < 0 or kept[-1] >= self.num_tokens or (kept.diff() <= 0).any()):
            shown = f"{kept[:8].tolist()}{'...' if len(kept) > 8 else ''}"
            raise ValueError(f"Plan.kept must rise strictly inside [0, {self.num_tokens}), got {shown}.")

    @property
    def num_kept(self) -> int:
        return len(self.kept)

    def mask(self) -> Tensor:
        """`[N]` bool, True where a token stays."""
        mask = torch.zeros(self.num_tokens, dtype=torch.bool, device=self.kept.device)
        mask[self.kept] = True
        return mask


def apply_plan(plan: Plan, values: Tensor, dim: int = 0) -> Tensor:
    """Gathers the kept entries of `values` along its token axis `dim` (whose length must be N).

    Raises:
        ValueError: the axis does not have `plan.num_tokens` entries.
    """
    if values.shape[dim] != plan.num_tokens:
        raise ValueError(
            f"The plan is for {plan.num_tokens} tokens, but axis {dim} of {tuple(values.shape)} is not that long."
        )
    return values.index_select(dim, plan.kept.to(values.device))


def keep_all(num_tokens: int, device: torch.device | str = "cpu") -> Plan:
    """The plan that drops nothing."""
    return Plan(torch.arange(num_tokens, device=device), num_tokens)
