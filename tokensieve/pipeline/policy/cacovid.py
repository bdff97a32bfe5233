"""CaCoVID's training: subsets sampled from the policy, rewarded by the frozen model, a group-relative update.

Ma, Zhou, Wang, Chen, Yang, Song, Zheng. https://arxiv.org/abs/2602.01649 (AAAI 2026)

For every sample, `rounds` times: draw token subsets (OCSS) and frame subsets from the policy as it was in round 1,
score them, and update on all subsets in memory. The kept share of the next round is halved where nearly every subset
was right, and doubled where nearly none was.

What differs from the official code (LivingFutureLab/CaCoVID; written from the description):
- Several samples share an update. No content subset is generated: it feeds a head that is not trained.
- The learning rate follows a schedule in updates (there: in samples, so it rises again).
- Rewards other than generated correctness, another sampler, and our light scorer can be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokensieve.errors import BadOption
from tokensieve.pipeline.policy.judging import check_reward, subset_rewards
from tokensieve.pipeline.policy.module import PolicyModule
from tokensieve.pipeline.policy.samples import Sample
from tokensieve.policies import Decisions, Objective, cacovid_loss
from tokensieve.policies.cacovid_loss import CACOVID
from tokensieve.policies.inputs import count_frames
from tokensieve.policies.ocss import ocss_subsets
from tokensieve.policies.samplers import frame_subsets, gumbel_subsets

SAMPLERS = {"ocss": ocss_subsets, "gumbel": gumbel_subsets}
NEARLY_ALL, NEARLY_NONE = 0.875, 0.125


@dataclass
class _Memory:
    """Subsets of one sample and their rewards, over the rounds."""

    old: tuple[Tensor, Tensor | None]
    rate: float
    generator: torch.Generator
    tokens: list[Tensor] = field(default_factory=list)
    token_rewards: list[Tensor] = field(default_factory=list)
    frames: list[Tensor] = field(default_factory=list)
    frame_rewards: list[Tensor] = field(default_factory=list)


class CacovidModule(PolicyModule):
    """Trains a policy with CaCoVID's objective; other arguments as in `PolicyModule`.

    Args:
        sampler: "ocss", or "gumbel" for plain draws without replacement.
        reward: see `judging`: "match" by default; a name of `policies.REWARDS` generates answers as the paper does.
        objective: advantage, policy loss, aggregation and KL.
        rounds: updates on one batch of samples.
        rate: share of a frame that a subset keeps in the first round.
        min_rate, max_rate: bounds of the adaptive rate; equal to `rate` for a fixed one.
        token_subsets, frame_subsets: how many of each are scored a round; frame subsets need a video.
    """

    def __init__(
        self,
        sampler: str = "ocss",
        reward: str = "match",
        objective: Objective = CACOVID,
        rounds: int = 5,
        rate: float = 0.02,
        min_rate: float = 0.01,
        max_rate: float = 0.12,
        token_subsets: int = 24,
        frame_subsets: int = 8,
        **shared,
    ):
        super().__init__(**shared)
        self.save_hyperparameters(ignore=["objective"])
        if sampler not in SAMPLERS:
            raise BadOption(f"sampler must be one of {tuple(SAMPLERS)}, got {sampler!r}.")
        check_reward(reward)
        if not 0 < min_rate <= rate <= max_rate <= 1:
            raise BadOption(f"Rates must be 0 < min_rate <= rate <= max_rate <= 1, got {min_rate}, {rate}, {max_rate}.")
        if rounds < 1 or token_subsets < 2 or frame_subsets < 0 or frame_subsets == 1:
            raise BadOption(
                f"Need rounds >= 1, token_subsets >= 2 and frame_subsets 0 or >= 2, got {rounds}, {token_subsets}, "
                f"{frame_subsets}."
            )
        self.draw, self.reward, self.rounds = SAMPLERS[sampler], reward, rounds
        self.objective = objective
        self.rate, self.min_rate, self.max_rate = rate, min_rate, max_rate
        self.num_token_subsets, self.num_frame_subsets = token_subsets, frame_subsets

    def learn(self, parts: Sequence[Sequence[Sample]], draws: Sequence[Sequence[torch.Generator]]) -> None:
        remembered = [self._remember(part, own) for part, own in zip(parts, draws, strict=True)]
        samples, memories = sum(map(list, parts), []), sum(remembered, [])
        for _ in range(self.rounds):
            if self.global_step >= self.trainer.max_steps:
                break
            greedy = [self._try_out(sample, memory) for sample, memory in zip(samples, memories, strict=True)]
            losses = (self._losses(part, mine) for part, mine in zip(parts, remembered, strict=True))
            loss = self.step(len(samples), losses)
            rewards = torch.cat([m.token_rewards[-1] for m in memories])
            self.log_dict(
                {
                    "loss": loss,
                    "reward": rewards.nanmean().float(),
                    "greedy": torch.stack(greedy).nanmean().float(),
                    "rate": sum(m.rate for m in memories) / len(memories),
                },
                prog_bar=True,
                batch_size=len(samples),
            )
            for memory in memories:
                memory.rate = self._next_rate(memory)

    @torch.no_grad()
    def _remember(self, part: Sequence[Sample], draws: Sequence[torch.Generator]) -> list[_Memory]:
        old = self.policy.forward_batch([s.tokens for s in part])
        return [_Memory(old=own, rate=self.rate, generator=g) for own, g in zip(old, draws, strict=True)]

    def _try_out(self, sample: Sample, memory: _Memory) -> Tensor:
        """Draws and scores subsets into the memory; the reward of the greedy one."""
        token_logits, frame_logits = memory.old
        num_frames = count_frames(sample.tokens)
        drawn = self.draw(token_logits, num_frames, memory.rate, self.num_token_subsets, generator=memory.generator)
        masks = [drawn.mask]
        with_frames = num_frames > 1 and self.num_frame_subsets > 0 and frame_logits is not None
        if with_frames:
            of_frames = frame_subsets(
                frame_logits, sample.tokens.features, memory.rate, self.num_frame_subsets, generator=memory.generator
            )
            masks.append(of_frames.mask.to(drawn.mask))
        rewards = subset_rewards(self.judge, sample, torch.cat(masks), self.reward)
        memory.tokens.append(drawn.mask)
        memory.token_rewards.append(rewards[: len(drawn.mask)])
        if with_frames:
            memory.frames.append(of_frames.frames)
            memory.frame_rewards.append(rewards[len(drawn.mask) :])
        return rewards[0]

    def _losses(self, part: Sequence[Sample], memories: Sequence[_Memory]) -> list[Tensor]:
        logits = self.policy.forward_batch([s.tokens for s in part])
        return [self._loss(own, memory) for own, memory in zip(logits, memories, strict=True)]

    def _loss(self, logits: tuple[Tensor, Tensor | None], memory: _Memory) -> Tensor:
        tokens = Decisions(
            logits=logits[0],
            old_logits=memory.old[0],
            chosen=torch.cat(memory.tokens),
            rewards=torch.cat(memory.token_rewards),
        )
        frames = None
        if memory.frames:
            frames = Decisions(
                logits=logits[1],
                old_logits=memory.old[1],
                chosen=torch.cat(memory.frames),
                rewards=torch.cat(memory.frame_rewards),
            )
        total = cacovid_loss(tokens, frames, objective=self.objective).total
        if frames is None and logits[1] is not None:
            total = total + 0 * logits[1].sum()  # several processes wait for a gradient of every parameter
        return total

    def _next_rate(self, memory: _Memory) -> float:
        mean = float(torch.cat(memory.token_rewards).nanmean())
        if mean >= NEARLY_ALL:
            return max(memory.rate / 2, self.min_rate)
        if mean <= NEARLY_NONE:
            return min(memory.rate * 2, self.max_rate)
        return memory.rate
