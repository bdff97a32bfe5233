"""VidCom2: Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models.

Liu, Wang, Ma, Zhang. https://arxiv.org/abs/2505.14454 (EMNLP 2025)

    x         the half of the channels that vary least over the video, scaled to length 1
    R(x, c)   sum of exp(-|x - c|^2 / (2 a)) over a in {1/8, 1/4, 1/2, 1, 2}: redundancy towards a centre c
    frames    w = softmax over frames of -mean R(x, centre of the video) / 0.01
    quota     round(n min(1, k (1 + w - mean w))) tokens of a frame, at least 1, for a share k of all tokens
    keep      in each frame the least R(x, centre of the video) + R(x, centre of the frame)

A frame unlike the rest of the video gets more tokens, up to twice its share.

What differs from vLLM's port (the reference implementation was not read; written from the description):
- Always exactly the budget: where the quotas add up to more or less, the most redundant of the chosen leave or the
  least redundant of the others join. Each frame keeps one token unless the budget has fewer tokens than the video
  frames (there: at least one a frame).
- Centres are plain means of the scaled tokens (INFERRED). Equal scores go to the lowest index.
- An image, with all its views, is one frame.
"""

# Shape legend: T frames, n places of a frame, N = T * n tokens, D width, C = D // 2 channels

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.compression.maxmin import unit_rows
from tokensieve.compression.plan import Plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.temporal import frames_of
from tokensieve.compression.tokens import VisualTokens

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
TEMPERATURE = 0.01


@register_method(
    "vidcom2",
    title="Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models",
    url="https://arxiv.org/abs/2505.14454",
    needs=("features", "frames"),
    licence="Apache-2.0",
    differs="Exactly the budget, also below one token a frame; written from a description of vLLM's port.",
)
def vidcom2(tokens: VisualTokens, num_keep: int, *, generator: torch.Generator | None = None) -> Plan:
    """Keeps what is unlike its video and its frame. Deterministic: `generator` is not used."""
    x_TnC = steady_channels(frames_of(tokens))
    redundancy_Tn, to_video_Tn = redundancies(x_TnC)
    quota_T = frame_quotas(to_video_Tn.mean(1), x_TnC.shape[1], num_keep / len(tokens))
    return Plan(choose(redundancy_Tn, quota_T, num_keep), len(tokens))


def steady_channels(x_TnD: Tensor) -> Tensor:
    """`[T, n, C]` the half of the channels (at least one) with the least variance over all tokens; rows of length 1."""
    variance_D = x_TnD.flatten(0, 1).var(0, correction=0)
    steady_C = variance_D.sort(stable=True).indices[: max(1, len(variance_D) // 2)].sort().values
    return unit_rows(x_TnD[..., steady_C])


def redundancies(x_TnC: Tensor) -> tuple[Tensor, Tensor]:
    """`[T, n]` redundancy towards both centres, and `[T, n]` that towards the centre of the video alone."""
    to_video_Tn = closeness(x_TnC, x_TnC.mean((0, 1)))
    return to_video_Tn + closeness(x_TnC, x_TnC.mean(1, keepdim=True)), to_video_Tn


def closeness(x_TnC: Tensor, centre: Tensor) -> Tensor:
    """`[T, n]`: the sum of Gaussians of the distance to `centre`, which broadcasts against `[T, n, C]`."""
    distance2_Tn = (x_TnC - centre).square().sum(-1)
    return torch.stack([torch.exp(-distance2_Tn / (2 * width)) for width in WIDTHS]).sum(0)


def frame_quotas(to_video_T: Tensor, num_places: int, share: float) -> Tensor:
    """`[T]` int64: how many tokens each frame may keep, from 1 to n.

    Args:
        to_video_T: mean redundancy of each frame towards the centre of the video.
        num_places: n.
        share: of all tokens, that stays.
    """
    weight_T = (-to_video_T / TEMPERATURE).softmax(0)
    share_T = (share * (1 + weight_T - weight_T.mean())).clamp(max=1)
    return (num_places * share_T).round().long().clamp(min=1)


def choose(redundancy_Tn: Tensor, quota_T: Tensor, num_keep: int) -> Tensor:
    """`[num_keep]` rising indices: first the best token of every frame, then the rest of the quotas, then others;
    the least redundant come first in each."""
    rank_Tn = redundancy_Tn.sort(dim=1, stable=True).indices.argsort(1)
    turn_Tn = 2 - (rank_Tn < quota_T[:, None]).long() - (rank_Tn == 0).long()
    by_score_N = redundancy_Tn.flatten().sort(stable=True).indices
    by_turn_N = by_score_N[turn_Tn.flatten()[by_score_N].sort(stable=True).indices]
    return by_turn_N[:num_keep].sort().values
