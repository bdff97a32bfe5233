"""The vision graph is the model's own encoder: in PyTorch number by number, and exported at any size."""

# Shape legend: N candidates, T tiles or frames

from functools import cache

import numpy as np
import pytest
import torch

from tests.export.exported import run
from tests.pipeline.tiny_processors import make_vlm, noise, shared_vlm
from tokensieve.compression.visionzip import scores_and_keys
from tokensieve.errors import UnsupportedModel
from tokensieve.export.graph_file import write_graph
from tokensieve.export.precision import exportable_copy
from tokensieve.export.verify import pixels_and_packing
from tokensieve.export.vision import ENCODERS, VisionGraph, make_encoder, vision_inputs
from tokensieve.pipeline.vlm import VLM

MEDIA = {
    "clip": noise(4),
    "tall clip": noise(3, 44, 20),
    "long clip": noise(8),
    "image": noise(1),
    "tall image": noise(1, 60, 21),
}


@cache
def sharp_vlm(family, factor=30):
    """With sharp attention in the tower, so that a wrong scale or rotation shows."""
    vlm = make_vlm(family)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in vlm.model.model.named_parameters():
        if ("vision" in name or "visual" in name) and "bias" not in name:
            if any(part in name for part in ("q_proj", "k_proj", "qkv")):
                parameter.data *= factor
            if "class_embedding" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)
    return vlm


