from __future__ import annotations

import numpy as np
import pytest
import torch

from tokensieve.datasets.trajectories.screen import arrow_cursor, check_cursor, draw_cursor, resize_bilinear
from tokensieve.errors import BadOption


@pytest.mark.parametrize("size", [(128, 128), (20, 200), (36, 64), (1, 1), (5, 7)])
def test_bilinear_is_torchs_without_smoothing(size):
    frames = np.random.default_rng(0).integers(0, 256, (2, 36, 64, 3), dtype=np.uint8)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(frames).permute(0, 3, 1, 2).float(), size=size, mode="bilinear", align_corners=False
    )
    ours = resize_bilinear(frames, size)
    assert ours.dtype == np.uint8 and ours.shape == (2, *size, 3)
    # half a grey level from rounding, and the order of the two axes in float32
    assert np.abs(ours - theirs.permute(0, 2, 3, 1).numpy()).max() <= 0.501


def test_the_same_size_is_the_same_picture():
    frames = np.random.default_rng(0).integers(0, 256, (2, 9, 11, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_bilinear(frames, (9, 11)), frames)


def test_the_cursor_points_to_the_top_left():
    cursor = check_cursor(arrow_cursor())
    assert cursor[0, 0].tolist() == [0, 0, 0, 255] and cursor[4, 2].tolist() == [255, 255, 255, 255]
    assert cursor[0, 1, 3] == 0 and set(np.unique(cursor)) == {0, 255}
    assert (cursor[:, 0, 3] == 255).all() and cursor[:, 12:, 3].max() == 0  # taller than wide


@pytest.mark.parametrize("height", [360, 720])
def test_where_the_cursor_is_drawn(height):
    frame = np.full((height, 640, 3), 100, dtype=np.uint8)
    draw_cursor(frame, arrow_cursor(), x=411.9, y=203.5)
    rows, columns = np.nonzero((frame != 100).any(-1))
    scale = height / 720
    assert (rows.min(), columns.min()) == (int(203.5 * scale), int(411.9 * scale))  # truncated to a whole pixel
    drawn = frame[rows.min() : rows.min() + 16, columns.min() : columns.min() + 16]
    opaque = arrow_cursor()[..., 3] == 255
    np.testing.assert_array_equal(drawn[opaque], arrow_cursor()[..., :3][opaque])
    assert (drawn[~opaque] == 100).all() and len(rows) == opaque.sum()


def test_a_half_transparent_cursor_is_blended():
    cursor = np.zeros((16, 16, 4), dtype=np.uint8)
    cursor[..., :3], cursor[..., 3] = 200, 51  # a fifth
    frame = np.full((360, 640, 3), 100, dtype=np.uint8)
    draw_cursor(frame, cursor, x=0, y=0)
    assert (frame[:16, :16] == 120).all() and (frame[16:] == 100).all()


@pytest.mark.parametrize(("x", "y"), [(1270, 715), (-10, 30), (40, -9), (1280, 0), (0, 720), (-100, 0), (5000, 5000)])
def test_a_cursor_over_the_edge_is_cut_off(x, y):
    frame = np.zeros((360, 640, 3), dtype=np.uint8)
    cursor = np.full((16, 16, 4), 255, dtype=np.uint8)
    draw_cursor(frame, cursor, x=x, y=y)
    row, column = np.mgrid[:360, :640]
    left, top = int(x / 2), int(y / 2)
    inside = (row >= top) & (row < top + 16) & (column >= left) & (column < left + 16)
    np.testing.assert_array_equal(frame.any(-1), inside)


@pytest.mark.parametrize("cursor", [None, np.zeros((16, 16, 3), dtype=np.uint8), np.zeros((16, 16, 4))])
def test_what_is_no_cursor(cursor):
    with pytest.raises(BadOption, match=r"\[16, 16, 4\]"):
        check_cursor(cursor)
