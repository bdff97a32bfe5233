"""SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference.

Zhang, Fan, Ma, Zheng, Huang, Cheng, Gudovskiy, Okuno, Nakata, Keutzer, Zhang (ICML 2025).
https://arxiv.org/abs/2410.04417

    V, T      embeddings of the visual tokens and of the question's text tokens, as they enter the language model
    m         mean over visual tokens of softmax over text of V T^T; raters: the text tokens with m above its mean
    s_j       attention of layer l from the raters to visual token j, mean over heads and raters; l = 2, 6, 15
    keep      after layer l the K_l highest s_j
    recycle   of the M dropped, the int(0.3 M) + 1 = M' highest go into int(M'/10) + 1 clusters by density peaks (with
              as many neighbours as clusters); the mean of each cluster stays as one more token

    K_l of 576 tokens, by the mean number over the layers:
    with recycling (v1)   192: 300, 200, 110   128: 303, 110, 36   96: 238, 48, 26   64: 66, 30, 17
    without (v2, "+")     192: 300, 200, 118   128: 238, 108, 60   96: 246, 54, 28   64: 66, 34, 20

What differs from the official code (Gumpest/SparseVLMs; written from the equations):
- The budget is what is left after the last step, recycled tokens included; the steps before it are read off the table,
  linearly between its rows (INFERRED). keep = 110/576 gives the first row, and so on. In models of fewer than 28 layers
  the three layers move down in proportion (INFERRED).
- A cluster mean stands at the place and position of its centre; officially it goes to the end with a new position.
- Text tokens are those after the last visual token (INFERRED): text before it cannot attend to it.
- Without recycling the table is that of v2, but its division by a position-only bias and its choice of 14 heads are
  left out. The paper's rank-based ratio is not in the official code either.
- Any batch; no noise on densities; means divide by the count, officially by the count + 1e-6.
"""

# Shape legend: N visual tokens of a prompt, n those that are not set aside, H heads, D width, M text tokens, K kept,
#               C clusters, R recycled tokens

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.compression.decoder_stage import DecoderStage, DecoderTokens, Step, check_whole, keep_best
from tokensieve.compression.density_peaks import cluster
from tokensieve.compression.plan import Merge, Plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.sink_guard import check_sinks, guarded_plan
from tokensieve.errors import BadOption

LAYERS = (2, 6, 15)  # of a model with DEPTH layers
DEPTH = 32
UNSCALED = 28  # from this depth on the three layers are as published
TABLE_TOKENS = 576
# Tokens after each of the three layers, by budget; all and nothing complete the table.
RECYCLED = ((0, 0, 0), (66, 30, 17), (238, 48, 26), (303, 110, 36), (300, 200, 110), (TABLE_TOKENS,) * 3)
PLAIN = ((0, 0, 0), (66, 34, 20), (246, 54, 28), (238, 108, 60), (300, 200, 118), (TABLE_TOKENS,) * 3)


@register_method(
    "sparsevlm",
    title="SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
    url="https://arxiv.org/abs/2410.04417",
    place="decoder",
    effect="merges",
    needs=("attention", "question"),
    licence="Apache-2.0",
    differs="Recycled tokens count in the budget and keep a place; steps in between interpolated; any batch.",
)
def sparsevlm(*, recycle: bool = True, layers: tuple[int, int, int] | None = None, sinks: str = "off") -> SparseVLM:
    """A stage that ranks visual tokens three times by the attention of the question's most visual words.

    Args:
        recycle: cluster the best of the dropped tokens and keep the means, which makes this a merging method.
        layers: the three layers after which tokens leave; None for 2, 6 and 15, scaled to shallower models.
        sinks: what becomes of attention sinks (ours, see `sink_guard`): "off" (ranked like all others, as in the
            paper), "protect" (all stay as they are, outside the budget: that many more tokens are left) or "exclude"
            (they rank below all others and are not recycled). Here a sink is a token that takes more than 0.3 of the
            raters' attention in some head, mean over raters, or whose hidden state is an outlier in norm. Each step
            finds its own sinks: one that is none any more is ranked again. The raters' attention cannot tell a sink
            from what the question is about, so "exclude" may drop the answer.

    Raises:
        BadOption: `sinks` is none of these, or `layers` are not three rising whole numbers (or, once they meet a model,
            not layers before its last).
    """
    check_sinks(sinks)
    if layers is not None:
        if not isinstance(layers, tuple | list) or len(layers) != len(LAYERS):
            raise BadOption(f"layers must be three whole numbers, got {layers!r}.")
        layers = tuple(check_whole(layer, "layers", 0) for layer in layers)
        if not layers[0] < layers[1] < layers[2]:
            raise BadOption(f"layers must rise, got {layers}.")
    return SparseVLM(bool(recycle), layers, sinks)


