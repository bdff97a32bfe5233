"""The core invariant, for every family and every registered method, and the pitfalls of every family.

keep=1 gives the model's own logits and greedy tokens; keep<1 equals the full prompt with the dropped tokens
masked out at the same positions, and merged tokens in the places of the tokens they are merged into. Neither needs
weights or reference code.
"""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from tests.compression.helpers import options_for
from tests.pipeline.tiny_families import BOUNDARY, FAMILIES, PAD, make_inputs, make_model
from tokensieve.compression import Plan, get_method, keep_all, list_methods
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.adapter import VLMAdapter, left_pack

TOLERANCE = 1e-5
NEW_TOKENS = 6
METHODS = [m.name for m in list_methods("projector")]
# Families whose encoder output is one tensor for all items: these cannot hold ragged items and beams at once.
TENSOR_FAMILIES = ["llava_onevision-video", "internvl", "gemma3", "paligemma", "video_llava", "llava_next_video"]
GREEDY = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)


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


def select(items, method: str, keep):
    method = get_method(method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # EVS warns that it does nothing to images
        return [method(item.tokens, keep, **options_for(method)) for item in items]


def masked_full(adapter, inputs, items, plans):
    """The full prompt with the dropped tokens masked out, at the positions of the full prompt."""
    mask = inputs["attention_mask"].clone()
    merged = []
    for item, plan in zip(items, plans, strict=True):
        mask[item.row, item.slots] = 0
        mask[item.row, item.slots[item.kept(plan)]] = 1
        merged.append(with_merged_tokens(item, plan))
    full = adapter.emit(inputs, merged, [keep_all(len(i.tokens)) for i in items])
    return full | {"attention_mask": mask}, mask


def with_merged_tokens(item, plan):
    """The item with its kept tokens replaced by what they are merged to, written out as a loop over the tokens."""
    if plan.merge is None:
        return item
    merge, projector = plan.merge, item.tokens.projector
    before = merge.before_projector and projector.one_row_per_token

    def mixed(values):
        rows = values.clone()
        for k, token in enumerate(plan.kept.tolist()):
            parts = (merge.target == k).nonzero()[:, 0]
            rows[token] = sum(float(merge.weight[e]) * values[merge.source[e]] for e in parts)
        return rows

    def placed(values, rows):
        return values.index_copy(0, item.candidates, rows)

    rows = projector.fn(mixed(projector.inputs)) if before else mixed(item.features[item.candidates])
    return dataclasses.replace(
        item,
        features=placed(item.features, rows),
        deepstack=tuple(placed(layer, mixed(layer[item.candidates])) for layer in item.deepstack),
    )


def logits_at_kept(model, arguments, family, mask=None):
    if family.startswith("paligemma"):  # `forward` counts from 1, `generate` from 0
        arguments = arguments | {"position_ids": arguments["position_ids"] + 1}
    logits = model(**arguments).logits
    mask = arguments["attention_mask"] if mask is None else mask
    return [row[m.bool()] for row, m in zip(logits, mask, strict=True)]


def assert_rows_close(rows, expected):
    for row, want in zip(rows, expected, strict=True):
        torch.testing.assert_close(row, want, atol=TOLERANCE, rtol=0)


def new_tokens(model, arguments, **options):
    ids = model.generate(**arguments, **(GREEDY | options))
    return ids[:, arguments["input_ids"].shape[1] :]


@pytest.mark.parametrize("batch", [1, 2])
def test_keeping_everything_is_the_model_itself(adapter, family, batch):
    inputs = make_inputs(family, batch)
    items = adapter.encode(inputs)
    everything = [keep_all(len(i.tokens)) for i in items]
    arguments = adapter.emit(inputs, items, everything, target="forward")
    assert_rows_close(logits_at_kept(adapter.model, arguments, ""), logits_at_kept(adapter.model, inputs, ""))
    arguments = adapter.emit(inputs, items, everything)
    assert torch.equal(new_tokens(adapter.model, arguments), new_tokens(adapter.model, inputs))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 2])
def test_dropping_equals_masking(adapter, family, method, batch):
    inputs = make_inputs(family, batch)
    items = adapter.encode(inputs, needs={"tower", "question"})
    plans = select(items, method, 0.4)
    full, mask = masked_full(adapter, inputs, items, plans)
    want = logits_at_kept(adapter.model, full, family, mask)
    want_tokens = new_tokens(adapter.model, masked_full(adapter, inputs, items, plans)[0])
    got = logits_at_kept(adapter.model, adapter.emit(inputs, items, plans), family)
    assert_rows_close(got, want)
    assert torch.equal(new_tokens(adapter.model, adapter.emit(inputs, items, plans)), want_tokens)


