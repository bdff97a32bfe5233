"""PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction.

Xing, Huang, Dong, Lu, Zhang, Zang, Cao, He, Wang, Wu, Lin (CVPR 2025). https://arxiv.org/abs/2410.17247

    stages    the L decoder layers in 4 equal parts
    a_j       attention from the last instruction token to visual token j, mean over heads, computed from the queries
              and keys of the layer about to run (its own norm, projections and rotary)
    keep      at the end of each of the first 3 stages the share lambda of the visual tokens with the highest a_j

With lambda = 0.5, the authors' default, 1, 1/2, 1/4 and 1/8 of the tokens are there in the four stages.

What differs from the paper and its code (Cooperx521/PyramidDrop; written from the paper's description, its code was
not read, so this list is INFERRED):
- The budget is the share left in the last stage: lambda = keep ** (1/3), and keep = 0.125 is the authors' default.
- Counts are rounded, the last is exact; stages end before layers L/4, L/2 and 3L/4 rounded down, never before layer 1.
- Batches, left padding, several images: budget and ranking are over all visual tokens of one prompt.
- Equal scores: the first token wins. Original positions are kept.
"""

# Shape legend: N visual tokens of a prompt, n those that are not set aside, H heads, L layers

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokensieve.compression.decoder_stage import DecoderStage, DecoderTokens, Step, check_whole, keep_best
from tokensieve.compression.plan import Plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.sink_guard import check_sinks, guarded_plan
from tokensieve.errors import BadOption


@register_method(
    "pyramiddrop",
    title="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
    url="https://arxiv.org/abs/2410.17247",
    place="decoder",
    needs=("attention", "question"),
    licence="not read",
    differs="Budget is the share left in the last stage; layers and rounding are inferred.",
)
def pyramiddrop(*, stages: int = 4, sinks: str = "off") -> PyramidDrop:
    """A stage that drops the same share of visual tokens several times on the way through the language model.

    Args:
        stages: equal parts of the language model, from 2 up; tokens leave between them.
        sinks: what becomes of attention sinks (ours, see `sink_guard`): "off" (ranked like all others, as in the
            paper), "protect" (all stay, outside the budget: that many more tokens are left) or "exclude" (they rank
            below all others). Here a sink is a token that takes more than 0.3 of the step's one row of attention in
            some head, or whose hidden state is an outlier in norm. Each step finds its own sinks: one that is none any
            more is ranked again. One row cannot tell a sink from what the prompt asks about, so "exclude" may drop the
            answer.

    Raises:
        BadOption: `sinks` is none of these, or `stages` is not a whole number from 2 up (or, once it meets a model,
            the model has one layer).
    """
    check_sinks(sinks)
    return PyramidDrop(check_whole(stages, "stages", 2), sinks)


@dataclass(frozen=True)
class PyramidDrop(DecoderStage):
    """See `pyramiddrop`."""

    stages: int
    sinks: str = "off"

    def steps(self, num_layers: int) -> tuple[Step, ...]:
        if num_layers < 2:
            raise BadOption("'pyramiddrop' needs a language model of at least two layers.")
        # Of steps that fall on one layer of a shallow model, the last wins.
        phases = {max(1, num_layers * i // self.stages): i for i in range(1, self.stages)}
        return tuple(Step(layer=layer, phase=phase, looks="next") for layer, phase in phases.items())

    def select(self, step: Step, tokens: DecoderTokens) -> Plan:
        row_HN = tokens.attention()
        score_N = row_HN.mean(0)
        num_keep = self.num_after(step.phase, tokens.num_first, tokens.num_keep)

        def keep_among(member_n: Tensor, num_best: int) -> Plan:
            return keep_best(score_N[member_n], num_best)

        return guarded_plan(tokens, row_HN, num_keep, self.sinks, keep_among)

    def num_after(self, phase: int, num_first: int, num_keep: int) -> int:
        """Visual tokens left after the first `phase` stages, when `num_keep` of `num_first` are left at the end."""
        if phase == self.stages - 1:
            return num_keep
        return round(num_first * (num_keep / num_first) ** (phase / (self.stages - 1)))
