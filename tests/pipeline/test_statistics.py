"""Intervals of means over clustered questions, against a bootstrap in loops and values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from tokensieve.errors import BadOption
from tokensieve.pipeline.evaluation import statistics
from tokensieve.pipeline.evaluation.statistics import mean_interval, paired_difference, wilson


def in_loops(values, groups, draws, seed, level):
    """The cluster bootstrap as its definition reads."""
    rng = np.random.default_rng(seed)
    labels = list(dict.fromkeys(groups))
    means = []
    for _ in range(draws):
        drawn = [labels[i] for i in rng.integers(len(labels), size=len(labels))]
        means.append(np.mean([v for label in drawn for v, g in zip(values, groups, strict=True) if g == label]))
    return np.quantile(means, [(1 - level) / 2, 1 - (1 - level) / 2])


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_whole_clips_are_drawn(level):
    rng = np.random.default_rng(1)
    values, groups = rng.random(30).tolist(), [f"clip {i}" for i in rng.integers(7, size=30)]  # clips of unequal length
    mean, low, high = mean_interval(values, groups, draws=300, seed=5, level=level)
    assert mean == pytest.approx(np.mean(values))
    assert [low, high] == pytest.approx(in_loops(values, groups, 300, 5, level).tolist())


def test_two_clips_by_hand():
    """Draws of two clips, one all right and one all wrong: the mean is 0 or 1 in a quarter of them each, else 1/2."""
    values, groups = [1, 1, 0, 0], ["a", "a", "b", "b"]
    assert mean_interval(values, groups) == (0.5, 0.0, 1.0)
    assert mean_interval(values, groups, level=0.4) == (0.5, 0.5, 0.5)


def test_questions_of_one_clip_are_no_evidence_of_their_own():
    values = [1.0] * 50 + [0.0] * 50
    alone = mean_interval(values)
    clustered = mean_interval(values, [i // 10 for i in range(100)])
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * 0.05, rel=0.1)  # the normal interval of a share of 1/2
    assert clustered.high - clustered.low > 2.5 * (alone.high - alone.low)


def test_a_difference_is_taken_question_by_question():
    reference = np.tile([0.0, 1.0], 20)
    better = np.where(np.arange(40) == 1, reference, reference * 0.5 + 0.5)
    difference = paired_difference(better, reference, range(40), draws=400)
    assert difference.mean == pytest.approx(0.25)
    assert difference == mean_interval(better - reference, range(40), draws=400)
    apart = mean_interval(better, draws=400).high - mean_interval(reference, draws=400).low
    assert difference.high - difference.low < apart
    assert paired_difference(reference, reference) == (0.0, 0.0, 0.0)
    assert paired_difference([0, 0], [1, 1]).mean == -1


def test_the_same_seed_gives_the_same_and_another_another():
    values, groups = np.arange(20.0), np.arange(20) // 3
    first = mean_interval(values, groups)
    assert first == mean_interval(values, groups) != mean_interval(values, groups, seed=1)
    assert first == mean_interval(values, [f"clip-{100 - g}" for g in groups])  # names do not matter
    assert mean_interval(values, groups, draws=10) != first


def test_blocks_change_nothing(monkeypatch):
    values, groups = np.arange(20.0), np.arange(20) // 3
    whole = mean_interval(values, groups)
    monkeypatch.setattr(statistics, "_BLOCK", 30)
    assert mean_interval(values, groups) == whole


def test_one_clip_has_no_interval():
    assert mean_interval([1, 0, 1, 1], ["a"] * 4) == (0.75, None, None)
    assert mean_interval([0.5]) == (0.5, None, None)
    assert paired_difference([1, 0], [0, 0], ["a", "a"]) == (0.5, None, None)


@pytest.mark.parametrize(
    "values, options, message",
    [
        ([], {}, "at least one number"),
        ([[1.0]], {}, "at least one number"),
        ([1.0, float("nan")], {}, "finite.*nan at place 1"),
        ([None, 1.0], {}, "finite.*place 0"),
        ([float("inf")], {}, "finite"),
        ([1.0, 0.0], {"groups": ["a"]}, "2 values and 1 groups"),
        ([1.0], {"draws": 0}, "draws"),
        ([1.0], {"seed": -1}, "seed"),
        ([1.0], {"level": 1.0}, "level"),
        ([1.0], {"level": 0.0}, "level"),
    ],
)
def test_what_is_refused(values, options, message):
    with pytest.raises(BadOption, match=message):
        mean_interval(values, **options)


def test_a_reference_for_every_value():
    with pytest.raises(BadOption, match="2 values and 1"):
        paired_difference([1, 0], [1])
    with pytest.raises(BadOption, match="reference must be finite"):
        paired_difference([1.0], [float("nan")])


def test_wilson():
    """As scipy's; the interval never leaves [0, 1]."""
    for right, of in ((8, 10), (0, 10), (10, 10), (285, 300), (1, 1)):
        expected = binomtest(right, of).proportion_ci(method="wilson")
        assert wilson(right, of) == pytest.approx((expected.low, expected.high), abs=1e-6)
    for wrong in ((-1, 2), (3, 2), (0, 0)):
        with pytest.raises(BadOption):
            wilson(*wrong)
