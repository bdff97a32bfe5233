"""Subsets of a video's tokens: what a sampler returns, and what samplers have in common."""

# Shape legend: V videos (any leading axes, or none), G subsets, T frames, n tokens a frame, N = T * n tokens,
#               k tokens kept of each frame, K = k * T tokens kept

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from tokensieve.errors import BadOption


@dataclass(frozen=True, kw_only=True, eq=False)
class Subsets:
    """G subsets of one size, so that one batch can hold them; with videos of one shape in front if several were given.

    Attributes:
        mask: `[..., G, N]` bool, True where a token stays: the N decisions that a token head is trained on.
        frames: `[..., G, T]` bool, the frames that were drawn: the decisions that a frame head is trained on; None
            where no frames are drawn.
        order: `[..., G, T, k]` int64, the tokens of every frame (counted inside it) in the order of drawing; None
            where the order means nothing.
    """

    mask: Tensor
    frames: Tensor | None = None
    order: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """`[..., G, K]` int64, rising: the tokens that stay."""
        return self.mask.nonzero()[:, -1].view(*self.mask.shape[:-1], -1)


def subset_size(rate: float, num_places: int) -> int:
    """How many of a frame's tokens stay: `round(rate * num_places)`, at least one.

    Raises:
        BadOption: `rate` is not in (0, 1].
    """
    check_share("rate", rate)
    return max(round(rate * num_places), 1)


def keep_scores(logits_X2: Tensor, name: str) -> Tensor:
    """Keep-logit minus drop-logit, `[..., X]` float32 on the CPU, where all drawing happens.

    Raises:
        BadOption: the last axis is not (drop, keep), or a logit is NaN or infinite.
    """
    if logits_X2.ndim < 2 or logits_X2.shape[-1] != 2 or not logits_X2.isfinite().all():
        raise BadOption(
            f"{name} must be finite numbers of shape [..., 2] (drop, keep), got shape {tuple(logits_X2.shape)}"
            f"{'' if logits_X2.isfinite().all() else ' with NaN or infinite values'}."
        )
    return logits_X2.detach().float().diff(dim=-1)[..., 0].cpu()


def by_frame(values_N: Tensor, num_frames: int) -> Tensor:
    """`[..., N]` as `[..., T, n]`.

    Raises:
        BadOption: N is no multiple of `num_frames`.
    """
    check_count("num_frames", num_frames)
    if values_N.shape[-1] % num_frames:
        raise BadOption(f"{values_N.shape[-1]} tokens cannot be {num_frames} frames of one size.")
    return values_N.unflatten(-1, (num_frames, -1))


def mask_of(order_GTk: Tensor, num_places: int) -> Tensor:
    """`[..., G, N]` bool: True at the listed tokens of every frame."""
    mask_GTn = torch.zeros(*order_GTk.shape[:-1], num_places, dtype=torch.bool)
    return mask_GTn.scatter_(-1, order_GTk, True).flatten(-2)


def largest(score_X: Tensor, count: int) -> Tensor:
    """`[..., count]` int64: the largest along the last axis, the largest first; of equal ones the lowest index."""
    return score_X.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def check_share(name: str, value: float) -> None:
    """Raises BadOption unless `value` is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:
        raise BadOption(f"{name} must be in (0, 1], got {value!r}.")


def check_count(name: str, value: int) -> None:
    """Raises BadOption unless `value` is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadOption(f"{name} must be a whole number above 0, got {value!r}.")


def check_generator(generator: torch.Generator) -> None:
    """Raises BadOption unless `generator` is one of the CPU: what it draws does not depend on the machine."""
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise BadOption(
            f"generator must be a torch.Generator on the CPU, got {generator!r}.",
            hint="Make one with torch.Generator().manual_seed(0).",
        )
