"""How far a mean may be off: bootstrap over clips, because questions about one clip are not independent.

The cluster bootstrap: clips, not questions, are drawn with replacement, and each drawn clip brings all its questions
(Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8; for paired comparison of models on
clustered questions see Miller, "Adding Error Bars to Evals", https://arxiv.org/abs/2411.00640). Intervals are
percentile intervals: from few clips, or where all values are alike, they come out too narrow. Shares of independent
trials have Wilson's interval instead.
"""

# Shape legend: N questions, G clips, D draws

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from tokensieve.errors import BadOption

_BLOCK = 1 << 21  # clips drawn at a time: bounds memory and changes no result


class Interval(NamedTuple):
    """A mean and its interval; `low` and `high` are None where one clip tells nothing about the spread."""

    mean: float
    low: float | None
    high: float | None


def wilson(num_right: int, num_all: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson, 1927), in [0, 1].

    Raises:
        BadOption: not 0 <= num_right <= num_all with num_all above 0.
    """
    if not 0 <= num_right <= num_all or num_all < 1:
        raise BadOption(f"Need 0 <= right <= all and all above 0, got {num_right} of {num_all}.")
    share, spread = num_right / num_all, z * z / num_all
    middle = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def mean_interval(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The mean over questions and its cluster bootstrap interval.

    Args:
        values: `[N]` a number for each question.
        groups: `[N]` the clip of each question; None takes questions as independent.
        draws: bootstrap samples.
        seed: of the draws; the same arguments always give the same interval.
        level: probability that the interval is to cover, in (0, 1).

    Raises:
        BadOption: no values, one that is not finite, another number of groups, or options out of range.
    """
    values_N = _finite("values", values)
    if draws < 1 or seed < 0 or not 0 < level < 1:
        raise BadOption(
            f"Need draws above 0, a seed from 0 up and a level between 0 and 1, got {draws}, {seed} and {level}."
        )
    group_N = _numbered(groups, len(values_N))
    sum_G, count_G = np.bincount(group_N, values_N), np.bincount(group_N)
    mean = float(values_N.mean())
    if len(sum_G) == 1:
        return Interval(mean, None, None)
    low, high = np.quantile(_resampled_means(sum_G, count_G, draws, seed), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def paired_difference(
    values: Sequence[float], reference: Sequence[float], groups: Sequence[Hashable] | None = None, **options
) -> Interval:
    """How much higher `values` are than `reference` on the same questions: `mean_interval` of the differences.

    Both come from the same drawn clips, so what makes a clip hard cancels out.

    Args:
        values, reference: `[N]`, the same questions in the same order.
        groups, **options: as in `mean_interval`.

    Raises:
        BadOption: as `mean_interval`, or unequal lengths.
    """
    values_N, reference_N = _finite("values", values), _finite("reference", reference)
    if len(values_N) != len(reference_N):
        raise BadOption(f"Need a reference for every value, got {len(values_N)} values and {len(reference_N)}.")
    return mean_interval(values_N - reference_N, groups, **options)


def _resampled_means(sum_G: np.ndarray, count_G: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """`[D]` means over the questions of G clips drawn with replacement."""
    rng, num = np.random.default_rng(seed), len(sum_G)
    means, rows = [], max(1, _BLOCK // num)
    for first in range(0, draws, rows):
        drawn_DG = rng.integers(num, size=(min(rows, draws - first), num))
        means.append(sum_G[drawn_DG].sum(1) / count_G[drawn_DG].sum(1))
    return np.concatenate(means)


def _finite(name: str, values: Sequence[float]) -> np.ndarray:
    values_N = np.asarray(values, dtype=np.float64)
    if values_N.ndim != 1 or not len(values_N):
        raise BadOption(f"{name} must be a list of at least one number, got shape {list(values_N.shape)}.")
    if len(bad := np.flatnonzero(~np.isfinite(values_N))):
        raise BadOption(f"{name} must be finite numbers, got {values_N[bad[0]]} at place {bad[0]}.")
    return values_N


def _numbered(groups: Sequence[Hashable] | None, num: int) -> np.ndarray:
    """`[N]` numbers from 0 in order of first appearance; any other labels of the same groups give the same."""
    if groups is None:
        return np.arange(num)
    if len(groups) != num:
        raise BadOption(f"Need a group for every value, got {num} values and {len(groups)} groups.")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups])
