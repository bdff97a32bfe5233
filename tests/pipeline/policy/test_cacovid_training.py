"""CaCoVID's training with made-up rewards: what it updates on, what it leaves alone, and that it learns."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.pipeline.policy.training import _few_questions, fit, judged_by, make_module, weights  # noqa: F401
from tokensieve.compression import VisualTokens
from tokensieve.errors import BadOption
from tokensieve.pipeline.policy import cacovid
from tokensieve.pipeline.policy.data import PolicyData
from tokensieve.policies import CACOVID, Objective

FRAMES, PLACES, PLANTED = 4, 48, 5


def planted_sample(seed: int):
    """A video whose frames hold 5 useful tokens in all, which share a direction."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(FRAMES * PLACES, 192, generator=generator)
    useful = torch.randperm(len(features), generator=generator)[:PLANTED]
    features[useful] += 2 * torch.randn(192, generator=torch.Generator().manual_seed(0))
    crop = torch.zeros(len(features), dtype=torch.long)
    tokens = VisualTokens(features=features, grids=((FRAMES, 6, 8),), crop=crop)
    return SimpleNamespace(tokens=tokens, useful=useful, answer_ids=torch.tensor([1]), answer="1")


def finds_two(_, sample, mask_GN, *__):
    """1 where at least 2 of the useful tokens stay."""
    return (mask_GN[:, sample.useful].sum(1) >= 2).double()


def found(_, sample, mask_GN, *__):
    """The share of the useful tokens that stays."""
    return mask_GN[:, sample.useful].double().mean(1)


@pytest.fixture
def rewards(monkeypatch):
    return judged_by(monkeypatch, cacovid)


def planted(module):
    """The module with planted videos in place of clips: one a question."""
    module.samples = lambda clips: [
        planted_sample(clip.source.source[1] * 10 + q) for clip in clips for q in range(len(clip.questions))
    ]
    return module


def sgd(module):
    """With plain steps, which leave weights without gradient as they are."""

    def configure_optimizers():
        optimizer = torch.optim.SGD(module.policy.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)]

    module.configure_optimizers = configure_optimizers
    return module


def make(**options):
    return planted(make_module("cacovid", question_aware=False, **options))


def moved(module, before) -> float:
    return max(float((v - before[k]).abs().max()) for k, v in weights(module).items())


def constant(value):
    return lambda _, __, mask_GN, *___: torch.full((len(mask_GN),), value, dtype=torch.float64)


def some_nan(_, sample, mask_GN, *__):
    rewards = finds_two(_, sample, mask_GN)
    rewards[1::2] = torch.nan
    return rewards


@pytest.mark.parametrize("values", [[0.0], [1.0], [0.3], [torch.nan], [1.0, torch.nan]])
def test_rewards_without_spread_teach_nothing(values, rewards):
    rewards(lambda _, __, mask_GN, *___: torch.tensor(values * len(mask_GN))[: len(mask_GN)].double())
    module = sgd(make())
    before = weights(module)
    trainer = fit(module, 4)
    assert moved(module, before) == 0 and trainer.callback_metrics["loss"] == 0


def test_unscored_subsets_are_left_out(rewards):
    rewards(some_nan)
    module = sgd(make(rate=0.25, max_rate=0.25, token_subsets=16))
    before = weights(module)
    trainer = fit(module, 4)
    assert 0 < moved(module, before) < 1 and trainer.callback_metrics["loss"].isfinite()
    assert trainer.callback_metrics["reward"].isfinite()


def test_subsets_of_all_tokens_teach_nothing(rewards):
    count = iter(range(10**6))
    asked = rewards(lambda _, __, mask_GN, *___: torch.tensor([float(next(count)) for _ in mask_GN]).double())
    module = sgd(make(rate=1.0, min_rate=1.0, max_rate=1.0, frame_subsets=0))
    before = weights(module)
    trainer = fit(module, 2)
    assert all(mask.all() for mask in asked)
    assert moved(module, before) == 0 and trainer.callback_metrics["loss"] == 0


def test_subsets_have_one_size_and_the_greedy_one_is_first(rewards):
    asked = rewards(finds_two)
    module = make(rate=0.125, min_rate=0.125, max_rate=0.125, rounds=1)
    old = module.policy(planted_sample(0).tokens)[0].diff(dim=1)[:, 0].view(FRAMES, PLACES)
    fit(module, 1, data=PolicyData(clips=1, batch=1))
    (masks,) = asked
    assert masks.shape == (6, FRAMES * PLACES) and (masks.sum(1) == 24).all()
    want = torch.zeros(FRAMES, PLACES, dtype=torch.bool).scatter(1, old.topk(6, 1).indices, True)
    assert torch.equal(masks[0].view(FRAMES, PLACES), want)
    assert (masks[:4].view(4, FRAMES, PLACES).sum(2) == 6).all()  # of every frame
    assert (masks[4:].view(2, FRAMES, PLACES).any(2).sum(1) == 1).all()  # of one frame in eight


