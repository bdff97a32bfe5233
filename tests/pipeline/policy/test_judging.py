"""Rewards against what they stand for: generating, summing log-probabilities, torch's own KL."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import tokensieve as ts
from tests.pipeline.policy.test_scoring import make_sample, random_masks
from tokensieve.compression import Plan
from tokensieve.datasets.clip_files import clip_frames
from tokensieve.datasets.clips import make_clip
from tokensieve.errors import BadOption
from tokensieve.pipeline.policy.judging import check_reward, divergence, subset_rewards
from tokensieve.pipeline.policy.samples import encode_samples, with_answer
from tokensieve.pipeline.policy.scoring import SubsetScorer
from tokensieve.policies.rewards import REWARDS


@pytest.fixture(scope="module")
def scorer():
    return SubsetScorer(ts.load("tiny"))


@pytest.fixture(scope="module")
def samples(scorer):
    clip = make_clip("test", 0)
    asked = [q.text for q in clip.questions]
    return encode_samples(scorer.vlm, clip_frames(clip), asked, [q.answer for q in clip.questions])


@pytest.fixture(scope="module")
def unlabelled(scorer):
    clip = make_clip("test", 0)
    return encode_samples(scorer.vlm, clip_frames(clip), [clip.questions[1].text])[0]


def logits(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_match_is_generating_and_comparing_tokens(scorer, samples):
    rewards = []
    for sample in samples:
        masks = random_masks(len(sample.tokens), num_subsets=8, keep=20)
        got = subset_rewards(scorer, sample, masks, "match")
        assert got.shape == (8,) and got.dtype == torch.float64
        for mask, reward in zip(masks, got.tolist(), strict=True):
            emitted = scorer.vlm.adapter.emit(sample.inputs, [sample.item], [Plan(mask.nonzero()[:, 0], len(mask))])
            ids = scorer.vlm.model.generate(**emitted, max_new_tokens=8, do_sample=False)
            new = ids[0, emitted["input_ids"].shape[1] :].tolist()
            assert reward == float(new == sample.answer_ids.tolist())
            rewards.append(reward)
    assert 0 < sum(rewards) < len(rewards)
    longer = with_answer(samples[1], torch.cat([samples[1].answer_ids[:1], samples[1].answer_ids]))
    everything = torch.ones_like(masks)
    assert (subset_rewards(scorer, samples[1], everything, "match") == 1).all()
    assert (subset_rewards(scorer, longer, everything, "match") == 0).all()  # its first token is right


@pytest.mark.parametrize("kind", ["exact", "free-form"])
def test_a_named_reward_judges_what_is_generated(kind, scorer, samples):
    sample = samples[1]
    masks = random_masks(len(sample.tokens), keep=20)
    want = [REWARDS[kind](text, sample.answer) for text in scorer.answers(sample, masks)]
    assert subset_rewards(scorer, sample, masks, kind).tolist() == want
    everything = torch.ones_like(masks)
    assert (subset_rewards(scorer, sample, everything, "exact") == 1).all()


def test_loglik_is_the_gain_over_no_visual_token(scorer, samples):
    sample = samples[1]
    masks = random_masks(len(sample.tokens), keep=3)
    got = subset_rewards(scorer, sample, masks, "loglik")

    def loglik(mask):
        log_probs = scorer.answer_logits(sample, mask[None])[0].double().log_softmax(-1)
        return sum(float(log_probs[i, token]) for i, token in enumerate(sample.answer_ids.tolist()))

    nothing = loglik(torch.zeros_like(masks[0]))
    for mask, reward in zip(masks, got.tolist(), strict=True):
        assert reward == pytest.approx(loglik(mask) - nothing, abs=1e-4)
    assert got.std() > 0.1


@pytest.mark.parametrize("kind, empty", [("match", None), ("loglik", 0.0), ("agree", None), ("exact", None)])
def test_subsets_of_all_and_of_none(kind, empty, scorer, samples):
    all_2N = torch.ones(2, len(samples[1].tokens), dtype=torch.bool)
    assert subset_rewards(scorer, samples[1], all_2N, kind).isfinite().all()
    none = subset_rewards(scorer, samples[1], ~all_2N, kind)
    assert none.isfinite().all() and none[0] == none[1]
    if empty is not None:
        assert none.tolist() == pytest.approx([empty] * 2, abs=1e-5)


@pytest.mark.parametrize("family", ["llava_onevision-video", "qwen2_5_vl", "qwen3_vl", "paligemma"])
def test_other_families_without_any_visual_token(family):
    vlm, sample = make_sample(family)
    none = torch.zeros(2, len(sample.tokens), dtype=torch.bool)
    assert subset_rewards(SubsetScorer(vlm), sample, none, "loglik").tolist() == pytest.approx([0, 0], abs=1e-5)


def test_agree_is_best_with_all_tokens(scorer, samples, unlabelled):
    masks = random_masks(len(unlabelled.tokens), num_subsets=6, keep=5)
    got = subset_rewards(scorer, unlabelled, masks, "agree")
    assert (got < -1e-6).all()
    whole = subset_rewards(scorer, unlabelled, torch.ones_like(masks), "agree")
    assert whole.tolist() == pytest.approx([0.0] * 6, abs=1e-5)
    # What the model itself says counts, not the label.
    own = scorer.own_answer(unlabelled)
    mislabelled = with_answer(samples[1], own.flip(0))
    torch.testing.assert_close(subset_rewards(scorer, mislabelled, masks, "agree"), got)
    torch.testing.assert_close(subset_rewards(scorer, with_answer(unlabelled, own), masks, "agree"), got)


def test_what_is_refused(scorer, unlabelled):
    masks = random_masks(len(unlabelled.tokens))
    for kind in ("match", "loglik", "exact"):
        with pytest.raises(BadOption, match="right answer.*agree"):
            subset_rewards(scorer, unlabelled, masks, kind)
    with pytest.raises(BadOption, match="'matsch'.*loglik.*Did you mean 'match'"):
        check_reward("matsch")
    with pytest.raises(BadOption, match="divergence"):
        divergence(logits(1, 2, 3), logits(1, 2, 3), "kl")


def kl(p, q):
    """KL(p || q) by torch, mean over answer tokens."""
    return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean(-1)


def test_divergences_are_torchs():
    teacher, student = logits(4, 3, 11), logits(4, 3, 11, seed=1)
    torch.testing.assert_close(divergence(teacher, student, "forward"), kl(teacher, student))
    torch.testing.assert_close(divergence(teacher, student, "reverse"), kl(student, teacher))
    middle = ((teacher.softmax(-1) + student.softmax(-1)) / 2).log()
    want = (kl(teacher, middle) + kl(student, middle)) / 2
    torch.testing.assert_close(divergence(teacher, student, "jsd"), want)
    torch.testing.assert_close(divergence(student, teacher, "jsd"), want)
    torch.testing.assert_close(divergence(teacher[:1], student)[2:3], divergence(teacher[:1], student[2:3]))


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_bounds_of_divergences(kind):
    teacher, student = logits(4, 3, 11), 100 * logits(4, 3, 11, seed=1)
    student.requires_grad_()
    got = divergence(teacher, student, kind)
    assert (got > 0).all() and got.isfinite().all()
    got.sum().backward()
    assert student.grad.isfinite().all() and student.grad.abs().max() > 0
    assert divergence(teacher, teacher + 5, kind).abs().max() < 1e-6
    if kind == "jsd":
        one, other = torch.tensor([[[100.0, -100.0]]]), torch.tensor([[[-100.0, 100.0]]])
        assert float(divergence(one, other, kind)) == pytest.approx(math.log(2), abs=1e-6)
        assert (got <= math.log(2) + 1e-6).all()


def test_half_precision_logits_are_widened():
    teacher, student = logits(2, 3, 11).bfloat16(), logits(2, 3, 11, seed=1).bfloat16()
    want = divergence(teacher.float(), student.float())
    assert divergence(teacher, student).dtype == torch.float32
    torch.testing.assert_close(divergence(teacher, student), want)
