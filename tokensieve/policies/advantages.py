"""Advantages of rewards relative to the other rows of the same group: the first of an objective's three parts.

A group is all sampled subsets of one video, or all sampled answers to one prompt. With mean_g and std_g over the
scored rows of group g:

    grpo            (r - mean_g) / (std_g + eps)      Shao et al. https://arxiv.org/abs/2402.03300
    dr_grpo         r - mean_g                        Liu et al. https://arxiv.org/abs/2503.20783
    grpo_batch_std  (r - mean_g) / (std + eps)        std over the scored rows of all groups
    rloo            r - mean of the other rows        Ahmadian et al. https://arxiv.org/abs/2402.14740

Standard deviations are unbiased (divided by n - 1). All in float64, whatever comes in.

Where libraries differ, and what holds here:
- eps is 1e-4 in trl (and here), 1e-6 in verl, 1e-9 in OpenRLHF.
- Rewards that are equal up to float32 rounding (0.3 + 0.6 and 0.9) count as equal: std <= 1e-6 max(1, |mean|) gives
  advantages of exactly 0. Without it such a group can get advantages around 1.
- A row without a reward (NaN or infinite) is left out of the statistics and gets 0, as in trl; verl spreads the NaN.
- A group of one row is refused, as in trl and OpenRLHF; verl would return its raw reward. A group of which NaN leaves
  one row gets 0.
- Rows of groups without spread still count in the denominators of the aggregation, as in all three libraries. To drop
  them (the "dynamic sampling" of DAPO), select the rows of `informative_rows` first.
"""

# Shape legend: B rows, G groups

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.errors import BadOption
from tokensieve.policies.lookup import look_up

EPS = 1e-4
EQUAL_REWARDS = 1e-6  # relative to the mean, or absolute where that is below 1

GroupIds = Tensor | int


def grpo(rewards_B: Tensor, group_ids: GroupIds, *, eps: float = EPS) -> Tensor:
    """Z-scores in the group, `[B]` float64 without unit.

    Args:
        rewards_B: one per row, task units; NaN or infinite for a row without one.
        group_ids: `[B]` whole numbers, rows of one group alike, in any order; or one number of rows per group, for
            groups that stand one after the other.
        eps: added to the standard deviation, in task units.

    Raises:
        BadOption: a shape is wrong, or a group has one row only.
    """
    groups = _statistics(rewards_B, group_ids)
    return groups.centred_B / (groups.std_B + eps)


def dr_grpo(rewards_B: Tensor, group_ids: GroupIds) -> Tensor:
    """Distance from the group's mean, `[B]` float64 in task units. Arguments and errors as in `grpo`."""
    return _statistics(rewards_B, group_ids).centred_B


def grpo_batch_std(rewards_B: Tensor, group_ids: GroupIds, *, eps: float = EPS) -> Tensor:
    """Distance from the group's mean over the standard deviation of all rows, `[B]` float64 without unit.

    Arguments and errors as in `grpo`.
    """
    groups = _statistics(rewards_B, group_ids)
    scored = rewards_B.detach().double()[groups.scored_B]
    std = scored.std() if len(scored) > 1 else scored.new_zeros(())
    return groups.centred_B / (std + eps)


def rloo(rewards_B: Tensor, group_ids: GroupIds) -> Tensor:
    """Distance from the mean of the group's other rows, `[B]` float64 in task units.

    That is n / (n - 1) times `dr_grpo`, n the scored rows of the group. Arguments and errors as in `grpo`.
    """
    groups = _statistics(rewards_B, group_ids)
    return groups.centred_B * groups.count_B / (groups.count_B - 1).clamp(min=1)


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "dr_grpo": dr_grpo,
    "grpo": grpo,
    "grpo_batch_std": grpo_batch_std,
    "rloo": rloo,
}


def get_advantage(name: str) -> Callable[..., Tensor]:
    """The estimator `(rewards [B], group_ids) -> [B]` of that name; BadOption if there is none."""
    return look_up("advantage estimator", name, ADVANTAGES)


def informative_rows(rewards_B: Tensor, group_ids: GroupIds) -> Tensor:
    """`[B]` bool: rows with a reward whose group has spread, the only ones that can teach anything.

    One minus its mean is the share of wasted rows, to log; indexing all fields with it is DAPO's dynamic sampling.
    Arguments and errors as in `grpo`.
    """
    groups = _statistics(rewards_B, group_ids)
    return groups.scored_B & (groups.std_B > 0)


@dataclass(frozen=True, eq=False)
class _Statistics:
    """Each row with numbers of its group. Without spread, `std_B` and `centred_B` are exactly 0."""

    scored_B: Tensor  # bool
    count_B: Tensor  # scored rows of the group
    centred_B: Tensor  # reward minus mean; 0 for a row without reward
    std_B: Tensor


def _statistics(rewards_B: Tensor, group_ids: GroupIds) -> _Statistics:
    if rewards_B.ndim != 1:
        raise BadOption(f"Rewards must be one number per row, [B], got shape {tuple(rewards_B.shape)}.")
    index_B = _group_index(rewards_B, group_ids)
    num_groups = int(index_B.max()) + 1 if len(index_B) else 0
    member_GB = (index_B == torch.arange(num_groups, device=index_B.device)[:, None]).double()
    if (member_GB.sum(1) < 2).any():
        raise BadOption(
            "A group has one row only, and its advantage would be relative to nothing.",
            hint="Sample at least 2 rows per group.",
        )
    scored_B = rewards_B.isfinite()
    rewards_B = rewards_B.detach().double().where(scored_B, 0.0)
    count_G = member_GB @ scored_B.double()
    mean_G = member_GB @ rewards_B / count_G.clamp(min=1)
    centred_B = (rewards_B - mean_G[index_B]).where(scored_B, 0.0)
    std_G = (member_GB @ centred_B.square() / (count_G - 1).clamp(min=1)).sqrt()
    std_G = std_G.where(std_G > EQUAL_REWARDS * mean_G.abs().clamp(min=1), 0.0)
    std_B = std_G[index_B]
    return _Statistics(scored_B, count_G[index_B], centred_B.where(std_B > 0, 0.0), std_B)


def _group_index(rewards_B: Tensor, group_ids: GroupIds) -> Tensor:
    num_rows = len(rewards_B)
    if isinstance(group_ids, Tensor):
        if group_ids.shape != rewards_B.shape or group_ids.is_floating_point():
            raise BadOption(
                f"group_ids must be {num_rows} whole numbers, one per row, got {tuple(group_ids.shape)} "
                f"{group_ids.dtype}."
            )
        return group_ids.to(rewards_B.device).unique(return_inverse=True)[1]
    if isinstance(group_ids, bool) or not isinstance(group_ids, int) or group_ids < 1 or num_rows % group_ids:
        raise BadOption(
            f"group_ids must be [B] whole numbers, or a number of rows per group that divides {num_rows}, "
            f"got {group_ids!r}."
        )
    return torch.arange(num_rows, device=rewards_B.device) // group_ids
