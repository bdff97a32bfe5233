from fractions import Fraction

import numpy as np
import pytest

from tokensieve.datasets.limits import Limits, fit_side
from tokensieve.datasets.sampling import Sampling, apply_short, pick
from tokensieve.errors import BadMedia, BadOption, MediaTooLarge

TEN = np.arange(10)  # ten frames at 10 frames/s


def picked(**options) -> list[int]:
    return pick(Sampling(**options), TEN, 10, Fraction(1, 10), Limits()).index.tolist()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"num_frames": 1}, [4]),
        ({"num_frames": 2}, [0, 9]),
        ({"num_frames": 4}, [0, 3, 6, 9]),
        ({"num_frames": 10}, list(range(10))),
        ({"num_frames": 3, "start_s": 0.3, "end_s": 0.7}, [3, 5, 7]),  # 0.3 is the time of frame 3, not just below
        ({"num_frames": 2, "start_s": 0.35}, [3, 9]),
        ({"num_frames": 2, "start_s": 0.95}, [9, 9]),
        ({"num_frames": 2, "end_s": 0.05}, [0, 0]),
        ({"fps": 10}, list(range(10))),
        ({"fps": 5}, [0, 2, 4, 6, 8]),
        ({"fps": 20, "start_s": 0.8}, [8, 8, 9, 9]),
        ({"fps": 10, "end_s": 0.3}, [0, 1, 2]),
        ({"fps": 0.001}, [0]),
        ({}, [0, 1, 2, 3, 5, 6, 7, 9]),
    ],
)
def test_picks(options, expected):
    assert picked(**options) == expected


def test_variable_rate_goes_by_time_not_by_index():
    pts = np.array([0, 1, 2, 3, 100])
    picks = pick(Sampling(num_frames=5), pts, 101, Fraction(1, 10), Limits())
    assert picks.index.tolist() == [0, 3, 3, 3, 4]


def test_negative_timestamps_count_from_the_first_frame():
    picks = pick(Sampling(num_frames=2, start_s=0.1), np.array([-3, -2, -1]), 0, Fraction(1, 10), Limits())
    assert picks.index.tolist() == [1, 2]


def test_asking_beyond_the_end_is_noted():
    assert "truncated" in pick(Sampling(end_s=9), TEN, 10, Fraction(1, 10), Limits()).notes[0]
    assert pick(Sampling(end_s=1.0), TEN, 10, Fraction(1, 10), Limits()).notes == ()


@pytest.mark.parametrize(
    "options",
    [
        {"num_frames": 0},
        {"num_frames": -1},
        {"num_frames": 2.5},
        {"num_frames": True},
        {"num_frames": "8"},
        {"fps": 0},
        {"fps": -1},
        {"fps": float("nan")},
        {"fps": float("inf")},
        {"fps": 1e300},
        {"fps": "2"},
        {"num_frames": 8, "fps": 2},
        {"start_s": -0.1},
        {"start_s": float("nan")},
        {"end_s": 0},
        {"end_s": float("inf")},
        {"start_s": 2, "end_s": 2},
        {"start_s": 2, "end_s": 1},
        {"short": "wrap"},
    ],
)
def test_nonsense_is_refused(options):
    with pytest.raises(BadOption) as caught:
        Sampling(**options)
    assert caught.value.exit_code == 2 and not caught.value.retryable
    assert isinstance(caught.value, ValueError)


def test_start_after_the_end_is_refused():
    with pytest.raises(BadOption, match="after the end"):
        picked(start_s=1.0)


def test_absurd_counts_are_refused_before_anything_is_built():
    with pytest.raises(MediaTooLarge, match="max_frames"):
        pick(Sampling(fps=1e6), np.array([0, 10**12]), 10**12 + 1, Fraction(1), Limits())
    with pytest.raises(MediaTooLarge, match="max_frames"):
        picked(num_frames=10**12)


def test_short_policies():
    assert apply_short([0, 0, 1], "repeat") == [0, 0, 1]
    assert apply_short([0, 0, 1], "fewer") == [0, 1]
    assert apply_short([0, 1], "error") == [0, 1]
    with pytest.raises(BadMedia, match="only 2 different"):
        apply_short([0, 0, 1], "error")


@pytest.mark.parametrize(
    "field, value", [("max_pixels", 0), ("timeout_s", float("nan")), ("max_frames", 1.5), ("timeout_s", 1e9)]
)
def test_limits_refuse_nonsense(field, value):
    with pytest.raises(BadOption, match=field):
        Limits(**{field: value})


def test_fit_side():
    assert fit_side(640, 272, 320) == (320, 136)
    assert fit_side(64, 48, 100) == (64, 48)
    assert fit_side(20000, 1, 100) == (100, 1)
