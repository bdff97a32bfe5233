"""FastVID: Dynamic Density Pruning for Fast Video Large Language Models.

Shen, Gong, He, Zhang, Zhang, Ding. https://arxiv.org/abs/2503.11187 (NeurIPS 2025)

    g_t        vector of frame t: the mean of its tokens (T frames of n places)
    a[t, p]    salience: attention in the last layer of the vision tower
    scenes     cut between frames t, t + 1 where cos(g_t, g_t+1) is among the 7 lowest, or below 0.9
    budget     R tokens a frame: int(0.4 R) for context, the others for salient tokens
    salient    the largest a of every frame stay as they are
    context    anchor frames: the last of a scene and every 4th before it. Density peaks (4 neighbours) among the other
               tokens of an anchor frame are centres; the scene's budget for context is shared over its anchor frames
    merge      for each anchor frame anew, all tokens of the scene that are not salient go to the nearest centre by
               cosine: w * centre + (1 - w) * mean of its tokens, centre included; w = max(1 / (their number + 1), 0.6)

What differs from the official code (LunarShen/FastVID, MIT; written from the description):
- `g` and `a` are those of the authors' Qwen2.5-VL variant for every model; the LLaVA-OneVision variant takes output and
  attention of SigLIP's pooling head, which Hugging Face checkpoints leave out (INFERRED).
- `a` is the attention of the class token in towers that have one, else the attention received.
- The budget is met exactly: a remainder is spread evenly over the frames, what does not divide over anchor frames goes
  to the last ones. The same where everything divides.
- Above about 45 % the anchor frames have too few tokens for the centres and the official code fails. Here the anchor
  frames of such a scene stand closer together.
- No random noise in the densities.
"""

# Shape legend: T frames, n places of a frame, N = T * n tokens, M tokens of a scene that are not salient,
#               S tokens of a frame that are not set aside, Q those of them that are not salient, K centres,
#               C channels, G width of a frame's vector

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor
from torch.nn import functional as F

from tokensieve.budget import even_shares, share_budget
from tokensieve.compression.density_peaks import peak_order
from tokensieve.compression.maxmin import unit_rows
from tokensieve.compression.plan import Plan, merge_plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.sink_guard import set_aside, sinks_to_guard
from tokensieve.compression.temporal import frames_of
from tokensieve.compression.tokens import VisualTokens
from tokensieve.errors import BadOption

NUM_NEIGHBOURS = 4


