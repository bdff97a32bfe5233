"""Subsets scored in one batch against one call of the model for each, for every family."""

from __future__ import annotations

import pytest
import torch

import tokensieve as ts
from tests.pipeline.tiny_families import FAMILIES, make_inputs, make_model
from tokensieve.compression import Plan
from tokensieve.datasets.clip_files import clip_frames
from tokensieve.datasets.clips import make_clip
from tokensieve.errors import BadOption
from tokensieve.pipeline.adapter import VLMAdapter
from tokensieve.pipeline.policy.samples import Sample, encode_samples
from tokensieve.pipeline.policy.scoring import SubsetScorer
from tokensieve.pipeline.vlm import VLM

# Families whose prompts here hold one image or video.
ONE_ITEM = [name for name in FAMILIES if name not in ("llava", "gemma3", "internvl", "smolvlm", "idefics3")]


def make_sample(name):
    vlm = VLM(make_model(name))
    inputs = {k: v for k, v in make_inputs(name, 1).items()}
    items = vlm.adapter.encode(inputs, frames_as_video=name in ("llava", "gemma3", "internvl"))
    (item,) = vlm.adapter.with_questions(items, inputs, None)
    text = {k: v for k, v in inputs.items() if v.shape == inputs["input_ids"].shape}
    answer = torch.tensor([7, 11, 93])
    return vlm, Sample(inputs=text, item=item, question="?", answer=None, answer_ids=answer)


def random_masks(num_tokens, num_subsets=5, keep=3):
    order = torch.rand(num_subsets, num_tokens, generator=torch.Generator().manual_seed(0)).argsort(1)
    return torch.zeros(num_subsets, num_tokens, dtype=torch.bool).scatter(1, order[:, :keep], True)


@pytest.mark.parametrize("name", [*ONE_ITEM, "llava", "gemma3", "internvl", "smolvlm"])
def test_one_batch_equals_a_call_for_each(name):
    vlm, sample = make_sample(name)
    masks = random_masks(len(sample.tokens))
    got = SubsetScorer(vlm).answer_logits(sample, masks)
    assert got.shape == (5, 3, 97)
    answer = sample.answer_ids[None]
    inputs = {
        k: torch.cat([v, {"input_ids": answer, "attention_mask": answer * 0 + 1}.get(k, answer * 0)], 1)
        for k, v in sample.inputs.items()
    }
    for row, mask in zip(got, masks, strict=True):
        plan = Plan(mask.nonzero()[:, 0], len(mask))
        with torch.no_grad():
            logits = vlm.model(**vlm.adapter.emit(inputs, [sample.item], [plan], target="forward")).logits[0]
        torch.testing.assert_close(row, logits[-4:-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llava_onevision-video", "qwen2_5_vl", "qwen3_vl", "llava_next"])
def test_a_shared_prefix_changes_nothing(name, monkeypatch):
    vlm, sample = make_sample(name)
    masks = random_masks(len(sample.tokens))
    calls = []
    vlm.model.register_forward_pre_hook(lambda m, a, kw: calls.append(tuple(kw["input_ids"].shape)), with_kwargs=True)
    prefix = int(sample.item.slots.min())
    monkeypatch.setattr("tokensieve.pipeline.policy.scoring.MIN_SHARED", 1)
    shared = SubsetScorer(vlm).answer_logits(sample, masks)
    assert calls[0] == (1, prefix) and calls[1][0] == 5
    monkeypatch.setattr("tokensieve.pipeline.policy.scoring.MIN_SHARED", 10**6)
    torch.testing.assert_close(SubsetScorer(vlm).answer_logits(sample, masks), shared, atol=1e-5, rtol=0)
    assert calls[2] == (5, calls[1][1] + prefix)


@pytest.fixture(scope="module")
def tiny():
    return ts.load("tiny")


@pytest.fixture(scope="module")
def samples(tiny):
    clip = make_clip("test", 0)
    return encode_samples(tiny, clip_frames(clip), [q.text for q in clip.questions], [q.answer for q in clip.questions])


def test_answers_with_all_tokens_are_the_models_own(tiny, samples):
    clip = make_clip("test", 0)
    for sample, question in zip(samples, clip.questions, strict=True):
        everything = torch.ones(2, len(sample.tokens), dtype=torch.bool)
        said = SubsetScorer(tiny).answers(sample, everything)
        assert said == [str(tiny.answer(clip_frames(clip), question.text))] * 2
        assert sample.answer == question.answer and sample.tokens.question.text == question.text


@pytest.mark.parametrize("shared", [1, 10**6])
def test_generated_answers_are_those_of_single_calls(tiny, samples, shared, monkeypatch):
    monkeypatch.setattr("tokensieve.pipeline.policy.scoring.MIN_SHARED", shared)
    sample = samples[1]
    masks = random_masks(len(sample.tokens), keep=9)
    said = SubsetScorer(tiny).answers(sample, masks)
    for text, mask in zip(said, masks, strict=True):
        plan = Plan(mask.nonzero()[:, 0], len(mask))
        emitted = tiny.adapter.emit(sample.inputs, [sample.item], [plan])
        ids = tiny.model.generate(**emitted, max_new_tokens=8, do_sample=False)
        new = tiny.processor.batch_decode(ids[:, emitted["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == new[0].strip()


def test_the_tower_runs_once_a_clip(tiny):
    clip = make_clip("test", 1)
    runs = []
    hook = tiny.adapter.base.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    try:
        made = encode_samples(tiny, clip_frames(clip), [q.text for q in clip.questions])
        scorer = SubsetScorer(tiny)
        for sample in made:
            scorer.answers(sample, random_masks(len(sample.tokens), keep=5))
    finally:
        hook.remove()
    assert len(runs) == 1 and made[0].answer is None


def test_the_models_own_answer(tiny, samples):
    own = SubsetScorer(tiny).own_answer(samples[0])
    assert torch.equal(own, samples[0].answer_ids)


def test_what_is_refused(tiny, samples):
    scorer = SubsetScorer(tiny)
    masks = random_masks(len(samples[0].tokens))
    uneven = masks.clone()
    uneven[0] = True
    with pytest.raises(BadOption, match="one size"):
        scorer.answers(samples[0], uneven)
    blank = encode_samples(tiny, clip_frames(make_clip("test", 1)), ["How many digits are there?"])[0]
    with pytest.raises(BadOption, match="no answer"):
        scorer.answer_logits(blank, masks)
    with pytest.raises(BadOption, match="as many questions"):
        encode_samples(tiny, clip_frames(make_clip("test", 1)), [])
    try:
        with pytest.raises(BadOption, match="judge"):
            SubsetScorer(tiny.compress("uniform", 0.5))
    finally:
        tiny.compress(None)


def test_the_adapters_placeholders_must_fit():
    adapter = VLMAdapter(make_model("llava_onevision-video"))
    inputs = make_inputs("llava_onevision-video", 1)
    items = adapter.encode(inputs)
    with pytest.raises(BadOption, match="placeholders"):
        adapter.place(items, inputs["input_ids"][:, :5])
