"""What all policy trainers share: the frozen judge, samples encoded once, validation at a few budgets, checkpoints."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import lightning as L
import torch
from torch import Tensor

from tokensieve.compression import check_keep, get_method
from tokensieve.errors import BadOption
from tokensieve.pipeline.optim import warm_up_then_cosine
from tokensieve.pipeline.policy.data import Asked, source_of_draws
from tokensieve.pipeline.policy.judging import subset_rewards
from tokensieve.pipeline.policy.samples import Sample, encode_samples
from tokensieve.pipeline.policy.scoring import SubsetScorer
from tokensieve.policies.light_scorer import LightScorer
from tokensieve.policies.scorer import PolicyScorer

SCORERS = ("light", "cacovid")
PRECISIONS = ("32-true", "bf16-mixed")


class PolicyModule(L.LightningModule):
    """A policy in training against a frozen model; subclasses say how it learns.

    The frozen model is no submodule: it is in no checkpoint, has no gradient and no optimizer sees it.

    Args:
        model: what judges: "tiny", a folder or a hub id.
        scorer: "light" (`LightScorer`) or "cacovid" (`PolicyScorer`, one decoder layer).
        question_aware: for "light": whether it reads the question.
        attention: for "cacovid": "bidirectional" or "causal".
        lr: peak learning rate.
        warmup: share of the steps over which it rises.
        seed: of weights and draws.
        val_keeps: budgets that validation looks at.
        accumulate: parts that the clips of a batch are worked off in: the same update in less memory.
        cache_gib: GiB of encoded clips that stay in memory, above 0; the oldest leave first.

    Raises:
        BadOption: an option is not one of these.
    """

    frame_head = True  # whether the policy shares its budget over frames by a head of its own

    def __init__(
        self,
        model: str = "tiny",
        scorer: str = "light",
        question_aware: bool = True,
        attention: str = "bidirectional",
        lr: float = 1e-3,
        warmup: float = 0.05,
        seed: int = 0,
        val_keeps: Sequence[float] = (0.1, 0.05),
        accumulate: int = 1,
        cache_gib: float = 4.0,
    ):
        super().__init__()
        from tokensieve.pipeline.loader import load

        if scorer not in SCORERS:
            raise BadOption(f"scorer must be one of {SCORERS}, got {scorer!r}.")
        if not (0 < lr < math.inf and 0 <= warmup <= 1):
            raise BadOption(f"Need a finite lr above 0 and a warmup in [0, 1], got {lr} and {warmup}.")
        if accumulate < 1 or not cache_gib > 0 or seed < 0:
            given = f"{accumulate}, {cache_gib} and {seed}"
            raise BadOption(f"accumulate and cache_gib must be above 0 and seed not below, got {given}.")
        self.automatic_optimization = False
        self.lr, self.warmup, self.cache_bytes = lr, warmup, cache_gib * 2**30
        self.accumulate, self.seed = accumulate, seed
        self.val_keeps = [check_keep(keep) for keep in val_keeps]
        self._judge = [SubsetScorer(load(model, device="cpu"))]  # in a list, so that it is no submodule
        if scorer == "cacovid":
            self.policy = PolicyScorer.init_from(self.judge.vlm.model, attention, seed=seed)
        else:
            width = self.judge.vlm.model.config.get_text_config().hidden_size
            self.policy = LightScorer(width, question_aware=question_aware, frame_head=self.frame_head, seed=seed)
        self.policy.requires_grad_(True)
        self._encoded: OrderedDict[Asked, list[Sample]] = OrderedDict()
        self._encoded_bytes = 0

    @property
    def judge(self) -> SubsetScorer:
        """The frozen model."""
        return self._judge[0]

    def on_fit_start(self) -> None:
        self.judge.vlm.model.to(self.device)

    def samples(self, clips: Sequence[Asked]) -> list[Sample]:
        """All questions of the clips, from memory where they were encoded before."""
        found = []
        for clip in clips:
            if clip not in self._encoded:
                self._encoded[clip] = encode_samples(self.judge.vlm, clip.load(), clip.questions, clip.answers)
                self._encoded_bytes += _num_bytes(self._encoded[clip])
            found += self._encoded[clip]
            while self._encoded_bytes > self.cache_bytes:
                _, oldest = self._encoded.popitem(last=False)
                self._encoded_bytes -= _num_bytes(oldest)
        return found

    def training_step(self, clips: Sequence[Asked], _) -> None:
        data = self.trainer.datamodule
        first = (data.steps_done * self.trainer.world_size + self.trainer.global_rank) * len(clips)
        draws = [
            [source_of_draws(self.seed, first + place, question) for question in range(len(clip.questions))]
            for place, clip in enumerate(clips)
        ]
        size = math.ceil(len(clips) / self.accumulate)
        starts = range(0, len(clips), size)
        parts = [self.samples(clips[i : i + size]) for i in starts]
        self.learn(parts, [sum(draws[i : i + size], []) for i in starts])
        data.steps_done += 1  # here, as hooks at the end of a batch come after the checkpoint that counts it

    def learn(self, parts: Sequence[Sequence[Sample]], draws: Sequence[Sequence[torch.Generator]]) -> None:
        """Learns from one batch by one or more calls of `step`.

        Args:
            parts: its samples, in parts whose gradients are taken one after the other.
            draws: the randomness of every sample. It follows from the place of the sample in the whole training, so
                that neither the number of processes nor an interruption changes it.
        """
        raise NotImplementedError

    def step(self, num_samples: int, losses: Iterable[Sequence[Tensor]]) -> Tensor:
        """One optimizer step down the mean loss of the samples of all processes; gradients are clipped at norm 1.

        Args:
            num_samples: of this process.
            losses: one per sample, part by part; a part's graph is gone when the next is asked for.

        Returns:
            The mean, without gradient.
        """
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        count = torch.tensor(float(num_samples), device=self.device)
        count = self.trainer.strategy.reduce(count, reduce_op="mean")  # gradients are averaged over processes
        total = torch.zeros((), device=self.device)
        for of_part in losses:
            loss = torch.stack(list(of_part)).sum() / count
            self.manual_backward(loss)
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return total

    def validation_step(self, clips: Sequence[Asked], _) -> None:
        method = get_method("cacovid")
        kind = "match" if self.trainer.datamodule.val_has_answers else "agree"
        for sample in self.samples(clips):
            for keep in self.val_keeps:
                mask_1N = method(sample.tokens, keep, policy=self.policy).mask()[None]
                score = subset_rewards(self.judge, sample, mask_1N, kind)
                self.log(f"val_{kind}_keep{keep:g}", score[0].float(), prog_bar=True, batch_size=1, sync_dist=True)

    def configure_optimizers(self):
        if self.trainer.max_steps < 1:
            raise BadOption("A policy is trained for a number of steps.", hint="Give the Trainer max_steps.")
        if self.trainer.precision not in PRECISIONS:
            raise BadOption(
                f"precision must be one of {PRECISIONS}, got {self.trainer.precision!r}.",
                hint="Weights stay in float32, where small steps are not rounded away.",
            )
        optimizer = torch.optim.AdamW(self.policy.parameters(), lr=self.lr, weight_decay=0.01)
        return [optimizer], [warm_up_then_cosine(optimizer, self.trainer.max_steps, self.warmup)]


def _num_bytes(samples: Sequence[Sample]) -> int:
    """Bytes of the encoder's output, which the questions of a clip share and which is nearly all of a sample."""
    item = samples[0].item
    projector = item.tokens.projector
    held = [item.features, item.tokens.features, *item.deepstack, *([] if projector is None else [projector.inputs])]
    return sum(x.numel() * x.element_size() for x in held)