def encoded(vlm, media, record=True):
    """What the encoder makes of a medium, and the same medium as the adapter knows it."""
    prepared = vlm.prepare(media, "what?", needs=("tower",) if record else ())
    packing, feed = pixels_and_packing(vlm, prepared)
    inputs = {name: torch.from_numpy(array) for name, array in {**feed, **packing.inputs}.items()}
    with torch.no_grad():
        return make_encoder(vlm, record)(inputs), prepared.items[0], inputs, packing


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def assert_same(vlm, media):
    made, item, _, packing = encoded(vlm, media)
    tokens = item.tokens
    assert packing.grids == tokens.grids and packing.crop.tolist() == tokens.crop.tolist()
    assert_close(made.features, tokens.features)
    assert_close(made.rows, tokens.projector.inputs)
    salience_N, keys_Nd = scores_and_keys(tokens.tower)
    assert_close(made.salience, salience_N)
    assert_close(made.keys, keys_Nd)
    assert made.one_row_per_token == tokens.projector.one_row_per_token
    rows = torch.randn(made.rows.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(made.project(rows), tokens.projector.fn(rows))
    values = rows.flatten(1)[:, :3]
    assert_close(made.to_tokens(values), tokens.projector.to_tokens(values))
    assert_close(made.to_tokens(values[:, 0]), tokens.projector.to_tokens(values[:, 0]))
    assert (made.mlp is None) == (tokens.projector.mlp is None)


@pytest.mark.parametrize("media", MEDIA)
@pytest.mark.parametrize("family", ENCODERS)
def test_encoder_is_the_models_own(family, media):
    assert_same(sharp_vlm(family), MEDIA[media])


def test_last_block_with_windows(monkeypatch):
    vlm = sharp_vlm("qwen2_5_vl")
    monkeypatch.setattr(vlm.model.model.visual, "fullatt_block_indexes", [0])
    for media in (MEDIA["tall image"], noise(4, 80, 12)):
        _, _, inputs, _ = encoded(vlm, media)
        assert len(inputs["patch_window"].unique()) > 1
        assert_same(vlm, media)


@pytest.mark.parametrize("layer", [-2, -1, 1, [0, -1], [-2, 1]])
def test_any_layer_may_be_read(layer):
    vlm = make_vlm("llava")
    if isinstance(layer, list):
        width = vlm.model.config.vision_config.hidden_size
        vlm.model.model.multi_modal_projector.linear_1 = torch.nn.Linear(width * len(layer), 32)
    vlm.model.config.vision_feature_layer = layer
    assert_same(vlm, MEDIA["clip"])


def test_blocks_behind_the_last_one_read_are_left_out():
    vlm = make_vlm("llava")
    assert vlm.model.config.vision_feature_layer == -2
    assert len(make_encoder(vlm, False).tower.blocks) == 1


@pytest.mark.parametrize(
    ("family", "says"), [("llava_next", "llava_next"), ("gemma3", "gemma3"), ("qwen2_vl", "qwen2_vl")]
)
def test_other_families_are_refused(family, says):
    with pytest.raises(UnsupportedModel, match=says):
        make_encoder(shared_vlm(family))


def test_towers_whose_tokens_form_no_square_are_refused():
    vlm = make_vlm("llava")
    vlm.model.config.vision_feature_select_strategy = "full"
    with pytest.raises(UnsupportedModel, match="no square"):
        make_encoder(vlm)


def test_other_towers_are_refused():
    vlm = make_vlm("llava")
    vlm.model.model.vision_tower.config.model_type = "pixtral"
    with pytest.raises(UnsupportedModel, match="pixtral"):
        make_encoder(vlm)


class Recorded(torch.nn.Module):
    """Gives what a method may look at, so that a test sees it."""

    needs, records = (), True

    def forward(self, encoded, inputs):
        columns = [encoded.features, encoded.salience[:, None], encoded.keys, encoded.project(encoded.rows).mean(-1)]
        columns[-1] = encoded.to_tokens(columns[-1])[:, None]
        return torch.cat(columns, dim=1), torch.arange(encoded.features.shape[0])


@pytest.fixture(scope="module", params=ENCODERS)
def graph(request, tmp_path_factory):
    """A model, and the graph of its encoder with all that a method may look at."""
    vlm = sharp_vlm(request.param, 6)  # sharper attention enlarges rounding errors
    made = VLM(exportable_copy(vlm.model, torch.float32), vlm.processor)
    module = VisionGraph(make_encoder(made, True), Recorded())
    path = tmp_path_factory.mktemp("vision") / "vision.onnx"
    inputs, shapes = vision_inputs(made, module)
    write_graph(module, path, inputs, shapes, module.outputs)
    return vlm, path


@pytest.mark.parametrize("media", MEDIA)
def test_graph_at_any_size(graph, media):
    vlm, path = graph
    made, item, inputs, _ = encoded(vlm, MEDIA[media])
    out = run(path, inputs)
    with torch.no_grad():
        expected, kept = Recorded()(made, inputs)
    most = 1e-5 * max(1, float(expected.abs().max()))
    np.testing.assert_allclose(out["features"], expected, atol=most, rtol=0)
    assert out["kept"].tolist() == kept.tolist()
    if "newline" in out:
        np.testing.assert_array_equal(out["newline"], vlm.model.model.image_newline.detach())


def test_one_frame_and_many(graph):
    vlm, path = graph
    for num_frames in (2, 12) if vlm.model.config.model_type == "qwen2_5_vl" else (1, 2, 12):
        made, _, inputs, _ = encoded(vlm, noise(num_frames))
        assert len(run(path, inputs)["features"]) == len(made.features)


def test_weights_are_written_once(graph):
    vlm, path = graph
    weights = sum(weight.numel() * 4 for weight in make_encoder(vlm, True).parameters())
    assert path.with_name(f"{path.name}_data").stat().st_size <= 1.05 * weights + 4096


def test_half_precision_probes_in_float32():
    vlm = shared_vlm("llava_onevision")
    half = VLM(exportable_copy(vlm.model, torch.float16), vlm.processor)
    _, _, inputs, _ = encoded(vlm, MEDIA["clip"])
    with torch.no_grad():
        made, whole = make_encoder(half, True)(inputs), make_encoder(vlm, True)(inputs)
    for ours, theirs in zip(
        (made.features, made.rows, made.salience, made.keys),
        (whole.features, whole.rows, whole.salience, whole.keys),
        strict=True,
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=2e-2 * float(theirs.abs().max()), rtol=0)
    assert made.project(made.rows).dtype == torch.float32
