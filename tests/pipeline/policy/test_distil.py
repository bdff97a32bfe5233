"""The soft choice, the student that sees it, and the trainer that learns from it without labels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.pipeline.policy.test_scoring import make_sample, random_masks
from tests.pipeline.policy.training import _few_questions, few_questions, make_module  # noqa: F401
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.policy.data import source_of_draws
from tokensieve.pipeline.policy.distil import DistilModule, most_weight, soft_top_k
from tokensieve.pipeline.policy.samples import with_answer


def scores(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


class TestSoftTopK:
    @pytest.mark.parametrize("heat", [10.0, 1.0, 0.1, 0.01])
    @pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
    def test_sums_to_the_budget(self, heat, spread):
        budgets = torch.tensor([0.3, 1.0, 7.5, 8.64, 72.0, 287.0])
        stays = soft_top_k(spread * scores(6, 288), budgets, heat)
        torch.testing.assert_close(stays.sum(1), budgets, atol=1e-3, rtol=1e-4)
        assert ((stays >= 0) & (stays <= 1)).all()

    def test_higher_scores_stay_more(self):
        score = scores(3, 50)
        stays = soft_top_k(score, torch.tensor([3.0, 20.5, 49.0]), 0.5)
        assert torch.equal(stays.argsort(1), score.argsort(1))

    def test_no_heat_is_the_hard_choice(self):
        score = scores(4, 40)
        stays = soft_top_k(score, torch.tensor([1.0, 5.0, 20.0, 39.0]), 1e-4)
        for row, hard, keep in zip(stays, score, (1, 5, 20, 39), strict=True):
            want = torch.zeros(40).index_fill(0, hard.topk(keep).indices, 1.0)
            torch.testing.assert_close(row, want, atol=1e-3, rtol=0)

    def test_equal_scores_share(self):
        stays = soft_top_k(torch.zeros(1, 8), torch.tensor([2.0]), 0.1)
        torch.testing.assert_close(stays, torch.full((1, 8), 0.25))
        tied = soft_top_k(torch.tensor([[5.0, 1.0, 1.0, -5.0]]), torch.tensor([2.0]), 0.01)
        torch.testing.assert_close(tied, torch.tensor([[1.0, 0.5, 0.5, 0.0]]), atol=1e-4, rtol=0)

    def test_a_shift_of_all_scores_changes_nothing(self):
        score, budget = scores(2, 30), torch.tensor([4.0, 9.5])
        torch.testing.assert_close(soft_top_k(score + 3, budget, 0.3), soft_top_k(score, budget, 0.3))

    @pytest.mark.parametrize("heat", [2.0, 0.3])
    def test_gradients(self, heat):
        score = scores(2, 7, dtype=torch.float64).requires_grad_()
        budget = torch.tensor([2.0, 3.5], dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda s: soft_top_k(s, budget, heat), score)
        (grad,) = torch.autograd.grad(soft_top_k(score, budget, heat).sum(), score)
        assert grad.abs().max() < 1e-9  # the budget is met whatever the scores

    def test_gradients_stay_finite_where_all_is_decided(self):
        score = (100 * torch.arange(20.0))[None].requires_grad_()
        stays = soft_top_k(score, torch.tensor([5.0]), 1e-3)
        assert stays.sum().item() == pytest.approx(5, abs=1e-3)
        (grad,) = torch.autograd.grad((stays * scores(20)).sum(), score)
        assert grad.isfinite().all()


FAMILIES = [
    "llava_onevision-video",
    "llava_onevision-image",
    "llava",
    "llava_next",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
]


def module_of(vlm, monkeypatch) -> DistilModule:
    monkeypatch.setattr("tokensieve.pipeline.loader.load", lambda *_, **__: vlm)
    return DistilModule()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_with_hard_weights_is_the_model_with_the_kept_tokens(family, monkeypatch):
    vlm, sample = make_sample(family)
    module = module_of(vlm, monkeypatch)
    longer = with_answer(sample, torch.tensor([5, 17, 23, 8, 93]))
    masks = random_masks(len(sample.tokens), num_subsets=3)
    samples, masks = [sample, longer, sample], [masks[0], masks[1], torch.ones_like(masks[2])]
    student = module.student_logits(samples, [mask.float() for mask in masks])
    full = module.judge.answer_logits(sample, masks[2][None])[0]
    for own, one, mask in zip(student, samples, masks, strict=True):
        want = module.judge.answer_logits(one, mask[None])[0]
        torch.testing.assert_close(own, want, atol=1e-5, rtol=0)
    assert (student[0] - full).abs().max() > 1e-3


def test_tokens_next_to_no_weight_are_not_even_given():
    score = scores(1, 288)
    stays = soft_top_k(score, torch.tensor([10.0]), 0.01)[0]
    seen = most_weight(stays)
    assert seen.sum() == 56 and stays[~seen].max() < 1e-6  # 4 times the budget and 16
    assert most_weight(torch.ones(20)).all() and most_weight(torch.full((20,), 0.5)).all()
    assert torch.equal(most_weight(torch.zeros(40)), torch.arange(40) < 16)


def test_leaving_them_out_changes_next_to_nothing(monkeypatch):
    vlm, sample = make_sample("llava_next")
    module = module_of(vlm, monkeypatch)
    stays = soft_top_k(3 * scores(1, len(sample.tokens)), torch.tensor([3.0]), 0.1)[0]
    assert not most_weight(stays).all()
    (few,) = module.student_logits([sample], [stays])
    monkeypatch.setattr("tokensieve.pipeline.policy.distil.SPARE", 1000)
    (all_of_them,) = module.student_logits([sample], [stays])
    torch.testing.assert_close(few, all_of_them, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_models_whose_images_look_ahead_are_refused(family, monkeypatch):
    vlm, _ = make_sample(family)
    with pytest.raises(UnsupportedModel, match="causal"):
        module_of(vlm, monkeypatch)


def test_a_sliding_window_is_refused(monkeypatch):
    vlm, _ = make_sample("llava_onevision-video")
    vlm.model.config.text_config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(UnsupportedModel, match="causal"):
        module_of(vlm, monkeypatch)


def test_gradients_of_the_student(monkeypatch):
    """Every token's weight gets one, and it is the slope."""
    vlm, sample = make_sample("llava_onevision-video")
    module = module_of(vlm, monkeypatch)
    weight = torch.full((len(sample.tokens),), 0.5, requires_grad=True)

    def loss(w):
        (own,) = module.student_logits([sample], [w])
        return own.log_softmax(-1)[0, 7]

    (grad,) = torch.autograd.grad(loss(weight), weight)
    assert (grad != 0).all()
    for i in (0, 7):
        step = torch.zeros_like(weight).index_fill(0, torch.tensor(i), 0.05)
        with torch.no_grad():
            slope = (loss(weight + step) - loss(weight - step)) / 0.1
        assert float(grad[i]) == pytest.approx(float(slope), rel=0.05, abs=1e-5)
    assert all(p.grad is None for p in vlm.model.parameters())


