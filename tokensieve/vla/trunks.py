"""Episodes cut into trunks of at most T steps, padded, with a mask: 300 steps become 128, 128 and 44 (OmniJARVIS)."""

# Shape legend: R trunks, T steps of a trunk, H height, W width in pixels, A parts of an action, S steps of an episode

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tokensieve.errors import BadOption

NO_ACTION = -1  # before the first step of an episode


@dataclass(frozen=True, kw_only=True, eq=False)
class Trunks:
    """Trunks of one or more episodes. Padding is at the end and zero everywhere.

    Attributes:
        frames: `[R, T, H, W, 3]` uint8, what was seen before each action.
        actions: `[R, T, A]` int64.
        previous: `[R, T, A]` int64, the actions one step earlier; -1 where an episode begins.
        mask: `[R, T]` bool, False at padding.

    Raises:
        BadOption: shapes or dtypes are not as above.
    """

    frames: Tensor
    actions: Tensor
    previous: Tensor
    mask: Tensor

    def __post_init__(self):
        lead = self.mask.shape
        if (
            len(lead) != 2
            or self.frames.shape[:2] != lead
            or self.frames.shape[4:] != (3,)
            or self.actions.ndim != 3
            or self.actions.shape[:2] != lead
            or self.previous.shape != self.actions.shape
        ):
            shapes = {field.name: list(getattr(self, field.name).shape) for field in fields(self)}
            raise BadOption(
                f"Trunks need frames [R, T, H, W, 3], actions and previous [R, T, A], mask [R, T]: {shapes}."
            )
        dtypes = (self.frames.dtype, self.actions.dtype, self.previous.dtype, self.mask.dtype)
        if dtypes != (torch.uint8, torch.int64, torch.int64, torch.bool):
            raise BadOption(f"Trunks need uint8 frames, int64 actions and a bool mask, got {dtypes}.")

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows) -> Trunks:
        """Some of the trunks: a slice, a list or a tensor of rows."""
        if isinstance(rows, int):
            raise BadOption("Take several trunks: a slice, a list or a tensor.")
        return self._each(lambda x: x[rows])

    def to(self, device) -> Trunks:
        """The same on another device."""
        return self._each(lambda x: x.to(device))

    def _each(self, change) -> Trunks:
        return Trunks(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


def cut_trunks(frames: Tensor, actions: Tensor, length: int) -> Trunks:
    """The trunks of one episode; the last is padded.

    Args:
        frames: `[S, H, W, 3]` uint8.
        actions: `[S, A]` int64, or `[S]` for actions of one part.
        length: T, at least 1.

    Raises:
        BadOption: there is no step, lengths differ, or shapes and dtypes are not as above.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise BadOption(f"A trunk has at least one step, got a length of {length!r}.")
    actions_SA = actions[:, None] if actions.ndim == 1 else actions
    if frames.ndim != 4 or actions_SA.ndim != 2 or len(frames) != len(actions_SA) or not len(frames):
        raise BadOption(
            f"Need frames [S, H, W, 3] and actions [S, A] of one length above 0, got {list(frames.shape)} and "
            f"{list(actions.shape)}."
        )
    previous_SA = torch.cat([torch.full_like(actions_SA[:1], NO_ACTION), actions_SA[:-1]])
    return Trunks(
        frames=_fold(frames, length),
        actions=_fold(actions_SA, length),
        previous=_fold(previous_SA, length),
        mask=_fold(torch.ones(len(frames), dtype=torch.bool, device=frames.device), length),
    )


def join_trunks(parts: list[Trunks]) -> Trunks:
    """The trunks of several episodes one after the other; all must have the same T."""
    if not parts:
        raise BadOption("There are no trunks to join.")
    if len({part.mask.shape[1] for part in parts}) > 1:
        raise BadOption("Trunks of different lengths cannot be joined.", hint="Cut all episodes with one length.")
    names = [field.name for field in fields(Trunks)]
    return Trunks(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _fold(x: Tensor, length: int) -> Tensor:
    """`[R, T, ...]` of `[S, ...]`, zeros at the end."""
    num_trunks = -(-len(x) // length)
    padded = x.new_zeros(num_trunks * length, *x.shape[1:])
    padded[: len(x)] = x
    return padded.unflatten(0, (num_trunks, length))
