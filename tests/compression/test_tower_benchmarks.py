"""The benchmarks of towers and stacks: what they count, and that their scripts run."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from tokensieve.pipeline.towers import tower_macs

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def towers():
    return runpy.run_path(str(FOLDER / "towers.py"))


def test_towers_at_tiny_sizes(monkeypatch, capsys, tmp_path):
    out = tmp_path / "towers.md"
    out.write_text("# A title\n\nWritten by hand.\n\nMachine: another one.\n")
    arguments = ["--smoke", "--repeats", "1", "--keeps", "0.5", "--batch", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["towers.py", *arguments])
    runpy.run_path(str(FOLDER / "towers.py"), run_name="__main__")
    written = out.read_text()
    assert written.startswith("# A title\n\nWritten by hand.\n\nMachine: ") and "another one" not in written
    tables = written.split("\n## ")[1:]
    printed = capsys.readouterr().out
    assert len(tables) == 8 and all(table.strip() in printed for table in tables)
    for table in tables:
        assert "| all tokens | 1 | 6" in table
        for method in ("tome", "evit", "tca"):
            assert f"| `{method}` | 0.5 | 3" in table


def test_every_tower_is_vit_b_16(towers):
    size = towers["BASE"]
    for name, build in towers["TOWERS"].items():
        with torch.device("meta"):
            tower = build(size)
        assert 85e6 < sum(weight.numel() for weight in tower.parameters()) < 87e6
        num_tokens = 196 if "SigLIP" in name else 197
        assert towers["macs"](name, size, (num_tokens,) * 13) == pytest.approx(17.5e9, rel=0.01)
    assert towers["macs"]("open_clip ViT-B-16", size, (197,) * 13) == tower_macs([197] * 13, width=768, patch_size=16)


def test_eta_by_hand(towers):
    assert towers["eta"]([10.0, 11.0, 9.0], [7.0, 6.0, 8.0], 0.6) == pytest.approx(3 / 4)
    assert towers["eta"]([10.0], [12.0], 0.5) == pytest.approx(-0.4)


def test_stack_on_the_shipped_model(monkeypatch, tmp_path):
    out = tmp_path / "stack.md"
    arguments = ["--model", "tiny", "--dtype", "float32", "--repeats", "1", "--clips", "2", "--new_tokens", "2"]
    monkeypatch.setattr(
        sys, "argv", ["stack.py", *arguments, "--projectors", "uniform", "--tower_keeps", "0.5", "--out", str(out)]
    )
    runpy.run_path(str(FOLDER / "stack.py"), run_name="__main__")
    lines = [line for line in out.read_text().splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0] for line in lines] == [
        "| all tokens",
        "| uniform",
        *(f"| {method}" for method in ("evit", "tca", "tome")),
        *(f"| {method}:0.5 + uniform" for method in ("evit", "tca", "tome")),
        "| 4 frames, uniform",
    ]
    visual = [int(line.split(" | ")[2]) for line in lines]
    assert visual[0] == 289 and {visual[1], *visual[5:]} == {30}
    encoder = [float(line.split(" | ")[3]) for line in lines]
    assert encoder[0] == encoder[1] and all(part < encoder[0] for part in encoder[2:])
    assert encoder[2:5] == encoder[5:8] and encoder[8] == pytest.approx(encoder[0] / 2, rel=0.01)
