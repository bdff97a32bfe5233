"""Density-peak clustering: centres are tokens in dense places that are far from any denser token.

Rodriguez, Laio, "Clustering by fast search and find of density peaks" (Science 2014), with the density of k nearest
neighbours that token methods use (SparseVLM, PruneVid, FastVID, HoliTom).

    D_ij     |x_i - x_j| / sqrt(C)
    rho_i    exp(-mean of the k smallest D_ij^2, i itself among them)
    delta_i  min D_ij over denser j; the densest token gets max D
    centres  the largest rho * delta;  every other token goes to its nearest centre

Nothing is random: of equal densities the lower index counts as the denser, and equal scores or distances go to the
lowest index (the official codes add noise of 1e-6 to the densities). Scores are compared as logarithms, so that no
density underflows where tokens are long. Distances come in chunks of rows: no N x N matrix above 2896 tokens.
"""

# Shape legend: N tokens, K centres, C channels, R rows of a chunk

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokensieve.compression.maxmin import SAME

MAX_CHUNK_BYTES = 2**25  # of one [R, N] chunk of distances; a handful of that size live at a time


def peak_order(x_NC: Tensor, num_neighbours: int) -> Tensor:
    """`[N]` int64: all tokens, the best centre first; the first K are the K centres.

    Args:
        x_NC: the tokens, any float dtype.
        num_neighbours: k of the density, the token itself counted; more than N means N.
    """
    num_tokens = len(x_NC)
    log_density_N = x_NC.new_empty(num_tokens, dtype=torch.float32)
    farthest_R = []
    for start, distance_RN in _distance_chunks(x_NC, x_NC):
        near_Rk = distance_RN.topk(min(num_neighbours, num_tokens), largest=False).values
        log_density_N[start : start + len(near_Rk)] = -near_Rk.square().mean(-1)
        farthest_R.append(distance_RN.amax())
    rank_N = log_density_N.sort(descending=True, stable=True).indices.argsort()
    delta_N = torch.stack(farthest_R).amax().repeat(num_tokens)
    for start, distance_RN in _distance_chunks(x_NC, x_NC):
        denser_RN = rank_N < rank_N[start : start + len(distance_RN), None]
        nearest_R = distance_RN.masked_fill(~denser_RN, torch.inf).amin(-1)
        delta_N[start : start + len(nearest_R)].clamp_(max=nearest_R)
    return (log_density_N + delta_N.log()).sort(descending=True, stable=True).indices


def nearest_centre(x_NC: Tensor, centre_K: Tensor) -> Tensor:
    """`[N]` int64 in [0, K): the nearest centre of every token; a centre belongs to itself.

    Args:
        x_NC: the tokens.
        centre_K: distinct token indices, int64.
    """
    label_N = centre_K.new_empty(len(x_NC))
    for start, distance_RK in _distance_chunks(x_NC, x_NC[centre_K]):
        label_N[start : start + len(distance_RK)] = distance_RK.argmin(-1)
    label_N[centre_K] = torch.arange(len(centre_K), device=centre_K.device)
    return label_N


def cluster(x_NC: Tensor, num_centres: int, num_neighbours: int) -> tuple[Tensor, Tensor]:
    """`[K]` centres, the best first, and `[N]` which of them each token belongs to."""
    centre_K = peak_order(x_NC, num_neighbours)[:num_centres]
    return centre_K, nearest_centre(x_NC, centre_K)


def _distance_chunks(x_NC: Tensor, y_KC: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row and `[R, K]` distances of one chunk of rows of `x_NC` after the other; memory stays bounded."""
    mean_C = y_KC.float().mean(0)  # less to cancel where all tokens share a large part
    y_KC = y_KC.float() - mean_C
    square_K = y_KC.square().sum(-1)
    num_rows = max(1, MAX_CHUNK_BYTES // (4 * len(y_KC)))
    for start in range(0, len(x_NC), num_rows):
        x_RC = x_NC[start : start + num_rows].float() - mean_C
        squares_RK = x_RC.square().sum(-1)[:, None] + square_K
        distance2_RK = squares_RK - 2 * x_RC @ y_KC.T
        distance2_RK = distance2_RK.masked_fill(distance2_RK < SAME * squares_RK, 0.0)  # copies tie exactly
        yield start, (distance2_RK / x_RC.shape[-1]).sqrt()
