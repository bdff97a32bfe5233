"""Greedy max-min selection: each pick is the token farthest from all picks so far, times a weight.

Shared by divprune, zoprune and norm-diversity. Distance is `1 - cos` in float32, whatever the dtype of
the model. The loop never reads a value back from a GPU, so it does not stall one. Memory grows with N, not with N^2.
"""

# Shape legend: N tokens, K picks, D width, R rows of a chunk, M tokens from the first row of the chunk on

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# Up to here all distances are computed in one matrix product (N = 1024). It is also the size of chunks of rows: what
# stays in a CPU's cache is read again for nothing.
MAX_MATRIX_BYTES = 2**22
# Above, a CPU computes the rows of the next picks together: a product of a few dozen rows takes hardly longer than one
# of a single row, and the tokens that are farthest now are nearly all picked soon.
LOOK_AHEAD = 64
MAX_AHEAD_BYTES = 2**24

# `1 - cos` of two equal float32 rows is a rounding error of either sign. Below this it counts as 0, so
# that copies tie exactly and the lowest index wins on every device.
SAME = 1e-6


def unit_rows(x_ND: Tensor) -> Tensor:
    """Rows scaled to length 1 in float32. A zero row stays zero: it has distance 1 to everything."""
    return F.normalize(x_ND.float(), dim=-1, eps=1e-12)


def cosine_distance(unit_RD: Tensor, unit_ND: Tensor) -> Tensor:
    """`[R, N]` of `1 - cos`, with differences within rounding set to 0."""
    cosine_RN = unit_RD @ unit_ND.T
    return F.threshold_(cosine_RN.neg_().add_(1), SAME, 0.0)


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
    value_N = torch.ones_like(nearest_N) if weight_N is None else weight_N
    pick_1 = first_1
    for i in range(num_keep):
        order_K[i : i + 1] = pick_1
        taken_N.index_fill_(0, pick_1, True)
        nearest_N = torch.minimum(nearest_N, distances_to(pick_1, value_N))
        value_N = (nearest_N if weight_N is None else weight_N * nearest_N).masked_fill(taken_N, -1.0)
        pick_1 = value_N.argmax(0, keepdim=True)
    return order_K


def most_isolated(unit_ND: Tensor) -> Tensor:
    """`[1]`: the token whose nearest other token is farthest away; ties go to the lowest index."""
    num_tokens = len(unit_ND)
    num_rows = max(1, MAX_MATRIX_BYTES // (4 * num_tokens))
    nearest_N = unit_ND.new_full((num_tokens,), torch.inf)
    for start in range(0, num_tokens, num_rows):  # the distance of two tokens serves both, so earlier ones are done
        distance_RM = cosine_distance(unit_ND[start : start + num_rows], unit_ND[start:])
        distance_RM.diagonal().fill_(torch.inf)  # a token is not its own neighbour
        nearest_N[start : start + num_rows].clamp_(max=distance_RM.amin(1))
        nearest_N[start:].clamp_(max=distance_RM.amin(0))
    return nearest_N.argmax(0, keepdim=True)


def distance_rows(unit_ND: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A function from a `[1]` index to that token's distances to all, `[N]`.

    Its second argument, `[N]`, says how likely each token is to be asked for next.
    """
    if 4 * len(unit_ND) ** 2 <= MAX_MATRIX_BYTES:
        matrix_NN = cosine_distance(unit_ND, unit_ND)
        return lambda pick_1, likely_N: matrix_NN.index_select(0, pick_1)[0]
    if unit_ND.device.type != "cpu":
        return lambda pick_1, likely_N: cosine_distance(unit_ND.index_select(0, pick_1), unit_ND)[0]
    known: dict[int, Tensor] = {}

    def row(pick_1: Tensor, likely_N: Tensor) -> Tensor:
        pick = int(pick_1)
        if pick not in known:
            if 4 * len(known) * len(unit_ND) > MAX_AHEAD_BYTES:
                known.clear()
            next_R = torch.cat([pick_1, likely_N.topk(min(LOOK_AHEAD, len(unit_ND))).indices])
            known.update(zip(next_R.tolist(), cosine_distance(unit_ND[next_R], unit_ND), strict=True))
        return known[pick]

    return row
