"""What tokenisers of continuous actions have in common, for comparison with behaviour tokens.

A chunk `[H, D]`, H steps of D numbers, becomes a list of codes and comes back. Codes are small whole numbers of the
tokeniser's own; where they lie in a language model's vocabulary is another matter, and papers differ:

    OpenVLA    vocab_size - 1 - code          overwrites the last 256 ids
    MiniVLA    the same, after the vocabulary has grown by as many tokens
    pi0-FAST   vocab_size - 1 - 128 - code    skips PaliGemma's last 128 ids
    ours       blocks appended in order, one per digit: vocabulary.py
"""

# Shape legend: N chunks, H steps, D numbers of an action, S steps of all data

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tokensieve.errors import BadOption


class ActionTokeniser(Protocol):
    """Actions to codes and back. Decoding needs no observation, which is what sets behaviour tokens apart."""

    @property
    def num_codes(self) -> int:
        """Codes are in [0, num_codes)."""

    def encode(self, chunk: Tensor) -> list[int]:
        """Codes of a chunk `[H, D]` of normalised actions."""

    def decode(self, codes: Sequence[int]) -> Tensor:
        """The chunk `[H, D]` float32 that the codes stand for."""


@dataclass(frozen=True)
class CountDown:
    """Ids that count down from the end of a vocabulary.

    Attributes:
        vocab_size: rows that count, new ones included.
        num_codes: of the tokeniser.
        skip: ids at the end that stay what they are: 0 in OpenVLA and MiniVLA, 128 in pi0-FAST.

    Raises:
        BadOption: there is no room for that many codes.
    """

    vocab_size: int
    num_codes: int
    skip: int = 0

    def __post_init__(self):
        if self.num_codes < 1 or self.skip < 0 or self.vocab_size < self.num_codes + self.skip:
            raise BadOption(
                f"{self.num_codes} codes and {self.skip} skipped ids do not fit into {self.vocab_size} ids."
            )

    def ids(self, codes: Sequence[int]) -> list[int]:
        """Token ids of codes; BadOption if one is not in [0, num_codes)."""
        check_codes(codes, self.num_codes)
        return [self.vocab_size - 1 - self.skip - code for code in codes]

    def codes(self, ids: Sequence[int]) -> list[int]:
        """Codes of token ids; BadOption if an id is none of an action."""
        codes = [self.vocab_size - 1 - self.skip - token_id for token_id in ids]
        check_codes(codes, self.num_codes)
        return codes


@dataclass(frozen=True, eq=False)
class QuantileScale:
    """Scales every number of an action so that its 1st and 99th percentile become -1 and 1 (OpenVLA, FAST).

    Attributes:
        low: `[D]` float64, the 1st percentile.
        high: `[D]` float64, the 99th.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def fit(cls, actions: Tensor) -> QuantileScale:
        """From all actions `[S, D]` of a data set.

        Raises:
            BadOption: there are none, or one is not finite.
        """
        if actions.ndim != 2 or not actions.numel() or not actions.isfinite().all():
            raise BadOption(f"Need finite actions [S, D], got shape {list(actions.shape)}.")
        low, high = np.quantile(actions.double().numpy(), [0.01, 0.99], axis=0)  # torch's takes 16 million at most
        return cls(torch.from_numpy(low), torch.from_numpy(high))

    def normalise(self, actions: Tensor) -> Tensor:
        """`[..., D]` float32; a number that never varied becomes 0. Not clipped."""
        return ((actions.double() - self._middle) / self._half).float()

    def restore(self, actions: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return (actions.double() * self._half + self._middle).float()

    @property
    def _middle(self) -> Tensor:
        return (self.low + self.high) / 2

    @property
    def _half(self) -> Tensor:
        half = (self.high - self.low) / 2
        return half.where(half > 0, torch.ones_like(half))


def check_chunk(chunk: Tensor, shape: tuple[int | None, int]) -> Tensor:
    """The chunk in float64.

    Raises:
        BadOption: it is not `[H, D]` of that shape (None: any H from 1), or a number is not finite.
    """
    wanted = ["H" if shape[0] is None else shape[0], shape[1]]
    if chunk.ndim != 2 or not len(chunk) or chunk.shape[1] != shape[1] or shape[0] not in (None, len(chunk)):
        raise BadOption(f"Need a chunk of actions {wanted}, got shape {list(chunk.shape)}.")
    if not chunk.isfinite().all():
        raise BadOption("Actions must be finite numbers; some are not.")
    return chunk.double()


def check_codes(codes: Sequence[int], num_codes: int) -> None:
    """Raises BadOption unless all codes are in [0, num_codes)."""
    if any(not 0 <= code < num_codes for code in codes):
        raise BadOption(f"Codes must be in [0, {num_codes}), got {min(codes)} to {max(codes)}.")
