"""The decoder graph is the model's own decoder, with a cache or without, padded or not, with gaps in the positions."""

# Shape legend: B batch, L new places, P cached places, S = P + L, D width

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import DynamicCache

from tests.export.exported import run, shorten
from tests.pipeline.tiny_families import make_model
from tokensieve.errors import UnsupportedModel
from tokensieve.export.generation import Decoder as OnnxDecoder
from tokensieve.export.generation import larger_blocks
from tokensieve.export.graph_file import write_graph
from tokensieve.export.language import (
    Decoder,
    Embedding,
    cache_facts,
    cache_names,
    check_text,
    decoder_inputs,
    decoder_outputs,
    text_model,
)
from tokensieve.export.precision import exportable_copy, quantize_weights

FAMILIES = ["llava", "llava_onevision-image", "qwen2_5_vl"]  # Llama, Qwen2, Qwen2 with three axes of positions


@pytest.fixture(scope="module", params=FAMILIES)
def decoder(request, tmp_path_factory):
    """A model, and its decoder graph."""
    model = make_model(request.param)
    shorten(model, 2)
    path = tmp_path_factory.mktemp("decoder") / "decoder.onnx"
    write_decoder(model, path, torch.float32)
    return model, path


def write_decoder(model, path, dtype):
    made = exportable_copy(model, dtype)
    inputs, shapes = decoder_inputs(made, dtype)
    write_graph(Decoder(made), path, inputs, shapes, decoder_outputs(made))


def sample(model, batch, past, new, seed=0):
    """Inputs of the decoder: padded on the left by another length in every row, positions with gaps."""
    facts = cache_facts(model)
    generator = torch.Generator().manual_seed(seed)
    total = past + new
    mask_BS = torch.ones(batch, total, dtype=torch.long)
    for row in range(batch):
        mask_BS[row, : min(row, total - 1)] = 0
    axes = (3,) if model.config.model_type == "qwen2_5_vl" else ()
    step = torch.randint(1, 4, (*axes, batch, total), generator=generator)
    position_ids = (step * mask_BS).cumsum(-1)
    embeds_BSD = torch.randn(batch, total, facts["width"], generator=generator)
    return embeds_BSD, mask_BS, position_ids


@torch.no_grad()
def reference(model, embeds_BSD, mask_BS, position_ids):
    """Logits of every place, by transformers alone."""
    hidden = text_model(model)(inputs_embeds=embeds_BSD, attention_mask=mask_BS, position_ids=position_ids)
    return model.lm_head(hidden.last_hidden_state).numpy()


def feed(model, embeds, mask, positions, past):
    names = cache_names("past_key_values", cache_facts(model)["num_layers"])
    return {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": positions,
        **dict(zip(names, past, strict=True)),
    }


def empty_cache(model, batch, dtype=torch.float32):
    facts = cache_facts(model)
    return [torch.zeros(batch, facts["num_kv_heads"], 0, facts["head_dim"], dtype=dtype)] * 2 * facts["num_layers"]


def cache_of(out):
    return [torch.from_numpy(array) for name, array in out.items() if name.startswith("present")]


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 9), (3, 2), (4, 17)])
def test_a_prompt(decoder, batch, length):
    model, path = decoder
    embeds, mask, positions = sample(model, batch, 0, length)
    out = run(path, feed(model, embeds, mask, positions, empty_cache(model, batch)))
    expected = reference(model, embeds, mask, positions)[:, -1:]
    np.testing.assert_allclose(out["logits"], expected, atol=1e-5)
    assert out["present.0.key"].shape[2] == length


@pytest.mark.parametrize("cuts", [(5, 6, 7, 8), (3, 8), (1, 2, 8)])
def test_a_prompt_in_pieces(decoder, cuts):
    model, path = decoder
    embeds, mask, positions = sample(model, 3, 0, 8)
    expected = reference(model, embeds, mask, positions)
    cache, start = empty_cache(model, 3), 0
    for stop in cuts:
        out = run(path, feed(model, embeds[:, start:stop], mask[:, :stop], positions[..., start:stop], cache))
        # A row of padding alone has no meaning, in transformers as here.
        real = mask[:, stop - 1].bool().numpy()
        np.testing.assert_allclose(out["logits"][real, 0], expected[real, stop - 1], atol=1e-5)
        cache, start = cache_of(out), stop


