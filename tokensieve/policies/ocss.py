"""OCSS, online combination-space sampling: the token subsets on which CaCoVID tries its policy out.

Ma, Zhou, Wang, Chen, Yang, Song, Zheng, "CaCoVID". https://arxiv.org/abs/2602.01649 (AAAI 2026)

In every frame of n tokens, of which k = round(r n) stay (r: rate), with s_i the keep-logit minus the drop-logit:

    groups   tokens by falling p = softmax(s), cut into Q = max(int(1 / r / group_size), 1) groups of neighbours, the
             first n mod Q one longer
    P        mass of p in each group, capped at c = max(min(max_group_prob / Q, 0.9), 0.1), or 1 where Q = 1
    subset   one group drawn by P; in it k tokens without replacement, by p over the mass of the group (+ 1e-8, as
             the official numbers show), clamped to [1 / 2m, 2 / m] and renormalised, m = n // Q

so a subset holds tokens that the policy thinks about equally useful, and no group is out of reach. Subset 0 is the
greedy one: the k largest s of every frame.

What differs from the official code (LivingFutureLab/CaCoVID; written from the description):
- A group never has fewer tokens than stay, and at least one token stays (there: an error on small frames).
- A cap below 1 / Q, which no distribution meets, counts as 1 / Q.
- Equal tokens are ordered by index.
"""

# Shape legend: V videos (any leading axes, or none), G subsets, T frames, n tokens a frame, N = T * n tokens,
#               Q groups, k tokens kept of each frame

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from tokensieve.errors import BadOption
from tokensieve.policies.subsets import (
    Subsets,
    by_frame,
    check_count,
    check_generator,
    keep_scores,
    largest,
    mask_of,
    subset_size,
)

GROUP_SIZE = 2.0
MAX_GROUP_PROB = 2.0
MOST_CAP, LEAST_CAP = 0.9, 0.1
MASS_EPS = 1e-8  # on the mass of a group: one that has next to none is drawn from evenly


def ocss_subsets(
    token_logits: Tensor,
    num_frames: int,
    rate: float,
    num_subsets: int,
    *,
    generator: torch.Generator,
    group_size: float = GROUP_SIZE,
    max_group_prob: float = MAX_GROUP_PROB,
    greedy_first: bool = True,
) -> Subsets:
    """Subsets of one group of every frame.

    Args:
        token_logits: `[..., N, 2]` (drop, keep) per token, frame by frame; videos of one shape in front, which draw
            one after the other.
        num_frames: T; 1 treats all tokens as one frame.
        rate: share of the tokens of a frame that stays, in (0, 1].
        num_subsets: G.
        generator: the source of all draws, on the CPU.
        group_size: about how many times the tokens that stay a group holds, above 0.
        max_group_prob: the most probable group gets at most this over Q, above 0.
        greedy_first: subset 0 is the greedy one instead of a drawn one.

    Raises:
        BadOption: logits or an option are not as above.
    """
    check_count("num_subsets", num_subsets)
    check_generator(generator)
    score_VTn = by_frame(keep_scores(token_logits, "token_logits"), num_frames)
    num_places = score_VTn.shape[-1]
    num_keep = subset_size(rate, num_places)
    num_groups = count_groups(rate, num_places, group_size)
    group_VTn = token_groups(score_VTn, num_groups)
    mass_VTQ = group_probabilities(score_VTn, group_VTn, group_cap(num_groups, max_group_prob))
    prob_VTQn = token_probabilities(score_VTn, group_VTn, num_groups)

    drawn = []
    for mass_Q, prob_Qn in zip(mass_VTQ.flatten(0, -2), prob_VTQn.flatten(0, -3), strict=True):
        chosen_G = torch.multinomial(mass_Q, num_subsets, replacement=True, generator=generator)
        drawn.append(torch.multinomial(prob_Qn[chosen_G], num_keep, generator=generator))
    order_VGTk = torch.stack(drawn).unflatten(0, score_VTn.shape[:-1]).transpose(-3, -2)
    if greedy_first:
        order_VGTk[..., 0, :, :] = largest(score_VTn, num_keep)
    return Subsets(mask=mask_of(order_VGTk, num_places).to(token_logits.device))


