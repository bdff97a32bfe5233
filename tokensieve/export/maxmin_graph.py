"""Greedy max-min selection for a graph: what `compression/maxmin.py` and `compression/score_diversity.py` choose.

The numbers of tokens, picks and tiles may all change from run to run. Picks are one loop, each with one row of
distances, so memory grows with N and not with N^2.
"""

# Shape legend: N tokens, K picks, D width, C tiles, R rows of a chunk

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

from tokensieve.compression.maxmin import SAME
from tokensieve.compression.score_diversity import FLAT_SPREAD

FAR = 4.0  # a power of two above any distance: with it, the first pick is the argmax of the weights, exactly
CHUNK = 64  # rows of distances at a time where all are wanted


def max_min_picks(
    unit_ND: Tensor, weight_N: Tensor, tile_N: Tensor, tile_of_pick_K: Tensor, first_1: Tensor | None = None
) -> Tensor:
    """`[K]` int64: distinct tokens in the order they are picked, each `argmax weight * distance to the tile's picks`.

    Args:
        unit_ND: rows of length 1.
        weight_N: at least 0; the first pick of a tile has the greatest one. Ties go to the lowest index.
        tile_N: tile of each token.
        tile_of_pick_K: which tile each pick comes from.
        first_1: `[1]` int64, the very first pick, where it is not the greatest weight.
    """
    num_tokens, num_picks = unit_ND.shape[0], tile_of_pick_K.shape[0]
    # In onnxruntime a row times a matrix is ten times as fast as the other way round.
    unit_DN = unit_ND.T.contiguous()
    pick_place_K, token_N = torch.arange(num_picks), torch.arange(num_tokens)

    def unfinished(step, order_K, nearest_N, taken_N):
        return step < num_picks

    def pick_next(step, order_K, nearest_N, taken_N):
        in_tile_N = tile_N == tile_of_pick_K.index_select(0, step[None])
        value_N = torch.where(in_tile_N & (taken_N == 0), weight_N * nearest_N, -1.0)
        pick_1 = value_N.argmax(0, keepdim=True)
        if first_1 is not None:
            pick_1 = torch.where(step == 0, first_1, pick_1)
        distance_N = _apart(1 - (unit_ND.index_select(0, pick_1) @ unit_DN)[0])
        return (
            step + 1,
            torch.where(pick_place_K == step, pick_1, order_K),
            torch.where(in_tile_N, torch.minimum(nearest_N, distance_N), nearest_N),
            torch.where(token_N == pick_1, 1.0, taken_N),
        )

    start = (
        torch.zeros((), dtype=torch.int64),
        torch.zeros_like(tile_of_pick_K),
        torch.full_like(weight_N, FAR),
        torch.zeros_like(weight_N),
    )
    return while_loop(unfinished, pick_next, start)[1]


def isolation(unit_ND: Tensor) -> Tensor:
    """`[N]`: distance of each token to its nearest other token."""
    num_tokens = unit_ND.shape[0]
    token_N, chunk_R = torch.arange(num_tokens), torch.arange(CHUNK)

    def unfinished(start, nearest_N):
        return start < num_tokens

    def next_rows(start, nearest_N):
        row_R = (start + chunk_R).clamp(max=num_tokens - 1)  # the last row fills up the last chunk
        distance_RN = _apart(1 - unit_ND.index_select(0, row_R) @ unit_ND.T)
        distance_RN = torch.where(token_N == row_R[:, None], FAR, distance_RN)
        # The distance of two tokens counts for both, whichever way round it came out, so that they tie exactly.
        nearest_N = torch.minimum(nearest_N, distance_RN.amin(0))
        return start + CHUNK, nearest_N.scatter_reduce(0, row_R, distance_RN.amin(1), "amin")

    start = torch.zeros((), dtype=torch.int64), torch.full_like(unit_ND[:, 0], FAR)
    return while_loop(unfinished, next_rows, start)[1]


def relative_scores(score_N: Tensor, tile_N: Tensor, num_tiles: int) -> Tensor:
    """`[N]`: `compression.score_diversity.relative_score` of every tile."""
    member_CN = tile_N == torch.arange(num_tiles)[:, None]
    low_C = torch.where(member_CN, score_N, torch.inf).amin(1)
    high_C = torch.where(member_CN, score_N, -torch.inf).amax(1)
    mean_C = torch.where(member_CN, score_N.abs(), 0.0).sum(1) / member_CN.sum(1).clamp(min=1)
    flat_C = high_C - low_C <= FLAT_SPREAD * mean_C
    low_N, range_N = low_C.index_select(0, tile_N), (high_C - low_C).index_select(0, tile_N)
    return torch.where(flat_C.index_select(0, tile_N), 1.0, (score_N - low_N) / (range_N + 1e-8))


def _apart(distance: Tensor) -> Tensor:
    """Distances of copies, which are rounding, set to 0."""
    return torch.where(distance > SAME, distance, 0.0)
