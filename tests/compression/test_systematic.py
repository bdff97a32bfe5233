"""Systematic sampling: exact in size, as probable as asked, and even where scores say nothing."""

from __future__ import annotations

import pytest
import torch

from tokensieve.compression.systematic import inclusion_probabilities, systematic_sample, systematic_subset


def scores(count, spread=1.0, seed=0):
    return spread * torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_keep", [1, 7, 60, 99, 100])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 10.0, 1e4])
def test_probabilities_sum_to_the_budget_and_samples_meet_it(num_keep, spread):
    for seed in range(5):
        score = scores(100, spread, seed)
        prob = inclusion_probabilities(score, num_keep)
        assert ((prob >= 0) & (prob <= 1)).all()
        if spread < 1e3:  # above, a float64 cannot split what is left among equals
            assert prob.sum() == pytest.approx(num_keep, rel=1e-9)
        kept = systematic_sample(prob, num_keep)
        assert len(kept) == num_keep and (kept.diff() > 0).all() and 0 <= kept[0] and kept[-1] < 100


def test_probabilities_are_those_of_draws_without_replacement():
    score, num_keep = scores(12, 1.5), 4
    clocks = -torch.rand(200_000, 12, generator=torch.Generator().manual_seed(1)).log() / score.exp()
    rings = clocks.argsort(1)[:, :num_keep]
    drawn = torch.zeros(len(clocks), 12).scatter_(1, rings, 1.0).mean(0)
    torch.testing.assert_close(inclusion_probabilities(score, num_keep).float(), drawn, atol=0.03, rtol=0)


def test_equal_scores_give_an_even_grid():
    assert systematic_subset(torch.zeros(12), 3).tolist() == [1, 5, 9]
    kept = systematic_subset(torch.full((288,), 7.0), 14)
    assert set(kept.diff().tolist()) == {20, 21}


def test_tokens_that_stand_out_are_taken_and_the_rest_is_even():
    score = torch.zeros(100)
    score[[3, 4, 5, 77]] = 20.0
    kept = systematic_subset(score, 8).tolist()
    assert {3, 4, 5, 77} <= set(kept)
    others = sorted(set(kept) - {3, 4, 5, 77})
    assert len(others) == 4 and min(b - a for a, b in zip(others, others[1:], strict=False)) > 15


def test_a_constant_changes_nothing():
    score = scores(50)
    assert torch.equal(systematic_subset(score + 100, 9), systematic_subset(score, 9))


def test_marks_by_hand():
    # Sums .6, 1.2, 1.4, 2.0: 1/2 falls into the first, 3/2 into the last.
    assert systematic_sample(torch.tensor([0.6, 0.6, 0.2, 0.6]), 2).tolist() == [0, 3]


def test_probabilities_above_one_by_rounding_lose_no_token():
    assert systematic_sample(torch.tensor([0.2, 2.4, 0.3, 0.1]), 3).tolist() == [0, 1, 2]
