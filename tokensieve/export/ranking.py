"""Orders of values in which equal ones keep the order of their indices, in a graph as well as in PyTorch."""

# Shape legend: N values, K of them

from __future__ import annotations

import torch
from torch import Tensor


def highest_k(score_N: Tensor, budget_K: Tensor) -> Tensor:
    """`[K]` int64, rising: where the K highest scores are; K is the length of `budget_K`."""
    return ranked(score_N).index_select(0, torch.arange(budget_K.shape[0])).sort().values


def ranked(score: Tensor) -> Tensor:
    """Indices along the last axis, int64, from the highest score to the lowest."""
    if torch.compiler.is_exporting():  # ONNX has no stable sort, but its TopK is stable; that of PyTorch is not
        return torch.topk(score, score.shape[-1]).indices
    return score.sort(dim=-1, descending=True, stable=True).indices
