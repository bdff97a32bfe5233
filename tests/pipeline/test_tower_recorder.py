"""The record of the tower's last layers, against the tower's own attention, for every family."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from tests.pipeline.tiny_families import FAMILIES, make_inputs, make_model
from tokensieve.errors import UnsupportedModel
from tokensieve.pipeline.adapter import VLMAdapter
from tokensieve.pipeline.stages import Stage
from tokensieve.pipeline.tower_recorder import TowerRecorder, parts_of

CLASS_TOKEN = {"llava", "llava_next", "llava_next_video", "video_llava", "internvl"}
OUTPUT_PROJECTIONS = ("out_proj", "proj", "projection_layer")


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def adapter(family):
    """With sharp attention in the tower, so that a wrong scale or rotation shows."""
    adapter = VLMAdapter(make_model(family))
    generator = torch.Generator().manual_seed(4)
    for name, parameter in adapter.base.named_parameters():
        if "language_model" not in name and "text_model" not in name and "bias" not in name:
            if any(part in name for part in ("q_proj", "k_proj", "qkv")):
                parameter.data *= 30
            if "class_embedding" in name or "cls_token" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)
    return adapter


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def modality_of(inputs):
    return "video" if any(k.startswith("pixel_values_videos") for k in inputs) else "image"


def maps_of_the_model(adapter, inputs):
    """Attention maps of the last two layers as the model itself computes them: one `[H, S, S]` per group."""
    blocks = adapter.family.tower_blocks(adapter.base, modality_of(inputs))
    seen = {place: [] for place in (-1, -2)}

    def spy(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        weights = (query @ key.transpose(-1, -2) * scaling).softmax(-1)
        for place, maps in seen.items():
            if module is parts_of(blocks[place])[1]:
                maps += list(weights)
        return (weights @ value).transpose(1, 2), weights

    AttentionInterface.register("spy", spy)
    configs = {id(m.config): m.config for b in blocks for m in b.modules() if hasattr(m, "config")}.values()
    before = [c._attn_implementation for c in configs]
    try:
        for config in configs:
            config._attn_implementation = "spy"
        items = adapter.encode(inputs, needs={"tower"})
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
    return items, seen


@pytest.mark.parametrize("batch", [1, 2])
def test_attention_is_the_models_own(adapter, family, batch):
    inputs = make_inputs(family, batch)
    items, seen = maps_of_the_model(adapter, inputs)
    for place in (-1, -2):
        layers = [item.tokens.tower.layers[place] for item in items]
        assert sum(len(layer.query) for layer in layers) == len(seen[place])
        maps = iter(seen[place])
        for item, layer in zip(items, layers, strict=True):
            assert layer.num_prefix == (family in CLASS_TOKEN)
            mine = [next(maps) for _ in layer.query]
            received = torch.cat([m.mean((0, 1))[layer.num_prefix :] for m in mine])
            torch.testing.assert_close(layer.received_attention(), layer.to_tokens(received), atol=1e-6, rtol=1e-4)
            assert layer.received_attention().shape == (len(item.tokens),)
            if layer.num_prefix:
                row = torch.cat([m.mean(0)[0, 1:] for m in mine])
                torch.testing.assert_close(layer.class_attention(), layer.to_tokens(row), atol=1e-6, rtol=1e-4)
                assert torch.equal(layer.salience(), layer.class_attention())
            else:
                assert torch.equal(layer.salience(), layer.received_attention())


def test_every_patch_goes_to_the_tokens_that_it_changes(family):
    """With attention silenced, a nudge to one patch changes the features of exactly the tokens it is carried to."""
    model = make_model(family)
    adapter = VLMAdapter(model)
    inputs = make_inputs(family, 2)
    blocks = adapter.family.tower_blocks(adapter.base, modality_of(inputs))
    for block in blocks:
        attention = parts_of(block)[1]
        (out,) = [getattr(attention, n) for n in OUTPUT_PROJECTIONS if hasattr(attention, n)]
        torch.nn.init.zeros_(out.weight)
    plain = adapter.encode(inputs, needs={"tower"})
    generator = torch.Generator().manual_seed(0)
    for index, item in enumerate(plain):
        layer = item.tokens.tower.layers[-1]
        lengths = [k.shape[1] for k in layer.key]
        num_patches = sum(lengths) - len(lengths) * layer.num_prefix
        for patch in torch.randperm(num_patches, generator=generator)[:6].tolist():
            changed = adapter_with_nudge(adapter, blocks, inputs, plain, index, patch)
            touched = (changed[index].tokens.features - item.tokens.features).abs().sum(-1) > 1e-7
            carried = layer.to_tokens(torch.eye(num_patches)[patch]) != 0
            assert torch.equal(touched, carried) or not carried.any()  # anyres images cut padding off
        assert layer.to_tokens(torch.ones(num_patches)).allclose(torch.ones(len(item.tokens)))


def adapter_with_nudge(adapter, blocks, inputs, items, index, patch):
    """Encodes with patch `patch` of item `index` pushed away before the first block."""
    layers = [item.tokens.tower.layers[-1] for item in items]
    groups_before = sum(len(layer.key) for layer in layers[:index])
    patches_before = sum(k.shape[1] for layer in layers[:index] for k in layer.key)
    prefix = layers[index].num_prefix

    def nudge(_, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        if hidden.ndim == 2:
            hidden[patches_before + patch] += 3 * torch.randn(hidden.shape[-1], generator=_seeded())
        else:
            per_image = hidden.shape[1] - prefix
            image, place = divmod(patch, per_image)
            hidden[groups_before + image, prefix + place] += 3 * torch.randn(hidden.shape[-1], generator=_seeded())
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    hook = blocks[0].register_forward_pre_hook(nudge, with_kwargs=True)
    try:
        return adapter.encode(inputs)
    finally:
        hook.remove()


def _seeded():
    return torch.Generator().manual_seed(1)


def test_keys(adapter, family):
    for item in adapter.encode(make_inputs(family, 1), needs={"tower"}):
        layer = item.tokens.tower.layers[-2]
        heads, _, width = layer.key[0].shape
        assert layer.mean_keys().shape == (len(item.tokens), width)
        assert layer.all_keys().shape == (len(item.tokens), heads * width)
        first = layer.key[0][:, layer.num_prefix :]
        expected = first.transpose(0, 1).flatten(1)
        if len(layer.key) == 1 and item.tokens.projector.one_row_per_token and len(expected) == len(item.tokens):
            if not family.startswith("qwen"):
                assert torch.equal(layer.all_keys(), expected)
        one_head = layer.class_attention(one_head=True) if layer.num_prefix else None
        assert one_head is None or not torch.allclose(one_head, layer.class_attention())


def test_nothing_is_recorded_unasked_and_no_hook_stays(adapter, family):
    inputs = make_inputs(family, 1)
    assert all(item.tokens.tower is None and item.tokens.question is None for item in adapter.encode(inputs))
    count = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapter.base.modules())  # noqa: E731
    before = count()  # transformers leaves some of its own
    adapter.encode(inputs, needs={"tower"})
    assert count() == before


def test_the_question_is_the_text_of_its_own_prompt(adapter, family):
    inputs = make_inputs(family, 2)
    for item in adapter.encode(inputs, needs={"question"}):
        ids = inputs["input_ids"][item.row]
        text = [t for t, seen in zip(ids.tolist(), inputs["attention_mask"][item.row], strict=True) if seen]
        config = adapter.model.config
        special = {getattr(config, f"{m}_token_id", None) for m in ("image", "video")} | {0, 1, 93}
        expected = adapter.model.get_input_embeddings()(torch.tensor([t for t in text if t not in special]))
        assert torch.equal(item.tokens.question.embeds, expected) and item.tokens.question.text is None
        before = [t for t in text[: int(item.slots[0]) - len(ids) + len(text)] if t not in special]
        assert item.tokens.question.num_before == len(before) > 0


@pytest.mark.parametrize("name", ["llava", "gemma3", "smolvlm", "internvl"])
def test_frames_given_as_images_join_their_towers(name):
    adapter = VLMAdapter(make_model(name))
    inputs = make_inputs(name, 1)
    separate = adapter.encode(inputs, needs={"tower"})
    (video,) = adapter.encode(inputs, frames_as_video=True, needs={"tower"})
    parts = [item.tokens.tower.layers[-1].salience() for item in separate]
    torch.testing.assert_close(video.tokens.tower.layers[-1].salience(), torch.cat(parts))


def test_bad_towers():
    with pytest.raises(UnsupportedModel, match="at least 2 blocks"):
        TowerRecorder(torch.nn.ModuleList([torch.nn.Linear(2, 2)]))
    with pytest.raises(UnsupportedModel, match="Linear is not known as a block"):
        TowerRecorder(torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 2))


@pytest.mark.parametrize("name", ["llava", "llava_onevision-video", "paligemma"])
def test_a_shortened_tower_spreads_its_attention_over_the_patches_it_stands_for(name):
    adapter = VLMAdapter(make_model(name))
    inputs = make_inputs(name, 2)
    items = adapter.encode(inputs, needs={"tower"}, tower=Stage("tome", 0.5, proportional=False))
    for item in items:
        layer = item.tokens.tower.layers[-1]
        assert layer.key[0].shape[1] < 16 + layer.num_prefix  # the tower had fewer tokens there
        salience = layer.salience()
        assert salience.shape == (len(item.tokens),) and (salience > 0).all()
    whole = adapter.encode(inputs, needs={"tower"}, tower=Stage("tome", 1.0))
    plain = adapter.encode(inputs, needs={"tower"})
    for got, want in zip(whole, plain, strict=True):
        torch.testing.assert_close(got.tokens.tower.layers[-2].salience(), want.tokens.tower.layers[-2].salience())
