"""HoliTom "M": Holistic Token Merging for Fast Video Large Language Models, the part inside the language model.

Shao, Tao, Qin, You, Sui, Wang (NeurIPS 2025). https://arxiv.org/abs/2505.21334

    a_j     attention of decoder layer k - 1 from the last token of the prompt to visual token j, mean over heads
    keep    the highest a_j (half of them), from layer k = 18 on, as FastV does
    merge   each dropped token in turn goes into the kept token it is most like: kept <- (kept + dropped) / 2

The merge depends on the order: the last token that comes counts half, the one before a quarter, and so on.

The part before the language model is the method 'holitom'.

What differs from the official code (cokeshao/HoliTom; written from the equations):
- Likeness is the cosine of hidden states before any merge, and dropped tokens come in reading order (INFERRED).
- Models of fewer than 19 layers: k is the last layer. Any batch; equal scores: the first token wins.
"""

# Shape legend: N visual tokens of a prompt, n those that are not set aside, K kept, M dropped, H heads, D width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.compression.decoder_stage import (
    DecoderStage,
    DecoderTokens,
    Step,
    check_whole,
    checked_layer,
    keep_best,
)
from tokensieve.compression.maxmin import SAME, unit_rows
from tokensieve.compression.plan import Merge, Plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.sink_guard import check_sinks, guarded_plan

ROWS_AT_ONCE = 1024  # of the [M, K] cosines


@register_method(
    "holitom-decoder",
    title="HoliTom: Holistic Token Merging for Fast Video Large Language Models (inner merging, 'M')",
    url="https://arxiv.org/abs/2505.21334",
    place="decoder",
    effect="merges",
    needs=("features", "attention", "question"),
    licence="Apache-2.0",
    differs="Cosine of hidden states before any merge, in reading order (inferred); any batch.",
)
def holitom_decoder(*, layer: int | None = None, sinks: str = "off") -> HoliTomDecoder:
    """A stage that keeps what the last token attends to and merges the rest into it.

    Args:
        layer: k, the first layer that runs on the shorter prompt, from 1 up; it looks at layer k - 1. None for 18, or
            the last layer of a shallower model.
        sinks: what becomes of attention sinks (ours, see `sink_guard`): "off" (ranked like all others, as in the
            paper), "protect" (all stay as they are, outside the budget: that many more tokens are left) or "exclude"
            (they rank below all others and are merged into none). Here a sink is a token that takes more than 0.3 of
            this one row of attention in some head, or whose hidden state is an outlier in norm. One row cannot tell a
            sink from what the prompt asks about, so "exclude" may drop the answer.

    Raises:
        BadOption: `sinks` is none of these, or `layer` is not a whole number from 1 up (or, once it meets a model, not
            one of its layers).
    """
    check_sinks(sinks)
    return HoliTomDecoder(layer if layer is None else check_whole(layer, "layer", 1), sinks)


@dataclass(frozen=True)
class HoliTomDecoder(DecoderStage):
    """See `holitom_decoder`."""

    layer: int | None
    sinks: str = "off"

    def steps(self, num_layers: int) -> tuple[Step, ...]:
        return (Step(layer=checked_layer(self.layer, 18, 1, num_layers - 1)),)

    def select(self, step: Step, tokens: DecoderTokens) -> Plan:
        row_HN = tokens.attention()
        score_N = row_HN.mean(0)

        def keep_among(member_n: Tensor, num_best: int) -> Plan:
            return halve_into_nearest(tokens.hidden[member_n], keep_best(score_N[member_n], num_best).kept)

        return guarded_plan(tokens, row_HN, tokens.num_keep, self.sinks, keep_among)


def halve_into_nearest(x_ND: Tensor, kept_K: Tensor) -> Plan:
    """Merges every other token, in order, into the kept token of largest cosine: `kept <- (kept + dropped) / 2`."""
    num_tokens = len(x_ND)
    unit_ND = unit_rows(x_ND)
    is_dropped_N = torch.ones(num_tokens, dtype=torch.bool, device=x_ND.device).index_fill(0, kept_K, False)
    dropped_M = is_dropped_N.nonzero()[:, 0]
    nearest = []
    for rows in dropped_M.split(ROWS_AT_ONCE):
        cosine_RK = unit_ND[rows] @ unit_ND[kept_K].T
        alike_RK = cosine_RK >= cosine_RK.amax(-1, keepdim=True) - SAME  # equal within rounding: the first
        nearest.append(alike_RK.int().argmax(-1))
    target = torch.cat([torch.arange(len(kept_K), device=kept_K.device), *nearest])
    source = torch.cat([kept_K, dropped_M])
    order = target.sort(stable=True).indices  # per target: itself, then what comes to it in order
    source, target = source[order], target[order]
    arrivals_K = torch.bincount(target, minlength=len(kept_K)) - 1
    first_K = arrivals_K.cumsum(0) - arrivals_K + torch.arange(len(kept_K), device=target.device)
    arrival = torch.arange(len(target), device=target.device) - first_K[target]  # 0 = the kept token itself
    halvings = arrivals_K[target] - (arrival - 1).clamp(min=0)
    return Plan(kept_K, num_tokens, Merge(source, target, torch.exp2(-halvings.float())))
