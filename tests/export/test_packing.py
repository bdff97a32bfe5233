"""Packing worked out from sizes equals what the models' own packing and the torch families do."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.pipeline.tiny_families import IMAGE, VIDEO, make_inputs, make_model
from tokensieve.errors import BadOption
from tokensieve.export import packing
from tokensieve.export.packing import NEWLINE, Packing
from tokensieve.pipeline.adapter import VLMAdapter
from tokensieve.pipeline.families import family_of

TILE, SIDE = 16, 4  # pixels and projector rows along a tile of the tiny model
PINPOINTS = {
    "few": [[16, 32], [32, 16], [32, 32], [16, 48], [48, 16]],
    "many": [[16 * down, 16 * across] for down in range(1, 5) for across in range(1, 5)],
    "falling": [[16 * down, 16 * across] for down in range(4, 0, -1) for across in range(4, 0, -1)],
}
SIZES = [(20, 30), (60, 21), (16, 16), (1, 1), (17, 16), (100, 100), (640, 480), (480, 640), (333, 1000), (50, 9)]


@cache
def onevision():
    return make_model("llava_onevision-image").model


@pytest.fixture
def base():
    model = onevision()
    before = model.config.image_grid_pinpoints, model.config.vision_aspect_ratio
    yield model
    model.config.image_grid_pinpoints, model.config.vision_aspect_ratio = before


def applied(packed: Packing, rows_PC: np.ndarray) -> np.ndarray:
    """The linear map of the graph."""
    return (rows_PC[packed.inputs["rows"]] * packed.inputs["weights"][..., None]).sum(1)


def assert_same(packed: Packing, layout, rows_PC: torch.Tensor, tolerance: float = 1e-6):
    structural = layout.structural
    if structural is None:
        structural = torch.zeros(len(layout.features), dtype=torch.bool)
    assert packed.grids == layout.grids
    np.testing.assert_array_equal(packed.slots == NEWLINE, structural.numpy())
    np.testing.assert_array_equal(packed.slots[packed.slots != NEWLINE], np.arange(packed.num_tokens))
    crop = layout.crop if layout.crop is not None else torch.zeros(packed.num_tokens, dtype=torch.long)
    np.testing.assert_array_equal(packed.crop, crop.numpy())
    if "rows" in packed.inputs:
        expected = layout.projector.to_tokens(rows_PC).numpy()
        np.testing.assert_allclose(applied(packed, rows_PC.numpy()), expected, rtol=0, atol=tolerance)


def anyres_layout(base, size, tiles):
    """What the torch family makes of an image, through the model's own packing."""
    family = family_of("llava_onevision")
    rows = torch.randn(tiles * SIDE**2, 5, generator=torch.Generator().manual_seed(0))
    maps = rows.view(tiles, SIDE**2, 5)
    sizes = torch.tensor([size])
    features = family.pack(base, [maps], sizes, torch.zeros(5))
    out = SimpleNamespace(pooler_output=features)
    return family.layouts(base, "image", out, {"image_sizes": sizes}, maps)[0], rows


