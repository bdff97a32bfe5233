"""What a small planner remembers: a few earlier frames, each of them as a few tokens.

A view of seven cells by seven says nothing about what is behind the agent. Without memory a planner that has lost sight
of its goal looks for it where it has just been.
"""

# Shape legend: B environments, R remembered frames, N tokens of each, F numbers of all cells of a frame, H height,
#               W width in pixels, D width

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokensieve.vla.planner_config import PlannerConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Memory:
    """What each of B environments showed earlier.

    Attributes:
        frames: `[B, R, H, W, 3]` uint8.
        there: `[B, R]` bool, False where the episode had not begun.
    """

    frames: Tensor
    there: Tensor

    def to(self, device) -> Memory:
        """The same on another device."""
        return Memory(frames=self.frames.to(device), there=self.there.to(device))


class Memories(nn.Module):
    """Tokens `[B, R * N, D]` of the cells of earlier frames, or learned ones where there is no frame.

    Args:
        config: of the planner.
    """

    def __init__(self, config: PlannerConfig):
        super().__init__()
        num_cells, tokens = config.grid[0] * config.grid[1], config.num_remembered
        shape = (len(config.memory), tokens, config.width)
        self.map = nn.Linear(num_cells * config.num_channels, tokens * config.width)
        self.norm = nn.LayerNorm(config.width)
        self.places = nn.Parameter(0.02 * torch.randn(shape))
        self.nothing = nn.Parameter(0.02 * torch.randn(shape))

    def forward(self, cells_BRF: Tensor, there_BR: Tensor) -> Tensor:
        tokens_BRND = self.norm(self.map(cells_BRF).unflatten(-1, self.places.shape[1:]))
        tokens_BRND = torch.where(there_BR[..., None, None], tokens_BRND, self.nothing.to(tokens_BRND.dtype))
        return (tokens_BRND + self.places).flatten(1, 2)
