"""DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models (stage 1: pruning over time).

Tao, Qin, You, Sui, Wang. https://arxiv.org/abs/2411.15024 (CVPR 2025)

    windows   four frames each; the first frame of a window stays whole
    compared  frames 1 and 2 of a window with its frame 0, frame 3 with frame 2, place by place (cosine)
    keep      in each compared frame the (1 - K) n tokens that are the least similar (n tokens a frame)

The paper calls this merging; what is similar is dropped, as in the released code. Stage 2, in the cache of the
language model, is `dycoke-decoder`.

What differs from the official code (KD-TAO/DyCoke; written from the description):
- K follows from the budget. What does not divide by the compared frames goes to the first of them, one token each.
- The last window, whole or short, is like all others, and no frame is lost. There its frame 2 stays whole where it is
  full, the last of an odd number of frames is dropped and four frames or fewer are an error: `as_released=True`.
- Kept tokens stay in reading order; there each frame's are in order of dissimilarity.
- Differences below 1e-6 are rounding and count as 0, so still places tie and the lowest index wins.
- An image: a warning, and all its tokens stay.
"""

# Shape legend: T frames, n places of a frame, N = T * n tokens, D width

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from tokensieve.compression.maxmin import SAME
from tokensieve.compression.plan import Plan, keep_all
from tokensieve.compression.registry import register_method
from tokensieve.compression.score_diversity import share_budget
from tokensieve.compression.temporal import frames_of
from tokensieve.compression.tokens import VisualTokens
from tokensieve.errors import BadOption

WINDOW = 4
_COMPARED_WITH = (0, 1, 2, 1)  # frames back from each frame of a window; 0: it stays whole


@register_method(
    "dycoke",
    title="DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models",
    url="https://arxiv.org/abs/2411.15024",
    needs=("features", "frames"),
    output_length="Never fewer tokens than the first frame of every window of four, a quarter of the video or a little "
    "more; an image stays whole.",
    licence="Apache-2.0",
    differs="The pruned share follows from the budget; the last window is treated like the others and no frame is "
    "lost (as_released=True repeats the released loop).",
)
def dycoke(
    tokens: VisualTokens,
    num_keep: int,
    *,
    generator: torch.Generator | None = None,
    as_released: bool = False,
) -> Plan:
    """Keeps every fourth frame, and of the others what changed. Deterministic: `generator` is not used.

    Keeps exactly `num_keep` tokens, or the frames that stay whole where the budget is smaller. An image has nothing to
    be compared with: all its tokens stay, and a warning says so.

    Args:
        tokens: the candidates.
        num_keep: how many stay.
        as_released: repeat the loop of the official code: in the last full window frame 2 stays whole too, and the
            last of an odd number of frames is dropped (so at most the other frames are kept).

    Raises:
        BadOption: `as_released` with four frames or fewer, which the official code cannot do, or no bool.
    """
    if not isinstance(as_released, bool):
        raise BadOption(f"as_released must be True or False, got {as_released!r}.")
    x_TnD = frames_of(tokens)
    num_frames, num_places = x_TnD.shape[:2]
    if num_frames == 1:
        warnings.warn(
            f"'dycoke' drops what is as in an earlier frame and needs a video of two or more frames; this item has the "
            f"grids {tokens.grids}, so all its {len(tokens)} tokens stay. Use 'zoprune' or 'divprune' for images.",
            stacklevel=2,
        )
        return keep_all(len(tokens), tokens.features.device)
    if as_released and num_frames <= WINDOW:
        raise BadOption(
            f"as_released=True needs more than {WINDOW} frames, this video has {num_frames}.",
            hint="Leave it out, or read more frames.",
        )
    back = released_frames_back(num_frames) if as_released else frames_back(num_frames)
    compared = [t for t in range(num_frames) if back[t]]
    counts = [num_places if step == 0 else 0 for step in back]
    left = min(max(0, num_keep - sum(counts)), len(compared) * num_places)
    for t, share in zip(compared, share_budget([num_places] * len(compared), left), strict=True):
        counts[t] = share
    return Plan(least_similar(x_TnD, back, counts).flatten().nonzero()[:, 0], len(tokens))


def frames_back(num_frames: int) -> list[int | None]:
    """How many frames before each frame the one is that it is compared with; 0 for a frame that stays whole.

    frames_back(6) == [0, 1, 2, 1, 0, 1]
    """
    return [_COMPARED_WITH[t % WINDOW] for t in range(num_frames)]


def released_frames_back(num_frames: int) -> list[int | None]:
    """As `frames_back`, but as in the official loop, for five frames or more; None for a frame that is dropped.

    released_frames_back(7) == [0, 1, 2, 1, 0, 1, None]
    """
    back: list[int | None] = list(frames_back(num_frames))
    for t in range(2, num_frames, WINDOW):
        if t - 2 >= num_frames - WINDOW:
            back[t] = 0
    if num_frames % 2:
        back[-1] = None
    return back


def least_similar(x_TnD: Tensor, back: list[int | None], counts: list[int]) -> Tensor:
    """`[T, n]` bool: the `counts[t]` tokens of frame t that are the least similar to the frame `back[t]` before it."""
    device = x_TnD.device
    earlier_T = torch.tensor([t - (step or 0) for t, step in enumerate(back)], device=device)
    change_Tn = F.threshold(1 - F.cosine_similarity(x_TnD, x_TnD[earlier_T], dim=-1), SAME, 0.0)
    rank_Tn = change_Tn.sort(dim=1, descending=True, stable=True).indices.argsort(1)
    return rank_Tn < torch.tensor(counts, device=device)[:, None]
