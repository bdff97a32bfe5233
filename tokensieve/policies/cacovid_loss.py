"""CaCoVID: Contribution-aware Token Compression for Efficient Video Understanding via Reinforcement Learning.

Ma, Zhou, Wang, Chen, Yang, Song, Zheng. https://arxiv.org/abs/2602.01649 (AAAI 2026)

The training loss. A policy gives logits (drop, keep) per token and per frame of a video; subsets of tokens and of
frames are sampled and rewarded. Every decision counts as an independent two-class one, a = 1 for kept:

    l_gi   = log_softmax(logits_i)[a_gi]                     in subset g; old ones from the logits sampled from
    A_g    = (R_g - mean R) / (std R + 1e-4)                 over all subsets of the video in memory
    w_gi   = 1 - mean_i a_g for a kept token, mean_i a_g for a dropped one
    tokens = mean_g [ sum_i w PPO(l, l_old, A_g) / sum_i w ] + beta (the same mean of k3 to a fair coin)
    frames = the same with w = 1
    loss   = tokens + frames

That is an `Objective` with the defaults of `CACOVID`. Without the weights, the few kept tokens would drown in the many
dropped ones. A subset that keeps all tokens or none has w = 0: it adds 0 and still counts in mean_g.

The law that subsets are drawn from is not this two-class likelihood, so the ratio is no exact importance weight; it
is what the official code does.

What differs from the official code (LivingFutureLab/CaCoVID; written from the description):
- Rewards are compared in float64, equal up to rounding counts as equal, and a NaN reward takes its subset out.
- Several videos may be in one batch, with `group_ids` and `valid`.
- No 1e-7 in the denominator: a row without weight gives 0 by itself. No third head: its loss was computed and left out.
"""

# Shape legend: B subsets, N decisions (tokens or frames)

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tokensieve.errors import BadOption
from tokensieve.policies.advantages import GroupIds
from tokensieve.policies.objective import Objective, Terms
from tokensieve.policies.ratio import widened

CACOVID = Objective(clip_low=0.2, clip_high=0.28, count_empty_rows=True)
FAIR_COIN = math.log(0.5)


@dataclass(frozen=True, eq=False, kw_only=True)
class Decisions:
    """Sampled subsets with their rewards, and the logits of what was decided.

    Attributes:
        logits: `[N, 2]` (drop, keep) of one video, shared by all subsets, or `[B, N, 2]`; with gradient.
        old_logits: of the same shape: those that the subsets were drawn from.
        chosen: `[B, N]`, 1 or True = in the subset.
        rewards: `[B]`; NaN for none.
        group_ids: `[B]` video of every subset, or the number of subsets per video; None for one video.
        valid: `[B, N]`, 0 or False = padding; None for none.
    """

    logits: Tensor
    old_logits: Tensor
    chosen: Tensor
    rewards: Tensor
    group_ids: GroupIds | None = None
    valid: Tensor | None = None


@dataclass(frozen=True, eq=False)
class CacovidLoss:
    """What `cacovid_loss` gave.

    Attributes:
        total: 0-d, to minimise.
        tokens: terms of the token subsets.
        frames: terms of the frame subsets; None without.
    """

    total: Tensor
    tokens: Terms
    frames: Terms | None


def cacovid_loss(tokens: Decisions, frames: Decisions | None = None, *, objective: Objective = CACOVID) -> CacovidLoss:
    """The loss of token subsets, and of frame subsets where the policy has a frame head.

    Another `objective` exchanges advantage, policy loss, aggregation or KL, and keeps the balance.

    Raises:
        BadOption: a shape is wrong, or there are fewer than 2 subsets of a video.
    """
    token_terms = two_class_loss(tokens, objective, balanced=True)
    if frames is None:
        return CacovidLoss(token_terms.total, token_terms, None)
    frame_terms = two_class_loss(frames, objective, balanced=False)
    return CacovidLoss(token_terms.total + frame_terms.total, token_terms, frame_terms)


def two_class_loss(decisions: Decisions, objective: Objective, *, balanced: bool) -> Terms:
    """One head's terms: kept and dropped decisions weighted to the same sum (`balanced`), or all alike.

    Raises:
        BadOption: as `cacovid_loss`.
    """
    chosen_BN = decisions.chosen
    if decisions.valid is not None and decisions.valid.shape != chosen_BN.shape:
        raise BadOption(
            f"valid must have the shape of chosen, {tuple(chosen_BN.shape)}, got {tuple(decisions.valid.shape)}."
        )
    valid_BN = torch.ones_like(chosen_BN) if decisions.valid is None else decisions.valid
    logprobs_BN = two_class_logprobs(decisions.logits, chosen_BN)
    mask_BN = balanced_weights(chosen_BN, valid_BN) if balanced else valid_BN
    return objective(
        logprobs_BN,
        two_class_logprobs(decisions.old_logits, chosen_BN),
        mask_BN,
        decisions.rewards,
        len(chosen_BN) if decisions.group_ids is None else decisions.group_ids,
        ref_logprobs_BT=torch.full_like(logprobs_BN, FAIR_COIN),
    )


def two_class_logprobs(logits: Tensor, chosen_BN: Tensor) -> Tensor:
    """Log-probability of every decision, `[B, N]` nats, in float32 or wider.

    Args:
        logits: (drop, keep), `[N, 2]` shared by all subsets or `[B, N, 2]`.
        chosen_BN: 1 or True = kept.

    Raises:
        BadOption: the shapes do not fit.
    """
    if chosen_BN.ndim != 2 or logits.shape not in ((*chosen_BN.shape, 2), (chosen_BN.shape[1], 2)):
        raise BadOption(
            f"Subsets must have shape [B, N] and logits [N, 2] or [B, N, 2], got {tuple(chosen_BN.shape)} and "
            f"{tuple(logits.shape)}."
        )
    logprobs = F.log_softmax(widened(logits), dim=-1)
    return torch.where(chosen_BN.bool(), logprobs[..., 1], logprobs[..., 0])


def balanced_weights(chosen_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Weights `[B, N]` float32 under which a subset's kept and dropped decisions have the same sum; 0 where not valid.

    A subset that holds all or none has 0 everywhere.
    """
    valid_BN = valid_BN.float()
    chosen_BN = chosen_BN.float() * valid_BN
    share_B1 = chosen_BN.sum(1, keepdim=True) / valid_BN.sum(1, keepdim=True).clamp(min=1)
    return valid_BN * torch.where(chosen_BN > 0, 1 - share_B1, share_B1)
