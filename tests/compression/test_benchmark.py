"""The benchmark script runs and prints its tables."""

import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "zoprune_estimators.py"


def test_zoprune_estimators(monkeypatch, capsys):
    sizes = ["--repeats", "1", "--tokens", "160", "--width-in", "32", "--width-out", "64"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *sizes])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert "| default, later calls |" in printed and "| default (exact) |" in printed
