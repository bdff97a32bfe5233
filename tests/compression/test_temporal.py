"""Frames, shares of a budget, still places, and plans from entries."""

import pytest
import torch

from tests.compression.helpers import plain, random_inputs
from tokensieve.budget import even_shares
from tokensieve.compression import apply_plan, merge_plan
from tokensieve.compression.temporal import frames_of, proportional_shares, still_places


@pytest.mark.parametrize(
    "grids, shape",
    [
        (((4, 2, 3),), (4, 6, 16)),
        (((1, 4, 6),), (1, 24, 16)),
        (((1, 2, 6), (1, 3, 4)), (1, 24, 16)),
        (((2, 1, 6), (1, 3, 4)), (1, 24, 16)),
    ],
)
def test_an_image_with_all_its_views_is_one_frame(grids, shape):
    tokens = plain(random_inputs(24).half(), grids=grids)
    frames = frames_of(tokens)
    assert frames.shape == shape and frames.dtype == torch.float32
    assert torch.equal(frames.flatten(0, 1), tokens.features.float())


@pytest.mark.parametrize(
    "sizes, total, shares",
    [
        ([10, 5, 5], 6, [3, 2, 1]),
        ([10, 5, 5], 20, [10, 5, 5]),
        ([10, 5, 5], 0, [0, 0, 0]),
        ([0, 3, 0], 2, [0, 2, 0]),
        ([0, 0], 0, [0, 0]),
        ([1, 1, 1], 1, [1, 0, 0]),
        ([7, 1], 7, [6, 1]),
    ],
)
def test_proportional_shares(sizes, total, shares):
    assert proportional_shares(sizes, total) == shares


def test_proportional_shares_add_up_and_fit():
    sizes = torch.randint(0, 30, (50, 7), generator=torch.Generator().manual_seed(0)).tolist()
    for row in sizes:
        for total in range(0, sum(row) + 1, 3):
            shares = proportional_shares(row, total)
            assert sum(shares) == total
            exact = [size * total / max(1, sum(row)) for size in row]
            assert all(0 <= s <= size and abs(s - e) < 1 for s, size, e in zip(shares, row, exact, strict=True))


@pytest.mark.parametrize("num_frames, total, shares", [(4, 8, [2, 2, 2, 2]), (4, 10, [3, 2, 3, 2]), (1, 7, [7])])
def test_even_shares(num_frames, total, shares):
    assert even_shares(num_frames, total) == shares


def test_even_shares_differ_by_one_and_spread_over_time():
    for num_frames in range(1, 20):
        for total in range(0, 60):
            shares = even_shares(num_frames, total)
            assert sum(shares) == total and max(shares) - min(shares) <= 1
    assert even_shares(9, 3) == [0, 1, 0, 0, 1, 0, 0, 1, 0]


def test_still_places_by_threshold():
    likeness = torch.tensor([[0.9, 0.5, 0.8], [0.9, 0.9, 0.9]])
    still = still_places(likeness, [4, 1], 0.8)
    assert still.tolist() == [[True, False, False], [False, False, False]]


def test_still_places_leave_the_budget_and_are_the_most_alike():
    likeness = torch.tensor([[0.85, 0.95, 0.3, 0.9], [0.99, 0.97, 0.2, 0.81]])
    # 4 + 3 frames of 4 places: 28 tokens; a still place saves 3 or 2
    for num_keep, expected in [
        (0, [[1, 1, 0, 1], [1, 1, 0, 1]]),
        (13, [[1, 1, 0, 1], [1, 1, 0, 1]]),  # 28 - 3 * 3 - 3 * 2
        (14, [[1, 1, 0, 1], [1, 1, 0, 0]]),  # 28 - 13
        (18, [[0, 1, 0, 1], [1, 1, 0, 0]]),
        (19, [[0, 1, 0, 0], [1, 1, 0, 0]]),
        (27, [[0, 0, 0, 0], [0, 0, 0, 0]]),
    ]:
        still = still_places(likeness, [4, 3], 0.8, num_keep)
        saved = still.sum(1) @ torch.tensor([3, 2])
        assert 28 - saved >= num_keep
        assert still.int().tolist() == expected


def test_of_places_that_are_equally_alike_the_first_count_as_still():
    likeness = 1 + torch.tensor([[-1e-7, 2e-7, 0.0, 1e-7]])  # rounding of 1
    assert still_places(likeness, [3], 0.8, 8).tolist() == [[True, True, False, False]]


def test_merge_plan_in_any_order():
    x = random_inputs(6)
    anchor, source = torch.tensor([4, 1, 4, 1]), torch.tensor([0, 1, 4, 5])
    plan = merge_plan(6, anchor, source, torch.tensor([0.25, 0.5, 0.75, 2.0]))
    assert plan.kept.tolist() == [1, 4]
    expected = torch.stack([0.5 * x[1] + 2 * x[5], 0.25 * x[0] + 0.75 * x[4]])
    torch.testing.assert_close(apply_plan(plan, x), expected)
