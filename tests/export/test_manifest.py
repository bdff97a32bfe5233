"""`tokensieve.json`: what is written is read, and what is wrong is one clear error."""

from __future__ import annotations

import json

import pytest

from tokensieve.errors import UnsupportedModel
from tokensieve.export import manifest as module
from tokensieve.export.manifest import NAME, Manifest

GOOD = Manifest(kind="vlm", family="llava", method="zoprune", keep=0.25, graphs={"a": "onnx/a.onnx"})


def test_what_is_written_is_read(tmp_path):
    GOOD.save(tmp_path)
    assert Manifest.load(tmp_path) == GOOD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2"),
        ({"kind": "llm"}, "kind must be"),
        ({"precision": "fp8"}, "precision must be"),
        ({"keep": True}, "keep must be"),
        ({"keep": 0}, "keep must be"),
        ({"family": None}, "family must be a string"),
        ({"model": []}, "model must be an object"),
        ({"graphs": {"a": "../a.onnx"}}, "inside the folder"),
        ({"graphs": {"a": "/a.onnx"}}, "inside the folder"),
        ({"graphs": {"a": 1}}, "inside the folder"),
        ({"weights": 1}, "unknown or missing fields: 'weights'"),
    ],
)
def test_wrong_values(tmp_path, change, message):
    GOOD.save(tmp_path)
    path = tmp_path / NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UnsupportedModel, match=message):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", ["", '{"format": 1', "[]", "[" * 100_000, "\xff"])
def test_no_json(tmp_path, text):
    (tmp_path / NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(UnsupportedModel, match="valid JSON object|read as text"):
        Manifest.load(tmp_path)


def test_missing_field_file_and_size(tmp_path, monkeypatch):
    with pytest.raises(UnsupportedModel, match="no exported model"):
        Manifest.load(tmp_path)
    GOOD.save(tmp_path)
    found = json.loads((tmp_path / NAME).read_text())
    del found["graphs"]
    (tmp_path / NAME).write_text(json.dumps(found))
    with pytest.raises(UnsupportedModel, match="'graphs'"):
        Manifest.load(tmp_path)
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(UnsupportedModel, match="larger than 10 bytes"):
        Manifest.load(tmp_path)


def test_a_link_is_refused(tmp_path):
    GOOD.save(tmp_path)
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / NAME).symlink_to(tmp_path / NAME)
    with pytest.raises(UnsupportedModel, match="is a link"):
        Manifest.load(folder)
