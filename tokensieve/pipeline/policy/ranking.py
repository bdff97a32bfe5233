"""Training by ranking: whole subsets of a video are drawn without replacement, and their exact likelihood is rewarded.

    draw     k of the N tokens one after the other, each with probability softmax(s) over those left (Plackett-Luce)
    log pi   sum over the draws j of  s_j - logsumexp(s of the tokens not drawn before)
    loss     an `Objective` over these log-probabilities: by default the advantage of GRPO times the likelihood ratio

`s_i` is the policy's keep-logit minus its drop-logit. Ours, from known parts. In use `cacovid` keeps, for a policy
without a frame head, a systematic sample with the same probabilities (see `compression.systematic`): training and use
agree. CaCoVID draws a fixed share of every frame and rewards each kept or dropped token by itself, so its tokens are
never compared across frames. With the reward "agree" no labels are needed: a distillation by the score function.

Plackett, "The analysis of permutations", Applied Statistics 24 (1975); drawing by Gumbel noise: Kool, van Hoof and
Welling, "Stochastic Beams and Where to Find Them", https://arxiv.org/abs/1903.06059 (ICML 2019).
"""

# Shape legend: G subsets, N candidates

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokensieve.compression.systematic import systematic_subset
from tokensieve.errors import BadOption
from tokensieve.pipeline.policy.budgets import Budgets
from tokensieve.pipeline.policy.judging import check_reward, subset_rewards
from tokensieve.pipeline.policy.module import PolicyModule
from tokensieve.pipeline.policy.samples import Sample
from tokensieve.policies import Objective
from tokensieve.policies.light_scorer import LightScorer
from tokensieve.policies.samplers import gumbel_subsets, plackett_luce_logprobs
from tokensieve.policies.subsets import Subsets

GRPO = Objective()


class RankingModule(PolicyModule):
    """Trains a policy to rank all tokens of a video; other arguments as in `PolicyModule`.

    Args:
        reward: see `judging`; "agree" needs no labels.
        objective: advantage, policy loss and aggregation; it has no reference, so no KL.
        subsets: how many are drawn a sample. One more is scored for the progress bar and teaches nothing: the one
            that `cacovid` would keep.
        min_keep, max_keep: shares between which each sample's budget is drawn (evenly in their logarithm), so that one
            policy serves many.
    """

    frame_head = False

    def __init__(
        self,
        reward: str = "loglik",
        objective: Objective = GRPO,
        subsets: int = 16,
        min_keep: float = 0.03,
        max_keep: float = 0.1,
        **shared,
    ):
        super().__init__(**shared)
        self.save_hyperparameters(ignore=["objective"])
        check_reward(reward)
        if subsets < 2:
            raise BadOption(f"subsets must be at least 2, got {subsets}.")
        if objective.kl_weight:
            raise BadOption("Ranking has no reference to stay near.", hint="Leave objective.kl_weight at 0.")
        if not isinstance(self.policy, LightScorer):
            raise BadOption("Ranking trains no frame head, and this scorer has one.", hint="Use scorer='light'.")
        self.reward, self.objective, self.num_subsets = reward, objective, subsets
        self.budgets = Budgets(min_keep, max_keep)

    def learn(self, parts: Sequence[Sequence[Sample]], draws: Sequence[Sequence[torch.Generator]]) -> None:
        rewards: list[Tensor] = []
        losses = (self._losses(part, own, rewards) for part, own in zip(parts, draws, strict=True))
        num_samples = sum(map(len, parts))
        loss = self.step(num_samples, losses)
        logged = {
            "loss": loss,
            "reward": torch.cat([r[:-1] for r in rewards]).nanmean().float(),
            "greedy": torch.stack([r[-1] for r in rewards]).nanmean().float(),
        }
        self.log_dict(logged, prog_bar=True, batch_size=num_samples)

    def _losses(
        self, samples: Sequence[Sample], draws: Sequence[torch.Generator], rewards: list[Tensor]
    ) -> list[Tensor]:
        logits = self.policy.forward_batch([s.tokens for s in samples])
        losses = []
        for sample, (token_logits, _), generator in zip(samples, logits, draws, strict=True):
            drawn = self._draw(token_logits, generator)
            kept = systematic_subset(token_logits.float().diff(dim=1)[:, 0], drawn.order.shape[-1])
            used_1N = torch.zeros_like(drawn.mask[:1]).index_fill(1, kept.to(drawn.mask.device), True)
            own = subset_rewards(self.judge, sample, torch.cat([drawn.mask, used_1N]), self.reward)
            losses.append(ranking_loss(token_logits, drawn.order, own[:-1], self.objective))
            rewards.append(own)
        return losses

    def _draw(self, token_logits: Tensor, generator: torch.Generator) -> Subsets:
        keep = self.budgets.draw(generator)
        return gumbel_subsets(token_logits, 1, keep, self.num_subsets, generator=generator, greedy_first=False)


def ranking_loss(token_logits: Tensor, order_G1k: Tensor, rewards_G: Tensor, objective: Objective) -> Tensor:
    """The objective's loss of the draws of one sample, 0-d.

    Args:
        token_logits: `[N, 2]` (drop, keep), with gradient.
        order_G1k: int64, the tokens in the order of drawing.
        rewards_G: one per subset; NaN for none.
    """
    logprobs_Gk = plackett_luce_logprobs(token_logits, order_G1k)[:, 0]
    return objective(logprobs_Gk, logprobs_Gk.detach(), torch.ones_like(logprobs_Gk), rewards_G, len(rewards_G)).total