class TestModule:
    @pytest.fixture
    def module(self):
        module = make_module("distil")
        module._trainer = SimpleNamespace(max_steps=10, global_step=0)
        return module

    def test_the_teacher_is_asked_once(self, module):
        samples = module.samples(few_questions("train", 2))
        first = module.judge.teach(samples[0])
        assert module.judge.teach(samples[0]) is first
        own, logits = first
        assert torch.equal(own, module.judge.own_answer(samples[0])) and logits.shape[0] == len(own)
        assert torch.equal(logits.argmax(-1), own) and not logits.requires_grad

    def test_labels_play_no_part(self, module):
        (clip,) = few_questions("train", 1)
        (sample,) = module.samples([clip])
        losses = [
            module._losses([s], [source_of_draws(0, 0, 0)], heat=0.3)[0].item()
            for s in (sample, with_answer(sample, None), with_answer(sample, torch.tensor([3, 4])))
        ]
        assert losses[0] == losses[1] == losses[2] > 0

    def test_budgets_are_drawn_between_the_bounds(self, module):
        logits = torch.zeros(288, 2)
        budgets = [float(module._stays(logits, 0.3, source_of_draws(0, i, 0)).sum()) / 288 for i in range(40)]
        assert 0.03 <= min(budgets) + 1e-5 < 0.04 and 0.2 < max(budgets) <= 0.25 + 1e-5
        assert sorted(budgets)[20] == pytest.approx((0.03 * 0.25) ** 0.5, rel=0.35)

    def test_no_noise_is_deterministic_but_for_the_budget(self):
        module = make_module("distil", noise=0.0, min_keep=0.1, max_keep=0.1)
        logits = scores(288, 2)
        one, other = (module._stays(logits, 0.3, source_of_draws(0, i, 0)) for i in range(2))
        assert torch.equal(one, other)
        torch.testing.assert_close(one, soft_top_k(logits.diff(dim=1).T, torch.tensor([28.8]), 0.3)[0])

    def test_the_heat_falls_exponentially(self):
        module = make_module("distil", first_heat=1.0, last_heat=0.01)
        heats = []
        for step in (0, 5, 10, 11):
            module._trainer = SimpleNamespace(max_steps=10, global_step=step)
            heats.append(module._heat())
        assert heats == pytest.approx([1.0, 0.1, 0.01, 0.01])

    def test_a_few_steps_lower_the_loss(self):
        module = make_module("distil", divergence="reverse", noise=0.0, min_keep=0.05, max_keep=0.05)
        samples = module.samples(few_questions("train", 3))
        optimizer = torch.optim.AdamW(module.policy.parameters(), lr=3e-3)
        losses = []
        for _ in range(8):
            draws = [source_of_draws(0, i, 0) for i in range(len(samples))]
            loss = torch.stack(module._losses(samples, draws, heat=0.3)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0], losses

    @pytest.mark.parametrize(
        "options, word",
        [
            ({"divergence": "kl"}, "divergence"),
            ({"min_keep": 0.3, "max_keep": 0.2}, "min_keep"),
            ({"max_keep": 1.0}, "max_keep"),
            ({"min_keep": 0}, "keep"),
            ({"first_heat": 0.1, "last_heat": 0.2}, "last_heat"),
            ({"last_heat": 0.0}, "last_heat"),
            ({"noise": -1.0}, "noise"),
            ({"scorer": "cacovid"}, "scorer"),
        ],
    )
    def test_what_is_refused(self, options, word):
        with pytest.raises(BadOption, match=word):
            make_module("distil", **options)
