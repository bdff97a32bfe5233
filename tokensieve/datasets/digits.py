"""Real scanned handwritten digits, split so that no digit image is in two splits.

Source: the UCI "Optical Recognition of Handwritten Digits" test set as shipped by scikit-learn
(`sklearn.datasets.load_digits`): 1,797 grey images of 8 x 8 pixels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

SPLITS = {"train": 0.7, "val": 0.1, "test": 0.2}  # share of the digit images of each class
GLYPH_SIZE = 32  # pixels; digits are enlarged once to this size


@lru_cache(maxsize=1)
def _load() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    from sklearn.datasets import load_digits

    raw = load_digits()
    splits: dict[str, list[int]] = {name: [] for name in SPLITS}
    order = np.random.default_rng(0).permutation(len(raw.target))
    for label in range(10):
        members = order[raw.target[order] == label]
        cuts = np.cumsum([round(share * len(members)) for share in SPLITS.values()])[:-1]
        for name, part in zip(SPLITS, np.split(members, cuts), strict=True):
            splits[name].extend(part.tolist())
    return raw.images / 16.0, raw.target, {name: np.array(sorted(ids)) for name, ids in splits.items()}


@lru_cache(maxsize=1)
def glyphs() -> np.ndarray:
    """All digits as opacity masks `[1797, 32, 32]` float32 in [0, 1], enlarged bicubically and sharpened."""
    from PIL import Image

    images, _, _ = _load()
    large = [Image.fromarray(i.astype(np.float32)).resize((GLYPH_SIZE, GLYPH_SIZE), Image.BICUBIC) for i in images]
    # The steeper ramp keeps strokes solid once they are tinted and laid over a texture.
    return np.clip((np.stack([np.asarray(i) for i in large]) - 0.15) / 0.5, 0, 1).astype(np.float32)


def digit_ids(split: str) -> list[np.ndarray]:
    """For each digit 0..9 the indices into `glyphs()` that belong to `split`.

    Raises:
        ValueError: the split is not one of "train", "val", "test".
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {sorted(SPLITS)}, got {split!r}.")
    _, labels, splits = _load()
    ids = splits[split]
    return [ids[labels[ids] == label] for label in range(10)]
