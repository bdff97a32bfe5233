"""The core invariant inside the language model: dropping tokens before a layer equals hiding their keys from there on.

The reference runs the full prompt with eager attention and a test hook that adds the hidden keys to every layer's
mask. It needs neither weights nor reference code.
"""

from __future__ import annotations

import pytest
import torch

from tests.pipeline.decoder_reference import (
    GREEDY,
    METHODS,
    PRUNING,
    TOLERANCE,
    Hidden,
    assert_same,
    emitted,
    layers_of,
    run_and_reference,
    stage_of,
    what_stayed,
)
from tests.pipeline.tiny_families import FAMILIES, make_inputs, make_model
from tokensieve.pipeline.adapter import VLMAdapter
from tokensieve.pipeline.attention_rows import attention_to
from tokensieve.pipeline.decoder_hooks import DecoderHooks


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def adapter(family):
    with torch.no_grad():
        yield VLMAdapter(make_model(family))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("method", PRUNING)
@pytest.mark.parametrize("batch", [1, 2])
def test_dropping_equals_hiding(adapter, family, method, batch):
    inputs = make_inputs(family, batch)
    stage = stage_of(method, **PRUNING[method])
    hooks, got, want = run_and_reference(adapter, inputs, stage, 0.4)
    assert_same(got, want)
    lengths = [layer.keys.shape[-2] for layer in got.past_key_values.layers]
    assert lengths[-1] < want.past_key_values.layers[-1].keys.shape[-2]  # the cache really shrinks
    text = (inputs["attention_mask"].sum(1) - torch.tensor([row[0] for row in hooks.kept_per_layer])).tolist()
    in_last = max(t + row[-1] for t, row in zip(text, hooks.kept_per_layer, strict=True))
    assert lengths[-1] == in_last + GREEDY["max_new_tokens"] - 1


def test_inner_logits_equal_hiding(adapter, family):
    """Every kept position of a forward, not only the last; dropped ones are zero."""
    inputs, model = make_inputs(family, 2), adapter.model
    items = adapter.encode(inputs)
    stage = stage_of("pyramiddrop")
    with DecoderHooks(model, stage, 0.4):
        got = model(**emitted(adapter, inputs, items, target="forward"))
    valid = inputs["attention_mask"].bool()
    prompt, later = what_stayed(got.cache, valid, stage.steps(3), 3)
    with Hidden(model, prompt, later):
        want = model(**emitted(adapter, inputs, items, target="forward"))
    torch.testing.assert_close(got.logits[later[-1]], want.logits[later[-1]], atol=TOLERANCE, rtol=0)
    assert got.logits.shape == want.logits.shape and (got.logits[~later[-1]] == 0).all()


def test_keeping_everything_is_the_model_itself(adapter, family):
    inputs, model = make_inputs(family, 2), adapter.model
    items = adapter.encode(inputs)
    want = model(**emitted(adapter, inputs, items)).logits
    tokens = model.generate(**emitted(adapter, inputs, items), **GREEDY)
    for method in METHODS:
        with DecoderHooks(model, stage_of(method), 1.0):
            assert torch.equal(model(**emitted(adapter, inputs, items)).logits, want), method
            if method in ("prunevid-decoder", "dycoke-decoder"):
                assert torch.equal(model.generate(**emitted(adapter, inputs, items), **GREEDY), tokens), method


def test_attention_rows_are_those_of_eager_attention(adapter, family):
    inputs, model = make_inputs(family, 2), adapter.model
    arguments = emitted(adapter, inputs)
    seen = {}
    layer = layers_of(model)[1]
    handle = layer.register_forward_pre_hook(lambda m, a, kw: seen.update(kw, hidden=a[0]), with_kwargs=True)
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        want = model(**arguments, output_attentions=attention == "eager").attentions
        mask, valid = seen["attention_mask"], inputs["attention_mask"].bool()
        for row in range(2):
            cos, sin = (c.expand(2, -1, -1)[row] for c in seen["position_embeddings"])
            rows, columns = valid[row].nonzero()[:, 0], torch.tensor([4, 7, 8])
            here = valid[row] if mask is None else mask[row]
            for reduction in ("mean", "max"):
                got = attention_to(layer, seen["hidden"][row], cos, sin, here, rows, columns, reduction)
                seen[attention, row, reduction] = got
    handle.remove()
    model.set_attn_implementation("sdpa")
    for row in range(2):
        rows = inputs["attention_mask"][row].bool()
        full = want[1][row][:, rows][..., [4, 7, 8]]
        for attention in ("sdpa", "eager"):
            torch.testing.assert_close(seen[attention, row, "mean"], full.mean(1), atol=1e-6, rtol=0)
            torch.testing.assert_close(seen[attention, row, "max"], full.amax(1), atol=1e-6, rtol=0)


def test_beams_follow(adapter, family):
    inputs = make_inputs(family, 2)
    if family in ("internvl", "video_llava"):  # their prompts of unequal length cannot be repeated, see RaggedFeatures
        inputs = make_inputs(family, 1)
    items = adapter.encode(inputs)
    if len({len(i.slots) for i in items}) > 1 and items[0].in_tensor:
        pytest.skip("ragged features in one tensor cannot be repeated for beams")
    options = dict(num_beams=3, num_return_sequences=2)
    for method in ("fastv", "prunevid-decoder"):
        _, got, want = run_and_reference(adapter, inputs, stage_of(method), 4, **options)
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(got.sequences_scores, want.sequences_scores, atol=TOLERANCE, rtol=0)
