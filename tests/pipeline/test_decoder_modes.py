"""Decoder hooks in single families: caches, beams, chat turns, training, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.pipeline.decoder_reference import (
    GREEDY,
    METHODS,
    TOLERANCE,
    Hidden,
    Recorded,
    assert_same,
    emitted,
    layers_of,
    run_and_reference,
    stage_of,
    what_stayed,
)
from tests.pipeline.tiny_families import BOUNDARY, IMAGE, PAD, TEXT, make_inputs, make_model
from tokensieve.compression import merge_plan
from tokensieve.compression.decoder_stage import DecoderStage, Step, keep_best
from tokensieve.compression.sparsevlm import visual_words
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline import attention_rows
from tokensieve.pipeline.adapter import VLMAdapter
from tokensieve.pipeline.attention_rows import attention_to
from tokensieve.pipeline.decoder_cache import notes_of
from tokensieve.pipeline.decoder_hooks import DecoderHooks


@pytest.fixture(scope="module")
def llava():
    return VLMAdapter(make_model("llava"))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_equals_its_prompts_one_by_one(method):
    adapter = VLMAdapter(make_model("llava_onevision-video"))
    rows = []
    for batch in (1, 2):
        with DecoderHooks(adapter.model, stage_of(method), 0.4) as hooks:
            inputs = make_inputs("llava_onevision-video", batch)
            ids = adapter.model.generate(**emitted(adapter, inputs), **GREEDY)
            rows.append((hooks.kept_per_layer[0], ids[0, -5:].tolist()))
    assert rows[0] == rows[1]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dycoke-decoder"])
@pytest.mark.parametrize("keep", [0.4, 0.1, 3])
def test_the_budget_is_met(method, keep):
    adapter = VLMAdapter(make_model("qwen2_5_vl"))
    inputs = make_inputs("qwen2_5_vl", 2)
    with DecoderHooks(adapter.model, stage_of(method), keep) as hooks:
        adapter.model(**emitted(adapter, inputs))
    candidates = [len(item.tokens) for item in adapter.encode(inputs)]
    wanted = [keep if keep > 1 else round(keep * n) for n in candidates]
    assert [counts[-1] for counts in hooks.kept_per_layer] == wanted
    assert [counts[0] for counts in hooks.kept_per_layer] == candidates or method == "framefusion"


@pytest.mark.parametrize(
    ("method", "looks_at", "queries"),
    [
        ("fastv", 1, "last"),
        ("pyramiddrop", 1, "last"),
        ("sparsevlm", 0, "raters"),
        ("framefusion", 0, "all"),
        ("prunevid-decoder", 1, "question"),
    ],
)
def test_the_attention_that_a_method_looks_at(method, looks_at, queries):
    """Layer, rows and reduction, against the maps of eager attention; the first step of each method."""
    adapter, inputs = VLMAdapter(make_model("llava_onevision-video")), make_inputs("llava_onevision-video", 2)
    model, items, stage = adapter.model, adapter.encode(inputs), Recorded(stage_of(method))
    if method == "framefusion":  # so that nothing merges and the second step prunes
        stage = Recorded(stage_of(method, similarity=1.0))
    with DecoderHooks(model, stage, 0.4):
        model(**emitted(adapter, inputs, items))
    model.set_attn_implementation("eager")
    full = model(**emitted(adapter, inputs, items), output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    layers = [step.layer for step in stage.steps(3)]
    step = 1 if method == "framefusion" else 0
    assert layers[step] == looks_at + (method != "pyramiddrop")
    for row in range(2):
        visual = items[row].slots[items[row].candidates]
        everything = inputs["attention_mask"][row].nonzero()[:, 0]
        question = everything[everything > items[row].slots[-1]]
        words = visual_words(full.hidden_states[0][row, visual], full.hidden_states[0][row, question])
        rows = {"last": question[-1:], "question": question, "all": everything, "raters": question[words]}[queries]
        assert queries != "raters" or 0 < len(rows) < len(question)
        maps = full.attentions[looks_at][row][:, rows][..., visual]
        want = maps.amax(1) if method == "prunevid-decoder" else maps.mean(1)
        torch.testing.assert_close(stage.attention[2 * step + row], want, atol=1e-6, rtol=0)


def test_deepstack_is_merged_like_the_tokens():
    """Pairs of tokens merge before layer 1; what is added after it are the means of their deepstack features."""
    adapter, inputs = VLMAdapter(make_model("qwen3_vl")), make_inputs("qwen3_vl", 2)
    items, carried = adapter.encode(inputs), []

    class Pairs(DecoderStage):
        def steps(self, num_layers):
            return (Step(layer=1),)

        def select(self, step, tokens):
            every = torch.arange(len(tokens))
            return merge_plan(len(tokens), every - every % 2, every, torch.full((len(tokens),), 0.5))

    with DecoderHooks(adapter.model, Pairs(), 0.5) as hooks:
        layer = layers_of(adapter.model)[1]
        handle = layer.register_forward_hook(lambda *_: carried.append((hooks._pass.carried[2], hooks._pass.layout)))
        adapter.model(**emitted(adapter, inputs, items))
        handle.remove()
    features, layout = carried[0]
    for item in items:
        columns = layout.columns(item.row, item.slots[::2])
        want = item.deepstack[1].unflatten(0, (-1, 2)).mean(1)
        torch.testing.assert_close(features[item.row, columns], want)


def test_beams_of_a_prompt_share_one_selection(llava):
    inputs, stage = make_inputs("llava", 2), Recorded(stage_of("fastv"))
    with DecoderHooks(llava.model, stage, 0.3) as hooks:
        llava.model.generate(**emitted(llava, inputs), **GREEDY, num_beams=3)
    assert len(stage.seen) == 2 and len(hooks.kept_per_layer) == 6


def test_what_a_step_sees():
    adapter = VLMAdapter(make_model("qwen3_vl"))
    inputs, stage = make_inputs("qwen3_vl", 2), Recorded(stage_of("pyramiddrop"))
    items = adapter.encode(inputs)
    with DecoderHooks(adapter.model, stage, 0.25):
        adapter.model(**emitted(adapter, inputs, items))
    first = stage.seen[0]
    grid = items[0].tokens.grids[0]
    assert grid == (3, 4, 2) and first.num_first == 24 and first.num_keep == 6 and first.counts == (24,)
    assert torch.equal(first.raster.frame, torch.arange(3).repeat_interleave(8))
    assert torch.equal(first.raster.place, torch.arange(8).repeat(3)) and (first.raster.block == 0).all()
    assert len(stage.seen) == 4 and len(stage.seen[2]) < 24 and stage.seen[2].counts == (24, len(stage.seen[2]))
    assert stage.seen[2].memory is first.memory and stage.seen[1].memory is not first.memory
    for name in ("block", "frame", "place"):
        assert torch.equal(getattr(stage.seen[2].raster, name), getattr(first.raster, name)[stage.plans[0].kept])


def test_structural_tokens_and_several_images_in_what_a_step_sees(llava):
    stage, adapter = Recorded(stage_of("fastv")), VLMAdapter(make_model("llava_onevision-video"))
    with DecoderHooks(adapter.model, stage, 0.25) as hooks:
        adapter.model(**emitted(adapter, make_inputs("llava_onevision-video", 1)))
    assert stage.seen[0].counts == (16, 16) and hooks.kept_per_layer == [[17, 17, 5]]
    stage = Recorded(stage_of("fastv"))
    with DecoderHooks(llava.model, stage, 0.25):
        llava.model(**emitted(llava, make_inputs("llava", 2)))
    for tokens in stage.seen:
        assert torch.equal(tokens.raster.block, torch.arange(2).repeat_interleave(16))


def test_structural_tokens_stay():
    adapter = VLMAdapter(make_model("llava_next"))
    inputs = make_inputs("llava_next", 2)
    items = adapter.encode(inputs)
    with DecoderHooks(adapter.model, stage_of("fastv"), 1e-6) as hooks:
        out = adapter.model(**emitted(adapter, inputs, items))
    stays = notes_of(out.cache).layouts[2].stays
    for item, counts in zip(items, hooks.kept_per_layer, strict=True):
        structural = torch.ones(len(item.slots), dtype=torch.bool)
        structural[item.candidates] = False
        assert structural.any() and stays[item.row, item.slots[structural]].all()
        assert counts[-1] == structural.sum() + 1


def test_raw_pixels_work_and_all_placeholders_count():
    model, inputs = make_model("llava_next"), make_inputs("llava_next", 1)
    with DecoderHooks(model, stage_of("fastv"), 4) as hooks:
        model.generate(**inputs, **GREEDY)
        assert hooks.kept_per_layer[0][-1] == 4
    with DecoderHooks(model, stage_of("framefusion"), 4), pytest.raises(BadOption, match="raw pixels"):
        model(**inputs)


def test_deepstack_follows_dropped_tokens():
    """Tokens leave before layer 1, deepstack features come in after layers 0 and 1."""
    adapter = VLMAdapter(make_model("qwen3_vl"))
    for batch in (1, 2):
        _, got, want = run_and_reference(adapter, make_inputs("qwen3_vl", batch), stage_of("fastv", layer=1), 0.3)
        assert_same(got, want)


def test_deepstack_after_the_last_layer_is_refused():
    model = make_model("qwen3_vl")
    hooks = DecoderHooks(model, stage_of("fastv", layer=1), 0.3)
    hooks._layers = hooks._layers[:2]
    adapter = VLMAdapter(model)
    with hooks, pytest.raises(UnsupportedModel, match="Deepstack"):
        model(**emitted(adapter, make_inputs("qwen3_vl", 1)))


class Uneven(DecoderStage):
    """Keeps the first 3 tokens of one prompt, 9 of the next, and so on."""

    def steps(self, num_layers):
        self.next = 3
        return (Step(layer=1),)

    def select(self, step, tokens):
        self.next += 6
        return keep_best(-torch.arange(len(tokens)), self.next - 6)


def test_rows_without_padding_may_keep_different_counts(llava):
    """The model makes no mask then, but the shorter row needs one."""
    inputs = {k: torch.cat([v, v]) for k, v in make_inputs("llava", 1).items()}
    inputs["pixel_values"][2:] = inputs["pixel_values"][2:].flip(0)
    hooks, got, want = run_and_reference(llava, inputs, Uneven(), 0.5)
    assert [counts[1] for counts in hooks.kept_per_layer] == [3, 9]
    assert_same(got, want)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_second_turn_on_the_cache(llava, batch):
    """Several new tokens at once over caches of unequal length."""
    inputs = make_inputs("llava", batch)
    turn = torch.tensor([[5, 6, 7], [8, 9, 10]])[:batch]
    model, stage = llava.model, stage_of("fastv")
    positions = torch.arange(1, 2)[None] + (inputs["attention_mask"].sum(1) - 1)[:, None]

    def conversation():
        out = model(**emitted(llava, inputs))
        cache = out.cache
        one = torch.ones(batch, 1, dtype=torch.long)
        mask = torch.cat([inputs["attention_mask"], one], 1)
        model(input_ids=turn[:, :1], cache=cache, attention_mask=mask, position_ids=positions)
        mask = torch.cat([mask, one, one], 1)
        more = positions + torch.tensor([[1, 2]])
        return model(input_ids=turn[:, 1:], cache=cache, attention_mask=mask, position_ids=more)

    with DecoderHooks(model, stage, 0.3):
        got = conversation()
    prompt, later = what_stayed(got.cache, inputs["attention_mask"].bool(), stage.steps(3), 3)
    with Hidden(model, prompt, later):
        want = conversation()
    torch.testing.assert_close(got.logits, want.logits, atol=TOLERANCE, rtol=0)


def test_notes_travel_with_a_copied_cache(llava):
    inputs = make_inputs("llava", 2)
    with DecoderHooks(llava.model, stage_of("fastv"), 0.3):
        cache = llava.model(**emitted(llava, inputs)).cache
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        step = dict(input_ids=torch.tensor([[5], [6]]), attention_mask=mask, position_ids=mask.sum(1)[:, None] - 1)
        want = llava.model(**step, cache=copy.deepcopy(cache)).logits
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(2)
        twice = {k: v.repeat_interleave(2, 0) for k, v in step.items()}
        assert torch.equal(llava.model(**step, cache=cache).logits, want)
        torch.testing.assert_close(
            llava.model(**twice, cache=repeated).logits, want.repeat_interleave(2, 0), atol=TOLERANCE, rtol=0
        )
        with pytest.raises(BadOption, match="2 prompts, but 3 rows"):
            llava.model(input_ids=torch.tensor([[5]] * 3), cache=copy.deepcopy(cache))


def test_training_without_a_cache_equals_hiding(llava):
    inputs = make_inputs("llava", 2)
    inputs["labels"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    visual = inputs["labels"] == IMAGE
    inputs["labels"][visual | torch.roll(visual, 1, 1)] = -100
    inputs["labels"][0, 1] = -100  # would be predicted from padding
    model, stage = llava.model, stage_of("pyramiddrop")
    with DecoderHooks(model, stage, 0.3):
        cache = model(**emitted(llava, inputs, target="forward")).cache
        with torch.enable_grad():
            got = model(**emitted(llava, inputs, target="forward"), use_cache=False).loss
            got.backward()
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    model.zero_grad()
    prompt, later = what_stayed(cache, inputs["attention_mask"].bool(), stage.steps(3), 3)
    with Hidden(model, prompt, later):
        want = model(**emitted(llava, inputs, target="forward"), use_cache=False).loss
    torch.testing.assert_close(got.detach(), want, atol=TOLERANCE, rtol=0)
    inputs["labels"][:, 4:] = 3
    with DecoderHooks(model, stage, 0.3), pytest.raises(BadOption, match="label follows a visual"):
        model(**emitted(llava, inputs, target="forward"))


def test_gradient_checkpointing_recomputes_the_same(llava):
    inputs, model = make_inputs("llava", 2), llava.model
    losses = []
    with DecoderHooks(model, stage_of("pyramiddrop"), 0.3), torch.enable_grad():
        for checkpointing in (False, True):
            model.train()
            if checkpointing:
                model.activation_checkpointing_enable()
            try:
                logits = model(**emitted(llava, inputs, target="forward"), use_cache=False).logits
                logits.square().mean().backward()
            finally:
                model.activation_checkpointing_disable()
                model.eval()
            losses.append(model.model.language_model.layers[0].self_attn.q_proj.weight.grad.clone())
            model.zero_grad()
    torch.testing.assert_close(losses[0], losses[1])


def test_hidden_states_can_be_asked_for(llava):
    with DecoderHooks(llava.model, stage_of("fastv"), 0.3):
        out = llava.model(**emitted(llava, make_inputs("llava", 1)), output_hidden_states=True)
    assert [h.shape[1] for h in out.hidden_states[:3]] == [43, 43, 43] and out.hidden_states[-1].shape[1] == 21


def test_right_padding_and_generation_without_a_cache(llava):
    """Dropping leaves rows in place, wherever their padding is; without a cache each step selects anew."""
    left = make_inputs("llava", 2)
    right = {k: v.clone() for k, v in left.items()}
    for key in ("input_ids", "attention_mask"):
        right[key][0] = torch.roll(left[key][0], -1)
    with DecoderHooks(llava.model, stage_of("fastv"), 0.3):
        a, b = llava.model(**left).logits, llava.model(**right).logits
        torch.testing.assert_close(a[0, 1:], b[0, :-1], atol=TOLERANCE, rtol=0)
        ids = llava.model.generate(**emitted(llava, left), **GREEDY, use_cache=False)
    assert ids.shape[1] == left["input_ids"].shape[1] + 5


def test_sliding_window_shorter_than_the_prompt():
    """In the prompt the window counts original places, as the masks do; a cache that lost keys cannot be cut."""
    model = make_model("gemma3")
    config = model.config.text_config
    config.sliding_window, kinds = 8, config.layer_types
    for layer, kind in zip(layers_of(model), kinds, strict=True):
        layer.self_attn.sliding_window = 8 if kind == "sliding_attention" else None
    adapter, inputs = VLMAdapter(model), make_inputs("gemma3", 2)
    assert "sliding_attention" in kinds and inputs["input_ids"].shape[1] > 8
    stage = stage_of("fastv")
    with DecoderHooks(model, stage, 0.4):
        out = model(**emitted(adapter, inputs))
    prompt, later = what_stayed(out.cache, inputs["attention_mask"].bool(), stage.steps(3), 3)
    with Hidden(model, prompt, later):
        want = model(**emitted(adapter, inputs))
    torch.testing.assert_close(out.logits[later[-1]], want.logits[later[-1]], atol=TOLERANCE, rtol=0)
    with DecoderHooks(model, stage, 0.4):  # decodes past the window
        assert model.generate(**emitted(adapter, inputs), **GREEDY).shape[0] == 2
    with DecoderHooks(model, stage_of("prunevid-decoder"), 0.4), pytest.raises(BadOption, match="sliding window"):
        model(**emitted(adapter, inputs))


def test_soft_capped_attention_with_two_kinds_of_layers():
    """PaliGemma 2: Gemma 2 caps its logits, which only eager attention can."""
    from transformers import Gemma2Config, PaliGemmaConfig, PaliGemmaForConditionalGeneration

    text = dict(head_dim=8, sliding_window=64, attn_logit_softcapping=0.5, query_pre_attn_scalar=8)
    text = Gemma2Config(**TEXT, **text, attn_implementation="eager")
    vision = make_model("paligemma").config.vision_config
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32)
    ).eval()
    for name, parameter in model.named_parameters():
        parameter.data *= 12 if "language_model" in name and "q_proj" in name else 1
    model.set_attn_implementation("eager")
    adapter, inputs, seen = VLMAdapter(model), make_inputs("paligemma", 2), {}
    layer = layers_of(model)[1]
    handle = layer.register_forward_pre_hook(lambda m, a, kw: seen.update(kw, hidden=a[0]), with_kwargs=True)
    want = model(**emitted(adapter, inputs), output_attentions=True).attentions[1]
    handle.remove()
    cos, sin = (c.expand(2, -1, -1)[0] for c in seen["position_embeddings"])
    last, columns = torch.tensor([want.shape[-1] - 1]), torch.arange(5, 12)
    got = attention_to(layer, seen["hidden"][0], cos, sin, seen["attention_mask"][0], last, columns)
    torch.testing.assert_close(got, want[0, :, -1, 5:12], atol=1e-6, rtol=0)
    _, got, want = run_and_reference(adapter, inputs, stage_of("fastv"), 0.4, attention="eager")
    assert_same(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    adapter = VLMAdapter(make_model("llava_onevision-video").to(dtype))
    inputs = make_inputs("llava_onevision-video", 2)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(dtype)
    for method in METHODS:
        with DecoderHooks(adapter.model, stage_of(method), 0.4):
            out = adapter.model(**emitted(adapter, inputs))
            assert out.logits.isfinite().all() and out.logits.dtype == dtype
            adapter.model.generate(**emitted(adapter, inputs), **GREEDY)


def test_flash_like_masks(llava):
    """An attention function that takes what Flash takes: a 2-D mask of keys, or None for causal."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import flash_attention_mask

    def flash_like(module, query, key, value, attention_mask, **kwargs):
        if attention_mask is not None:
            assert attention_mask.ndim == 2
            num_queries, num_keys = query.shape[2], key.shape[2]
            place = torch.arange(num_keys)
            causal = place[None] <= place[num_keys - num_queries :, None]
            attention_mask = attention_mask.bool()[:, None, None] & causal
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("flash_like", flash_like)
    AttentionMaskInterface.register("flash_like", flash_attention_mask)
    inputs = make_inputs("llava", 2)
    with DecoderHooks(llava.model, stage_of("fastv"), 0.3):
        want = llava.model.generate(**emitted(llava, inputs), **GREEDY)
        llava.model.set_attn_implementation({"text_config": "flash_like"})
        try:
            got = llava.model.generate(**emitted(llava, inputs), **GREEDY)
        finally:
            llava.model.set_attn_implementation("sdpa")
    assert torch.equal(got, want)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return out


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_the_size_of_an_attention_map_is_made(llava, method, monkeypatch):
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    from tokensieve.pipeline.adapter import KeptRaster

    monkeypatch.setattr(attention_rows, "MAX_CHUNK_BYTES", 2**18)
    num_visual, num_all = 576, 600
    ids = torch.tensor([[3] * 4 + [IMAGE] * num_visual + [5, 6, 7, 8] * 5])
    features = torch.randn(num_visual, 32, generator=torch.Generator().manual_seed(0))
    encoded = BaseModelOutputWithPooling(pooler_output=[features])
    encoded.kept_rasters = (KeptRaster(row=0, token=torch.arange(num_visual), grids=((4, 12, 12),)),)
    arguments = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(num_all)[None],
        mm_encoder_outputs={"image": encoded},
    )
    with DecoderHooks(llava.model, stage_of(method), 0.5), Largest() as largest:
        llava.model.generate(**arguments, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert 0 < largest.numel < num_all**2


def test_installing_and_removing_leaves_no_trace(llava):
    model, inputs = llava.model, make_inputs("llava", 1)
    count = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    before, want = count(), model(**emitted(llava, inputs)).logits
    hooks = DecoderHooks(model, stage_of("fastv"), 0.3).install()
    installed = count()
    assert hooks.install() is hooks and count() == installed > before and hooks.installed
    with pytest.raises(BadOption, match="already"):
        DecoderHooks(model, stage_of("pyramiddrop"), 0.3).install()
    assert not torch.equal(model(**emitted(llava, inputs)).logits, want)
    hooks.remove()
    hooks.remove()
    assert count() == before and not hooks.installed
    assert torch.equal(model(**emitted(llava, inputs)).logits, want)
    with pytest.raises(ZeroDivisionError), hooks:
        raise ZeroDivisionError
    assert count() == before


def test_an_error_inside_a_forward_leaves_the_next_one_well(llava):
    class Broken(DecoderStage):
        def steps(self, num_layers):
            return (Step(layer=1),)

        def select(self, step, tokens):
            if self.broken:
                raise ZeroDivisionError
            return keep_best(tokens.attention().mean(0), tokens.num_keep)

    stage, inputs = Broken(), make_inputs("llava", 1)
    with DecoderHooks(llava.model, stage, 0.3) as hooks:
        stage.broken = True
        with pytest.raises(ZeroDivisionError):
            llava.model(**emitted(llava, inputs))
        stage.broken = False
        cache = llava.model(**emitted(llava, inputs)).cache
        step = dict(input_ids=torch.tensor([[5]]), attention_mask=torch.ones(1, 44, dtype=torch.long))
        want = llava.model(**step, cache=copy.deepcopy(cache)).logits
        stage.broken = True
        with pytest.raises(ZeroDivisionError):
            llava.model(**emitted(llava, inputs))
        assert torch.equal(llava.model(**step, cache=cache).logits, want)
        stage.broken = False
        llava.model(**emitted(llava, inputs))
        assert hooks.kept_per_layer == [[32, 10, 10]]


def test_prompts_without_images_pass(llava):
    text = dict(input_ids=torch.tensor([[1, 5, 6, 7]]), attention_mask=torch.ones(1, 4, dtype=torch.long))
    want = llava.model.generate(**text, **GREEDY)
    for method in METHODS:
        with DecoderHooks(llava.model, stage_of(method), 0.3) as hooks:
            assert torch.equal(llava.model.generate(**text, **GREEDY), want)
            assert hooks.kept_per_layer == [[0, 0, 0]]


def test_what_is_refused(llava):
    model, inputs = llava.model, make_inputs("llava", 2)
    with DecoderHooks(model, stage_of("fastv"), 0.3):
        with pytest.raises(BadOption, match="StaticCache"):
            model.generate(**emitted(llava, inputs), **GREEDY, cache_implementation="static", disable_compile=True)
        for size in (7, 30, 42):  # a border among the images, behind them, in the question
            with pytest.raises(BadOption, match="chunk"):
                model.generate(**emitted(llava, inputs), **GREEDY, prefill_chunk_size=size)
        cache = model(input_ids=torch.tensor([[5, 6]] * 2)).cache
        with pytest.raises(BadOption, match="image in a later turn"):
            model(**emitted(llava, inputs), cache=cache)
        with pytest.raises(BadOption, match="inputs_embeds alone"):
            model(inputs_embeds=torch.zeros(1, 4, 32))
        ends = dict(inputs, input_ids=torch.cat([inputs["input_ids"][:, 3:], inputs["input_ids"][:, :3]], 1))
        ends["input_ids"][:, -1] = IMAGE
        ends["input_ids"][:, 3] = 5
        ends["attention_mask"] = torch.ones_like(ends["input_ids"])
        with pytest.raises(BadOption, match="ends with a visual"):
            model(**ends)
        model.model.language_model.config._attn_implementation = "flex_attention"
        try:
            with pytest.raises(BadOption, match="flex_attention"):
                model(**emitted(llava, inputs))
        finally:
            model.model.language_model.config._attn_implementation = "sdpa"
    with pytest.raises(BadOption, match="layer must be from 1 to 2"):
        DecoderHooks(model, stage_of("fastv", layer=3), 0.3)
    with pytest.raises(BadOption, match="keep"):
        DecoderHooks(model, stage_of("fastv"), 0)


def test_layer_zero_is_refused_where_the_model_would_miscount(llava):
    """prunevid cuts the caches of all layers: positions must be given, and one token comes at a time."""
    inputs = make_inputs("llava", 1)
    step = dict(input_ids=torch.tensor([[5]]), attention_mask=torch.ones(1, 44, dtype=torch.long))
    with DecoderHooks(llava.model, stage_of("prunevid-decoder"), 0.3):
        cache = llava.model(**emitted(llava, inputs)).cache
        with pytest.raises(BadOption, match="position_ids"):
            llava.model(**step, cache=copy.deepcopy(cache))
        llava.model(**step, cache=cache, position_ids=torch.tensor([[43]]))
        more = dict(input_ids=torch.tensor([[5, 6]]), position_ids=torch.tensor([[44, 45]]))
        with pytest.raises(BadOption, match="one new token at a time"):
            llava.model(**more, cache=cache)


def test_a_prompt_other_than_the_prepared_one_is_noticed(llava):
    inputs = make_inputs("llava", 2)
    arguments = emitted(llava, inputs)
    arguments["input_ids"][0, 25] = IMAGE
    arguments["input_ids"][1, 10] = BOUNDARY
    assert PAD not in arguments["input_ids"][1]
    with DecoderHooks(llava.model, stage_of("fastv"), 0.3), pytest.raises(BadOption, match="prepared with"):
        llava.model(**arguments)
