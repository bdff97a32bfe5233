"""VisionZip for a graph: what `compression/visionzip.py` makes of every picture, all pictures at once."""

# Shape legend: N visual tokens, V views (pictures), K kept, d width of a head, R rows of a chunk

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

from tokensieve.compression.maxmin import SAME, unit_rows
from tokensieve.export.ranking import highest_k, ranked

CHUNK = 128  # rows of distances at a time


def zip_views(
    score_N: Tensor, key_Nd: Tensor, view_N: Tensor, views_V2: Tensor, budget_K: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What becomes of all pictures.

    Args:
        score_N: higher is better.
        key_Nd: keys, compared by cosine.
        view_N: picture of each token.
        views_V2: how many tokens of each picture are dominant, and how many contextual.
        budget_K: only its length is used, the sum of these numbers.

    Returns:
        `[K]` int64 kept tokens, rising; `[N]` int64, which of the K takes each token over; `[N]` with which weight, 0
        where none does.
    """
    member_NV = view_N[:, None] == torch.arange(views_V2.shape[0])
    size_V = member_NV.sum(0)
    num_dominant_V, num_contextual_V = views_V2.unbind(1)
    dominant_N = _rank_in_view(score_N, view_N, size_V) < num_dominant_V.index_select(0, view_N)
    rest_NV = member_NV & ~dominant_N[:, None]
    place_N = rest_NV.long().cumsum(0).gather(1, view_N[:, None])[:, 0] - 1  # among the others of the picture
    stride_V = ((size_V - num_dominant_V) // num_contextual_V.clamp(min=1)).clamp(min=1)
    stride_N, num_contextual_N = stride_V.index_select(0, view_N), num_contextual_V.index_select(0, view_N)
    nth_N = place_N // stride_N
    target_N = ~dominant_N & (nth_N * stride_N == place_N) & (nth_N < num_contextual_N)

    is_kept_N = dominant_N | target_N
    kept_K = highest_k(is_kept_N.float(), budget_K)
    slot_N = _nearest_target(unit_rows(key_Nd), view_N, target_N, member_NV, kept_K)
    slot_N = torch.where(is_kept_N, is_kept_N.long().cumsum(0) - 1, slot_N)
    assigned_N = (~is_kept_N & (num_contextual_N > 0)).float()
    num_assigned_K = torch.zeros(budget_K.shape[0]).scatter_add(0, slot_N, assigned_N)
    weight_N = assigned_N / num_assigned_K.clamp(min=1).index_select(0, slot_N)
    return kept_K, slot_N, torch.where(is_kept_N, 1.0, weight_N)


def merged(values: Tensor, slot_N: Tensor, weight_N: Tensor, budget_K: Tensor) -> Tensor:
    """`[K, ...]`: the weighted sum of what each kept token takes over of `values`, `[N, ...]`."""
    flat = values.flatten(1)
    total = torch.zeros(budget_K.shape[0], flat.shape[1]).index_add(0, slot_N, flat * weight_N[:, None])
    return total.reshape(-1, *values.shape[1:])


def _rank_in_view(score_N: Tensor, view_N: Tensor, size_V: Tensor) -> Tensor:
    """`[N]` int64: 0 for the highest score of each picture; equal scores in order of their indices."""
    order_N = ranked(score_N)
    order_N = order_N.index_select(0, ranked(-view_N.index_select(0, order_N)))  # picture by picture
    first_N = (size_V.cumsum(0) - size_V).index_select(0, view_N.index_select(0, order_N))
    return torch.zeros_like(order_N).scatter(0, order_N, torch.arange(score_N.shape[0]) - first_N)


def _nearest_target(unit_Nd: Tensor, view_N: Tensor, target_N: Tensor, member_NV: Tensor, kept_K: Tensor) -> Tensor:
    """`[N]` int64: which of the K is the target nearest to each token, in the same picture; any where there is none.

    Distances are those of `compression/density_peaks.py`, rounding included, so that copies tie in the same way.
    """
    num_tokens, width = unit_Nd.shape
    target_NV = (member_NV & target_N[:, None]).float()
    mean_Vd = (target_NV.T @ unit_Nd) / target_NV.sum(0).clamp(min=1)[:, None]
    unit_Nd = unit_Nd - mean_Vd.index_select(0, view_N)
    square_N = unit_Nd.square().sum(-1)
    kept_Kd, square_K = unit_Nd.index_select(0, kept_K), square_N.index_select(0, kept_K)
    view_K = torch.where(target_N.index_select(0, kept_K), view_N.index_select(0, kept_K), -1)
    chunk_R = torch.arange(CHUNK)

    def unfinished(start, slot_N):
        return start < num_tokens

    def next_rows(start, slot_N):
        row_R = (start + chunk_R).clamp(max=num_tokens - 1)  # the last row fills up the last chunk
        squares_RK = square_N.index_select(0, row_R)[:, None] + square_K
        distance2_RK = squares_RK - 2 * unit_Nd.index_select(0, row_R) @ kept_Kd.T
        distance2_RK = torch.where(distance2_RK < SAME * squares_RK, 0.0, distance2_RK)
        distance_RK = (distance2_RK / width).sqrt()
        together_RK = view_N.index_select(0, row_R)[:, None] == view_K
        nearest_R = torch.where(together_RK, distance_RK, torch.inf).argmin(1)
        return start + CHUNK, slot_N.scatter(0, row_R, nearest_R)

    return while_loop(unfinished, next_rows, (torch.zeros((), dtype=torch.int64), torch.zeros_like(view_N)))[1]
