"""FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Vision-Language Models.

Fu, Liu, Han, Dai, Yan, Yang, Ning, Wang (ICCV 2025). https://arxiv.org/abs/2501.01986

    before each decoder layer, until done:
    sim_j    cosine of visual token j with the token at the same place in the previous frame that still has one there
    merge    all j with sim_j >= S merge: every run of them into the token it starts from, which becomes the mean
             of the run; if they are a smaller share than r of the tokens, this was the last merge
    cap      no more merge than the budget allows; if the cap binds, only the most similar merge and all is done
    prune    once, before the layer after the last merge: the tokens with the highest attention, mean over heads and
             over all queries, down to the budget

S = 0.6, r = 0.1. The authors' budget ("cost" 0.3) is the mean share of tokens over all layers: with N_i tokens in layer
i, what may be left from layer l of L on is (cost L N - sum of N_i before l) / (L - l).

What differs from the official code (thu-nics/FrameFusion; written from the equations):
- The budget is by default what is left at the end, as for all other methods here; `budget="mean"` is the authors'.
- The mean is over the model's real depth; the official code always counts 28 layers (`budget_layers=28`).
- The attention looked at is that of the layer which has just run (INFERRED).
- A video that still merges before the last layer is pruned there, so that the budget is always met. Images are pruned
  before layer 1. Each raster (image, video, view of an image) only merges within itself.
- Any batch; equal similarities or scores: the first token wins.
"""

# Shape legend: N visual tokens of a prompt, H heads, D width, R runs

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tokensieve.compression.decoder_stage import (
    DecoderStage,
    DecoderTokens,
    Raster,
    Step,
    check_number,
    check_whole,
    keep_best,
)
from tokensieve.compression.plan import Merge, Plan, keep_all
from tokensieve.compression.registry import register_method
from tokensieve.errors import BadOption

BUDGETS = ("final", "mean")


@register_method(
    "framefusion",
    title="FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Vision-Language Models",
    url="https://arxiv.org/abs/2501.01986",
    place="decoder",
    effect="merges",
    needs=("features", "attention", "frames"),
    licence="MIT",
    differs="Budget is what is left at the end unless budget='mean'; real depth instead of 28 layers; any batch.",
)
def framefusion(
    *, similarity: float = 0.6, min_share: float = 0.1, budget: str = "final", budget_layers: int | None = None
) -> FrameFusion:
    """A stage that merges what stays the same from frame to frame in the first layers, then prunes once.

    Args:
        similarity: S, cosine from which two tokens merge.
        min_share: r, merging ends when fewer of the tokens merge.
        budget: "final": `keep` is left after the last step. "mean": `keep` is the mean share over all layers.
        budget_layers: layers that the mean is taken over; None for all of the model (28 is the official constant).

    Raises:
        BadOption: an option out of range, or `budget_layers` without `budget="mean"`.
    """
    if budget not in BUDGETS:
        raise BadOption(f"budget must be one of {BUDGETS}, got {budget!r}.")
    if budget_layers is not None:
        check_whole(budget_layers, "budget_layers", 1)
        if budget != "mean":
            raise BadOption('budget_layers belongs to budget="mean".')
    return FrameFusion(
        check_number(similarity, "similarity", -1, 1), check_number(min_share, "min_share", 0, 1), budget, budget_layers
    )


@dataclass(frozen=True)
class FrameFusion(DecoderStage):
    """See `framefusion`."""

    similarity: float
    min_share: float
    budget: str
    budget_layers: int | None

    needs_frames = True

    def steps(self, num_layers: int) -> tuple[Step, ...]:
        looks = ["next"] + ["previous"] * (num_layers - 1)
        return tuple(Step(layer=i, looks=looks[i], queries="all") for i in range(num_layers))

    def select(self, step: Step, tokens: DecoderTokens) -> Plan:
        state = tokens.memory.setdefault("state", "merging")
        allowed = self.allowed(step.layer, tokens)
        if state == "done" or len(tokens) <= allowed:
            return keep_all(len(tokens), tokens.hidden.device)
        if state == "pruning" or step.layer == tokens.num_layers - 1:
            tokens.memory["state"] = "done"
            return keep_best(tokens.attention().mean(0), max(1, int(allowed)))
        plan, share, capped = merge_similar_frames(
            tokens.hidden, tokens.raster, self.similarity, int(len(tokens) - allowed)
        )
        if capped:
            tokens.memory["state"] = "done"
        elif share < self.min_share:
            tokens.memory["state"] = "pruning"
        return plan

    def allowed(self, layer: int, tokens: DecoderTokens) -> float:
        """Tokens that may be left from `layer` on."""
        if self.budget == "final":
            return tokens.num_keep
        num_layers = self.budget_layers or tokens.num_layers
        return max(1.0, (num_layers * tokens.num_keep - sum(tokens.counts)) / max(1, num_layers - layer))


def merge_similar_frames(x_ND: Tensor, raster: Raster, similarity: float, most: int) -> tuple[Plan, float, bool]:
    """One merge step.

    Args:
        x_ND: visual tokens in reading order.
        raster: where they stood.
        similarity: cosine from which a token merges into what stands before it at its place.
        most: how many may merge.

    Returns:
        The plan, the share of tokens that are similar enough, and whether `most` was fewer.
    """
    num_tokens = len(x_ND)
    key_N = raster.block * (int(raster.place.max()) + 1) + raster.place
    order_N = key_N.sort(stable=True).indices  # place by place, frames in order
    x_ND, key_N = x_ND[order_N].float(), key_N[order_N]
    cosine_N = F.pad(F.cosine_similarity(x_ND[1:], x_ND[:-1], dim=-1), (1, 0), value=-torch.inf)
    cosine_N[1:].masked_fill_(key_N[1:] != key_N[:-1], -torch.inf)
    merges_N = cosine_N >= similarity
    count = int(merges_N.sum())
    if count > most:
        chosen = cosine_N.sort(descending=True, stable=True).indices[:most]
        merges_N = torch.zeros_like(merges_N).index_fill(0, chosen, True)
    run_N = (~merges_N).cumsum(0) - 1
    first_R = order_N[~merges_N]
    place_R = first_R.argsort().argsort()
    target_N = place_R[run_N]
    by_target = target_N.sort(stable=True).indices
    weight_N = 1 / torch.bincount(target_N).float()[target_N]
    merge = Merge(order_N[by_target], target_N[by_target], weight_N[by_target])
    return Plan(first_R.sort().values, num_tokens, merge), count / num_tokens, count > most
