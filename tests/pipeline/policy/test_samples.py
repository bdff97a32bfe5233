"""Samples against `VLM.prepare`, with every family's processor: the same prompts, places and positions."""

from __future__ import annotations

import pytest
import torch

from tests.pipeline.tiny_processors import RECIPES, make_vlm, noise
from tokensieve.compression import Plan
from tokensieve.pipeline.policy.samples import encode_samples
from tokensieve.pipeline.prompt import as_frames

QUESTIONS = ["what?", "and then?"]


@pytest.mark.parametrize("num_frames", [1, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_a_subset_of_a_sample_stands_where_the_prompt_has_it(name, num_frames):
    vlm, frames = make_vlm(name), as_frames(noise(num_frames))
    try:
        samples = encode_samples(vlm, frames, QUESTIONS, ["a", "b"])
    except ValueError as error:
        assert "one image or video a prompt" in str(error)  # separate images, that no policy is trained on
        return
    for sample, question in zip(samples, QUESTIONS, strict=True):
        kept_1N = (torch.arange(len(sample.tokens)) % 2 == 0)[None]
        got = vlm.adapter.emit_subsets(sample.inputs, sample.item, kept_1N.expand(3, -1), target="generate")
        prompt = vlm.prepare(frames, question)
        plan = Plan(kept_1N[0].nonzero()[:, 0], kept_1N.shape[1])
        want = vlm.adapter.emit(prompt.inputs, prompt.items, [plan])
        for name_of_input in ("input_ids", "attention_mask", "position_ids"):
            ours, theirs = got[name_of_input], want[name_of_input]
            assert torch.equal(ours, theirs.expand_as(ours)), name_of_input
        answer = torch.tensor([5, 7])
        longer = sample.inputs_with(answer)
        assert longer["input_ids"][0, -2:].tolist() == [5, 7]
        assert longer["attention_mask"].shape == longer["input_ids"].shape
