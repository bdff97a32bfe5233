"""Greedy max-min selection: each pick is the token farthest from all picks so far, times a weight.

Shared by divprune, zoprune and norm-diversity. Distance is `1 - cos` in float32, whatever the dtype of
the model. The loop never reads a value back to the host, so it does not stall a GPU.
"""

# Shape legend: N tokens, K picks, D width, R rows of a chunk

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# Up to here all distances are computed in one matrix product (N = 8192); above, one row per pick. On a
# CPU the matrix is faster once more than about a tenth of the tokens stay, and never much slower.
MAX_MATRIX_BYTES = 2**28

# `1 - cos` of two equal float32 rows is a rounding error of either sign. Below this it counts as 0, so
# that copies tie exactly and the lowest index wins on every device.
SAME = 1e-6


def unit_rows(x_ND: Tensor) -> Tensor:
    """Rows scaled to length 1 in float32. A zero row stays zero: it has distance 1 to everything."""
    return F.normalize(x_ND.float(), dim=-1, eps=1e-12)


def cosine_distance(unit_RD: Tensor, unit_ND: Tensor) -> Tensor:
    """`[R, N]` of `1 - cos`, with differences within rounding set to 0."""
    return F.threshold(1 - unit_RD @ unit_ND.T, SAME, 0.0)


def greedy_max_min(unit_ND: Tensor, num_keep: int, first_1: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """`num_keep` distinct token indices in the order they were picked.

    Starts with `first_1` (`[1]` int64), then takes `argmax_i weight_i * min_{p in picked} D(i, p)` over
    the tokens not yet picked; ties go to the lowest index. Weights are >= 0, None means 1 for all.
    """
    num_tokens = len(unit_ND)
    distances_to = distance_rows(unit_ND)
    order_K = first_1.new_empty(num_keep)
    taken_N = torch.zeros(num_tokens, dtype=torch.bool, device=unit_ND.device)
    nearest_N = unit_ND.new_full((num_tokens,), torch.inf)
    pick_1 = first_1
    for i in range(num_keep):
        order_K[i : i + 1] = pick_1
        taken_N.index_fill_(0, pick_1, True)
        nearest_N = torch.minimum(nearest_N, distances_to(pick_1))
        value_N = nearest_N if weight_N is None else weight_N * nearest_N
        pick_1 = value_N.masked_fill(taken_N, -1.0).argmax(0, keepdim=True)
    return order_K


def most_isolated(unit_ND: Tensor) -> Tensor:
    """`[1]`: the token whose nearest other token is farthest away; ties go to the lowest index."""
    num_tokens = len(unit_ND)
    num_rows = max(1, MAX_MATRIX_BYTES // (4 * num_tokens))
    nearest_N = unit_ND.new_empty(num_tokens)
    for start in range(0, num_tokens, num_rows):
        distance_RN = cosine_distance(unit_ND[start : start + num_rows], unit_ND)
        distance_RN.diagonal(start).fill_(torch.inf)  # a token is not its own neighbour
        nearest_N[start : start + num_rows] = distance_RN.amin(-1)
    return nearest_N.argmax(0, keepdim=True)


def distance_rows(unit_ND: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from a `[1]` index to that token's distances to all, `[N]`; memory stays bounded."""
    if 4 * len(unit_ND) ** 2 <= MAX_MATRIX_BYTES:
        matrix_NN = cosine_distance(unit_ND, unit_ND)
        return lambda pick_1: matrix_NN.index_select(0, pick_1)[0]
    return lambda pick_1: cosine_distance(unit_ND.index_select(0, pick_1), unit_ND)[0]
