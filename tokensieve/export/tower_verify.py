"""Compares the graphs of a tower with PyTorch, on random pixels, on pictures of digits, and on random texts."""

# Shape legend: B images or texts, H and W of an image, T tokens of a text

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokensieve.datasets.digits import glyphs
from tokensieve.errors import UnsupportedModel
from tokensieve.export.manifest import Manifest
from tokensieve.export.tower_graphs import Part, example_ids, new_stage, text_features
from tokensieve.export.tower_runtime import TEXT, VISION, OnnxTower
from tokensieve.pipeline.adaptation.tca_stream import image_features
from tokensieve.pipeline.towers import compress_tower

# Distance of an embedding from PyTorch's, as a share of its length. fp32: other orders of summing. fp16: 10 bits of
# mantissa through a dozen blocks. int8: one scale a column of each weight and one a tensor of activations.
TOLERANCES: Mapping[str, float] = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.25}
# Two tokens whose scores are equal up to rounding may change places, and then a reduced embedding moves by more. Of
# the images that are compared this share may, and no farther than this.
NEAR_TIES, NEAR_TIE_TOLERANCE = 1 / 8, 0.25


def digit_pictures(num: int, size: tuple[int, int]) -> Tensor:
    """`[num, 3, H, W]`: scanned digits on coloured grounds, with numbers as models take them."""
    glyph_B1GG = torch.from_numpy(glyphs()[7 : 7 + num])[:, None]
    generator = torch.Generator().manual_seed(0)
    ink, ground = 3 * torch.rand(2, num, 3, 1, 1, generator=generator) - 1.5
    return F.interpolate(ground + (ink - ground) * glyph_B1GG, size, mode="bilinear", antialias=True)


def verify_tower(model: nn.Module, tower: OnnxTower, parts: Mapping[str, Part]) -> dict[str, object]:
    """Differences between the graphs and PyTorch.

    Raises:
        UnsupportedModel: they are too large.
    """
    manifest = tower.manifest
    pictures = {
        "random pixels": torch.randn(4, 3, *tower.image_size, generator=torch.Generator().manual_seed(1)),
        "digits": digit_pictures(4, tower.image_size),
    }
    far = {name: _vision_differences(model, tower, pixels) for name, pixels in pictures.items()}
    if tower.anchor_blocks:
        for name, pixels in pictures.items():
            far[f"{name} with anchors"] = _vision_differences(model, tower, pixels, pictures["digits"])
    found: dict[str, object] = {VISION: _judged(far, manifest, may_tie=manifest.method is not None)}
    if TEXT in parts:
        found[TEXT] = _judged(_text_differences(model, tower, parts[TEXT]), manifest, may_tie=False)
    return {**found, "tolerance": TOLERANCES[manifest.precision], "near_tie_tolerance": NEAR_TIE_TOLERANCE}


def _vision_differences(
    model: nn.Module, tower: OnnxTower, pixels: Tensor, anchor_pixels: Tensor | None = None
) -> np.ndarray:
    """`[B]`, over several sizes of a batch; the paths of `anchor_pixels` are the anchors."""
    manifest, device = tower.manifest, next(model.parameters()).device
    stage, anchors = new_stage(manifest.method, manifest.options), None
    with compress_tower(model, stage, manifest.keep), torch.no_grad():
        if anchor_pixels is not None:
            image_features(model, anchor_pixels.to(device))
            stage.anchors = torch.stack(stage.path, 1)
            anchors = stage.anchors[:, [block - 1 for block in tower.anchor_blocks]].cpu().numpy()
        wanted = [image_features(model, pixels.to(device)).cpu().numpy()]
    if manifest.method == "tca":
        wanted.append(torch.stack(stage.path, 1).cpu().numpy())
    far = []
    for some in (slice(0, 1), slice(1, len(pixels))):
        part = pixels[some].numpy()
        got = tower.encode_with_path(part, anchors) if manifest.method == "tca" else [tower.encode_image(part)]
        far.append(np.max([_distance(g, w[some]) for g, w in zip(got, wanted, strict=True)], axis=0))
    return np.concatenate(far)


def _text_differences(model: nn.Module, tower: OnnxTower, part: Part) -> dict[str, np.ndarray]:
    device = next(model.parameters()).device
    longest = part.inputs["input_ids"].shape[1]
    is_fixed = part.shapes["input_ids"][1] == longest
    far = {}
    for batch, length in ((1, longest), (3, longest if is_fixed else max(2, longest // 2))):
        ids_BT = example_ids(model, batch, length)
        mask_BT = torch.ones_like(ids_BT) if "attention_mask" in part.inputs else None
        if mask_BT is not None and batch > 1:
            mask_BT[0, -1] = 0
        with torch.no_grad():
            wanted = text_features(model, *(each if each is None else each.to(device) for each in (ids_BT, mask_BT)))
        got = tower.encode_text(ids_BT.numpy(), None if mask_BT is None else mask_BT.numpy())
        far[f"{batch} texts of {length}"] = _distance(got, wanted.cpu().numpy())
    return far


def _distance(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`[B]`: length of the difference, as a share of the wanted length."""
    got, wanted = (x.reshape(len(x), -1).astype(np.float64) for x in (got, wanted))
    return np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)


def _judged(far: Mapping[str, np.ndarray], manifest: Manifest, may_tie: bool) -> dict[str, object]:
    every = np.concatenate(list(far.values()))
    limit = TOLERANCES[manifest.precision]
    num_beyond = int((~(every <= limit)).sum())
    allowed = may_tie and num_beyond <= NEAR_TIES * len(every) and (every <= NEAR_TIE_TOLERANCE).all()
    if num_beyond and not allowed:
        worst = ", ".join(f"{name}: {values.max():.2g}" for name, values in far.items())
        raise UnsupportedModel(
            f"The exported graph differs from PyTorch by more than {limit:g} in {num_beyond} of {len(every)} cases "
            f"({worst}).",
            hint="Nothing was written. Please report the model, or use precision='fp32'.",
        )
    return {"greatest": {name: float(values.max()) for name, values in far.items()}, "beyond": num_beyond}
