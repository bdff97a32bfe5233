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
    settings = [(None, 1.0), ("zoprune", 0.25), ("fastv", 0.25)]
    score, tokens = accuracy.evaluate(ts.load("tiny"), clips, settings)

    def share(setting) -> float:
        return sum(n for (_, right), n in score[setting].items() if right) / score[setting].total()

    assert tokens == {(None, 1.0): (289, 289), ("zoprune", 0.25): (73, 73), ("fastv", 0.25): (289, 73)}
    assert share((None, 1.0)) > 0.85 and share(("zoprune", 0.25)) > 0.75  # 48 questions
    blind = [setting for setting in score if isinstance(setting, str)]
    assert len(blind) == 2 and all(share(setting) < 0.5 for setting in blind)


def test_report_has_a_row_for_every_setting(accuracy):
    clips = [make_clip("test", i) for i in range(12)]
    right = Counter({(kind, True): 3 for kind in KINDS} | {(kind, False): 1 for kind in KINDS})
    score = {(None, 1.0): right, ("zoprune", 0.25): right, "image-blind: the model sees grey frames": right}
    text = accuracy.report(
        clips, score, {(None, 1.0): (289.0, 289.0), ("zoprune", 0.25): (289.0, 73.0)}, "tiny", "test"
    )
    assert "| zoprune | 0.25 | 289 → 73 | **75.0** (" in text and text.count("| 75.0") == 3 * len(KINDS)
    assert text.count("\n| ") == 3 + 3 + 1  # settings, three rows of guesses, head


def test_the_short_table_replaces_what_stands_between_the_marks(accuracy, tmp_path):
    clips = [make_clip("test", i) for i in range(2)]
    right = Counter({(kind, True): 3 for kind in KINDS} | {(kind, False): 1 for kind in KINDS})
    score = {("zoprune", keep): right for keep in accuracy.PAGE_KEEPS} | {(None, 1.0): right}
    page = tmp_path / "methods.md"
    page.write_text(f"before\n{accuracy.PAGE_MARKS[0]}\nold\n{accuracy.PAGE_MARKS[1]}\nafter\n")
    accuracy.fill_page(page, accuracy.short_table(clips, score, "tiny"))
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| `zoprune` | projector | 75.0 | 75.0 | 75.0 |" in text