def count_groups(rate: float, num_places: int, group_size: float = GROUP_SIZE) -> int:
    """Q: how many groups a frame is cut into.

    Raises:
        BadOption: `rate` is not in (0, 1], or `group_size` is not above 0.
    """
    num_keep = subset_size(rate, num_places)
    _check_positive("group_size", group_size)
    return max(min(int(1 / rate / group_size), num_places // num_keep), 1)


def group_cap(num_groups: int, max_group_prob: float = MAX_GROUP_PROB) -> float:
    """c: the most probability that a group may have.

    Raises:
        BadOption: `max_group_prob` is not above 0.
    """
    _check_positive("max_group_prob", max_group_prob)
    return 1.0 if num_groups == 1 else max(min(max_group_prob / num_groups, MOST_CAP), LEAST_CAP)


def token_groups(score_Tn: Tensor, num_groups: int) -> Tensor:
    """`[..., n]` int64 in [0, Q): the group of every token, 0 for the most probable ones."""
    small, longer = divmod(score_Tn.shape[-1], num_groups)
    sizes_Q = torch.full((num_groups,), small) + (torch.arange(num_groups) < longer)
    group_n = torch.arange(num_groups).repeat_interleave(sizes_Q)
    order_Tn = largest(score_Tn, score_Tn.shape[-1])
    return torch.empty_like(order_Tn).scatter_(-1, order_Tn, group_n.expand_as(order_Tn))


def group_probabilities(score_Tn: Tensor, group_Tn: Tensor, cap: float) -> Tensor:
    """`[..., Q]` float32: the probability of every group, capped."""
    num_groups = int(group_Tn.max()) + 1
    mass_TQ = score_Tn.new_zeros(*score_Tn.shape[:-1], num_groups).scatter_add_(-1, group_Tn, score_Tn.softmax(-1))
    return cap_probabilities(mass_TQ, cap)


def token_probabilities(score_Tn: Tensor, group_Tn: Tensor, num_groups: int) -> Tensor:
    """`[..., Q, n]` float32: the probability of every token once a group is drawn, 0 outside the group."""
    smallest = score_Tn.shape[-1] // num_groups
    inside_TQn = group_Tn[..., None, :] == torch.arange(num_groups)[:, None]
    prob_TQn = score_Tn.softmax(-1)[..., None, :] * inside_TQn
    prob_TQn = prob_TQn / (prob_TQn.sum(-1, keepdim=True) + MASS_EPS)
    prob_TQn = prob_TQn.clamp(1 / (2 * smallest), 2 / smallest) * inside_TQn
    return prob_TQn / prob_TQn.sum(-1, keepdim=True)


def cap_probabilities(prob_Q: Tensor, cap: float) -> Tensor:
    """Distributions along the last axis with no entry above `cap`.

    Every entry is first raised to 1 / Q^2. While the largest is above the cap it is pinned there, and the others,
    raised again, share the rest in proportion. A `cap` below 1 / Q counts as 1 / Q.
    """
    num_groups = prob_Q.shape[-1]
    cap = max(cap, 1 / num_groups)
    pinned_Q = torch.zeros_like(prob_Q, dtype=torch.bool)
    done_1 = torch.zeros_like(prob_Q[..., :1], dtype=torch.bool)
    result_Q = torch.zeros_like(prob_Q)
    rest = 1.0  # what is not pinned yet
    for _ in range(num_groups):
        prob_Q = prob_Q.clamp(min=1 / num_groups**2).masked_fill(pinned_Q, 0)
        prob_Q = prob_Q / prob_Q.sum(-1, keepdim=True)
        result_Q = torch.where(pinned_Q | done_1, result_Q, rest * prob_Q)
        top_1 = prob_Q.argmax(-1, keepdim=True)
        done_1 = done_1 | (prob_Q.gather(-1, top_1) <= cap)
        if done_1.all():
            break
        newly_Q = torch.zeros_like(pinned_Q).scatter_(-1, top_1, ~done_1)
        result_Q = result_Q.masked_fill(newly_Q, rest * cap)
        pinned_Q = pinned_Q | newly_Q
        rest, cap = rest * (1 - cap), cap / (1 - cap)
    return result_Q


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise BadOption(f"{name} must be a finite number above 0, got {value!r}.")
