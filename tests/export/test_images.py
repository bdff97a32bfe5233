"""Pixels made without torch against the processors that need it.

Tolerances, in grey levels of 255, on noise, the hardest picture to resample: 0 where nothing is resampled, 1 for each
resampling (bicubic: only rounding differs), 2 where Lanczos is used (SmolVLM).
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export import images

TILE = 48
PINPOINTS = [[48, 48], [48, 96], [96, 48], [96, 96], [144, 48]]
SMOL = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": TILE}}
QWEN = {"patch_size": 4, "size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}}


def noise(frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def settings(processor) -> dict:
    """As `processor_config.json` holds them."""
    return json.loads(processor.to_json_string())


def assert_within(levels: float, ours: np.ndarray, theirs: torch.Tensor, config: dict, channel_axis: int = 1):
    assert ours.dtype == np.float32 and ours.shape == tuple(theirs.shape)
    shape = [1] * ours.ndim
    shape[channel_axis] = 3
    difference = np.abs(ours - theirs.numpy()) * np.asarray(config["image_std"]).reshape(shape) * 255
    assert difference.max() <= levels + 1e-3


@pytest.mark.parametrize(
    ("height", "width", "levels"), [(56, 56, 0), (56, 81, 0), (90, 56, 0), (40, 40, 1), (200, 131, 1), (57, 95, 1)]
)
def test_resize_and_centre_crop(height, width, levels):
    side = {"height": 56, "width": 56}
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=side)
    frames = noise(2, height, width)
    theirs = processor(list(frames), return_tensors="pt")["pixel_values"]
    config = settings(processor)
    assert_within(levels, images.plain_pixels(frames, config), theirs, config)


def test_crop_larger_than_the_picture_fills_up_with_black():
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 57, "width": 61})
    frames = noise(1, 40, 40)
    theirs = processor(list(frames), return_tensors="pt")["pixel_values"]
    config = settings(processor)
    assert_within(0, images.plain_pixels(frames, config), theirs, config)


@pytest.mark.parametrize("switched_off", [("do_normalize",), ("do_rescale",), ("do_rescale", "do_normalize")])
def test_switches(switched_off):
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 8}, do_center_crop=False, **dict.fromkeys(switched_off, False)
    )
    frames = noise(1, 8, 8)
    theirs = processor(list(frames), return_tensors="pt")["pixel_values"].float()
    np.testing.assert_array_equal(images.plain_pixels(frames, settings(processor)), theirs.numpy())


@pytest.mark.parametrize(
    ("height", "width", "levels"), [(48, 48, 0), (96, 96, 1), (100, 57, 1), (30, 80, 1), (200, 70, 1), (47, 49, 1)]
)
def test_any_resolution(height, width, levels):
    processor = transformers.LlavaOnevisionImageProcessor(
        size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS
    )
    frames = noise(1, height, width)
    theirs = processor([list(frames)], return_tensors="pt")["pixel_values"][0]
    config = settings(processor)
    assert_within(levels, images.anyres_pixels(frames[0], config), theirs, config)


@pytest.mark.parametrize(("height", "width", "levels"), [(48, 48, 0), (100, 57, 1), (30, 80, 1)])
def test_videos_are_resized(height, width, levels):
    processor = transformers.LlavaOnevisionVideoProcessor(size={"height": TILE, "width": TILE})
    frames = noise(3, height, width)
    theirs = processor([frames], return_tensors="pt")["pixel_values_videos"][0]
    config = settings(processor)
    assert_within(levels, images.plain_pixels(frames, config), theirs, config)


@pytest.mark.parametrize("splitting", [True, False])
@pytest.mark.parametrize(
    ("height", "width"), [(48, 96), (96, 96), (96, 48), (100, 57), (60, 100), (30, 80), (300, 70), (48, 48)]
)
def test_splitting(height, width, splitting):
    processor = transformers.SmolVLMImageProcessor(**SMOL, do_image_splitting=splitting)
    frames = noise(1, height, width)
    theirs = processor([list(frames)], return_tensors="pt", return_row_col_info=True)
    config = settings(processor)
    ours, rows, columns = images.split_pixels(frames[0], config)
    assert ([[rows]], [[columns]]) == (theirs["rows"], theirs["cols"])
    assert len(ours) == (rows * columns + 1 if splitting else 1)
    assert_within(2, ours, theirs["pixel_values"][0], config)
    if rows and max(height, width) == 96 and not height % 48 and not width % 48:  # tiles are cut, not resampled
        np.testing.assert_allclose(ours[:-1], theirs["pixel_values"][0, :-1], rtol=0, atol=1e-6)


def test_a_picture_of_one_tile_is_not_split():
    processor = transformers.SmolVLMImageProcessor(size={"longest_edge": TILE}, max_image_size={"longest_edge": TILE})
    frames = noise(1, 48, 40)
    theirs = processor([list(frames)], return_tensors="pt", return_row_col_info=True)
    config = settings(processor)
    ours, rows, columns = images.split_pixels(frames[0], config)
    assert (rows, columns) == (0, 0) and theirs["rows"] == [[0]]
    assert_within(2, ours, theirs["pixel_values"][0], config)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (100, 60), (60, 100), (30, 80)])
def test_videos_are_squared(height, width):
    processor = transformers.SmolVLMVideoProcessor(
        **SMOL, video_sampling={"video_size": {"longest_edge": 96}, "max_frames": 8, "fps": 1}
    )
    frames = noise(3, height, width)
    theirs = processor([frames], return_tensors="pt", do_sample_frames=False)["pixel_values"][0]
    config = settings(processor)
    assert_within(2, images.squared_pixels(frames, config), theirs, config)


@pytest.mark.parametrize("num_frames", [1, 2, 3])
@pytest.mark.parametrize(("height", "width", "levels"), [(16, 32, 0), (40, 48, 0), (100, 57, 1), (10, 13, 1)])
def test_patches(height, width, levels, num_frames):
    frames = noise(num_frames, height, width)
    if num_frames == 1:
        processor = transformers.Qwen2VLImageProcessor(**QWEN)
        theirs, kind = processor(list(frames), return_tensors="pt"), "image"
        pixels = theirs["pixel_values"]
    else:
        processor = transformers.Qwen2VLVideoProcessor(**QWEN)
        theirs, kind = processor([frames], return_tensors="pt", do_sample_frames=False), "video"
        pixels = theirs["pixel_values_videos"]
    config = settings(processor)
    ours, grid = images.patch_pixels(frames, config)
    assert grid == tuple(theirs[f"{kind}_grid_thw"][0].tolist())
    split = (len(ours), 3, -1)
    assert_within(levels, ours.reshape(split), pixels.view(split), config)


@pytest.mark.parametrize(("height", "width"), [(100, 57), (900, 1200), (4, 9), (28, 28 * 150), (1, 200)])
def test_smart_size(height, width):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    config = settings(transformers.Qwen2VLImageProcessor())
    expected = smart_resize(height, width, 28, config["size"]["shortest_edge"], config["size"]["longest_edge"])
    assert images.smart_size(height, width, 1, config) == expected


@pytest.mark.parametrize("num_frames", [2, 6, 40])
def test_long_videos_get_smaller_frames_where_the_processor_says_so(num_frames):
    processor = transformers.Qwen2VLVideoProcessor(**QWEN, cap_pixels_per_frame=True, max_video_tokens=40)
    frames = noise(num_frames, 60, 44)
    theirs = processor([frames], return_tensors="pt", do_sample_frames=False)["video_grid_thw"][0].tolist()
    config = settings(processor)
    assert list(images.patch_pixels(frames, config)[1]) == theirs
    uncapped = images.smart_size(60, 44, num_frames, config | {"cap_pixels_per_frame": False})
    assert (images.smart_size(60, 44, num_frames, config) == uncapped) == (num_frames == 2)


def test_too_long_a_picture_is_refused():
    with pytest.raises(BadOption, match="200 times"):
        images.patch_pixels(noise(1, 2, 401), settings(transformers.Qwen2VLImageProcessor(**QWEN)))


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"shortest_edge": 10**9}},
        {"size": {"shortest_edge": -5}},
        {"size": "large"},
        {"size": None},
        {"size": {"height": 4.5, "width": 4}},
        {"size": {"shortest_edge": 9, "longest_edge": 11}},
        {"crop_size": {"height": True, "width": 3}},
        {"resample": 77},
        {"do_pad": True},
        {"image_mean": None},
    ],
)
def test_settings_that_make_no_sense_are_refused(change):
    config = settings(transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}))
    with pytest.raises(UnsupportedModel):
        images.plain_pixels(noise(1, 9, 12), config | change)
