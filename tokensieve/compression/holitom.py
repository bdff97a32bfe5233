"""HoliTom: Holistic Token Merging for Fast Video Large Language Models (outer stage: before the model).

Shao, Tao, Qin, You, Sui, Wang. https://arxiv.org/abs/2505.21334 (NeurIPS 2025)

    x[t, p]   token at place p of frame t (T frames of n places, N = T n);   s[t, p] = cos(x[t, p], x[t+1, p])
    scenes    the cut into runs of frames that maximises sum (still places of a scene) * (its frames - 1); a place is
              still where all s inside the scene are above 0.8. Found by dynamic programming
    merge 1   a still place is averaged over the frames of its scene
    merge 2   the still places of a scene are clustered by density peaks (7 neighbours); a cluster becomes
              0.6 * centre + 0.4 * mean of its other tokens; a centre on its own stays as it is
    prune     of the other places of a frame those with the largest salience stay: attention received in the last
              layer of the vision tower, mean over heads and queries

The merge inside the language model ("M") is `holitom-decoder`.

What differs from the official code (cokeshao/HoliTom, Apache-2.0; written from the description):
- The budget is met exactly: shared over scenes and frames in proportion to what is left after merge 1, by largest
  remainder. `official_counts=True` is the official rule, `round` for still places and `ceil` for every frame, which
  keeps up to one token a frame too many.
- Where merge 1 alone would fall below the budget, only the most alike places are merged (not with `official_counts`).
- Density with fewer than 7 tokens: of all of them (INFERRED).
- No random noise in the densities. A cluster stands at the place of its centre in the scene's first frame and keeps
  that position, in rising order.
"""

# Shape legend: T frames, n places of a frame, N = T * n tokens, S scenes, P still places of a scene, K their centres,
#               W frames of a scene, M loose tokens of a frame, Q those that stay, C channels

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from tokensieve.compression.density_peaks import cluster
from tokensieve.compression.maxmin import unit_rows
from tokensieve.compression.plan import Plan, merge_plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.sink_guard import add_sinks, set_aside, sinks_to_guard
from tokensieve.compression.temporal import frames_of, proportional_shares, still_places
from tokensieve.compression.tokens import VisualTokens
from tokensieve.errors import BadOption

NUM_NEIGHBOURS = 7
CENTRE_WEIGHT = 0.6


