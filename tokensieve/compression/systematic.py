"""Systematic sampling: exactly k tokens, each with a probability of its own, spread as evenly as these allow.

    pi_i    1 - exp(-t exp(s_i)), t such that they sum to k: about the probability that token i is among k draws without
            replacement by softmax(s) (exact for a race of exponential clocks that is stopped at time t)
    choice  the tokens at which the running sum of pi passes 1/2, 3/2, ..., k - 1/2

Where scores are flat this is an even grid over the tokens, and where a few tokens stand out it takes those. The k
highest scores would be clusters instead: neighbours look alike and score alike.

Madow, "On the theory of systematic sampling, II", Annals of Mathematical Statistics 20 (1949); probabilities: Rosén,
"Asymptotic theory for order sampling", Journal of Statistical Planning and Inference 62 (1997).
"""

# Shape legend: N tokens, k kept

from __future__ import annotations

import torch
from torch import Tensor

HALVINGS = 100
ROUNDING = 1e-9  # a sum this close below a mark has reached it


def systematic_subset(score_N: Tensor, num_keep: int) -> Tensor:
    """`[k]` int64, rising: the systematic sample by these scores, worked out on the CPU.

    Args:
        score_N: finite; a constant added to all changes nothing.
        num_keep: k, from 1 to N.
    """
    return systematic_sample(inclusion_probabilities(score_N.detach().cpu(), num_keep), num_keep)


def inclusion_probabilities(score_N: Tensor, num_keep: int) -> Tensor:
    """`[N]` float64 in (0, 1], with sum `num_keep` up to rounding.

    Args:
        score_N: finite; a constant added to all changes nothing.
        num_keep: from 1 to N.
    """
    if num_keep == len(score_N):
        return torch.ones_like(score_N, dtype=torch.float64)
    score_N = score_N.double()
    low, high = -score_N.amax() - 50, 50 - score_N.amin()  # log t: about none stays, all stay
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_many = -torch.expm1(-(score_N + middle).exp()).sum() > num_keep
        low, high = torch.where(too_many, low, middle), torch.where(too_many, middle, high)
    return -torch.expm1(-(score_N + high).exp())


def systematic_sample(prob_N: Tensor, num_keep: int) -> Tensor:
    """`[k]` int64, rising and distinct: where the running sum of the probabilities passes 1/2, 3/2, ...

    Args:
        prob_N: in [0, 1], with sum `num_keep` up to rounding.
        num_keep: k, from 1 to N.
    """
    passed_N = prob_N.double().cumsum(0)
    passed_N = (passed_N * (num_keep / passed_N[-1])).clamp(max=num_keep)
    # Token i holds the marks in (passed[i - 1], passed[i]]: none or one, as none spans more than 1.
    marks_N = (passed_N + (0.5 + ROUNDING)).floor().long()
    kept = (marks_N > torch.cat([marks_N.new_zeros(1), marks_N[:-1]])).nonzero()[:, 0]
    if len(kept) == num_keep:
        return kept
    # A probability of 1 that rounding has made longer can hold two marks: the likeliest of the others goes in.
    order_N = prob_N.index_fill(0, kept, -1).sort(descending=True, stable=True).indices
    return torch.cat([kept, order_N[: num_keep - len(kept)]]).sort().values
