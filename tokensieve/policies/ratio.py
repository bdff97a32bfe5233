"""Differences of log-probabilities that stay finite, and carry no gradient, where the mask is 0."""

# Shape legend: B rows, T decisions or tokens of a row

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.errors import BadOption

MAX_LOG_RATIO = 20.0  # nats; exp(20) is 5e8. Half precision rounding alone never gets there.


def log_ratio(logprobs_BT: Tensor, other_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """`logprobs - other` `[B, T]` in nats, in float32 or wider; 0 where the mask is 0, whatever stands there.

    Padding may hold infinities or NaN: they reach neither the result nor a gradient.

    Raises:
        BadOption: the three are not of one shape `[B, T]`.
    """
    if logprobs_BT.ndim != 2 or not logprobs_BT.shape == other_BT.shape == mask_BT.shape:
        raise BadOption(
            f"Log-probabilities and mask must have one shape [B, T], got {tuple(logprobs_BT.shape)}, "
            f"{tuple(other_BT.shape)} and mask {tuple(mask_BT.shape)}."
        )
    absent_BT = mask_BT == 0
    return widened(logprobs_BT).masked_fill(absent_BT, 0.0) - widened(other_BT).masked_fill(absent_BT, 0.0)


def widened(x: Tensor) -> Tensor:
    """In float32, or as it is where it has more bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
