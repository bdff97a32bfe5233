"""EVS: Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference.

Bagrov, Khvedchenia, Tymchenko, Aharon, Kadoch, and others (NVIDIA). https://arxiv.org/abs/2510.14624

    x[t, p]  token at place p of frame t (T frames of n places)
    score    255 in frame 0, then 1 - cos(x[t, p], x[t-1, p]): what changed since the frame before
    keep     the highest scores, equal ones in reading order

A token is always compared with the frame before, kept or not, so a slow drift is never refreshed.

What differs from the released code (vLLM, `vllm/multimodal/evs.py`; written from the description):
- The budget is given as a count, so nothing is lost to `int` on floats.
- Differences below 1e-6 are rounding and count as 0, so still places tie and the earliest stays.
- One frame: a warning, where the released code silently keeps everything.
"""

# Shape legend: T frames, n places of a frame, D width

from __future__ import annotations

import warnings

import torch
from torch.nn import functional as F

from tokensieve.compression.maxmin import SAME
from tokensieve.compression.plan import Plan, keep_all
from tokensieve.compression.registry import register_method
from tokensieve.compression.tokens import VisualTokens

FIRST_FRAME_SCORE = 255.0  # above any `1 - cos`, which is at most 2


@register_method(
    "evs",
    title="Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference",
    url="https://arxiv.org/abs/2510.14624",
    needs=("features", "frames"),
    output_length="Never fewer tokens than one frame: frame 0 stays whole, an image stays whole.",
    follows_tokens=True,
    licence="Apache-2.0 (the file also has an NVIDIA notice)",
    differs="Takes a count as budget; still places tie, the earliest stays; warns on an image.",
)
def evs(tokens: VisualTokens, num_keep: int, *, generator: torch.Generator | None = None) -> Plan:
    """Keeps frame 0 and what changed since the frame before. Deterministic: `generator` is not used.

    Keeps `max(num_keep, tokens of a frame)`. An image has no frame before: all its tokens stay, and a
    warning says so.
    """
    num_frames = tokens.grids[0][0]
    if len(tokens.grids) > 1 or num_frames == 1:
        warnings.warn(
            f"'evs' drops what did not change since the frame before and needs a video of two or more frames; "
            f"this item has the grids {tokens.grids}, so all its {len(tokens)} tokens stay. "
            "Use 'zoprune' or 'divprune' for images.",
            stacklevel=2,
        )
        return keep_all(len(tokens), tokens.features.device)
    x_TnD = tokens.features.float().unflatten(0, (num_frames, -1))
    places = x_TnD.shape[1]
    score_Tn = x_TnD.new_full((num_frames, places), FIRST_FRAME_SCORE)
    score_Tn[1:] = F.threshold(1 - F.cosine_similarity(x_TnD[1:], x_TnD[:-1], dim=-1), SAME, 0.0)
    order_N = score_Tn.flatten().sort(descending=True, stable=True).indices
    return Plan(order_N[: max(places, num_keep)].sort().values, len(tokens))
