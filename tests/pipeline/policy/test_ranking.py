"""Training by ranking: the loss is the likelihood of the draws, and what is rewarded rises to the top of the video."""

from __future__ import annotations

import pytest
import torch

from tests.pipeline.policy.test_cacovid_training import FRAMES, PLACES, found, moved, planted, planted_sample, sgd
from tests.pipeline.policy.training import _few_questions, fit, judged_by, make_module, weights  # noqa: F401
from tokensieve.compression import get_method
from tokensieve.errors import BadOption
from tokensieve.pipeline.policy import ranking
from tokensieve.pipeline.policy.data import PolicyData
from tokensieve.policies import Objective


def make(**options):
    return planted(make_module("rank", question_aware=False, **options))


@pytest.fixture
def rewards(monkeypatch):
    return judged_by(monkeypatch, ranking)


def test_the_loss_by_hand():
    """Scores log 1, log 2, log 3; draws (2, 0) and (1, 2), of which the second is right."""
    keep = torch.tensor([1.0, 2.0, 3.0]).log().requires_grad_()
    logits = torch.stack([torch.zeros(3), keep], 1)
    order = torch.tensor([[[2, 0]], [[1, 2]]])
    loss = ranking.ranking_loss(logits, order, torch.tensor([0.0, 1.0]), Objective(advantage="dr_grpo"))
    loss.backward()
    # Advantages -1/2 and 1/2, mean over 2 draws and 2 subsets: d loss = -(1/8) * (d log p of draw 2 - of draw 1).
    first = torch.tensor([0.0, 0, 1]) - torch.tensor([1.0, 2, 3]) / 6 + torch.tensor([1.0, 0, 0])
    first -= torch.tensor([1.0, 2, 0]) / 3
    second = torch.tensor([0.0, 1, 0]) - torch.tensor([1.0, 2, 3]) / 6 + torch.tensor([0.0, 0, 1])
    second -= torch.tensor([1.0, 0, 3]) / 4
    torch.testing.assert_close(keep.grad, -(second - first) / 8)


def test_subsets_are_drawn_from_the_whole_video_and_what_would_be_kept_is_last(rewards):
    asked = rewards(found)
    module = make(subsets=64, min_keep=0.05, max_keep=0.05)
    kept = get_method("cacovid")(planted_sample(0).tokens, 10, policy=module.policy).kept
    fit(module, 1, data=PolicyData(clips=1, batch=1))
    (masks,) = asked
    assert masks.shape == (65, FRAMES * PLACES) and (masks.sum(1) == 10).all()
    assert masks[-1].nonzero()[:, 0].tolist() == kept.tolist()
    assert len(set(masks[:-1].view(64, FRAMES, PLACES).sum(2)[:, 0].tolist())) > 3  # not as many of every frame


def test_what_would_be_kept_teaches_nothing(rewards):
    rewards(lambda _, __, mask_GN, *___: torch.tensor([0.0] * (len(mask_GN) - 1) + [1.0], dtype=torch.float64))
    module = sgd(make())
    before = weights(module)
    trainer = fit(module, 3)
    assert moved(module, before) < 1e-7
    assert trainer.callback_metrics["reward"] == 0 and trainer.callback_metrics["greedy"] == 1


def test_budgets_differ_between_samples(rewards):
    asked = rewards(found)
    fit(make(subsets=2, min_keep=0.02, max_keep=0.5), 12, data=PolicyData(clips=12, batch=1))
    sizes = {int(mask[0].sum()) for mask in asked}
    assert len(sizes) > 5 and min(sizes) >= 4 and max(sizes) <= 96


def test_rewards_without_spread_teach_nothing(rewards):
    rewards(lambda _, __, mask_GN, *___: torch.ones(len(mask_GN), dtype=torch.float64))
    module = sgd(make())
    before = weights(module)
    fit(module, 3)
    assert moved(module, before) < 1e-7


def test_subsets_without_a_reward_are_left_out(rewards):
    def some(_, sample, mask_GN, *__):
        values = found(_, sample, mask_GN)
        values[1::2] = torch.nan
        return values

    rewards(some)
    module = sgd(make(subsets=16))
    before = weights(module)
    trainer = fit(module, 3)
    assert 0 < moved(module, before) < 1 and trainer.callback_metrics["reward"].isfinite()


def test_useful_tokens_are_found_in_the_whole_video(rewards):
    rewards(found)
    module = make(subsets=24, min_keep=0.03, max_keep=0.06, lr=6e-3)
    held_out = [planted_sample(10_000 + i) for i in range(20)]

    @torch.no_grad()
    def kept() -> float:
        shares = []
        for sample in held_out:
            mask = get_method("cacovid")(sample.tokens, 6, policy=module.policy).mask()
            shares.append(float(mask[sample.useful].double().mean()))
        return sum(shares) / len(shares)

    before = kept()
    fit(module, 40, data=PolicyData(clips=40, batch=3))
    assert kept() > max(0.8, before + 0.3), (before, kept())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"subsets": 1}, "subsets must be at least 2"),
        ({"min_keep": 0.2, "max_keep": 0.1}, "0 < min_keep <= max_keep < 1"),
        ({"max_keep": 1.0}, "0 < min_keep <= max_keep < 1"),
        ({"objective": Objective(kl_weight=0.1)}, "no reference"),
        ({"scorer": "cacovid"}, "Use scorer='light'"),
        ({"reward": "matsch"}, "match"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(BadOption, match=message):
        make_module("rank", **options)
