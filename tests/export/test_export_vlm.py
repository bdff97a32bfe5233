"""`export_vlm` writes a whole, verified folder or nothing."""

import json
import os

import numpy as np
import pytest
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from tests.export.exported import exported
from tests.pipeline.tiny_processors import make_vlm, noise, shared_vlm
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export import verify
from tokensieve.export import vlm as exporter
from tokensieve.export.manifest import Manifest
from tokensieve.export.precision import TOLERANCES
from tokensieve.export.verify import Example, verify_folder
from tokensieve.export.vlm import check_exportable, export_vlm

CASES = [
    ("llava", "visionzip", "fp32"),
    ("llava_onevision", "zoprune", "fp32"),
    ("qwen2_5_vl", "divprune", "fp32"),
    ("smolvlm", "norm-diversity", "fp32"),
    ("smolvlm", "uniform", "fp16"),
    ("llava", None, "int8"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request):
    return *request.param, *exported(*request.param)


def test_folder_is_whole_and_verified(case):
    family, method, precision, vlm, folder = case
    manifest = Manifest.load(folder)
    assert (manifest.family, manifest.method, manifest.precision) == (family, method, precision)
    assert manifest.keep == (0.5 if method else 1.0) and manifest.kind == "vlm"
    found, tolerance = manifest.verified["differences"], TOLERANCES[precision]
    assert found["logits"] <= tolerance.logits and found["features"] <= tolerance.features
    assert len(manifest.verified["answers"]) == (4 if method else 2)
    if precision == "fp32":
        assert found["unequal_kept"] == 0
        assert all(each["equal_tokens"] == each["tokens"] for each in manifest.verified["answers"])
    for file in manifest.graphs.values():
        assert (folder / file).is_file() and (folder / f"{file}_data").is_file()
    assert {each.name for each in (folder / "onnx").iterdir()} == {
        f"{name}.onnx{end}" for name in manifest.graphs for end in ("", "_data")
    }
    assert AutoConfig.from_pretrained(folder).model_type == family
    assert GenerationConfig.from_pretrained(folder).pad_token_id == 0
    assert type(AutoProcessor.from_pretrained(folder)) is type(vlm.processor)
    assert not [each for each in folder.parent.iterdir() if each.name.endswith(".part")]


def test_nothing_tells_of_this_machine(case):
    *_, folder = case
    here = os.getcwd().encode()
    for file in folder.rglob("*"):
        if file.is_file() and not file.name.endswith("_data"):
            text = file.read_bytes()
            assert here not in text and b"site-packages" not in text, file.name


def test_manifest_has_the_facts_of_the_runtime(case):
    family, _, _, vlm, folder = case
    facts = Manifest.load(folder).model
    assert (facts["num_layers"], facts["num_kv_heads"], facts["head_dim"]) == (1, 2, 8)
    assert (facts["width"], facts["vocab"]) == (32, len(vlm.processor.tokenizer))
    assert facts["modalities"] == ["image", "video"] and facts["image_token_id"] in facts["suppress_token_ids"]
    assert facts["eos_token_ids"] == [93] and facts["pad_token_id"] == 0
    assert {0, 93, facts["image_token_id"]} <= set(facts["question_ids_skipped"])
    expected = {"llava": 16, "llava_onevision": 16, "smolvlm": 4, "qwen2_5_vl": None}[family]
    assert facts.get("patches_per_tile") == expected


def test_model_stays_as_it_is():
    vlm, _ = exported("llava_onevision", "zoprune")
    assert vlm.compression.name == "zoprune" and vlm.compression.keep == 0.5
    assert vlm.model.config._attn_implementation != "eager"
    assert all(weight.requires_grad for weight in vlm.model.parameters())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logits", lambda out: out | {"logits": out["logits"] + np.float32(1e-2)} if "logits" in out else out),
        ("features", lambda out: out | {"features": out["features"] * 1.01} if "features" in out else out),
        ("kept", lambda out: out | {"kept": out["kept"][::-1] * 0} if "kept" in out else out),
        (
            "embeddings",
            lambda out: out | {"inputs_embeds": out["inputs_embeds"] * 2} if "inputs_embeds" in out else out,
        ),
        ("newline", lambda out: out | {"newline": out["newline"] + 1} if "newline" in out else out),
        ("logits", lambda out: out | {"logits": out["logits"] * np.float32(np.nan)} if "logits" in out else out),
    ],
)
def test_verification_sees_a_difference(monkeypatch, name, change):
    vlm, folder = exported("llava_onevision", "zoprune")
    right = verify._Graphs.run
    monkeypatch.setattr(verify._Graphs, "run", lambda self, graph, feed: change(right(self, graph, feed)))
    with pytest.raises(UnsupportedModel, match=f"differs from PyTorch.*{name}"):
        verify_folder(vlm, folder, Manifest.load(folder), [Example(noise(4), "what?")])


@pytest.fixture
def quick(monkeypatch):
    """Graphs that are written in no time, by a stand-in."""

    def write(module, path, *_):
        path.write_bytes(b"graph")

    monkeypatch.setattr(exporter, "write_graph", write)
    return write


def test_a_failure_leaves_nothing(tmp_path, quick, monkeypatch):
    def fail(*_):
        raise UnsupportedModel("It differs.")

    monkeypatch.setattr(exporter, "verify_folder", fail)
    with pytest.raises(UnsupportedModel, match="differs"):
        export_vlm(shared_vlm("llava").compress(None), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(exporter, "verify_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_vlm(shared_vlm("llava").compress(None), tmp_path / "out")
    assert [each.name for each in tmp_path.rglob("*")] == ["out"]


def test_without_verification(tmp_path, quick):
    (tmp_path / "out").mkdir()
    manifest = export_vlm(shared_vlm("llava").compress(None), tmp_path / "out", verify=False)
    assert manifest.verified == {} and Manifest.load(tmp_path / "out") == manifest


@pytest.mark.parametrize("kind", ["file", "folder", "link", "no parent"])
def test_what_is_there_stays(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(exporter, "exportable_copy", None)  # nothing is begun
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
        (out / "mine").touch()
    elif kind == "link":
        (tmp_path / "other").mkdir()
        out.symlink_to(tmp_path / "other")
    else:
        out = tmp_path / "missing" / "out"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadOption, match="exists already|no folder"):
        export_vlm(shared_vlm("llava").compress(None), out)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("family", "method", "options", "says"),
    [
        ("gemma3", None, {}, "gemma3"),
        ("qwen3_vl", "divprune", {}, "qwen3_vl"),
        ("llava", "fastv", {"layer": 1}, "decoder"),
        ("llava", "tome", {}, "tower"),
        ("llava", "divprune", {"positions": "compact"}, "compact"),
        ("llava", "fastvid", {}, "fastvid"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_any_work(tmp_path, family, method, options, says, quick):
    vlm = make_vlm(family).compress(method, keep=0.5, **options)
    with pytest.raises(UnsupportedModel, match=says):
        export_vlm(vlm, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    vlm.compress(None)


def test_bad_arguments(tmp_path):
    with pytest.raises(BadOption, match="int4"):
        export_vlm(shared_vlm("llava").compress(None), tmp_path / "out", precision="int4")
    lonely = make_vlm("llava")
    lonely.processor = None
    with pytest.raises(BadOption, match="no processor"):
        check_exportable(lonely)


def test_options_are_written_with_their_defaults():
    _, folder = exported("llava", "visionzip")
    options = json.loads((folder / "tokensieve.json").read_text())["options"]
    assert options == {"dominant": 54 / 64, "sinks": "off"}
