"""The examples of docs/decoding.md run, and its table names the methods."""

from __future__ import annotations

import re
from pathlib import Path

from tokensieve import decoding
from tokensieve.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "decoding.md").read_text()
API = (Path(__file__).parents[2] / "docs" / "api.md").read_text()


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["clips", "--out", "demo", "--count", "1"])
    next(Path("demo").glob("*.mp4")).rename("clip.mp4")
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, "docs/decoding.md", "exec"), names)
    assert "True True True" in capsys.readouterr().out


def test_every_public_name_is_documented():
    assert [name for name in decoding.__all__ if f"| `{name}` |" not in API] == []
    factories = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert factories == {"cautious", "best_of", "self_consistency", "token_recycling", "recycling_chain"}
