"""PruneVid: Visual Token Pruning for Efficient Video Large Language Models (stage 1: merging before the model).

Huang, Zhou, Han. https://arxiv.org/abs/2412.16117 (ACL 2025)

    x[t, p]   token at place p of frame t (T frames of n places);   f_t = mean_p x[t, p]
    scenes    density-peak clusters of the f_t (7 neighbours, int(0.25 T) of them), made contiguous
    still     places of a scene whose mean cosine over all pairs of frames is above 0.8
    merge 1   a still place is averaged over the frames of its scene
    merge 2   the still places of a scene, and the other places of each of its frames, are groups; density-peak
              clusters (7 neighbours) of a group, each replaced by its mean

Stage 2, inside the language model, is `prunevid-decoder`.

What differs from the official code (Visual-AI/PruneVid, CC BY-NC-SA 4.0; written from the description):
- The number of clusters comes from the budget, in proportion to the sizes of the groups, at least one a group.
  `cluster_ratio=0.5` is the official rule: groups above 14 tokens are halved, smaller ones left alone, and the
  budget is not looked at.
- Where averaging still places alone would fall below the budget, only the most alike ones are averaged; where there
  are more groups than the budget has tokens, neighbouring groups are joined.
- Made contiguous: each label keeps its longest runs of two or more frames. Frames between two such runs go to the
  longer one, the earlier one if equal (INFERRED where several short runs stand side by side); without any such run
  the video is one scene.
- No random noise in the densities. A merged token stands at the place of its cluster's centre (a still place: in the
  scene's first frame) and keeps that position, in rising order.
"""

# Shape legend: T frames, n places of a frame, N = T * n tokens, S scenes, M units after the merge over time,
#               G units of a group, K clusters of it, C channels

from __future__ import annotations

import math
from itertools import groupby
from numbers import Real

import torch
from torch import Tensor
from torch.nn import functional as F

from tokensieve.compression.density_peaks import cluster
from tokensieve.compression.plan import Plan, apply_plan, merge_plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.temporal import frames_of, proportional_shares, still_places
from tokensieve.compression.tokens import VisualTokens
from tokensieve.errors import BadOption

NUM_NEIGHBOURS = 7
SMALL_GROUP = 14  # the official rule leaves groups up to this size alone


@register_method(
    "prunevid",
    title="PruneVid: Visual Token Pruning for Efficient Video Large Language Models",
    url="https://arxiv.org/abs/2412.16117",
    effect="merges",
    needs=("features", "frames"),
    output_length="Exactly the budget; with cluster_ratio given, what the video allows, whatever the budget.",
    licence="CC BY-NC-SA 4.0 (README)",
    differs="The number of clusters comes from the budget (cluster_ratio=0.5 is the official rule); positions stay.",
)
def prunevid(
    tokens: VisualTokens,
    num_keep: int,
    *,
    generator: torch.Generator | None = None,
    temporal_segment_ratio: float = 0.25,
    threshold: float = 0.8,
    cluster_ratio: float | None = None,
) -> Plan:
    """Averages what stands still over each scene, then clusters. Deterministic: `generator` is not used.

    An image is one frame: no merge over time, its tokens are clustered.

    Args:
        tokens: the candidates.
        num_keep: how many stay.
        temporal_segment_ratio: clusters of frames as a share of the frames, in (0, 1]; at least one.
        threshold: mean cosine above which a place of a scene counts as still, in [-1, 1].
        cluster_ratio: None to meet the budget, or the official rule: the share that stays of every group of more
            than 14 tokens, in (0, 1]; `num_keep` is then not used.

    Raises:
        BadOption: an option is out of range.
    """
    _check_share("temporal_segment_ratio", temporal_segment_ratio)
    if cluster_ratio is not None:
        _check_share("cluster_ratio", cluster_ratio)
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not -1 <= threshold <= 1:
        raise BadOption(f"threshold must be a cosine in [-1, 1], got {threshold!r}.")
    x_TnC = frames_of(tokens)
    lengths = scene_lengths(x_TnC.mean(1), temporal_segment_ratio)
    min_left = num_keep if cluster_ratio is None else 0
    still_Sn = still_places(mean_cosine(x_TnC, lengths), lengths, threshold, min_left)
    unit_N, groups = units_and_groups(still_Sn, lengths)
    if cluster_ratio is None:
        groups = join_groups(groups, num_keep)
        spare = proportional_shares([len(g) - 1 for g in groups], num_keep - len(groups))
        counts = [1 + share for share in spare]
    else:
        counts = [max(1, int(len(g) * cluster_ratio)) if len(g) > SMALL_GROUP else len(g) for g in groups]
    return merge_groups(x_TnC.flatten(0, 1), unit_N, groups, counts)