def ragged_plans(items):
    """A different share of each item: plans of unequal length within a batch."""
    return [Plan(torch.arange(0, len(i.tokens), 2 + n), len(i.tokens)) for n, i in enumerate(items)]


def test_ragged_budgets(adapter, family):
    inputs = make_inputs(family, 2)
    items = adapter.encode(inputs)
    plans = ragged_plans(items)
    full, mask = masked_full(adapter, inputs, items, plans)
    got = logits_at_kept(adapter.model, adapter.emit(inputs, items, plans), family)
    assert_rows_close(got, logits_at_kept(adapter.model, full, family, mask))


def test_a_batch_equals_its_prompts_one_by_one(adapter, family):
    inputs = make_inputs(family, 2)
    items = adapter.encode(inputs)
    together = new_tokens(adapter.model, adapter.emit(inputs, items, ragged_plans(items)))
    first = make_inputs(family, 1)
    items_first = adapter.encode(first)
    alone = new_tokens(adapter.model, adapter.emit(first, items_first, ragged_plans(items_first)))
    assert torch.equal(together[:1], alone)


def test_dropping_text_positions_would_be_noticed(adapter, family):
    """The invariant has teeth: compact positions do change the logits."""
    inputs = make_inputs(family, 1)
    items = adapter.encode(inputs)
    plans = select(items, "uniform", 0.4)
    kept = logits_at_kept(adapter.model, adapter.emit(inputs, items, plans), family)
    compact = logits_at_kept(adapter.model, adapter.emit(inputs, items, plans, positions="compact"), family)
    assert (kept[0] - compact[0]).abs().max() > 100 * TOLERANCE


def test_compact_positions_are_what_a_shorter_prompt_would_get(adapter, family):
    inputs = make_inputs(family, 2)
    items = adapter.encode(inputs)
    arguments = adapter.emit(inputs, items, ragged_plans(items), positions="compact")
    counter = (arguments["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(arguments["position_ids"], counter.expand(arguments["position_ids"].shape))


@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=3),
        dict(prefill_chunk_size=7),
        dict(cache_implementation="static", disable_compile=True),
    ],
    ids=["beams", "chunked prefill", "static cache"],
)
def test_generation_modes(adapter, family, options):
    inputs = make_inputs(family, 2)
    items = adapter.encode(inputs)
    plans = select(items, "uniform", 4)
    if "prefill_chunk_size" in options and family in ("gemma3", "paligemma"):
        pytest.skip("images attend to themselves in both directions: a chunk border inside one changes the model")
    want = new_tokens(adapter.model, masked_full(adapter, inputs, items, plans)[0], **options)
    got = new_tokens(adapter.model, adapter.emit(inputs, items, plans), **options)
    assert torch.equal(got, want)


def test_sampling_with_several_sequences(adapter, family):
    inputs = make_inputs(family, 2)
    items = adapter.encode(inputs)
    plans = select(items, "uniform", 4)
    options = dict(do_sample=True, num_return_sequences=3, top_k=5)
    torch.manual_seed(3)
    want = new_tokens(adapter.model, masked_full(adapter, inputs, items, plans)[0], **options)
    torch.manual_seed(3)
    assert torch.equal(new_tokens(adapter.model, adapter.emit(inputs, items, plans), **options), want)


def test_eager_attention(adapter, family):
    inputs = make_inputs(family, 2)
    items = adapter.encode(inputs)
    plans = select(items, "uniform", 0.4)
    full, mask = masked_full(adapter, inputs, items, plans)
    adapter.model.set_attn_implementation("eager")
    try:
        want = logits_at_kept(adapter.model, full, family, mask)
        got = logits_at_kept(adapter.model, adapter.emit(inputs, items, plans), family)
    finally:
        adapter.model.set_attn_implementation("sdpa")
    assert_rows_close(got, want)


def test_no_cache_and_no_padding(adapter, family):
    """Without the explicit mask, gaps in the positions would be taken for borders of packed sequences."""
    inputs = make_inputs(family, 1)
    items = adapter.encode(inputs)
    plans = select(items, "uniform", 0.4)
    arguments = adapter.emit(inputs, items, plans)
    full, mask = masked_full(adapter, inputs, items, plans)
    got = logits_at_kept(adapter.model, arguments | {"use_cache": False}, family)
    assert_rows_close(got, logits_at_kept(adapter.model, full | {"use_cache": False}, family, mask))


def test_training_loss_with_labels(adapter, family):
    inputs = make_inputs(family, 2)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= BOUNDARY, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    inputs = inputs | {"labels": labels}
    items = adapter.encode(inputs)
    plans = ragged_plans(items)
    arguments = adapter.emit(inputs, items, plans, target="forward")
    full = adapter.emit(inputs, items, [keep_all(len(i.tokens)) for i in items], target="forward")
    mask = masked_full(adapter, inputs, items, plans)[1]
    # In the full prompt the token after a dropped one is predicted from a masked place: not so in the short one.
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    comparable = labels.masked_fill(before == 0, -100)
    short = dict(arguments)
    short["labels"] = left_pack(comparable, mask.bool(), -100)
    torch.testing.assert_close(
        adapter.model(**short).loss,
        adapter.model(**(full | {"labels": comparable, "attention_mask": mask})).loss,
        atol=TOLERANCE,
        rtol=0,
    )


