"""Exported models of every family get the prompts, the visual tokens and the words of their PyTorch twins."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from tests.export.exported import exported
from tests.pipeline.tiny_processors import noise
from tokensieve.errors import BadOption
from tokensieve.export.runtime import OnnxVLM

CASES = [
    ("llava", "visionzip"),
    ("llava_onevision", "zoprune"),
    ("qwen2_5_vl", "divprune"),
    ("smolvlm", "norm-diversity"),
]


@cache
def opened(family: str, method: str | None, precision: str = "fp32"):
    vlm, folder = exported(family, method, precision)
    return vlm, OnnxVLM.from_pretrained(folder, "cpu", threads=1)


def tolerance(family: str) -> float:
    """Pictures of 16 x 16 are resampled by SmolVLM's processor alone, with a grey level of difference."""
    return 4e-3 if family == "smolvlm" else 2e-5


@pytest.mark.parametrize("num_frames", [1, 3])
@pytest.mark.parametrize(("family", "method"), CASES)
def test_prompts_of_every_family(family, method, num_frames):
    """Ids, positions, kept tokens and embeddings, then greedy tokens."""
    vlm, onnx_vlm = opened(family, method)
    frames = noise(num_frames, *{"llava_onevision": (16, 32), "qwen2_5_vl": (16, 32)}.get(family, (16, 16)))
    if num_frames > 1 and family == "llava_onevision":
        frames = frames[:, :, :16]
    questions = ["Which?", "Which one was it?"]
    prepared = vlm.prepare(frames, questions)
    ours = onnx_vlm.prepare(frames, questions)
    np.testing.assert_array_equal(ours.input_ids, prepared["input_ids"].numpy())
    np.testing.assert_array_equal(ours.attention_mask, prepared["attention_mask"].numpy())
    positions = prepared["position_ids"].numpy()
    positions = positions[1:] if positions.ndim == 3 else positions
    np.testing.assert_array_equal(ours.position_ids * ours.attention_mask, positions * ours.attention_mask)
    assert ours.visual_tokens == [prepared.visual_tokens(row) for row in (0, 1)]
    with torch.no_grad():
        embeds = vlm.model.get_input_embeddings()(prepared["input_ids"])
    for item, plan in zip(prepared.items, prepared.plans, strict=True):
        np.testing.assert_array_equal(ours.kept[item.row], plan.kept.numpy())
        at = prepared["input_ids"][item.row] == getattr(vlm.model.config, f"{item.modality}_token_id")
        embeds[item.row, at] = item.kept_features(plan).detach()
    real = ours.attention_mask.astype(bool)
    np.testing.assert_allclose(ours.inputs_embeds[real], embeds.numpy()[real], rtol=0, atol=tolerance(family))
    expected = vlm.model.generate(
        **prepared, do_sample=False, max_new_tokens=8, suppress_tokens=onnx_vlm.manifest.model["suppress_token_ids"]
    )[:, prepared["input_ids"].shape[1] :]
    for new, theirs in zip(onnx_vlm.generate(ours, max_new_tokens=8), expected.tolist(), strict=True):
        assert new == theirs[: len(new)] and (len(new) == 8 or new[-1] in onnx_vlm.manifest.model["eos_token_ids"])


@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_budget_of_everything_changes_nothing(family, method):
    """Whatever the method does with what it drops, or merges."""
    vlm, onnx_vlm = opened(family, method)
    frames = noise(3, 16, 16)
    prepared = vlm.compress(None).prepare(frames, "Which?")
    vlm.compress(method, 0.5)
    ours = onnx_vlm.prepare(frames, "Which?", keep=1)
    np.testing.assert_array_equal(ours.input_ids, prepared["input_ids"].numpy())
    (item,) = prepared.items
    at = (prepared["input_ids"][0] == onnx_vlm.manifest.model[f"{item.modality}_token_id"]).numpy()
    np.testing.assert_allclose(ours.inputs_embeds[0, at], item.features.numpy(), rtol=0, atol=tolerance(family))


def test_an_export_without_a_method():
    vlm, onnx_vlm = opened("llava_onevision", None, "int8")
    frames = noise(2, 16, 16)
    answer = onnx_vlm.answer(frames, "Which?", keep=1, max_new_tokens=3)
    assert (answer.method, answer.keep) == (None, 1.0)
    assert answer.visual_tokens == vlm.answer(frames, "Which?", max_new_tokens=3).visual_tokens
    with pytest.raises(BadOption, match="without a method"):
        onnx_vlm.answer(frames, "Which?", keep=0.5)


def test_frames_as_images_take_the_word_video():
    """LLaVA has no placeholder for videos, so the word is text like any other."""
    vlm, onnx_vlm = opened("llava", "visionzip")
    ours, theirs = (each.prepare(noise(2, 16, 16), "What is <video>?") for each in (onnx_vlm, vlm))
    np.testing.assert_array_equal(ours.input_ids, theirs["input_ids"].numpy())
