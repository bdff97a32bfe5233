"""Where visual tokens stand and how a budget is spent: the graph inputs that are worked out outside the graph.

The exporter and the runtime share these functions. They need numpy and no torch.
"""

# Shape legend: N candidate tokens, K kept, T token frames, C tiles, V views

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from tokensieve.budget import even_shares, num_to_keep, share_budget
from tokensieve.errors import BadOption

Grids = Sequence[tuple[int, int, int]]

DOMINANT_SHARE = 54 / 64  # of VisionZip
IMPORTANCE, CAP_OF_KEEP = 0.5, Fraction(3, 2)  # of CaCoVID


def geometry(grids: Grids, crop: np.ndarray) -> dict[str, np.ndarray]:
    """The raster inputs of a vision graph for one image or video.

    Args:
        grids: `(frames, height, width)` in tokens per raster block, as in `VisualTokens`.
        crop: `[N]` tile of each token, 0 for the base view.

    Returns:
        frames: `[T]` float32 zeros, T token frames; an image, with all its views, is one.
        tile: `[N]` int64, the tile of each token.
        tiles: `[C]` float32 zeros, C tiles.
        place: `[N, 3]` float32 in (0, 1), time, row and column of each token in its block.
        neighbours: `[N, 6]` int64, the tokens before, after, above, below, left and right in the block; itself at a
            border.
        view_index: `[N]` int64, the frame of a video or tile of an image that VisionZip takes for a picture.

    Raises:
        BadOption: `crop` does not fit the grids.
    """
    crop = np.asarray(crop, dtype=np.int64)
    num_tokens = _num_tokens(grids)
    if crop.shape != (num_tokens,):
        raise BadOption(f"crop must be one number for each of the {num_tokens} tokens of {grids}, got {crop.shape}.")
    places, neighbours, first = [], [], 0
    for grid in grids:
        scaled = [(np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size) for size in grid]
        places.append(np.stack(np.meshgrid(*scaled, indexing="ij"), axis=-1).reshape(-1, 3))
        index = first + np.arange(math.prod(grid)).reshape(grid)
        neighbours.append(np.stack([_shifted(index, axis, step) for axis in range(3) for step in (-1, 1)], axis=-1))
        first += index.size
    num_frames = _num_frames(grids)
    return {
        "frames": np.zeros(num_frames, dtype=np.float32),
        "tile": crop,
        "tiles": np.zeros(int(crop.max()) + 1, dtype=np.float32),
        "place": np.concatenate(places),
        "neighbours": np.concatenate([each.reshape(-1, 6) for each in neighbours]),
        "view_index": _views(grids, crop),
    }


def num_kept(method: str, keep: float | int, grids: Grids, crop: np.ndarray | None = None) -> int:
    """K: how many of the N tokens stay. EVS never keeps fewer than a frame, and an image whole.

    Args:
        method: name of a method that can be exported.
        keep: a fraction in (0, 1] or a whole number.
        grids, crop: as in `geometry`; tiles change nothing.

    Raises:
        BadOption: `keep` is none of these.
    """
    return _at_least_a_frame(method, num_to_keep(keep, _num_tokens(grids)), grids)


def budget_inputs(
    method: str, num_keep: int, grids: Grids, crop: np.ndarray, options: Mapping[str, object] | None = None
) -> dict[str, np.ndarray]:
    """The inputs of a vision graph that say how many tokens stay, and which part of the item they come from.

    Args:
        method: name of a method that can be exported.
        num_keep: K, from 1 to N; see `num_kept`.
        grids, crop: as in `geometry`.
        options: the method's own.

    Returns:
        budget: `[K]` int64, tile by tile the tile of each pick (zoprune, norm-diversity), else zeros.
        views: `[V, 2]` int64, how many tokens of each view stay as they are, and how many sum up others (visionzip).
        quota: `[3]` int64, of the tokens that a policy with frame logits chooses (cacovid): how many, their number
            before it was rounded down, rounded to the nearest, and how many of one frame at most.

    Raises:
        BadOption: `num_keep` is out of range.
    """
    options = options or {}
    crop = np.asarray(crop, dtype=np.int64)
    num_tokens = _num_tokens(grids)
    if not 1 <= num_keep <= num_tokens:
        raise BadOption(f"Of {num_tokens} tokens 1 to {num_tokens} can be kept, got {num_keep}.")
    num_keep = _at_least_a_frame(method, num_keep, grids)
    inputs = {"budget": np.zeros(num_keep, dtype=np.int64)}
    if method in ("zoprune", "norm-diversity"):
        counts = np.bincount(crop)
        inputs["budget"] = np.repeat(np.arange(len(counts)), share_budget(counts.tolist(), num_keep))
    elif method == "visionzip":
        inputs["views"] = _view_shares(num_keep, grids, crop, options.get("dominant", DOMINANT_SHARE))
    elif method == "cacovid":
        inputs["quota"] = _quota(num_keep, grids, options.get("importance"), options.get("frame_cap"))
    return inputs


def _num_tokens(grids: Grids) -> int:
    return sum(math.prod(grid) for grid in grids)


def _num_frames(grids: Grids) -> int:
    return grids[0][0] if len(grids) == 1 else 1


def _at_least_a_frame(method: str, num_keep: int, grids: Grids) -> int:
    return max(num_keep, _num_tokens(grids) // _num_frames(grids)) if method == "evs" else num_keep


def _shifted(index: np.ndarray, axis: int, step: int) -> np.ndarray:
    """What stands one step further along an axis; at the border, the token itself."""
    last = index.shape[axis] - 1
    return index.take(np.clip(np.arange(last + 1) + step, 0, last), axis=axis)


def _views(grids: Grids, crop: np.ndarray) -> np.ndarray:
    num_frames = _num_frames(grids)
    return np.arange(len(crop)) // (len(crop) // num_frames) if num_frames > 1 else crop


def _view_shares(num_keep: int, grids: Grids, crop: np.ndarray, dominant: float) -> np.ndarray:
    """`[V, 2]`: as `compression/views.py` and `compression/visionzip.py` share a budget."""
    num_frames = _num_frames(grids)
    shares = even_shares(num_frames, num_keep) if num_frames > 1 else share_budget(np.bincount(crop).tolist(), num_keep)
    kept_whole = [max(1, round(share * dominant)) if share else 0 for share in shares]
    return np.array([(whole, share - whole) for share, whole in zip(shares, kept_whole, strict=True)], dtype=np.int64)


def _quota(num_keep: int, grids: Grids, importance: float | None, frame_cap: float | None) -> np.ndarray:
    """`[3]`: the whole numbers in `compression/cacovid.py`, of exact products."""
    num_tokens = _num_tokens(grids)
    num_places = num_tokens // _num_frames(grids)
    share = Fraction(float(IMPORTANCE if importance is None else importance))
    cap = CAP_OF_KEEP * Fraction(num_keep, num_tokens) if frame_cap is None else frame_cap
    most = min(num_places, max(1, int(share * num_places * cap)))
    return np.array([math.floor(share * num_keep), round(share * num_keep), most], dtype=np.int64)
