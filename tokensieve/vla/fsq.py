"""Finite Scalar Quantization: VQ-VAE Made Simple (Mentzer et al., arXiv 2309.15505): rounding instead of a codebook.

L_i     levels of dimension i; h_i = floor(L_i / 2)
z       real numbers; one code is d of them
code    z squashed by tanh into L_i places, rounded, over h_i: for L = 5 one of -1, -.5, 0, .5, 1; even L have no +1
digit   code * h_i + h_i, in 0 .. L_i - 1
index   sum of digit_i * b_i with b = (1, L_1, L_1 L_2, ...): the first digit counts least

Two published variants differ in how they squash. They disagree in about 0.3 % of the digits of [8, 8, 8, 6, 5] (for
normal z of standard deviation 1.5), so a checkpoint names the one it was trained with:

    "jax"   the authors' notebook:           half = (L - 1)(1 - eps) / 2    shift = tan(offset / half)
    "pypi"  vector-quantize-pytorch's class: half = (L - 1)(1 + eps) / 2    shift = artanh(offset / half)

Differs from both: digits, codes and indices from outside are checked, and a number that is none (NaN) is an error.
"""

# Shape legend: ... any leading axes, d dimensions of a code

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.errors import BadOption

VARIANTS = ("jax", "pypi")
EPS = 1e-3
MAX_CODES = 2**31 - 1


@dataclass(frozen=True)
class FSQ:
    """A quantiser of vectors of d numbers. It has no weights.

    Attributes:
        levels: `L_i`, how many values dimension i can take.
        variant: "jax" or "pypi".

    Raises:
        BadOption: no levels, one below 2 (below 3 for "pypi"), more than 2^31 - 1 codes, or another variant.
    """

    levels: tuple[int, ...]
    variant: str = "jax"

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise BadOption(f"variant must be one of {VARIANTS}, got {self.variant!r}.")
        object.__setattr__(self, "levels", check_levels(self.levels, lowest=3 if self.variant == "pypi" else 2))

    @property
    def num_dims(self) -> int:
        """d."""
        return len(self.levels)

    @property
    def num_codes(self) -> int:
        """The product of the levels."""
        return math.prod(self.levels)

    @property
    def basis(self) -> tuple[int, ...]:
        """What a digit counts in the index: 1, L_1, L_1 L_2, ..."""
        return tuple(math.prod(self.levels[:i]) for i in range(self.num_dims))

    def quantise(self, z: Tensor) -> Tensor:
        """Codes `[..., d]` in [-1, 1] for `z` `[..., d]`; the gradient is that of the squashing without the rounding.

        Half precision is widened to float32: near a border between two digits bfloat16 rounds to the wrong one.
        """
        self._check_width(z)
        squashed = self._squash(z if z.dtype == torch.float64 else z.float())
        rounded = squashed + (squashed.round() - squashed).detach()
        return rounded / self._halves(rounded)

    def codes_to_digits(self, codes: Tensor) -> Tensor:
        """Digits `[..., d]` int64 of codes `[..., d]`.

        Raises:
            BadOption: a value is not one of the levels', say because it is NaN.
        """
        self._check_width(codes)
        halves = self._halves(codes)
        exact = codes * halves + halves
        if not (exact - exact.round()).abs().le(0.01).all():
            raise BadOption("Codes must be values that quantise() returns; some are not.")
        return self._checked(exact.round().long())

    def digits_to_codes(self, digits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes `[..., d]` of digits `[..., d]`.

        Raises:
            BadOption: a digit is not in 0 .. L_i - 1.
        """
        halves = self._halves(digits)
        return ((self._checked(digits) - halves) / halves).to(dtype)

    def digits_to_index(self, digits: Tensor) -> Tensor:
        """Indices `[...]` int64 in [0, num_codes) of digits `[..., d]`. Errors as in `digits_to_codes`."""
        return (self._checked(digits).long() * digits.new_tensor(self.basis, dtype=torch.int64)).sum(-1)

    def index_to_digits(self, index: Tensor) -> Tensor:
        """Digits `[..., d]` int64 of indices `[...]`.

        Raises:
            BadOption: an index is not in [0, num_codes).
        """
        if index.numel() and not (0 <= int(index.min()) and int(index.max()) < self.num_codes):
            raise BadOption(f"Indices must be in [0, {self.num_codes}), got {int(index.min())} to {int(index.max())}.")
        basis, levels = (index.new_tensor(x, dtype=torch.int64) for x in (self.basis, self.levels))
        return index.long()[..., None].div(basis, rounding_mode="floor") % levels

    def _squash(self, z: Tensor) -> Tensor:
        sign = -1 if self.variant == "jax" else 1
        half = (z.new_tensor(self.levels) - 1) * (1 + sign * EPS) / 2
        offset = z.new_tensor([0.5 if level % 2 == 0 else 0.0 for level in self.levels])
        shift = torch.tan(offset / half) if self.variant == "jax" else torch.atanh(offset / half)
        return torch.tanh(z + shift) * half - offset

    def _halves(self, like: Tensor) -> Tensor:
        return like.new_tensor([level // 2 for level in self.levels])

    def _check_width(self, x: Tensor) -> None:
        if x.ndim == 0 or x.shape[-1] != self.num_dims:
            raise BadOption(
                f"The last axis must have {self.num_dims} entries for levels {list(self.levels)}, got "
                f"shape {list(x.shape)}."
            )

    def _checked(self, digits: Tensor) -> Tensor:
        self._check_width(digits)
        if digits.is_floating_point() or digits.dtype == torch.bool:
            raise BadOption(f"Digits must be whole numbers, got {digits.dtype}.")
        if not ((digits >= 0) & (digits < digits.new_tensor(self.levels))).all():
            raise BadOption(f"Digit i must be in 0 .. L_i - 1 for levels {list(self.levels)}; some are not.")
        return digits


def check_levels(levels: Sequence[int], lowest: int = 2) -> tuple[int, ...]:
    """The levels as a tuple.

    Raises:
        BadOption: there are none, one is no whole number of at least `lowest`, or they make more than 2^31 - 1 codes.
    """
    if not isinstance(levels, Sequence) or isinstance(levels, str) or not levels:
        raise BadOption(f"levels must be a list of whole numbers such as [8, 8, 8, 6, 5], got {levels!r}.")
    if any(isinstance(level, bool) or not isinstance(level, int) or level < lowest for level in levels):
        raise BadOption(f"Every level must be a whole number of at least {lowest}, got {list(levels)}.")
    if len(levels) > 31 or math.prod(levels) > MAX_CODES:
        raise BadOption(f"{len(levels)} levels make more than {MAX_CODES} codes; take fewer or smaller ones.")
    return tuple(levels)
