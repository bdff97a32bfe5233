"""How a learned selector learns: scorers, subset samplers, rewards, and objectives in exchangeable parts. No trainer.

Rows are subsets (or answers), grouped by video (or prompt): advantages `[B]` from rewards `[B]`, a loss per decision
`[B, T]` from log-probabilities `[B, T]`, and one number from those.
"""

from tokensieve.policies.advantages import (
    ADVANTAGES,
    dr_grpo,
    get_advantage,
    grpo,
    grpo_batch_std,
    informative_rows,
    rloo,
)
from tokensieve.policies.aggregation import MODES, aggregate, denominator_of
from tokensieve.policies.cacovid_loss import (
    CACOVID,
    CacovidLoss,
    Decisions,
    balanced_weights,
    cacovid_loss,
    two_class_logprobs,
    two_class_loss,
)
from tokensieve.policies.checkpoint import SavedPolicy, load_policy
from tokensieve.policies.kl import KL_ESTIMATORS, get_kl, k1, k2, k3
from tokensieve.policies.light_scorer import LightScorer
from tokensieve.policies.losses import POLICY_LOSSES, get_policy_loss, gspo, ppo_clip, ppo_clip_sequence
from tokensieve.policies.objective import Objective, Terms
from tokensieve.policies.ocss import ocss_subsets
from tokensieve.policies.rewards import REWARDS, get_reward, loglik_gain
from tokensieve.policies.samplers import density_subset, frame_subsets, gumbel_subsets, plackett_luce_logprobs
from tokensieve.policies.scorer import PolicyScorer
from tokensieve.policies.subsets import Subsets

__all__ = [
    "ADVANTAGES",
    "CACOVID",
    "KL_ESTIMATORS",
    "MODES",
    "POLICY_LOSSES",
    "REWARDS",
    "CacovidLoss",
    "Decisions",
    "LightScorer",
    "Objective",
    "PolicyScorer",
    "SavedPolicy",
    "Subsets",
    "Terms",
    "aggregate",
    "balanced_weights",
    "cacovid_loss",
    "denominator_of",
    "density_subset",
    "dr_grpo",
    "frame_subsets",
    "get_advantage",
    "get_kl",
    "get_policy_loss",
    "get_reward",
    "grpo",
    "grpo_batch_std",
    "gspo",
    "gumbel_subsets",
    "informative_rows",
    "k1",
    "k2",
    "k3",
    "load_policy",
    "loglik_gain",
    "ocss_subsets",
    "plackett_luce_logprobs",
    "ppo_clip",
    "ppo_clip_sequence",
    "rloo",
    "two_class_logprobs",
    "two_class_loss",
]