def test_gradients_reach_the_encoder(family):
    with torch.enable_grad():
        adapter = VLMAdapter(make_model(family))
        inputs = make_inputs(family, 1)
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] >= BOUNDARY, -100)
        items = adapter.encode(inputs)
        adapter.model(**adapter.emit(inputs, items, select(items, "uniform", 0.5), target="forward")).loss.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.projector.parameters())


def test_second_turn_without_explicit_positions(adapter, family):
    """A second call on the cached prompt that passes no positions: M-RoPE models fall back on their delta."""
    if not family.startswith("qwen"):
        pytest.skip("1-D families count from the mask; Chat passes positions explicitly")
    inputs = make_inputs(family, 1)
    items = adapter.encode(inputs)
    plans = select(items, "uniform", 0.4)
    arguments = adapter.emit(inputs, items, plans)
    turn = torch.tensor([[5, 9, 11, 23]])
    out = adapter.model(**arguments)
    mask = torch.cat([arguments["attention_mask"], torch.ones_like(turn)], 1)
    got = adapter.model(input_ids=turn, cache=out.cache).logits
    last = arguments["position_ids"][1:].max()
    steps = torch.arange(1, 5)
    text = arguments["position_ids"][:1, :, -1:] + steps
    positions = torch.cat([text, (last + steps).expand(3, 1, 4)])
    again = adapter.emit(inputs, items, plans)
    both = again | {
        "input_ids": torch.cat([again["input_ids"], turn], 1),
        "attention_mask": mask,
        "position_ids": torch.cat([again["position_ids"], positions], -1),
    }
    both.pop("mm_token_type_ids", None)
    want = adapter.model(**both).logits[:, -4:]
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", TENSOR_FAMILIES)
def test_beams_over_ragged_items_are_refused(name):
    adapter = VLMAdapter(make_model(name))
    inputs = make_inputs(name, 2)
    items = adapter.encode(inputs)
    arguments = adapter.emit(inputs, items, ragged_plans(items))
    with pytest.raises(BadOption, match="as many kept tokens"):
        adapter.model.generate(**arguments, **GREEDY, num_beams=2)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl", "smolvlm"])
def test_beams_over_ragged_items_in_list_families(name):
    adapter = VLMAdapter(make_model(name))
    inputs = make_inputs(name, 2)
    items = adapter.encode(inputs)
    plans = ragged_plans(items)
    want = new_tokens(adapter.model, masked_full(adapter, inputs, items, plans)[0], num_beams=3)
    assert torch.equal(new_tokens(adapter.model, adapter.emit(inputs, items, plans), num_beams=3), want)


def test_outputs_are_built_afresh(adapter, family):
    """Beam search changes `mm_encoder_outputs` in place; the items must survive it."""
    inputs = make_inputs(family, 2)
    items = adapter.encode(inputs)
    plans = select(items, "uniform", 4)
    first = new_tokens(adapter.model, adapter.emit(inputs, items, plans), num_beams=2)
    assert torch.equal(new_tokens(adapter.model, adapter.emit(inputs, items, plans), num_beams=2), first)


def test_inputs_are_left_alone(adapter, family):
    inputs = make_inputs(family, 2)
    before = {k: v.clone() for k, v in inputs.items()}
    items = adapter.encode(inputs)
    adapter.emit(inputs, items, ragged_plans(items))
    assert all(torch.equal(inputs[k], before[k]) for k in before)


def test_projector_rows_reproduce_the_features(adapter, family):
    """`projector.fn(inputs)`, carried to tokens channel by channel, is what the encoder returned."""
    inputs = make_inputs(family, 2)
    for item in adapter.encode(inputs):
        projector = item.tokens.projector
        projected = projector.fn(projector.inputs)
        if projected.shape == item.tokens.features.shape:
            got = projected if projected.shape[0] == len(item.tokens) else None
            got = torch.stack([projector.to_tokens(column) for column in got.T], -1)
        else:
            got = torch.stack([projector.to_tokens(column) for column in projected.T], -1)
        torch.testing.assert_close(got, item.tokens.features, atol=TOLERANCE, rtol=1e-4)