def scene_lengths(frame_TC: Tensor, temporal_segment_ratio: float) -> list[int]:
    """Frames of each scene: density-peak clusters of the frames' vectors, made contiguous."""
    num_clusters = max(1, int(temporal_segment_ratio * len(frame_TC)))
    return contiguous_lengths(cluster(frame_TC, num_clusters, NUM_NEIGHBOURS)[1].tolist())


def contiguous_lengths(labels: list[int]) -> list[int]:
    """Lengths of the scenes that labels of frames make.

        contiguous_lengths([2, 2, 2, 1, 0, 0]) == [4, 2]

    Each label keeps its longest runs of two or more frames; frames between two of these runs go to the longer one (the
    earlier if equal). Neighbouring runs of one label are one scene.
    """
    runs = [(label, len(list(frames))) for label, frames in groupby(labels)]
    longest = {label: max(length for other, length in runs if other == label) for label, _ in runs}
    keeps = [length > 1 and length == longest[label] for label, length in runs]
    kept = [i for i, keep in enumerate(keeps) if keep]
    if not kept:
        return [len(labels)]
    scene_labels = []
    for i, (label, length) in enumerate(runs):
        if not keeps[i]:
            before = [k for k in kept if k < i][-1:]
            after = [k for k in kept if k > i][:1]
            label = runs[max(before + after, key=lambda k: runs[k][1])][0]
        scene_labels += [label] * length
    return [len(list(frames)) for _, frames in groupby(scene_labels)]


def mean_cosine(x_TnC: Tensor, lengths: list[int]) -> Tensor:
    """`[S, n]`: mean cosine over all pairs of frames of a scene, for every place; 0 in scenes of one frame."""
    unit_TnC = F.normalize(x_TnC, dim=-1, eps=1e-12)
    likeness = []
    for unit_WnC in unit_TnC.split(lengths):
        length, own_n = len(unit_WnC), unit_WnC.square().sum((0, -1))
        likeness.append((unit_WnC.sum(0).square().sum(-1) - own_n) / max(1, length * (length - 1)))
    return torch.stack(likeness)


def units_and_groups(still_Sn: Tensor, lengths: list[int]) -> tuple[Tensor, list[Tensor]]:
    """`[N]` the first token of the unit each token is in, and the units of each group, as their first tokens.

    A unit is a still place of a scene, with its tokens in all frames, or one other token. Groups: scene by scene the
    still places, then the others frame by frame; empty groups are left out.
    """
    num_places, groups, first = still_Sn.shape[1], [], 0
    unit_Tn = torch.arange(sum(lengths) * num_places, device=still_Sn.device).view(-1, num_places)
    for still_n, length in zip(still_Sn, lengths, strict=True):
        scene_Wn = unit_Tn[first : first + length]
        groups += [scene_Wn[0, still_n], *(frame_n[~still_n] for frame_n in scene_Wn)]
        scene_Wn[:, still_n] = scene_Wn[0, still_n]
        first += length
    return unit_Tn.flatten(), [group for group in groups if len(group)]


def join_groups(groups: list[Tensor], num_groups: int) -> list[Tensor]:
    """At most `num_groups` groups: neighbours joined where there are more."""
    if len(groups) <= num_groups:
        return groups
    bounds = [k * len(groups) // num_groups for k in range(num_groups + 1)]
    return [torch.cat(groups[start:end]) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def merge_groups(x_NC: Tensor, unit_N: Tensor, groups: list[Tensor], counts: list[int]) -> Plan:
    """Density-peak clusters of the units of every group, each replaced by its mean over units at its centre's place."""
    source_N = torch.arange(len(unit_N), device=unit_N.device)
    over_time = merge_plan(len(unit_N), unit_N, source_N, 1 / unit_N.bincount()[unit_N])
    x_MC = apply_plan(over_time, x_NC)
    anchor_M, size_M = over_time.kept.clone(), torch.ones_like(over_time.kept)
    for group, count in zip(groups, counts, strict=True):
        if count < len(group):
            unit_G = torch.searchsorted(over_time.kept, group)
            centre_K, label_G = cluster(x_MC[unit_G], count, NUM_NEIGHBOURS)
            anchor_M[unit_G] = group[centre_K][label_G]
            size_M[unit_G] = label_G.bincount()[label_G]
    unit_E = over_time.merge.target
    weight_E = over_time.merge.weight / size_M[unit_E]
    return merge_plan(len(unit_N), anchor_M[unit_E], over_time.merge.source, weight_E)


def _check_share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and 0 < value <= 1):
        raise BadOption(f"{name} must be a share in (0, 1], got {value!r}.")
