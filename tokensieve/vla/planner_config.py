"""The options of a small planner, which its checkpoint carries, and what every planner returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tokensieve.compression import check_keep, get_method
from tokensieve.errors import BadOption
from tokensieve.vla.config import MAX_SIDE
from tokensieve.vla.fsq import check_levels
from tokensieve.vla.words import check_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor, nn

    from tokensieve.vla.memory import Memory

VISUALS = ("resampled", "patches")
LIMITS = {"width": 8192, "num_channels": 4096, "num_layers": 64, "num_heads": 256}
LIMITS |= {"num_resampled": 1024, "num_remembered": 64}
MAX_MEMORY, MAX_LAG = 64, 1024  # frames, and steps back


@dataclass(frozen=True, kw_only=True, eq=False)
class Planned:
    """What a planner wants done in each of B environments.

    Attributes:
        digits: `[B, d]` int64, the behaviours.
        kept: `[B, P]` bool, which of the P patches the planner saw as tokens of their own; None where tokens are no
            patches.
        num_visual: tokens of the present frame that the language model read, in the mean over rows.
    """

    digits: Tensor
    kept: Tensor | None
    num_visual: float


class BehaviourPlanner(Protocol):
    """The big model of the loop: `Planner`, or `VLMPlanner` around any vision-language model."""

    @property
    def levels(self) -> tuple[int, ...]:
        """Of the code."""

    @property
    def network(self) -> nn.Module:
        """What learns."""

    @property
    def memory(self) -> tuple[int, ...]:
        """How many steps ago the frames were taken that it wants beside the present one."""

    def loss(self, frames: Tensor, instructions: Sequence[str], digits: Tensor, memory: Memory | None = None) -> Tensor:
        """Mean of -log p over the digits' tokens, 0-d, for frames `[B, H, W, 3]` and digits `[B, d]`."""

    def plan(
        self,
        frames: Tensor,
        instructions: Sequence[str],
        memory: Memory | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Planned:
        """Valid behaviours for frames `[B, H, W, 3]`; likely ones, or drawn with a generator."""


@dataclass(frozen=True, kw_only=True)
class PlannerConfig:
    """Options of `Planner`. Nothing of it is the paper's, whose big model is LLaVA-7B.

    Attributes:
        words: that instructions consist of, see `words_of`.
        levels: of the code.
        frame_size: height and width in pixels.
        patch_size: pixels a side of a patch; it divides the frame.
        visual: "resampled": few visual tokens made of all patches by a linear map; "patches": one per patch, which a
            compression method can drop.
        num_resampled: tokens of "resampled".
        memory: how many steps ago the frames were taken that it sees beside the present one; () for none.
        num_remembered: tokens made of each of them.
        method: of compression, None for all tokens: any that works on a set of tokens, looks at nothing but them and
            keeps exactly as many as it is told.
        keep: budget: a share, or a number from 2.
        width: of all vectors.
        num_channels: of the convolutions.
        num_layers: transformer layers.
        num_heads: attention heads; they divide the width.

    Raises:
        BadOption: an option is not as above.
    """

    words: tuple[str, ...]
    levels: tuple[int, ...]
    frame_size: tuple[int, int] = (56, 56)
    patch_size: int = 8
    visual: str = "resampled"
    num_resampled: int = 4
    memory: tuple[int, ...] = ()
    num_remembered: int = 2
    method: str | None = None
    keep: float | int = 1.0
    width: int = 128
    num_channels: int = 48
    num_layers: int = 3
    num_heads: int = 4

    def __post_init__(self):
        object.__setattr__(self, "words", check_words(self.words))
        object.__setattr__(self, "levels", check_levels(self.levels))
        for name, most in LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise BadOption(f"{name} must be a whole number from 1 to {most}, got {value!r}.")
        sides = (*self.frame_size, self.patch_size) if isinstance(self.frame_size, tuple | list) else ()
        whole = len(sides) == 3 and all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides)
        if not whole or any(side % self.patch_size for side in self.frame_size):
            raise BadOption(
                f"frame_size must be a height and a width of at most {MAX_SIDE} pixels in whole patches, got "
                f"{self.frame_size!r} and patches of {self.patch_size!r}."
            )
        object.__setattr__(self, "frame_size", tuple(self.frame_size))
        lags = self.memory if isinstance(self.memory, tuple | list) else (0,)
        if len(lags) > MAX_MEMORY or not all(type(lag) is int and 1 <= lag <= MAX_LAG for lag in lags):
            raise BadOption(
                f"memory must be at most {MAX_MEMORY} numbers of steps from 1 to {MAX_LAG}, got {self.memory!r}."
            )
        object.__setattr__(self, "memory", tuple(lags))
        if self.visual not in VISUALS:
            raise BadOption(f"visual must be one of {VISUALS}, got {self.visual!r}.")
        if self.width % self.num_heads:
            raise BadOption(f"num_heads must divide the width, got {self.num_heads} heads and {self.width}.")
        check_keep(self.keep)
        self._check_method()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.frame_size[0] // self.patch_size, self.frame_size[1] // self.patch_size

    def _check_method(self) -> None:
        if self.method is None:
            return
        if not isinstance(self.method, str):
            raise BadOption(f"method must be a name or None, got {self.method!r}.")
        method = get_method(self.method)
        if self.visual != "patches":
            raise BadOption("Resampled tokens are few and cannot be dropped.", hint='Choose visual="patches".')
        if method.place != "projector" or not set(method.needs) <= {"features"} or method.output_length != "exact":
            raise BadOption(
                f"{self.method!r} cannot compress the patches of a small planner: it works in the {method.place}, "
                f"needs {', '.join(method.needs) or 'nothing'}, and its output length is: {method.output_length}.",
                hint="Take uniform, random, norm-diversity or divprune; a VLM takes every method.",
            )
