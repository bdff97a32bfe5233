"""Self-certainty and Borda voting: choosing among answers without a judge, arXiv 2502.18581, NeurIPS 2025.

p_ij   probability of vocabulary entry j at answer token i, from raw logits
SC     self-certainty, mean over i of KL(uniform || p_i) = mean_i(-mean_j log p_ij) - log V, nats
r      rank of a candidate by SC, 1 for the most certain of M
vote   (M - r + 1) ** power, added to the candidate's answer; power 0 is majority voting

Differs from the official code: the distributions are those that the answer's tokens were drawn from, as in the
formula; the official slice begins one token later. As there, the earliest candidate stands for an answer, and one
without an answer votes for nothing.
"""

# Shape legend: M candidates, T answer tokens, V vocabulary

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.errors import BadOption


def token_certainty(logits_MV: Tensor) -> Tensor:
    """`[..., ]` float32: KL divergence of the uniform distribution from the softmax of raw logits `[..., V]`, nats."""
    logits_MV = logits_MV.float()
    return logits_MV.logsumexp(-1) - logits_MV.mean(-1) - math.log(logits_MV.shape[-1])


def self_certainty(logits_MTV: Tensor, mask_MT: Tensor) -> Tensor:
    """How far the model was from guessing, on average over each answer's tokens.

    Args:
        logits_MTV: raw logits that the tokens were drawn from: before temperature, top-k, top-p and masks.
        mask_MT: bool or 0/1, the answer's tokens.

    Returns:
        `[M]` float32, nats; 0 for uniform distributions, `-inf` for an answer without tokens.

    Raises:
        BadOption: a logit of an answer's token is not finite, as after top-k or a grammar.
    """
    mask_MT = mask_MT.bool()
    certainty_MT = token_certainty(logits_MTV)
    check_finite(certainty_MT[mask_MT])
    return mean_certainty(certainty_MT.where(mask_MT, 0.0).sum(-1), mask_MT.sum(-1))


def mean_certainty(sum_M: Tensor, num_M: Tensor) -> Tensor:
    """The mean from its sum and the number of tokens; `-inf` where there are none."""
    return torch.where(num_M > 0, sum_M / num_M.clamp(min=1), -torch.inf).float()


def check_finite(certainty: Tensor) -> None:
    """Raises BadOption if a self-certainty is infinite or undefined."""
    if not certainty.isfinite().all():
        raise BadOption(
            "Self-certainty needs raw logits, and some are not finite.",
            hint="Give the model's logits before temperature, top-k, top-p, suppressed tokens and grammars.",
        )


@dataclass(frozen=True, kw_only=True)
class Vote:
    """Who won.

    Attributes:
        winner: number of the candidate: the earliest one with the winning answer; the first one if none has an answer.
        votes: of every answer, in the order of their first candidates.
    """

    winner: int
    votes: dict[Hashable, float]


def borda_votes(certainty_M: Sequence[float] | Tensor, answers: Sequence[Hashable | None], power: float) -> Vote:
    """Lets candidates vote for their answers, the more certain ones with more weight.

    Args:
        certainty_M: self-certainty of each candidate; equal ones rank in their order.
        answers: what each candidate answers; None for no answer.
        power: 0 or more. 0 is majority voting; the larger, the more the most certain candidate decides. The paper has
            0.3 up to 16 candidates and 1.2 from 32 on.

    Returns:
        The vote; among answers with equally many votes the one that was given first wins.

    Raises:
        BadOption: no candidates, unequal lengths, or a power below 0.
    """
    certainty = [float(c) for c in certainty_M]
    num = len(certainty)
    if not num or num != len(answers):
        raise BadOption(f"Needed: one answer for each of at least one candidate, got {len(answers)} for {num}.")
    check_power(power)
    votes: dict[Hashable, float] = {answer: 0.0 for answer in answers if answer is not None}
    for rank, candidate in enumerate(sorted(range(num), key=lambda i: -certainty[i]), start=1):
        if answers[candidate] is not None:
            votes[answers[candidate]] += (num - rank + 1) ** power
    if not votes:
        return Vote(winner=0, votes={})
    best = max(votes, key=votes.__getitem__)
    return Vote(winner=list(answers).index(best), votes=votes)


def check_power(power: float) -> None:
    """Raises BadOption unless `power` is a number from 0 up."""
    if isinstance(power, bool) or not isinstance(power, int | float) or not 0 <= power < math.inf:
        raise BadOption(f"power must be 0 or more, got {power!r}.")
