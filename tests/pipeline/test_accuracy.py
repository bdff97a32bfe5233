"""The accuracy benchmark runs, and the shipped model answers better than any blind guess could."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

import tokensieve as ts
from tokensieve.datasets.clips import KINDS, make_clip

PATH = Path(__file__).parents[2] / "benchmarks" / "accuracy.py"


@pytest.fixture(scope="module")
def accuracy():
    spec = importlib.util.spec_from_file_location("accuracy", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_shipped_model_sees(accuracy):
    clips = [make_clip("test", i) for i in range(12)]
    settings = [(None, 1.0), ("zoprune", 0.25)]
    score = accuracy.evaluate(ts.load("tiny"), clips, settings)

    def share(setting) -> float:
        return sum(n for (_, right), n in score[setting].items() if right) / score[setting].total()

    assert share((None, 1.0)) > 0.85 and share(("zoprune", 0.25)) > 0.75  # 48 questions
    blind = [setting for setting in score if isinstance(setting, str)]
    assert len(blind) == 2 and all(share(setting) < 0.5 for setting in blind)


def test_report_has_a_row_for_every_setting(accuracy):
    clips = [make_clip("test", i) for i in range(12)]
    right = Counter({(kind, True): 3 for kind in KINDS} | {(kind, False): 1 for kind in KINDS})
    score = {(None, 1.0): right, ("zoprune", 0.25): right, "image-blind: the model sees grey frames": right}
    text = accuracy.report(clips, score, "tiny", "test")
    assert "| zoprune | 0.25 | **75.0** (" in text and text.count("| 75.0") == 3 * len(KINDS)
    assert text.count("\n| ") == 3 + 3 + 1  # settings, three rows of guesses, head