@register_method(
    "holitom",
    title="HoliTom: Holistic Token Merging for Fast Video Large Language Models",
    url="https://arxiv.org/abs/2505.21334",
    effect="merges",
    needs=("features", "frames", "tower"),
    output_length="Exactly the budget; with official_counts=True up to one token a frame more, or less where much "
    "stands still.",
    licence="Apache-2.0",
    differs="Meets the budget exactly (official_counts=True is the official rounding, which overshoots); positions are "
    "kept.",
)
def holitom(
    tokens: VisualTokens,
    num_keep: int,
    *,
    generator: torch.Generator | None = None,
    threshold: float = 0.8,
    official_counts: bool = False,
    sinks: str = "off",
) -> Plan:
    """Merges what stands still over each scene, prunes the rest by salience. Deterministic: `generator` is not used.

    An image is one frame: nothing is merged, the most salient tokens stay.

    Args:
        tokens: the candidates, with `tokens.tower`.
        num_keep: how many stay.
        threshold: cosine of neighbouring frames above which a place counts as still, in [-1, 1]. The paper has 0.8,
            and 0.65 where a tenth of the tokens stays.
        official_counts: round as the official code does.
        sinks: what becomes of the tower's attention sinks (ours, see `sink_guard`): "off" (ranked like all others, as
            in the paper), "exclude" (neither kept nor merged, the budget goes to the others) or "protect" (all stay
            as they are, outside the budget: `num_keep` plus the number of sinks stay). A place does not stand still
            while a sink is there.

    Raises:
        BadOption: an option is out of range, or `sinks` is none of these.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not -1 <= threshold <= 1:
        raise BadOption(f"threshold must be a cosine in [-1, 1], got {threshold!r}.")
    if not isinstance(official_counts, bool):
        raise BadOption(f"official_counts must be True or False, got {official_counts!r}.")
    x_TnC = frames_of(tokens)
    salience_Tn = tokens.tower.layers[-1].received_attention().reshape(x_TnC.shape[:2])
    unit_TnC = unit_rows(x_TnC)
    # All frames are one picture here: they share one budget by what they hold.
    everyone = torch.arange(len(tokens), device=x_TnC.device)
    others, num_keep, aside = set_aside(everyone, num_keep, sinks_to_guard(tokens.tower, sinks), sinks)
    is_other_Tn = torch.isin(everyone, others).view(salience_Tn.shape)
    cosine_Tn = (unit_TnC[1:] * unit_TnC[:-1]).sum(-1).masked_fill(~(is_other_Tn[1:] & is_other_Tn[:-1]), -torch.inf)
    lengths = scene_lengths(cosine_Tn > threshold)
    num_left = 0 if official_counts else num_keep + len(tokens) - len(others)
    still_Sn = still_places(least_cosine(cosine_Tn, lengths), lengths, threshold, num_left)
    plan = merge_and_prune(x_TnC, salience_Tn, still_Sn, lengths, num_keep, official_counts, is_other_Tn)
    return add_sinks(plan, everyone, aside, len(tokens))


def scene_lengths(alike_Tn: Tensor) -> list[int]:
    """Frames of each scene, so that as many tokens as possible are saved by merging what stands still.

    Of equally good cuts the one with the shortest last scene is taken, and so on backwards.

    Args:
        alike_Tn: `[T - 1, n]` bool, whether a place looks the same in frames t and t + 1.
    """
    num_frames = len(alike_Tn) + 1
    saved = [[0] for _ in range(num_frames)]  # saved[s][e - s]: by one scene from frame s to frame e
    for start in range(num_frames - 1):
        still = alike_Tn[start:].cumprod(0).sum(1).tolist()
        saved[start] += [count * (i + 1) for i, count in enumerate(still)]
    best, first = [0], []  # best[e]: saved in frames before e; first[e]: where the scene that ends with frame e starts
    for end in range(num_frames):
        total, start = max((best[start] + saved[start][end - start], start) for start in range(end + 1))
        best.append(total)
        first.append(start)
    lengths, end = [], num_frames
    while end:
        lengths.append(end - first[end - 1])
        end = first[end - 1]
    return lengths[::-1]


def least_cosine(cosine_Tn: Tensor, lengths: list[int]) -> Tensor:
    """`[S, n]`: the least cosine of neighbouring frames inside each scene; 0 in scenes of one frame."""
    rows, first = [], 0
    for length in lengths:
        inside_Wn = cosine_Tn[first : first + length - 1]
        rows.append(inside_Wn.amin(0) if length > 1 else cosine_Tn.new_zeros(cosine_Tn.shape[1]))
        first += length
    return torch.stack(rows)


def merge_and_prune(
    x_TnC: Tensor,
    salience_Tn: Tensor,
    still_Sn: Tensor,
    lengths: list[int],
    num_keep: float,
    official_counts: bool = False,
    is_other_Tn: Tensor | None = None,
) -> Plan:
    """The plan for given scenes and still places. `num_keep` may be a fraction of a token with `official_counts`.

    With `is_other_Tn` (bool) tokens where it is False are left out; they must not be at still places.
    """
    is_loose_Tn = ~still_Sn.repeat_interleave(torch.tensor(lengths, device=still_Sn.device), dim=0)
    if is_other_Tn is not None:
        is_loose_Tn &= is_other_Tn
    num_loose = [loose_W.tolist() for loose_W in is_loose_Tn.sum(1).split(lengths)]
    # Scene by scene: its still places, then the loose tokens of each frame.
    groups = list(zip(still_Sn.sum(1).tolist(), num_loose, strict=True))
    sizes = [size for still, loose in groups for size in (still, *loose)]
    if official_counts:
        ratio, shares = min(num_keep / sum(sizes), 1.0), []
        for still, loose in groups:
            shares += [round(still * ratio), *[math.ceil(size * ratio) for size in loose]]
    else:
        shares = proportional_shares(sizes, num_keep)
    share_of_next = iter(shares)
    index_Tn = torch.arange(x_TnC[..., 0].numel(), device=x_TnC.device).view(x_TnC.shape[:2])
    entries, first = [], 0
    for still_n, length in zip(still_Sn, lengths, strict=True):
        scene = slice(first, first + length)
        entries.append(_merge_still(x_TnC[scene, still_n], index_Tn[scene, still_n], next(share_of_next)))
        for frame in range(first, first + length):
            is_loose_n = is_loose_Tn[frame]
            index_M, num_salient = index_Tn[frame, is_loose_n], next(share_of_next)
            order_M = salience_Tn[frame, is_loose_n].sort(descending=True, stable=True).indices
            kept_Q = index_M[order_M[:num_salient]]
            entries.append((kept_Q, kept_Q, torch.ones(len(kept_Q), device=kept_Q.device)))
        first += length
    anchor_E, source_E, weight_E = (torch.cat(parts) for parts in zip(*entries, strict=True))
    return merge_plan(index_Tn.numel(), anchor_E, source_E, weight_E)


def _merge_still(x_WPC: Tensor, index_WP: Tensor, num_centres: int) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors, sources and weights of the still places of a scene of W frames."""
    if num_centres == 0:
        return index_WP[0, :0], index_WP[0, :0], x_WPC.new_empty(0)
    centre_K, label_P = cluster(x_WPC.mean(0), num_centres, NUM_NEIGHBOURS)
    anchor_P = index_WP[0, centre_K][label_P]
    num_others_K = label_P.bincount() - 1
    weight_P = ((1 - CENTRE_WEIGHT) / num_others_K.clamp(min=1))[label_P]
    weight_P[centre_K] = torch.where(num_others_K > 0, CENTRE_WEIGHT, 1.0)
    weight_P = weight_P / len(index_WP)
    return anchor_P.expand_as(index_WP).flatten(), index_WP.flatten(), weight_P.expand_as(index_WP).flatten()
