"""One token per number and step: OpenVLA's 256 bins (Kim et al., arXiv 2406.09246).

edges   256 numbers, evenly from -1 to 1: 255 intervals
code    how many edges are at or below the clipped number, minus 1; 255 for the number 1 alone
number  the middle of interval min(code, 254)

OpenVLA's digit is code + 1 and its token id vocab_size - digit: `CountDown(vocab_size, 256)`. The error inside [-1, 1]
is at most 1/255.
"""

# Shape legend: H steps, D numbers of an action

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokensieve.errors import BadOption
from tokensieve.vla.action_tokens import check_chunk, check_codes


class BinnedActions:
    """OpenVLA's rule as an `ActionTokeniser`; a chunk may have any number of steps.

    Args:
        num_dims: D.
        num_codes: how many edges there are, from 2.

    Raises:
        BadOption: an option is not as above.
    """

    def __init__(self, num_dims: int, num_codes: int = 256):
        if num_dims < 1 or num_codes < 2:
            raise BadOption(f"Need at least 1 number and 2 codes, got {num_dims} and {num_codes}.")
        self.num_dims, self.num_codes = num_dims, num_codes
        self._edges = torch.linspace(-1, 1, num_codes, dtype=torch.float64)

    def encode(self, chunk: Tensor) -> list[int]:
        """`H * D` codes of `[H, D]`, step by step; numbers beyond [-1, 1] are clipped, as the paper does.

        Raises:
            BadOption: another shape, or numbers that are not finite.
        """
        clipped = check_chunk(chunk, (None, self.num_dims)).clamp(-1, 1)
        return (torch.bucketize(clipped, self._edges, right=True) - 1).flatten().tolist()

    def decode(self, codes: Sequence[int]) -> Tensor:
        """`[H, D]` float32.

        Raises:
            BadOption: there are no codes, some lack for whole steps, or one is not in [0, num_codes).
        """
        if not len(codes) or len(codes) % self.num_dims:
            raise BadOption(f"Need whole steps of {self.num_dims} codes, got {len(codes)} codes.")
        check_codes(codes, self.num_codes)
        middles = (self._edges[:-1] + self._edges[1:]) / 2
        place = torch.tensor(codes).clamp(max=self.num_codes - 2)
        return middles[place].view(-1, self.num_dims).float()
