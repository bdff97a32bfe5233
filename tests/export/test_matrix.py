"""Every family that can be exported with every method that people deploy: graphs, prompts and answers are PyTorch's.

Exporting them all takes minutes, so this runs only when asked for: `pytest -m slow tests/export/test_matrix.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from tests.export.exported import short_vlm
from tests.export.test_graph_scorers import sharp
from tests.pipeline.tiny_processors import noise
from tokensieve.export import OnnxVLM, export_vlm
from tokensieve.export.verify import Example
from tokensieve.policies.light_scorer import LightScorer
from tokensieve.policies.scorer import PolicyScorer

pytestmark = pytest.mark.slow

SIZES = {"llava": (16, 16), "llava_onevision": (16, 16), "qwen2_5_vl": (16, 32), "smolvlm": (16, 16)}  # not resized
METHODS = ("zoprune", "divprune", "evs", "cacovid", "cacovid-light", "visionzip")
QUESTIONS = ("What?", "Which digit is red?")
NUM_TOKENS = 8


def policy(method: str, model: nn.Module) -> dict[str, nn.Module]:
    """Options of a method: a random policy with scores that differ, where one is needed."""
    if method == "cacovid":
        return {"policy": sharp(PolicyScorer.init_from(model))}
    if method == "cacovid-light":
        return {"policy": sharp(LightScorer(32, width=8, num_heads=2))}
    return {}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", SIZES)
def test_family_with_method(tmp_path, family, method):
    vlm = short_vlm(family)
    vlm.compress(method.removesuffix("-light"), keep=0.5, **policy(method, vlm.model))
    clips = [noise(frames, *SIZES[family], seed=seed) for seed, frames in enumerate((1, 2, 4, 5))]
    examples = [Example(clip, question) for clip in clips for question in QUESTIONS]
    manifest = export_vlm(vlm, tmp_path / "out", examples=examples)
    found = manifest.verified["differences"]
    assert found["logits"] < 1e-4 and found["unequal_kept"] == 0
    assert all(each["equal_tokens"] == each["tokens"] for each in manifest.verified["answers"])

    exported = OnnxVLM.from_pretrained(tmp_path / "out", "cpu", threads=1)
    for clip in clips:
        ours = exported.answer([clip] * 2, list(QUESTIONS), max_new_tokens=NUM_TOKENS)
        theirs = vlm.answer([clip] * 2, list(QUESTIONS), max_new_tokens=NUM_TOKENS)
        assert [each.answer for each in ours] == [each.answer for each in theirs]
        assert [each.visual_tokens for each in ours] == [each.visual_tokens for each in theirs]
    kept = exported.prepare(clips[-1], QUESTIONS[1]).kept[0]
    np.testing.assert_array_equal(kept, vlm.prepare(clips[-1], QUESTIONS[1]).plans[0].kept.numpy())