@dataclass(frozen=True)
class SparseVLM(DecoderStage):
    """See `sparsevlm`."""

    recycle: bool
    layers: tuple[int, int, int] | None
    sinks: str = "off"

    def steps(self, num_layers: int) -> tuple[Step, ...]:
        last = num_layers - 2  # of the layers after which something runs
        layers = self.layers
        if layers is None:
            layers = LAYERS if num_layers >= UNSCALED else [layer * num_layers // DEPTH for layer in LAYERS]
        if last < 0 or layers[-1] > last:
            raise BadOption(f"layers must be below {last + 1} in this model of {num_layers} layers, got {layers}.")
        # Of steps that fall on one layer of a shallow model, the last wins.
        phases = {layer + 1: phase for phase, layer in enumerate(layers)}
        return tuple(Step(layer=layer, phase=phase, queries="raters") for layer, phase in phases.items())

    def raters(self, visual: Tensor, text: Tensor) -> Tensor:
        return visual_words(visual, text)

    def select(self, step: Step, tokens: DecoderTokens) -> Plan:
        rows_HN = tokens.attention()
        score_N = rows_HN.mean(0)
        table = RECYCLED if self.recycle else PLAIN
        num_keep = min(schedule(tokens.num_first, tokens.num_keep, table)[step.phase], len(tokens))

        def keep_among(member_n: Tensor, num_best: int) -> Plan:
            if not self.recycle or num_best < 2 or num_best == len(member_n):
                return keep_best(score_N[member_n], num_best)
            return keep_and_recycle(tokens.hidden[member_n], score_N[member_n], num_best)

        return guarded_plan(tokens, rows_HN, num_keep, self.sinks, keep_among)


def visual_words(visual_ND: Tensor, text_MD: Tensor) -> Tensor:
    """`[M]` bool, the raters: text tokens that visual tokens are more like than the average text token."""
    mean_M = (visual_ND.float() @ text_MD.float().T).softmax(-1).mean(0)
    rates_M = mean_M > mean_M.mean()
    return rates_M if rates_M.any() else torch.ones_like(rates_M)


def schedule(num_first: int, num_keep: int, table: tuple[tuple[int, int, int], ...]) -> tuple[int, int, int]:
    """Tokens after each of the three steps so that `num_keep` of `num_first` are left at the end."""
    wanted = num_keep / num_first * TABLE_TOKENS
    above = max(1, bisect_left([row[-1] for row in table], wanted - 1e-9))
    low, high = table[above - 1], table[above]
    share = (wanted - low[-1]) / (high[-1] - low[-1])
    counts = [round((a + share * (b - a)) / TABLE_TOKENS * num_first) for a, b in zip(low[:2], high[:2], strict=True)]
    second = max(num_keep, counts[1])
    return max(second, counts[0]), second, num_keep


def num_recycled(num_dropped: int) -> tuple[int, int]:
    """How many of the dropped tokens are recycled, and into how many clusters."""
    num_tokens = int(0.3 * num_dropped) + 1
    return num_tokens, int(num_tokens / 10) + 1


def keep_and_recycle(x_ND: Tensor, score_N: Tensor, num_keep: int) -> Plan:
    """The best tokens and means of clusters of the next best, `num_keep` (from 2 up, below N) in all.

    As many clusters as `num_recycled` says, but at most half of the budget.
    """
    num_tokens = len(x_ND)
    num_best = num_keep - 1
    while num_best > (num_keep + 1) // 2 and num_best + num_recycled(num_tokens - num_best)[1] > num_keep:
        num_best -= 1
    num_more, num_clusters = num_recycled(num_tokens - num_best)[0], num_keep - num_best
    order_N = score_N.sort(descending=True, stable=True).indices
    best_K = order_N[:num_best]
    recycled_R = order_N[num_best : num_best + num_more].sort().values
    centre_C, label_R = cluster(x_ND[recycled_R], num_clusters, num_clusters)

    kept = torch.cat([best_K, recycled_R[centre_C]])
    source = torch.cat([best_K, recycled_R])
    target = torch.cat([torch.arange(num_best, device=kept.device), num_best + label_R])
    weight = 1 / torch.bincount(target).float()[target]
    place_K = kept.argsort().argsort()
    order_E = place_K[target].sort(stable=True).indices
    merge = Merge(source[order_E], place_K[target][order_E], weight[order_E])
    return Plan(kept.sort().values, num_tokens, merge)