def test_the_cache_is_that_of_transformers(decoder):
    model, path = decoder
    embeds, mask, positions = sample(model, 1, 0, 6)
    out = run(path, feed(model, embeds, mask, positions, empty_cache(model, 1)))
    cache = DynamicCache()
    with torch.no_grad():
        text_model(model)(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
        )
    for i, layer in enumerate(cache.layers):
        np.testing.assert_allclose(out[f"present.{i}.key"], layer.keys, atol=1e-5)
        np.testing.assert_allclose(out[f"present.{i}.value"], layer.values, atol=1e-5)


def test_padding_changes_nothing(decoder):
    model, path = decoder
    embeds, mask, positions = sample(model, 1, 0, 7)
    alone = run(path, feed(model, embeds, mask, positions, empty_cache(model, 1)))["logits"]
    padded = [torch.nn.functional.pad(x, (0, 0, 3, 0) if x is embeds else (3, 0)) for x in (embeds, mask, positions)]
    padded[0][:, :3] = 1e3
    together = run(path, feed(model, *padded, empty_cache(model, 1)))["logits"]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.isfinite(together).all()


def test_weights_are_written_once_and_without_traces(decoder):
    model, path = decoder
    made = Decoder(model)
    written = path.with_name(f"{path.name}_data").stat().st_size
    assert written <= 1.02 * sum(weight.numel() * 4 for weight in made.parameters()) + 4096
    text = path.read_bytes()
    assert b".py" not in text and b"tokensieve" not in text


def test_half_precision(tmp_path):
    model = make_model("llava_onevision-image")
    shorten(model, 1)
    write_decoder(model, tmp_path / "decoder.onnx", torch.float16)
    embeds, mask, positions = sample(model, 2, 0, 9)
    out = run(tmp_path / "decoder.onnx", feed(model, embeds, mask, positions, empty_cache(model, 2, torch.float16)))
    expected = reference(model, embeds, mask, positions)[:, -1:]
    assert out["logits"].dtype == np.float32 and out["present.0.key"].dtype == np.float16
    assert 1e-6 < np.abs(out["logits"] - expected).max() < 3e-2 * max(1, np.abs(expected).max())


def test_eight_bits(decoder, tmp_path):
    model, path = decoder
    quantize_weights(path, tmp_path / "small.onnx")
    sizes = [each.with_name(f"{each.name}_data").stat().st_size for each in (path, tmp_path / "small.onnx")]
    assert sizes[1] < 0.5 * sizes[0]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["small.onnx", "small.onnx_data"]
    embeds, mask, positions = sample(model, 2, 0, 9)
    out = run(tmp_path / "small.onnx", feed(model, embeds, mask, positions, empty_cache(model, 2)))
    expected = reference(model, embeds, mask, positions)[:, -1:]
    assert 1e-5 < np.abs(out["logits"] - expected).max() < 0.25 * max(1, np.abs(expected).max())


def test_embedding():
    model = make_model("llava")
    ids = torch.arange(12).view(3, 4)
    assert torch.equal(Embedding(exportable_copy(model, torch.float16))(ids), model.get_input_embeddings()(ids).half())


def test_a_gpu_is_given_larger_blocks(decoder):
    model, path = decoder
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    embeds, mask, positions = (x.numpy() for x in sample(model, 1, 0, 150))
    logits = []
    for extra in ({}, larger_blocks(session)):
        stepping = OnnxDecoder(session)
        assert stepping._extra == {}  # a CPU
        stepping._extra = extra
        stepping.start(1)
        logits.append(stepping.step(embeds, mask, positions))
    assert list(extra) == ["queries_per_block"]
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_a_copy_shares_what_it_can_and_leaves_the_model_alone():
    model = make_model("llava_onevision-image")
    model.config.get_text_config().tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    hook = text_model(model).register_forward_hook(lambda *_: None)
    same, half = exportable_copy(model, torch.float32), exportable_copy(model, torch.float16)
    hook.remove()
    assert same.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert half.lm_head.weight is half.get_input_embeddings().weight and half.lm_head.weight.dtype == torch.float16
    assert text_model(half).rotary_emb.inv_freq.dtype == torch.float32
    assert not text_model(half)._forward_hooks
    assert model.lm_head.weight.requires_grad and model.lm_head.weight.dtype == torch.float32
    assert text_model(model).config._attn_implementation != "eager"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("paligemma", {}),
        ("llava_onevision-image", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
        ("llava", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    ],
)
def test_other_language_models_are_refused(family, changes):
    model = make_model(family)
    for name, value in changes.items():
        setattr(model.config.get_text_config(), name, value)
    with pytest.raises(UnsupportedModel, match="cannot be exported|can be exported"):
        check_text(model)