@register_method(
    "fastvid",
    title="FastVID: Dynamic Density Pruning for Fast Video Large Language Models",
    url="https://arxiv.org/abs/2503.11187",
    effect="merges",
    needs=("features", "frames", "tower"),
    licence="MIT",
    differs="Mean tokens as frame vectors and attention of the tower's last layer as salience, for every model; meets "
    "the budget exactly, also above 45 %.",
)
def fastvid(
    tokens: VisualTokens,
    num_keep: int,
    *,
    generator: torch.Generator | None = None,
    min_scenes: int = 8,
    threshold: float = 0.9,
    context_share: float = 0.4,
    anchor_spacing: int = 4,
    centre_weight: float = 0.6,
    sinks: str = "off",
) -> Plan:
    """Keeps salient tokens and merges the rest of each scene. Deterministic: `generator` is not used.

    An image is one frame: its salient tokens and clusters of the others.

    Args:
        tokens: the candidates, with `tokens.tower`.
        num_keep: how many stay.
        min_scenes: cuts at the `min_scenes - 1` largest changes, whatever `threshold`.
        threshold: cosine of neighbouring frames' vectors below which there is a cut, in [-1, 1].
        context_share: share of the budget for merged tokens, in [0, 1].
        anchor_spacing: frames from one anchor frame to the next.
        centre_weight: least weight of a centre in its merged token, in [0, 1].
        sinks: what becomes of the tower's attention sinks (ours, see `sink_guard`): "off" (ranked like all others, as
            in the paper), "exclude" (neither kept nor merged, the budget goes to the others of the frame) or "protect"
            (all stay as they are, outside the budget: `num_keep` plus the number of sinks stay).

    Raises:
        BadOption: an option is out of range, or `sinks` is none of these.
    """
    for name, value in (("min_scenes", min_scenes), ("anchor_spacing", anchor_spacing)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadOption(f"{name} must be a whole number from 1 up, got {value!r}.")
    for name, value, low in (
        ("threshold", threshold, -1),
        ("context_share", context_share, 0),
        ("centre_weight", centre_weight, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= 1:
            raise BadOption(f"{name} must be a number in [{low}, 1], got {value!r}.")
    x_TnC = frames_of(tokens)
    return prune_by_density(
        x_TnC,
        x_TnC.mean(1),
        tokens.tower.layers[-1].salience().reshape(x_TnC.shape[:2]),
        num_keep,
        min_scenes,
        threshold,
        context_share,
        anchor_spacing,
        centre_weight,
        sinks_to_guard(tokens.tower, sinks),
        sinks,
    )


def prune_by_density(
    x_TnC: Tensor,
    frame_TG: Tensor,
    salience_Tn: Tensor,
    num_keep: int,
    min_scenes: int = 8,
    threshold: float = 0.9,
    context_share: float = 0.4,
    anchor_spacing: int = 4,
    centre_weight: float = 0.6,
    is_sink_N: Tensor | None = None,
    sinks: str = "off",
) -> Plan:
    """The method for any frame vectors `frame_TG`, `salience_Tn` and sinks; the rest as in `fastvid`."""
    num_frames, num_places = salience_Tn.shape
    index_Tn = torch.arange(num_frames * num_places, device=x_TnC.device).view(num_frames, num_places)
    salience_N = salience_Tn.flatten()
    stay, others, context = [], [], []  # of every frame: rising token indices, and how many of the others are centres
    for index_n, share in zip(index_Tn, even_shares(num_frames, num_keep), strict=True):
        member_S, share, aside = set_aside(index_n, share, is_sink_N, sinks)
        num_context = int(context_share * share)
        order_S = salience_N[member_S].sort(descending=True, stable=True).indices
        is_salient_S = torch.zeros_like(member_S, dtype=torch.bool)
        is_salient_S[order_S[: share - num_context]] = True
        stay += [member_S[is_salient_S], aside]
        others.append(member_S[~is_salient_S])
        context.append(num_context)
    kept = torch.cat(stay)
    entries = [(kept, kept, torch.ones(len(kept), device=kept.device))]
    x_NC, first = x_TnC.flatten(0, 1), 0
    for length in scene_lengths(frame_TG, min_scenes, threshold):
        scene = range(first, first + length)
        source_M = torch.cat([others[frame] for frame in scene])
        unit_MC = unit_rows(x_NC[source_M])
        room = [len(others[frame]) for frame in scene]
        for frame, num_centres in anchor_shares(room, sum(context[frame] for frame in scene), anchor_spacing):
            index_Q = others[first + frame]
            centre_K = index_Q[peak_order(x_NC[index_Q], NUM_NEIGHBOURS)[:num_centres]]
            place_K = torch.searchsorted(source_M, centre_K)
            label_M, weight_M = merge_to_centres(unit_MC, place_K, centre_weight)
            entries.append((centre_K[label_M], source_M, weight_M))
        first += length
    anchor_E, source_E, weight_E = (torch.cat(parts) for parts in zip(*entries, strict=True))
    return merge_plan(index_Tn.numel(), anchor_E, source_E, weight_E)


def scene_lengths(frame_TG: Tensor, min_scenes: int, threshold: float) -> list[int]:
    """Frames of each scene: cuts at the `min_scenes - 1` lowest cosines and at all below `threshold`."""
    cosine_T = F.cosine_similarity(frame_TG[1:].float(), frame_TG[:-1].float(), dim=-1)
    is_cut_T = cosine_T < threshold
    is_cut_T[cosine_T.sort(stable=True).indices[: min_scenes - 1]] = True
    ends = [0, *(is_cut_T.nonzero()[:, 0] + 1).tolist(), len(frame_TG)]
    return [end - start for start, end in zip(ends[:-1], ends[1:], strict=True)]


def anchor_shares(room: list[int], num_centres: int, spacing: int) -> list[tuple[int, int]]:
    """Anchor frames of a scene and the centres of each: the last frame and every `spacing`-th before it.

        anchor_shares([9, 9, 9, 9, 9], 7, 4) == [(4, 4), (0, 3)]

    Where the anchor frames have no room for the centres, `spacing` shrinks. Frames without a centre are left out.

    Args:
        room: how many centres each frame of the scene can hold; their sum is at least `num_centres`.
        num_centres: to share equally, what does not divide to the last frames.
        spacing: frames from one anchor frame to the next, from 1 up.
    """
    frames = range(len(room) - 1, -1, -spacing)
    if sum(room[frame] for frame in frames) < num_centres:
        return anchor_shares(room, num_centres, min(spacing, len(room)) - 1)
    shares = share_budget([room[frame] for frame in frames], num_centres)
    return [(frame, share) for frame, share in zip(frames, shares, strict=True) if share]


def merge_to_centres(unit_MC: Tensor, centre_K: Tensor, centre_weight: float) -> tuple[Tensor, Tensor]:
    """`[M]` the cluster of each token, in [0, K), and `[M]` its weight in the merged token.

    Args:
        unit_MC: tokens of length 1.
        centre_K: which of them are the centres, int64.
        centre_weight: least weight of a centre.
    """
    label_M = (unit_MC @ unit_MC[centre_K].T).argmax(-1)
    label_M[centre_K] = torch.arange(len(centre_K), device=centre_K.device)
    count_K = label_M.bincount()
    own_K = (1 / (count_K + 1)).clamp(min=centre_weight)
    weight_M = ((1 - own_K) / count_K)[label_M]
    weight_M[centre_K] += own_K
    return label_M, weight_M
