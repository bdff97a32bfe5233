"""An objective is three parts, chosen by name, and a penalty: advantage, policy loss, aggregation, and KL."""

# Shape legend: B rows, T decisions or tokens of a row

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tokensieve.errors import BadOption
from tokensieve.policies.advantages import GroupIds, get_advantage
from tokensieve.policies.aggregation import aggregate, check_mode
from tokensieve.policies.kl import get_kl
from tokensieve.policies.losses import check_clip, get_policy_loss


@dataclass(frozen=True, eq=False)
class Terms:
    """What an objective gave.

    Attributes:
        total: 0-d, to minimise: `policy + kl_weight * kl`.
        policy: 0-d, the aggregated policy loss.
        kl: 0-d, the aggregated KL estimate; None where its weight is 0.
        advantages: `[B]` float64.
    """

    total: Tensor
    policy: Tensor
    kl: Tensor | None
    advantages: Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A policy-gradient objective over log-probabilities, rewards and a mask.

    Published ones: GRPO is the default with clip_high=0.2; DAPO takes token-mean and clip_high=0.28; Dr. GRPO takes
    dr_grpo and seq-mean-token-sum-norm; GSPO takes policy_loss="gspo" with clips of its own.

    Raises:
        BadOption: a name is unknown, or a number out of range.
    """

    advantage: str = "grpo"
    """Which advantage estimator: a name of `ADVANTAGES`."""
    policy_loss: str = "ppo_clip"
    """Which loss per token: a name of `POLICY_LOSSES`."""
    clip_low: float = 0.2
    """How far the probability ratio may fall below 1."""
    clip_high: float = 0.28
    """How far the probability ratio may rise above 1."""
    dual_clip: float | None = None
    """Cap on the ratio where the advantage is negative, above 1."""
    aggregation: str = "seq-mean-token-mean"
    """How losses per token become one number: one of `MODES`."""
    length: int | None = None
    """The constant length of seq-mean-token-sum-norm."""
    count_empty_rows: bool = False
    """Rows without any weight count in the mean over rows."""
    kl: str = "k3"
    """Which KL estimator: a name of `KL_ESTIMATORS`."""
    kl_weight: float = 0.0
    """Weight of the KL term, from 0 up."""

    def __post_init__(self) -> None:
        get_advantage(self.advantage)
        get_policy_loss(self.policy_loss)
        get_kl(self.kl)
        check_clip(self.clip_low, self.clip_high, self.dual_clip)
        check_mode(self.aggregation, self.length)
        if not 0 <= self.kl_weight < math.inf:
            raise BadOption(f"kl_weight must be a finite number from 0 up, got {self.kl_weight!r}.")

    def __call__(
        self,
        logprobs_BT: Tensor,
        old_logprobs_BT: Tensor,
        mask_BT: Tensor,
        rewards_B: Tensor,
        group_ids: GroupIds,
        *,
        ref_logprobs_BT: Tensor | None = None,
        denominator: Tensor | float | None = None,
    ) -> Terms:
        """The loss of one batch.

        Args:
            logprobs_BT: log-probabilities of the actions taken, nats, with gradient.
            old_logprobs_BT: the same under the policy that sampled them.
            mask_BT: 0/1 or weights >= 0.
            rewards_B: one per row; NaN for none.
            group_ids: `[B]`, or the number of rows per group; see `advantages.grpo`.
            ref_logprobs_BT: the same actions under the reference; needed where `kl_weight` is not 0.
            denominator: see `aggregate`.

        Raises:
            BadOption: a shape is wrong, or the reference is missing.
        """
        advantages_B = get_advantage(self.advantage)(rewards_B, group_ids)
        clips = {"clip_low": self.clip_low, "clip_high": self.clip_high, "dual_clip": self.dual_clip}
        loss_BT = get_policy_loss(self.policy_loss)(logprobs_BT, old_logprobs_BT, advantages_B, mask_BT, **clips)
        policy = self._aggregate(loss_BT, mask_BT, denominator)
        if not self.kl_weight:
            return Terms(policy, policy, None, advantages_B)
        if ref_logprobs_BT is None:
            raise BadOption(f"A kl_weight of {self.kl_weight} needs ref_logprobs.")
        kl = self._aggregate(get_kl(self.kl)(logprobs_BT, ref_logprobs_BT, mask_BT), mask_BT, denominator)
        return Terms(policy + self.kl_weight * kl, policy, kl, advantages_B)

    def _aggregate(self, values_BT: Tensor, mask_BT: Tensor, denominator: Tensor | float | None) -> Tensor:
        return aggregate(
            values_BT,
            mask_BT,
            self.aggregation,
            length=self.length,
            denominator=denominator,
            count_empty_rows=self.count_empty_rows,
        )
