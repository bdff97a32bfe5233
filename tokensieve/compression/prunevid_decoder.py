"""PruneVid, stage 2: Visual Token Pruning for Efficient Video Large Language Models.

Huang, Zhou, Han (ACL 2025). https://arxiv.org/abs/2412.16117

    s_j    attention of decoder layer 10 from the question's text tokens to visual token j, maximum over heads and text
           tokens
    keep   after that layer the share alpha (0.4) with the highest s_j, of every frame by itself
    cache  the keys and values of the dropped tokens also leave the layers before

Stage 1, at the projector, is the method 'prunevid'.

What differs from the official code (Visual-AI/PruneVid; written from the equations):
- The official groups are the static tokens of a segment and the dynamic ones of every frame; here the static tokens,
  which stand in the first frame of their segment, are ranked with that frame's dynamic ones, because a language
  model's prompt does not tell them apart.
- The budget is exact over the prompt: frames get their share by largest remainders (earlier frames first).
- Models of fewer than 12 layers: the last layer but one looks. Without frames (raw pixels) all tokens are one group.
- The question is the text after the last visual token (INFERRED). Any batch; equal scores: the first token wins.
"""

# Shape legend: N visual tokens of a prompt, n those that are not set aside, H heads, G groups

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.compression.decoder_stage import DecoderStage, DecoderTokens, Raster, Step, check_whole, checked_layer
from tokensieve.compression.plan import Plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.sink_guard import check_sinks, guarded_plan


@register_method(
    "prunevid-decoder",
    title="PruneVid: Visual Token Pruning for Efficient Video Large Language Models (stage 2)",
    url="https://arxiv.org/abs/2412.16117",
    place="decoder",
    needs=("attention", "question"),
    licence="CC BY-NC-SA 4.0",
    differs="Groups are frames; budget exact over the prompt; any batch.",
)
def prunevid_decoder(*, layer: int | None = None, sinks: str = "off") -> PruneVidDecoder:
    """A stage that ranks the visual tokens of each frame by the question's strongest attention.

    Args:
        layer: the layer whose attention is looked at and after which tokens leave; None for 10, or the last but one of
            a shallower model.
        sinks: what becomes of attention sinks (ours, see `sink_guard`): "off" (ranked like all others, as in the
            paper), "protect" (all stay, outside the budget: that many more tokens are left) or "exclude" (they rank
            below all others). Here a sink is a token that takes more than 0.3 of the attention of some text token in
            some head, or whose hidden state is an outlier in norm; frames share the budget by their other tokens. The
            strongest attention cannot tell a sink from what one word asks about, so "exclude" may drop the answer.

    Raises:
        BadOption: `sinks` is none of these, or `layer` is not a whole number from 0 up (or, once it meets a model, not
            a layer before its last).
    """
    check_sinks(sinks)
    return PruneVidDecoder(layer if layer is None else check_whole(layer, "layer", 0), sinks)


@dataclass(frozen=True)
class PruneVidDecoder(DecoderStage):
    """See `prunevid_decoder`."""

    layer: int | None
    sinks: str = "off"

    def steps(self, num_layers: int) -> tuple[Step, ...]:
        layer = checked_layer(self.layer, 10, 0, num_layers - 2)
        return (Step(layer=layer + 1, queries="question", over_queries="max", cut_cache=True),)

    def select(self, step: Step, tokens: DecoderTokens) -> Plan:
        strongest_HN = tokens.attention()
        score_N = strongest_HN.amax(0)
        frame_N = frames_of(tokens.raster, len(tokens)).to(score_N.device)

        def keep_among(member_n: Tensor, num_best: int) -> Plan:
            return keep_best_of_groups(score_N[member_n], frame_N[member_n], num_best)

        return guarded_plan(tokens, strongest_HN, tokens.num_keep, self.sinks, keep_among)


def frames_of(raster: Raster | None, num_tokens: int) -> Tensor:
    """`[N]` int64 in [0, G): which frame of which raster each token is in, in reading order; all 0 without a raster."""
    if raster is None:
        return torch.zeros(num_tokens, dtype=torch.long)
    return torch.stack([raster.block, raster.frame]).unique(dim=1, return_inverse=True)[1]


def keep_best_of_groups(score_N: Tensor, group_N: Tensor, num_keep: int) -> Plan:
    """The highest scores of every group, `num_keep` in all, each group in proportion to its size."""
    group_N = group_N.to(score_N.device)
    sizes_G = torch.bincount(group_N).cpu()
    wanted_G = sizes_G.double() * num_keep / len(score_N)
    quota_G = wanted_G.floor().long()
    rest_G = (quota_G - wanted_G).round(decimals=9)
    quota_G[rest_G.sort(stable=True).indices[: num_keep - int(quota_G.sum())]] += 1
    order_N = score_N.sort(descending=True, stable=True).indices
    order_N = order_N[group_N[order_N].sort(stable=True).indices]  # group by group, best first
    starts_G = sizes_G.cumsum(0) - sizes_G
    kept = torch.cat([order_N[s : s + q] for s, q in zip(starts_G.tolist(), quota_G.tolist(), strict=True)])
    return Plan(kept.sort().values, len(score_N))
