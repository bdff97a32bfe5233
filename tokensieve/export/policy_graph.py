"""Selection by a policy's logits for a graph: `compression/systematic.py` and `compression/cacovid.py`."""

# Shape legend: N tokens, T frames, n tokens of a frame, K kept, M tokens not chosen by their logits

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

from tokensieve.compression.cacovid import CAP_OF_KEEP, EQUAL_FRAMES, SHARPNESS
from tokensieve.compression.systematic import HALVINGS, ROUNDING
from tokensieve.export.ranking import highest_k, ranked


def systematic_sample(score_N: Tensor, budget_K: Tensor) -> Tensor:
    """`[K]` int64, rising: the systematic sample by these scores."""
    num_keep = _count(budget_K)
    prob_N = _inclusion_probabilities(score_N.double(), num_keep)
    passed_N = prob_N.cumsum(0)
    passed_N = torch.minimum(passed_N * (num_keep / passed_N[-1]), num_keep)
    marks_N = (passed_N + 0.5 + ROUNDING).floor()  # not as one number: the exporter rounds such to float32
    held_N = marks_N > torch.cat([torch.zeros(1, dtype=torch.float64), marks_N[:-1]])
    # Where rounding has made a token hold two marks, the likeliest of the others fills up.
    return highest_k(torch.where(held_N, 2.0, prob_N), budget_K)


def _inclusion_probabilities(score_N: Tensor, num_keep: Tensor) -> Tensor:
    def unfinished(i, low, high):
        return i < HALVINGS

    def halve(i, low, high):
        middle = (low + high) / 2
        too_many = _clock(score_N + middle).sum() > num_keep
        return i + 1, torch.where(too_many, low, middle), torch.where(too_many, middle, high)

    start = torch.zeros((), dtype=torch.int64), -score_N.amax(0) - 50, 50 - score_N.amin(0)
    return _clock(score_N + while_loop(unfinished, halve, start)[2])


def _clock(log_rate: Tensor) -> Tensor:
    """The probability that an exponential clock of this rate has rung at time 1."""
    return 1 - torch.exp(-log_rate.exp())


def frame_quotas(score_T: Tensor, quota_3: Tensor, budget_K: Tensor, num_tokens: int, cap: float | None) -> Tensor:
    """`[T]` int64: how many tokens of each frame are chosen by their logits.

    Args:
        score_T: keep-logit minus drop-logit of every frame.
        quota_3: as `geometry.budget_inputs` gives it.
        budget_K: only its length is used.
        num_tokens: N.
        cap: the option `frame_cap`.
    """
    total, nearest, most = quota_3.unbind()
    num_frames = _count(score_T)
    if cap is None:
        highest = float(CAP_OF_KEEP) / num_frames
    else:
        highest = torch.tensor(cap, dtype=torch.float64) / (num_frames * _count(budget_K) / num_tokens)
    score_T = SHARPNESS * score_T / score_T.abs().amax(0).clamp(min=EQUAL_FRAMES)
    share_T = torch.maximum(score_T.softmax(0), (1 / (2 * num_frames)).float())
    share_T = torch.minimum(share_T, highest.float())
    quota_T = (share_T / share_T.sum() * nearest).round().long()
    quota_T = torch.minimum(quota_T.clamp(min=1), most)
    sign = torch.sign(total - quota_T.sum())
    frame_T = torch.arange(score_T.shape[0])

    def unfinished(quota_T):
        return quota_T.sum() != total

    def correct(quota_T):
        """The largest loses 1, or the smallest gains 1; the first of equal ones."""
        return (quota_T + sign * (frame_T == (-sign * quota_T).argmax(0)),)

    return while_loop(unfinished, correct, (quota_T,))[0]


def quota_sample(score_N: Tensor, quota_T: Tensor, budget_K: Tensor) -> Tensor:
    """`[K]` int64, rising: of every frame its quota of the highest scores, and an even sample of the other tokens."""
    num_tokens = score_N.shape[0]
    score_Tn = score_N.reshape(quota_T.shape[0], -1)
    order_Tn = ranked(score_Tn)
    place_Tn = torch.arange(score_Tn.shape[1]).expand_as(order_Tn)
    rank_Tn = torch.zeros_like(order_Tn).scatter(1, order_Tn, place_Tn)
    important_N = (rank_Tn < quota_T[:, None]).flatten()

    num_important = quota_T.sum()
    num_coverage = budget_K.shape[0] - num_important
    last = torch.where(num_coverage > 1, num_tokens - 1 - num_important, 0).double()
    sample_K = torch.arange(budget_K.shape[0])
    # As torch.linspace computes it, from both ends.
    step = last / (num_coverage - 1).clamp(min=1)
    from_start_K, from_end_K = step * sample_K, last - step * (num_coverage - 1 - sample_K)
    rank_K = torch.where(sample_K < num_coverage // 2, from_start_K, from_end_K).round().long()
    rank_K = torch.where(sample_K < num_coverage, rank_K, num_tokens)
    sampled = torch.zeros(num_tokens + 1).scatter(0, rank_K, 1.0)
    rank_N = ((~important_N).long().cumsum(0) - 1).clamp(min=0)
    return highest_k(torch.where(important_N, 1.0, sampled.index_select(0, rank_N)), budget_K)


def _count(x: Tensor) -> Tensor:
    """The length of the first axis as a float64 number of the graph."""
    return torch.full((), x.shape[0], dtype=torch.float64)
