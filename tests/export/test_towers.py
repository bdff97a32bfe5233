"""Exported towers and text encoders give what PyTorch gives."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from tests.export.tower_cases import CASES, SIDE, exported, make_model, random_pixels  # noqa: F401, a fixture
from tests.pipeline.test_towers import _timm, _transformers
from tests.pipeline.tiny_families import make_model as make_vlm
from tokensieve.compression.condensation import condense, rank_score, split_patches
from tokensieve.compression.evit import keep_attended
from tokensieve.compression.tome import merge_similar, tome
from tokensieve.compression.tower_stage import stable_order
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export import tower_graphs, tower_verify
from tokensieve.export.graph_file import write_graph
from tokensieve.export.manifest import Manifest
from tokensieve.export.tower_graphs import example_ids
from tokensieve.export.tower_runtime import TEXT, VISION, OnnxTower
from tokensieve.export.tower_verify import digit_pictures
from tokensieve.export.towers import export_tower
from tokensieve.pipeline.adaptation.tca_stream import image_features
from tokensieve.pipeline.towers import compress_tower

TCA = [name for name, case in CASES.items() if case.method == "tca"]


def close(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype == np.float32
        np.testing.assert_allclose(g, w.numpy(), rtol=1e-4, atol=1e-5 * float(w.abs().max()))


def run(tower, pixels, anchors=None):
    if tower.manifest.method == "tca":
        return tower.encode_with_path(pixels.numpy(), anchors)
    return [tower.encode_image(pixels.numpy())]


# --- images


@pytest.mark.parametrize("name", CASES)
def test_images_at_several_batches(exported, name):  # noqa: F811
    it = exported(name)
    pictures = torch.cat([random_pixels(3), digit_pictures(3, (SIDE, SIDE)), torch.full((1, 3, SIDE, SIDE), 0.5)])
    wanted = it.reference(pictures)
    assert wanted[0].std(0).min() > 1e-3
    for batch in (1, 2, len(pictures)):
        close(run(it.tower, pictures[:batch]), [w[:batch] for w in wanted])
    close(run(it.tower, pictures[-1:]), [w[-1:] for w in wanted])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.method])
def test_the_graph_reduces(exported, name):  # noqa: F811
    it = exported(name)
    plain = image_features(it.model, random_pixels(2))
    assert (plain - torch.from_numpy(it.tower.encode_image(random_pixels(2).numpy()))).abs().max() > 1e-2
    tokens = it.manifest.model["tokens_per_block"]
    with compress_tower(it.model, it.case.method, it.case.keep, **it.case.options) as handle, torch.no_grad():
        image_features(it.model, random_pixels(2))
    assert tuple(tokens) == handle.trace.tokens_per_block and tokens[-1] < tokens[0]


@pytest.mark.parametrize("name", TCA)
def test_anchors_are_an_input_that_may_be_empty(exported, name):  # noqa: F811
    it = exported(name)
    rows = [block - 1 for block in it.tower.anchor_blocks]
    assert rows == [0]
    pixels = random_pixels(3)
    without = run(it.tower, pixels)
    paths = it.reference(random_pixels(5, seed=8))[1]
    for num in (1, 2, 5):
        with_anchors = run(it.tower, pixels, paths[:num, rows].numpy())
        close(with_anchors, it.reference(pixels, paths[:num]))
        assert abs(with_anchors[0] - without[0]).max() > 1e-3
    # An anchor against the class token is chosen all the same: only the row for "none" has no cosine.
    against = -it.reference(pixels[:1])[1]
    close(run(it.tower, pixels[:1], against[:, rows].numpy()), it.reference(pixels[:1], against))


def test_ties_go_to_the_first(tmp_path):
    """Equal scores of different tokens, where another order would give other tokens."""

    class Ties(nn.Module):
        def forward(self, x, score):
            ones = torch.ones_like(score)
            split = split_patches(x.shape[1], 0.2)
            metric = torch.stack([score.round(), ones], -1)
            first = torch.zeros(x.shape[:1], dtype=torch.int64)
            made = condense(x, rank_score(torch.stack([score, -score], 1)) + 0 * score, split, first)
            return (
                stable_order(score),
                stable_order(score, descending=True),
                merge_similar(x, ones, metric, 7, 2).x,
                keep_attended(x, ones, score, 9, 1).x,
                condense(x, score, split, first).x,
                made.x,
            )

    x, score = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60.0).view(2, 30) % 3
    names = {f"out{i}": ["batch"] for i in range(6)}
    shapes = {"x": ["batch", 30, 8], "score": ["batch", 30]}
    ranks = {"out0": 2, "out1": 2}
    outputs = {name: ["batch", *("?",) * (ranks.get(name, 3) - 1)] for name in names}
    with torch.no_grad():
        write_graph(Ties().eval(), tmp_path / "ties.onnx", {"x": x, "score": score}, shapes, outputs)
    session = onnxruntime.InferenceSession(tmp_path / "ties.onnx", providers=["CPUExecutionProvider"])
    for values in (score, torch.zeros(1, 30), torch.rand(3, 30, generator=torch.Generator().manual_seed(0)).round()):
        some = torch.randn(len(values), 30, 8, generator=torch.Generator().manual_seed(1))
        got = session.run(None, {"x": some.numpy(), "score": values.numpy()})
        for g, w in zip(got, Ties()(some, values), strict=True):
            np.testing.assert_allclose(g, w.numpy(), rtol=1e-5, atol=1e-5)


# --- texts


@pytest.mark.parametrize("name, lengths", [("evit", (8,)), ("tca", (9, 4, 2)), ("plain", (9, 5))])
def test_texts(exported, name, lengths):  # noqa: F811
    it = exported(name)
    takes_mask = "attention_mask" in it.manifest.inputs[TEXT]
    assert takes_mask == (name == "tca")
    for length in lengths:
        for batch in (1, 2, 5):
            ids = example_ids(it.model, batch, length)
            mask = torch.ones_like(ids)
            mask[-1, length // 2 + 1 :] = 0
            wanted = tower_graphs.text_features(it.model, ids, mask if takes_mask else None)
            close([it.tower.encode_text(ids.numpy(), mask.numpy() if takes_mask else None)], [wanted])
            if takes_mask:
                unmasked = it.tower.encode_text(ids.numpy())
                close([unmasked], [tower_graphs.text_features(it.model, ids, torch.ones_like(ids))])


def test_an_end_of_text_is_found_wherever_it_is(exported):  # noqa: F811
    it = exported("tca")
    ids = torch.full((2, 6), 5)
    ids[0, 1] = ids[1, 4] = 49
    close([it.tower.encode_text(ids.numpy())], [tower_graphs.text_features(it.model, ids, torch.ones_like(ids))])


# --- the folder


@pytest.mark.parametrize("name", CASES)
def test_what_the_folder_holds(exported, name):  # noqa: F811
    it = exported(name)
    names = sorted(str(path.relative_to(it.folder)) for path in it.folder.rglob("*") if path.is_file())
    graphs = [VISION, TEXT] if TEXT in it.manifest.graphs else [VISION]
    files = ["tokensieve.json", *(f"onnx/{graph}.onnx{end}" for graph in graphs for end in ("", "_data"))]
    if it.manifest.family == "transformers":
        files.append("config.json")
    assert names == sorted(files)
    assert [path.name for path in it.folder.parent.iterdir() if path.name.startswith(".")] == []
    assert Manifest.load(it.folder) == it.manifest
    facts = it.manifest
    libraries = {"clip": "transformers", "siglip": "transformers"}
    assert facts.kind == "tower" and facts.family == libraries.get(it.case.model, it.case.model)
    assert not facts.dynamic_keep and facts.keep == it.case.keep and facts.method == it.case.method
    assert facts.inputs[VISION]["pixel_values"] == ["batch", 3, SIDE, SIDE] == [
        "batch", *it.tower._shapes[VISION]["pixel_values"][1:]
    ]  # fmt: skip
    verified = facts.verified[VISION]
    assert verified["beyond"] == 0 and all(0 <= value < 1e-5 for value in verified["greatest"].values())
    assert len(verified["greatest"]) == (4 if facts.method == "tca" else 2)
    assert set(facts.versions) >= {"tokensieve", "torch", "onnx", "onnxruntime"}
    json.dumps(facts.options)


def copy_graphs(monkeypatch, it):
    """Lets the exporter take the graphs of an earlier export instead of tracing again."""

    def take(module, path, inputs, dynamic, outputs):
        for end in ("", "_data"):
            path.with_name(path.name + end).write_bytes((it.folder / "onnx" / (path.name + end)).read_bytes())

    monkeypatch.setattr(tower_graphs, "write_graph", take)


def test_half_precision(tmp_path, exported):  # noqa: F811
    check_smaller(tmp_path, exported("evit"), "fp16", share=0.6)


def test_quantised_weights(tmp_path, monkeypatch, exported):  # noqa: F811
    copy_graphs(monkeypatch, exported("plain"))
    check_smaller(tmp_path, exported("plain"), "int8", share=0.7)


def check_smaller(tmp_path, it, precision, share):
    case = it.case
    manifest = export_tower(it.model, tmp_path / "out", method=case.method, keep=case.keep, precision=precision)
    for graph in (VISION, TEXT):
        greatest = max(manifest.verified[graph]["greatest"].values())
        assert 1e-5 < greatest < tower_verify.TOLERANCES[precision]
    tower = OnnxTower.from_pretrained(tmp_path / "out", "cpu")
    got, wanted = tower.encode_image(random_pixels(3).numpy()), it.reference(random_pixels(3))[0].numpy()
    assert got.dtype == np.float32 and manifest.precision == precision
    assert np.linalg.norm(got - wanted) < tower_verify.TOLERANCES[precision] * np.linalg.norm(wanted)
    names = sorted(path.name for path in (tmp_path / "out" / "onnx").iterdir())
    assert names == sorted(f"{graph}.onnx{end}" for graph in (VISION, TEXT) for end in ("", "_data"))
    sizes = [(folder / "onnx" / f"{VISION}.onnx_data").stat().st_size for folder in (it.folder, tmp_path / "out")]
    assert sizes[1] < share * sizes[0]


def test_without_verification(tmp_path, monkeypatch, exported):  # noqa: F811
    copy_graphs(monkeypatch, exported("evit"))
    export_tower(make_model("open_clip"), tmp_path / "out", method="evit", keep=0.4, verify=False)
    assert Manifest.load(tmp_path / "out").verified == {}


# --- failure


def refuse(tmp_path, words, error, model, **options):
    out = tmp_path / "out"
    with pytest.raises(error, match=words):
        export_tower(model, out, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, words",
    [
        ({"precision": "fp64"}, "precision"),
        ({"method": "tome", "keep": 0.0}, "keep"),
        ({"method": "tome", "nonsense": 1}, "nonsense"),
        ({"nonsense": 1}, "none was given"),
        ({"keep": 0.5}, "needs a method"),
        ({"method": "tca", "first_center": torch.Generator()}, "first_center"),
        ({"method": "tca", "first_center": lambda block, band: 0}, "first_center"),
        ({"method": "evit", "blocks": [7]}, "block 7"),
        ({"image_size": 30}, "30 x 30"),
        ({"image_size": (24, 24, 24)}, "image_size"),
        ({"image_size": 24.0}, "image_size"),
        ({"image_size": True}, "image_size"),
    ],
)
def test_bad_options(tmp_path, options, words):
    refuse(tmp_path, words, BadOption, make_model("timm"), **options)


@pytest.mark.parametrize("method", ["visionzip", "nonsense", tome()])
def test_other_methods_are_refused(tmp_path, method):
    refuse(tmp_path, "tome, evit, tca", UnsupportedModel, make_model("timm"), method=method)


def test_models_that_cannot_be_exported(tmp_path):
    refuse(tmp_path, "training", BadOption, make_model("timm").train())
    refuse(tmp_path, "float32", BadOption, make_model("timm").half())
    refuse(tmp_path, "no vision tower", UnsupportedModel, nn.Linear(2, 2))
    refuse(tmp_path, "no CLIP or SigLIP", UnsupportedModel, make_vlm("llava").eval())
    refuse(tmp_path, "no CLIP or SigLIP", UnsupportedModel, nn.Sequential(_timm()).eval())
    refuse(tmp_path, "no pooled", UnsupportedModel, _transformers("SiglipVisionModel", vision_use_head=False).eval())
    model = make_model("timm")
    with compress_tower(model, "tome"):
        refuse(tmp_path, "compressed already", BadOption, model)


def test_a_folder_that_exists_stays(tmp_path):
    (tmp_path / "out" / "in").mkdir(parents=True)
    with pytest.raises(BadOption, match="exists already"):
        export_tower(make_model("timm"), tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadOption, match="exists already"):
        export_tower(make_model("timm"), tmp_path / "link")
    with pytest.raises(BadOption, match="no folder"):
        export_tower(make_model("timm"), tmp_path / "none" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_a_mismatch_leaves_nothing(tmp_path, monkeypatch, exported):  # noqa: F811
    copy_graphs(monkeypatch, exported("tome"))
    other = make_model("timm")
    other.head.weight[0] += 0.05
    refuse(tmp_path, "more than 0.0001 in 8 of 8", UnsupportedModel, other, method="tome", keep=0.4)
    copy_graphs(monkeypatch, exported("evit"))
    other = make_model("open_clip")
    other.text_projection *= 1.01
    refuse(tmp_path, "more than 0.0001 in 4 of 4", UnsupportedModel, other, method="evit", keep=0.4)


def test_one_image_in_eight_may_be_a_near_tie(tmp_path, monkeypatch, exported):  # noqa: F811
    copy_graphs(monkeypatch, exported("tome"))
    true_distance, wrong = tower_verify._distance, [0.2]

    def distance(got, wanted):
        far = true_distance(got, wanted)
        return np.append(far[:-1], wrong.pop()) if wrong else far

    monkeypatch.setattr(tower_verify, "_distance", distance)
    options = dict(method="tome", keep=0.4)
    manifest = export_tower(make_model("timm"), tmp_path / "out", **options)
    assert manifest.verified[VISION]["beyond"] == 1
    (tmp_path / "more").mkdir()
    for some in ([0.2, 0.2], [0.3], [np.nan]):
        wrong += some
        refuse(tmp_path / "more", "differs", UnsupportedModel, make_model("timm"), **options)
    wrong.append(0.01)
    copy_graphs(monkeypatch, exported("plain"))
    refuse(tmp_path / "more", "differs", UnsupportedModel, make_model("siglip"))


def test_a_failed_trace_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(tower_graphs, "write_graph", fail)
    refuse(tmp_path, "cannot be traced .RuntimeError", UnsupportedModel, make_model("timm"))
    model = make_model("timm")
    with pytest.raises(UnsupportedModel):
        export_tower(model, tmp_path / "out", method="tome")
    assert list(tmp_path.iterdir()) == [] and "forward" not in vars(model.blocks[0])
