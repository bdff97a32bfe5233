"""The runtime of exported towers, and streaming TCA without torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.export.tower_cases import SIDE, exported, random_pixels  # noqa: F401, a fixture
from tokensieve.compression.condensation import drop_rate_for
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export.manifest import Manifest
from tokensieve.export.tower_runtime import TEXT, VISION, OnnxTower
from tokensieve.export.tower_stream import Memory, OnnxTCAStream
from tokensieve.pipeline.adaptation import TCAStream
from tokensieve.pipeline.adaptation.reservoir import Reservoir, block_weights


def test_no_torch_is_imported():
    code = "import sys, tokensieve.export.tower_stream; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- zero-shot classes


def test_classes_as_the_model_gives_them(exported):  # noqa: F811
    pixels = random_pixels(3)
    it = exported("plain")
    ids = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = it.model(input_ids=ids, pixel_values=pixels).logits_per_image
    got = it.tower.classify(pixels.numpy(), it.tower.encode_text(ids.numpy()))
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4)
    it = exported("evit")
    ids = ids[:, :8]
    texts = it.tower.encode_text(ids.numpy())
    unit_texts, unit_images = (F.normalize(x, dim=-1) for x in (it.model.encode_text(ids), *it.reference(pixels)))
    wanted = it.model.logit_scale.exp() * unit_images @ unit_texts.T
    np.testing.assert_allclose(it.tower.classify(pixels.numpy(), 3 * texts), wanted.numpy(), atol=1e-4)
    tower = exported("tome").tower
    embeds = tower.encode_image(pixels.numpy())
    np.testing.assert_allclose(np.diag(tower.classify(pixels.numpy(), embeds)), 100, rtol=1e-5)


def test_wrong_inputs(exported):  # noqa: F811
    tower, pixels = exported("tca").tower, random_pixels(2).numpy()
    for bad in (pixels[0], pixels[:0], pixels[:, :, :-1], pixels.astype(int), pixels[:, :1], "x", [[1.0]]):
        with pytest.raises(BadOption, match=r"pixels must be an array \[batch, 3, 24, 24\]"):
            tower.encode_image(bad)
    tower.encode_image(pixels.astype(np.float64).tolist())
    width = tower.manifest.model["width"]
    for bad in (np.ones((1, 2, width + 1), np.float32), np.ones((1, 2, width)), np.ones((2, width))):
        with pytest.raises(BadOption, match="anchors must be"):
            tower.encode_with_path(pixels, bad)
    ids = np.ones((2, 5), np.int64)
    for bad in (ids[0], ids[:0], ids.astype(float)):
        with pytest.raises(BadOption, match="ids must be"):
            tower.encode_text(bad)
    with pytest.raises(BadOption, match="attention_mask must be"):
        tower.encode_text(ids, ids[:, 1:])
    with pytest.raises(BadOption, match="text_embeds must be"):
        tower.classify(pixels, np.ones((2, 3)))
    with pytest.raises(BadOption, match="takes no attention_mask"):
        exported("plain").tower.encode_text(ids, ids)
    with pytest.raises(BadOption, match="ids must be"):
        exported("evit").tower.encode_text(ids)
    with pytest.raises(BadOption, match="no text encoder"):
        exported("tome").tower.encode_text(ids)
    with pytest.raises(BadOption, match="records no paths"):
        exported("evit").tower.encode_with_path(pixels)


def test_folders_of_other_things(tmp_path, exported):  # noqa: F811
    with pytest.raises(UnsupportedModel, match="no exported model"):
        OnnxTower.from_pretrained(tmp_path)
    Manifest(kind="vlm", family="llava", graphs={VISION: "onnx/vision_model.onnx"}).save(tmp_path)
    with pytest.raises(UnsupportedModel, match="no exported tower"):
        OnnxTower.from_pretrained(tmp_path)
    Manifest(kind="tower", family="timm", graphs={VISION: "onnx/vision_model.onnx"}).save(tmp_path)
    with pytest.raises(UnsupportedModel):
        OnnxTower.from_pretrained(tmp_path)
    for name, value in (("logit_scale", "7"), ("logit_bias", True), ("anchor_blocks", [0]), ("anchor_blocks", 3)):
        Manifest(kind="tower", family="timm", graphs={VISION: "onnx/v.onnx"}, model={name: value}).save(tmp_path)
        with pytest.raises(UnsupportedModel, match=f"wrong value for '{name}'"):
            OnnxTower.from_pretrained(tmp_path)
    with pytest.raises(BadOption, match="provider"):
        OnnxTower.from_pretrained(exported("evit").folder, "nonsense")
    assert exported("evit").tower.image_size == (SIDE, SIDE)
    assert TEXT not in exported("tome").manifest.graphs


# --- the stream


def two_classes(it, pixels):
    """Text features of two classes that are both predicted: along the embeddings, across their mean."""
    embeds = F.normalize(it.reference(pixels)[0], dim=-1)
    mean = F.normalize(embeds.mean(0), dim=0)
    along = torch.linalg.svd(embeds - embeds.mean(0), full_matrices=False)[2][0]
    along = F.normalize(along - (along @ mean) * mean, dim=0)
    return torch.stack([along, -along])


def torch_stream(it, text, **options):
    rate = drop_rate_for(36, 18, num_steps=2, fuse=False)  # which the budget gave, where none is stated
    return TCAStream(it.model, text, **{"drop_rate": rate, **it.case.options}, **options)


@pytest.mark.parametrize("options", [{}, {"scale": 0.1, "beta": 3.0, "lambd": 4.0, "reservoir_size": 2}], ids=str)
@pytest.mark.parametrize("name", ["tca", "tca-paper"])
def test_a_stream_gives_what_the_stream_in_torch_gives(exported, name, options):  # noqa: F811
    it = exported(name)
    pixels = random_pixels(24)
    text = two_classes(it, pixels)
    theirs, ours = torch_stream(it, text, **options), OnnxTCAStream(it.tower, text.numpy(), **options)
    had_anchors = []
    for some in torch.split(pixels, [1, 5, 2, 8, 1, 7]):
        had_anchors.append(ours.memory is not None and not ours.memory.num_missing())
        np.testing.assert_allclose(ours.step(some.numpy()), theirs.step(some).numpy(), atol=2e-3, rtol=1e-4)
        reservoir = theirs.reservoir
        np.testing.assert_array_equal(ours.memory.step_CM, reservoir.step_CM.numpy())
        np.testing.assert_allclose(ours.memory.path_CMLD, reservoir.path_CMLD.numpy(), atol=1e-3)
        np.testing.assert_allclose(ours.memory.key_CM, reservoir.key_CM.numpy(), atol=1e-3)
    assert False in had_anchors and True in had_anchors
    assert ours.num_seen == theirs.num_seen == 24
    ours.reset()
    theirs.reset()
    np.testing.assert_allclose(ours.step(pixels[:3].numpy()), theirs.step(pixels[:3]).numpy(), atol=2e-3, rtol=1e-4)


def test_correction_off_and_logit_numbers(exported):  # noqa: F811
    it = exported("tca-paper")
    pixels = random_pixels(6)
    text = two_classes(it, pixels)
    for options in ({"correct": False}, {"logit_scale": 30.0, "logit_bias": 1.0}):
        ours, theirs = OnnxTCAStream(it.tower, text.numpy(), **options), torch_stream(it, text, **options)
        np.testing.assert_allclose(ours.step(pixels.numpy()), theirs.step(pixels).numpy(), atol=1e-3, rtol=1e-4)
    assert OnnxTCAStream(it.tower, text.numpy()).logit_bias == -3
    it = exported("tca")
    assert OnnxTCAStream(it.tower, two_classes(it, pixels).numpy()).logit_scale == 100


@pytest.mark.parametrize("diverse", [True, False])
def test_the_memory_is_the_reservoir(diverse):
    generator = torch.Generator().manual_seed(0)
    ours, theirs, weight = Memory(3, 3, 5, 6), Reservoir(3, 3, 5, 6), block_weights(5, 0.7)
    for step in range(40):
        label = int(torch.randint(3, (1,), generator=generator))
        key = torch.randint(4, (1,), generator=generator) / 4  # some are equal
        path = torch.randn(5, 6, generator=generator)
        theirs.admit(label, key, path, step, "diverse" if diverse else "lowest")
        ours.admit(label, key.numpy()[0], path.numpy(), step, diverse=diverse)
        for name in ("key_CM", "step_CM", "path_CMLD", "count_C"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name).numpy())
        assert ours.num_missing() == theirs.num_missing()
        np.testing.assert_allclose(ours.mean_CLD, theirs._mean_CLD.numpy(), atol=1e-6)
        for beta in (2.0, None):
            got = ours.correction(path.numpy(), scale=0.7, lambd=1.5, beta=beta)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, theirs.correction(path, weight, lambd=1.5, beta=beta).numpy(), atol=1e-6)


def test_a_bad_image_leaves_the_stream_as_before(exported):  # noqa: F811
    it = exported("tca")
    stream = OnnxTCAStream(it.tower, two_classes(it, random_pixels(6)).numpy())
    stream.step(random_pixels(2).numpy())
    before = stream.memory.step_CM.copy()
    for bad in (random_pixels(1).numpy() * np.nan, random_pixels(1).numpy()[0], np.zeros((0, 3, SIDE, SIDE), "f")):
        with pytest.raises(BadOption):
            stream.step(bad)
    assert stream.num_seen == 2 and np.array_equal(stream.memory.step_CM, before)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"reservoir_size": 0}, "reservoir_size"),
        ({"reservoir_size": True}, "reservoir_size"),
        ({"scale": 0}, "scale"),
        ({"lambd": -1}, "lambd"),
        ({"beta": float("nan")}, "beta"),
        ({"logit_scale": 0}, "logit_scale"),
        ({"logit_bias": float("inf")}, "logit_bias"),
    ],
)
def test_bad_options(exported, options, words):  # noqa: F811
    with pytest.raises(BadOption, match=words):
        OnnxTCAStream(exported("tca").tower, np.eye(16, dtype=np.float32)[:2], **options)


def test_bad_texts_and_towers(exported):  # noqa: F811
    tower, text = exported("tca").tower, np.eye(16, dtype=np.float32)[:2]
    for bad in (text[0], 2 * text, text * np.nan, text[:0], [1.0], text.astype(int)):
        with pytest.raises(BadOption, match="text_features"):
            OnnxTCAStream(tower, bad)
    with pytest.raises(BadOption, match="method tca"):
        OnnxTCAStream(exported("evit").tower, text)
    with pytest.raises(BadOption, match="widths must be equal"):
        OnnxTCAStream(tower, np.eye(9, dtype=np.float32)).step(random_pixels(1).numpy())