@pytest.mark.parametrize("most", [1, 4, 9])
@pytest.mark.parametrize("pinpoints", PINPOINTS)
def test_anyres_is_the_models_own_packing(base, pinpoints, most):
    base.config.image_grid_pinpoints = PINPOINTS[pinpoints]
    base.config.vision_aspect_ratio = f"anyres_max_{most}"
    rng = np.random.default_rng(most)
    sizes = SIZES + [tuple(int(x) for x in pair) for pair in rng.integers(100, 500, (40, 2))]
    shrunk = cut = 0
    for size in sizes:
        down, across = (x // TILE for x in packing.best_resolution(size, PINPOINTS[pinpoints]))
        packed = packing.pack_anyres(size, PINPOINTS[pinpoints], tile=TILE, side=SIDE, most=most)
        layout, rows = anyres_layout(base, size, 1 + down * across)
        assert_same(packed, layout, rows)
        assert packed.inputs["rows"].dtype == np.int64 and packed.inputs["weights"].dtype == np.float32
        shrunk += (packed.inputs["weights"].max(1) < 1).any()
        cut += len(np.unique(packed.inputs["rows"])) < len(rows)
    assert cut and bool(shrunk) == (most == 1 or pinpoints != "few")


def test_a_picture_that_is_all_padding_is_refused():
    with pytest.raises(BadOption, match="too thin"):
        packing.pack_anyres((1, 5000), PINPOINTS["few"], tile=TILE, side=SIDE, most=9)


@pytest.mark.parametrize("num_frames", [2, 5])
def test_pooled_video_is_the_models_own_pooling(base, num_frames):
    rows = torch.randn(num_frames * SIDE**2, 5)
    features = torch.zeros(1, num_frames * (SIDE // 2) ** 2 + 1, 5)
    seen = rows.view(num_frames, SIDE**2, 5)
    inputs = {"pixel_values_videos": torch.zeros(1, num_frames, 3, 1, 1)}
    out = SimpleNamespace(pooler_output=features)
    layout = family_of("llava_onevision").layouts(base, "video", out, inputs, seen)[0]
    assert_same(packing.pack_pooled_video(num_frames, SIDE), layout, rows)


@pytest.mark.parametrize("side", [3, 5, 12, 27])
def test_pooling_of_odd_rasters(side):
    rows = torch.randn(2, side * side, 3)
    half = -(-side // 2)
    expected = torch.nn.functional.interpolate(
        rows.transpose(1, 2).unflatten(2, (side, side)), [half, half], mode="bilinear"
    )
    packed = packing.pack_pooled_video(2, side)
    np.testing.assert_allclose(
        applied(packed, rows.flatten(0, 1).numpy()), expected.flatten(2).mT.flatten(0, 1), rtol=0, atol=1e-6
    )


def _item(name: str, joined: bool):
    adapter = VLMAdapter(make_model(name))
    inputs = make_inputs(name, 1)
    with torch.no_grad():
        return adapter.encode(inputs, joined)[0], inputs, adapter


@pytest.mark.parametrize(
    ("name", "joined", "packed"),
    [
        ("llava", True, packing.pack_frames(2, 4)),
        ("smolvlm", False, packing.pack_tiles(3, 2)),
        ("qwen2_5_vl", False, packing.pack_patches((2, 8, 12), merge=2, window=32, patch=4)),
    ],
)
def test_rasters_of_the_other_families(name, joined, packed):
    with torch.no_grad():
        item = VLMAdapter(make_model(name)).encode(make_inputs(name, 1), joined)[0]
    assert packed.grids == item.tokens.grids
    np.testing.assert_array_equal(packed.crop, item.tokens.crop.numpy())
    np.testing.assert_array_equal(packed.slots, np.arange(len(item.slots)))


@pytest.mark.parametrize(("height", "width", "window"), [(8, 12, 32), (12, 4, 16), (20, 28, 24), (8, 8, 32)])
def test_windows_and_places_of_patches(height, width, window):
    from transformers.vision_utils import get_vision_window_index

    grid = torch.tensor([[1, height, width]])
    packed = packing.pack_patches((1, height, width), merge=2, window=window, patch=4)
    order, borders = get_vision_window_index(grid, 2, window, 4)
    number = torch.empty(height * width, dtype=torch.long)
    of_patch = (order[:, None] * 4 + torch.arange(4)).flatten()
    for i, (start, stop) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        number[of_patch[start:stop]] = i
    ours = packed.inputs["patch_window"]
    np.testing.assert_array_equal(ours[:, None] == ours[None], (number[:, None] == number[None]).numpy())
    # The processor's order: what `patch_place` says must be where a patch of a picture of coordinates comes from.
    picture = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    grouped = picture.reshape(height // 2, 2, width // 2, 2, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    np.testing.assert_array_equal(packed.inputs["patch_place"], grouped)


@pytest.mark.parametrize("seconds", [0.5, 0.7000001, 1.9999999, 2 / 3, 7.3])
@pytest.mark.parametrize("modality", ["image", "video"])
def test_mrope_positions(modality, seconds):
    model = make_model("qwen2_5_vl")
    frames = 1 if modality == "image" else 7
    token = IMAGE if modality == "image" else VIDEO
    ids = torch.tensor([[5] * 4 + [token] * (frames * 4 * 6) + [7] * 3])
    grid = torch.tensor([[frames, 8, 12]])
    extra = {"second_per_grid_ts": torch.tensor([seconds])} if modality == "video" else {}
    types = (ids == token).long() * (1 if modality == "image" else 2)
    expected, _ = model.model.get_rope_index(ids, types, **{f"{modality}_grid_thw": grid}, **extra)
    per_second = np.float32(model.config.vision_config.tokens_per_second)
    interval = 1.0 if modality == "image" else float(per_second * np.float32(seconds))
    ours = packing.mrope_positions((ids[0] == token).numpy(), (frames, 4, 6), interval)
    np.testing.assert_array_equal(ours, expected[:, 0].numpy())
    assert ours.dtype == np.int64