def test_two_layer_weights_are_the_projector(adapter, family):
    for item in adapter.encode(make_inputs(family, 1)):
        mlp, projector = item.tokens.projector.mlp, item.tokens.projector
        if mlp is None:
            assert not family.startswith("llava")
            continue
        x = projector.inputs
        hidden = torch.nn.functional.linear(x, mlp.w1, mlp.b1)
        centred = lambda y: y - y[:1]  # noqa: E731  (the last bias is not part of the record)
        torch.testing.assert_close(centred(mlp.act(hidden) @ mlp.w2.T), centred(projector.fn(x)), atol=1e-5, rtol=1e-4)


def test_text_alone(adapter, family):
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    items = adapter.encode(inputs)
    assert items == [] and "mm_encoder_outputs" not in adapter.emit(inputs, items, [])


def test_missing_placeholder_is_an_error(adapter, family):
    inputs = make_inputs(family, 1)
    if family == "internvl":
        pytest.skip("InternVL reads the number of tiles off the placeholders")
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] > BOUNDARY, 5)
    with pytest.raises(BadOption, match="placeholders"):
        adapter.encode(inputs)


def test_unknown_family():
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=10)
    with pytest.raises(UnsupportedModel, match="llava_onevision"):
        VLMAdapter(LlamaForCausalLM(tiny))


@pytest.mark.parametrize("options", [dict(positions="renumber"), dict(target="train")])
def test_bad_emit_options(options):
    adapter = VLMAdapter(make_model("llava"))
    inputs = make_inputs("llava", 1)
    with pytest.raises(BadOption):
        adapter.emit(inputs, [], [], **options)


@pytest.mark.parametrize("name", ["llava", "gemma3", "smolvlm", "internvl"])
def test_frames_given_as_images_join_to_one_video(name):
    adapter = VLMAdapter(make_model(name))
    inputs = make_inputs(name, 1)
    separate, (video,) = adapter.encode(inputs), adapter.encode(inputs, frames_as_video=True)
    frames = sum(len(item.tokens.grids) for item in separate)
    assert video.tokens.grids[0][0] == frames and len(video.tokens.grids) == 1
    assert torch.equal(video.tokens.features, torch.cat([i.tokens.features for i in separate]))
    plans = select([video], "evs", 0.6)
    full, mask = masked_full(adapter, inputs, [video], plans)
    got = logits_at_kept(adapter.model, adapter.emit(inputs, [video], plans), name)
    assert_rows_close(got, logits_at_kept(adapter.model, full, name, mask))


def test_left_pack():
    stays = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 0]]).bool()
    values = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert left_pack(values, stays, PAD - 1).tolist() == [[-1, 1, 3], [5, 6, 7]]


def test_zoprune_shares_its_budget_over_the_tiles_and_keeps_every_newline():
    adapter = VLMAdapter(make_model("llava_next"))
    inputs = make_inputs("llava_next", 2)
    for item in adapter.encode(inputs):
        tiles = int(item.tokens.crop.max()) + 1
        plan = get_method("zoprune")(item.tokens, 4 * tiles)
        assert item.tokens.crop[plan.kept].bincount().tolist() == [4] * tiles
        dropped = set(range(len(item.slots))) - set(item.kept(plan).tolist())
        newlines = set(range(len(item.slots))) - set(item.candidates.tolist())
        rows = sum(grid[1] for grid in item.tokens.grids[1:])
        assert len(newlines) == rows > 0 and not dropped & newlines
        newline = adapter.base.image_newline
        assert all(torch.equal(item.features[i], newline) for i in newlines)


def test_pixels_beside_encoded_tokens_are_refused():
    adapter = VLMAdapter(make_model("llava"))
    inputs = make_inputs("llava", 1)
    items = adapter.encode(inputs)
    arguments = adapter.emit(inputs, items, select(items, "uniform", 0.5))
    with pytest.raises(ValueError, match="pre-computed|same time"):
        adapter.model.generate(**arguments, pixel_values=inputs["pixel_values"], **GREEDY)


def test_a_sliding_window_shorter_than_the_prompt_breaks_the_invariant():
    """The documented limit of Gemma 3: its window counts tokens, so dropped ones let older ones back in."""

    def difference(window: int) -> float:
        model = make_model("gemma3")
        for config in (
            model.config.text_config,
            *(layer.self_attn.config for layer in model.model.language_model.layers),
        ):
            config.sliding_window = window
        for layer in model.model.language_model.layers:
            layer.self_attn.sliding_window = window
        adapter = VLMAdapter(model)
        inputs = make_inputs("gemma3", 1)
        items = adapter.encode(inputs)
        plans = select(items, "uniform", 0.5)
        full, mask = masked_full(adapter, inputs, items, plans)
        got = logits_at_kept(model, adapter.emit(inputs, items, plans), "gemma3")[0]
        return float((got - logits_at_kept(model, full, "gemma3", mask)[0]).abs().max())

    assert difference(512) < TOLERANCE < 100 * TOLERANCE < difference(4)
