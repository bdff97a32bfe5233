"""FastV: An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large VLMs.

Chen, Zhao, Liu, Bai, Lin, Zhou, Chang (ECCV 2024). https://arxiv.org/abs/2403.06764

    a_j    attention of decoder layer K - 1 from the last token of the prompt to visual token j, mean over heads
    keep   the highest a_j, from layer K on, in reading order and at their original positions

Layers count from 0; K = 2, so the first two layers see all tokens. The first layers do the looking, later ones hardly
attend to most visual tokens.

What differs from the official code (pkunlp-icler/FastV; written from the equations):
- One row of one layer is computed beside SDPA or Flash, where the official code turns layer K - 1 to eager attention.
- Batches, left padding, several images: budget and ranking are over all visual tokens of one prompt.
- Equal scores: the first token wins.
"""

# Shape legend: N visual tokens of a prompt, H heads

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokensieve.compression.decoder_stage import (
    DecoderStage,
    DecoderTokens,
    Step,
    check_whole,
    checked_layer,
    keep_best,
)
from tokensieve.compression.plan import Plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.sink_guard import check_sinks, guarded_plan


@register_method(
    "fastv",
    title="An Image is Worth 1/2 Tokens After Layer 2",
    url="https://arxiv.org/abs/2403.06764",
    place="decoder",
    needs=("attention", "question"),
    licence="none at the root (Apache-2.0 in subfolders)",
    differs="One attention row beside SDPA; any batch; budget over all visual tokens of a prompt.",
)
def fastv(*, layer: int | None = None, sinks: str = "off") -> FastV:
    """A stage that ranks visual tokens once, by the attention of the last token.

    Args:
        layer: K, the first layer that runs without the dropped tokens, from 1 up; it looks at layer K - 1. None for 2,
            or the last layer of a shallower model.
        sinks: what becomes of attention sinks (ours, see `sink_guard`): "off" (ranked like all others, as in the
            paper), "protect" (all stay, outside the budget: that many more tokens are left) or "exclude" (they rank
            below all others). Here a sink is a token that takes more than 0.3 of this one row of attention in some
            head, or whose hidden state is an outlier in norm. One row cannot tell a sink from what the prompt asks
            about, so "exclude" may drop the answer.

    Raises:
        BadOption: `sinks` is none of these, or `layer` is not a whole number from 1 up (or, once it meets a model, not
            one of its layers).
    """
    check_sinks(sinks)
    return FastV(layer if layer is None else check_whole(layer, "layer", 1), sinks)


@dataclass(frozen=True)
class FastV(DecoderStage):
    """See `fastv`."""

    layer: int | None
    sinks: str = "off"

    def steps(self, num_layers: int) -> tuple[Step, ...]:
        return (Step(layer=checked_layer(self.layer, 2, 1, num_layers - 1)),)

    def select(self, step: Step, tokens: DecoderTokens) -> Plan:
        row_HN = tokens.attention()
        score_N = row_HN.mean(0)

        def keep_among(member_n: Tensor, num_best: int) -> Plan:
            return keep_best(score_N[member_n], num_best)

        return guarded_plan(tokens, row_HN, tokens.num_keep, self.sinks, keep_among)
