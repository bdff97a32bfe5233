"""Budgets that differ between the samples of a training, so that one policy serves many."""

from __future__ import annotations

import math

import torch

from tokensieve.compression.budget import check_keep
from tokensieve.errors import BadOption


class Budgets:
    """Shares of the tokens between two bounds, drawn evenly in their logarithm.

    Args:
        min_keep, max_keep: the bounds.

    Raises:
        BadOption: not `0 < min_keep <= max_keep < 1`.
    """

    def __init__(self, min_keep: float, max_keep: float):
        if not 0 < check_keep(min_keep) <= check_keep(max_keep) < 1:
            raise BadOption(f"Shares must be 0 < min_keep <= max_keep < 1, got {min_keep} and {max_keep}.")
        self.low, self.high = math.log(min_keep), math.log(max_keep)

    def draw(self, generator: torch.Generator) -> float:
        """A share."""
        return math.exp(self.low + (self.high - self.low) * float(torch.rand((), generator=generator)))
