from __future__ import annotations

import math

import pytest
import torch

from tokensieve.decoding import borda_votes, self_certainty
from tokensieve.errors import BadOption


def test_self_certainty_is_the_divergence_from_uniform():
    logits = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0)) * 3
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 0]])
    uniform = torch.full((50,), 1 / 50)
    token = torch.nn.functional.kl_div(logits.log_softmax(-1), uniform.expand_as(logits), reduction="none").sum(-1)
    want = (token * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(self_certainty(logits, mask), want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(self_certainty(logits + 7, mask), want, atol=1e-5, rtol=1e-5)


def test_uniform_and_peaked():
    ones = torch.ones(1, 2)
    assert self_certainty(torch.full((1, 2, 1000), 3.0), ones).abs() < 1e-6
    peaked = torch.zeros(1, 2, 1000)
    peaked[..., 5] = 100
    assert self_certainty(peaked, ones) > 90


def test_an_empty_answer_is_the_least_certain():
    assert self_certainty(torch.randn(2, 3, 9), torch.tensor([[0, 0, 0], [1, 1, 0]]))[0] == -math.inf


def test_masked_logits_fail_loudly():
    logits = torch.zeros(1, 2, 5)
    logits[0, 0, 3] = -torch.inf
    with pytest.raises(BadOption, match="raw logits"):
        self_certainty(logits, torch.tensor([[1, 1]]))
    assert self_certainty(logits, torch.tensor([[0, 1]])).isfinite()  # padding may hold anything


def test_votes_by_hand():
    """Ranks: b 4th, a 2nd, b 3rd, c 1st; votes (5 - rank)^p."""
    certainty, answers = [0.1, 0.7, 0.3, 0.9], ["b", "a", "b", "c"]
    vote = borda_votes(certainty, answers, power=1)
    assert vote.votes == {"b": 3, "a": 3, "c": 4} and vote.winner == 3
    vote = borda_votes(certainty, answers, power=0.3)
    assert vote.votes["b"] == pytest.approx(1 + 2**0.3) and vote.winner == 0  # the earliest b, not the surer one
    assert borda_votes(certainty, answers, power=0).votes == {"b": 2, "a": 1, "c": 1}


def test_limits_of_the_power():
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        certainty = torch.rand(9, generator=generator)
        answers = torch.randint(4, (9,), generator=generator).tolist()
        majority = borda_votes(certainty, answers, power=0)
        assert answers.count(answers[majority.winner]) == max(answers.count(a) for a in answers)
        assert answers[borda_votes(certainty, answers, power=60).winner] == answers[int(certainty.argmax())]
        assert borda_votes(certainty.exp() * 3 - 1, answers, 0.5) == borda_votes(certainty, answers, 0.5)


def test_ties_and_missing_answers():
    assert borda_votes([1.0, 1.0], ["x", "y"], power=0).winner == 0
    assert borda_votes([1.0, 1.0], ["x", "y"], power=1).votes == {"x": 2, "y": 1}
    assert borda_votes([0.9, 0.1, 0.2], [None, "y", None], power=2).winner == 1
    assert borda_votes([0.9, 0.1, 0.2], [None, "y", None], power=2).votes == {"y": 1}
    assert borda_votes([0.1, 0.9], [None, None], power=1) == borda_votes([0.1, 0.9], [None, None], power=0)
    assert borda_votes([0.1, 0.9], [None, None], power=1).winner == 0
    assert borda_votes([0.4], ["x"], power=3).winner == 0


@pytest.mark.parametrize(("certainty", "answers", "power"), [([], [], 1), ([1.0], ["a", "b"], 1), ([1.0], ["a"], -1)])
def test_bad_votes(certainty, answers, power):
    with pytest.raises(BadOption):
        borda_votes(certainty, answers, power)