def test_rounds_draw_from_the_first_policy_and_learn_from_all_before(rewards, monkeypatch):
    rewards(finds_two)
    seen = []

    def loss(tokens, frames, **options):
        seen.append((tokens, frames))
        return real(tokens, frames, **options)

    real = cacovid.cacovid_loss
    monkeypatch.setattr(cacovid, "cacovid_loss", loss)
    trainer = fit(make(rounds=3), 3, data=PolicyData(clips=1, batch=1))
    assert trainer.global_step == 3
    assert [len(tokens.rewards) for tokens, _ in seen] == [4, 8, 12]
    assert [len(frames.rewards) for _, frames in seen] == [2, 4, 6]
    assert all(torch.equal(tokens.old_logits, seen[0][0].old_logits) for tokens, _ in seen)
    assert torch.equal(seen[0][0].logits, seen[0][0].old_logits)
    assert not torch.equal(seen[1][0].logits, seen[1][0].old_logits)
    assert torch.equal(seen[2][0].chosen[:8], seen[1][0].chosen)
    assert not torch.equal(seen[2][0].chosen[8:], seen[1][0].chosen[:4])


@pytest.mark.parametrize(
    "value, kept",
    [(1.0, [1, 1, 1]), (0.9, [1, 1, 1]), (0.0, [1, 2, 4, 6, 6]), (0.1, [1, 2, 4]), (0.5, [1, 1]), (torch.nan, [1, 1])],
)
def test_the_rate_follows_the_mean_reward(value, kept, rewards):
    asked = rewards(constant(value))
    fit(make(rounds=len(kept), frame_subsets=0), len(kept), data=PolicyData(clips=1, batch=1))
    assert [int(mask[0].sum()) // FRAMES for mask in asked] == kept  # 0.02, 0.04, 0.08, 0.12 of 48 tokens


def test_a_high_rate_is_halved_down_to_the_least(rewards):
    asked = rewards(constant(1.0))
    options = dict(rate=0.5, min_rate=0.2, max_rate=0.5, frame_subsets=0)
    fit(make(rounds=3, **options), 3, data=PolicyData(clips=1, batch=1))
    assert [int(mask[0].sum()) // FRAMES for mask in asked] == [24, 12, 10]


def test_training_stops_at_the_last_step_in_the_middle_of_a_batch(rewards):
    rewards(finds_two)
    assert fit(make(rounds=5), 7).global_step == 7


def test_images_have_no_frames_to_draw_and_still_a_gradient_everywhere(rewards):
    rewards(finds_two)
    module = make(rate=0.25, max_rate=0.25)
    image = planted_sample(0)
    tokens = VisualTokens(features=image.tokens.features, grids=((1, 12, 16),), crop=image.tokens.crop)
    module.samples = lambda clips: [SimpleNamespace(**(vars(image) | {"tokens": tokens}))] * len(clips[0].questions)
    seen = []
    module.on_after_backward = lambda: seen.append([p.grad is not None for p in module.parameters()])
    fit(module, 1, data=PolicyData(clips=1, batch=1))
    assert len(seen) == 1 and all(seen[0])


@pytest.mark.parametrize("sampler, steps", [("ocss", 60), ("gumbel", 30)])
def test_the_policy_learns_what_is_rewarded(sampler, steps, rewards):
    rewards(found)
    options = dict(rate=0.125, min_rate=0.125, max_rate=0.125, token_subsets=24, frame_subsets=0, rounds=1, lr=6e-3)
    module = make(sampler=sampler, **options)
    held_out = [planted_sample(10_000 + i) for i in range(20)]

    @torch.no_grad()
    def greedy() -> float:
        rewards = []
        for sample in held_out:
            score = module.policy(sample.tokens)[0].diff(dim=1)[:, 0].view(FRAMES, PLACES)
            mask = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(6, 1).indices, True)
            rewards.append(found(None, sample, mask.view(1, -1)))
        return float(torch.cat(rewards).mean())

    before = greedy()
    fit(module, steps, data=PolicyData(clips=100, batch=4))
    assert before < 0.2 and greedy() > 0.6, (before, greedy())


def test_parts_of_the_objective_are_used(rewards):
    rewards(finds_two)
    options = dict(rate=0.25, max_rate=0.25, token_subsets=16)
    trained = []
    for objective in (CACOVID, Objective(advantage="rloo", kl_weight=0.1)):
        module = sgd(make(objective=objective, **options))
        fit(module, 2)
        trained.append(weights(module))
    assert any(not torch.equal(trained[0][k], trained[1][k]) for k in trained[0])


@pytest.mark.parametrize(
    "options, word",
    [
        ({"sampler": "all"}, "sampler"),
        ({"reward": "matsch"}, "Did you mean 'match'"),
        ({"rate": 0.0}, "min_rate <= rate"),
        ({"rate": 0.2}, "max_rate"),
        ({"max_rate": 1.5}, "max_rate"),
        ({"rounds": 0}, "rounds"),
        ({"token_subsets": 1}, "token_subsets"),
        ({"frame_subsets": 1}, "frame_subsets"),
    ],
)
def test_what_is_refused(options, word):
    with pytest.raises(BadOption, match=word):
        make_module("cacovid", **options)
