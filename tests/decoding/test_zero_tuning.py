"""The factor on the sink: the operator, equality to eager attention scaled after softmax, sinks anywhere, search."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.decoding.models import new_model, prompts, shared_model
from tokensieve.decoding import DecodeSession, token_recycling
from tokensieve.decoding.zero_tuning import ZeroTuning, expand_gamma, find_sinks, with_bias
from tokensieve.decoding.zero_tuning_search import (
    answer_entropy,
    dominant_heads,
    first_token_accuracy,
    search_gamma,
)
from tokensieve.errors import BadOption, UnsupportedModel

NUM_LAYERS, NUM_HEADS = 3, 4
GREEDY = dict(max_new_tokens=6, do_sample=False)


def some_gamma() -> torch.Tensor:
    gamma = torch.rand(NUM_LAYERS, NUM_HEADS, generator=torch.Generator().manual_seed(3)) * 4 + 0.05
    gamma[1, 2] = gamma[2, 0] = 1
    return gamma


def scaled(attn: torch.Tensor, gamma_H: torch.Tensor, column_B: list[int]) -> torch.Tensor:
    """The paper's form: scale one column of `[B, H, Q, K]` after softmax, and divide by the sum."""
    attn = attn.clone()
    for row, column in enumerate(column_B):
        attn[row, :, :, column] *= gamma_H[:, None]
    return attn / attn.sum(-1, keepdim=True)


def reference_of(model, gamma: torch.Tensor, column_B: list[int]):
    """A copy with eager attention that scales after softmax."""

    def attend(module, query, key, value, attention_mask, scaling, **_):
        repeat = module.num_key_value_groups
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
        weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1)
        weights = scaled(weights, gamma[module.layer_idx], column_B)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("scaled_after_softmax", attend)
    AttentionMaskInterface.register("scaled_after_softmax", eager_mask)
    twin = copy.deepcopy(model)
    name = "scaled_after_softmax"
    parts = hasattr(model.config, "vision_config")
    twin.set_attn_implementation({"text_config": name, "vision_config": "sdpa"} if parts else name)
    return twin


def first_columns(inputs) -> list[int]:
    return inputs["attention_mask"].int().argmax(-1).tolist()


def assert_close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=0)


@torch.no_grad()
def forward(model, inputs):
    """Logits of the real tokens; positions as `generate` makes them."""
    mask = inputs["attention_mask"]
    inputs = inputs | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return model(**inputs).logits[mask.bool()]


def test_the_two_forms_agree_and_ratios_stay():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, 7, generator=generator)
    gamma = torch.tensor([0.3, 1.0, 2.0, 4.0])
    plain = logits.softmax(-1)
    bias = torch.zeros(2, 4, 7)
    bias[:, :, 0] = gamma.log()
    mask = with_bias(torch.ones(1, 1, 5, 7, dtype=torch.bool), bias, torch.float32)
    tuned = (logits + mask).softmax(-1)
    torch.testing.assert_close(tuned, scaled(plain, gamma, [0, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(tuned.sum(-1), torch.ones(2, 4, 5), atol=1e-6, rtol=0)
    ratio = tuned[..., 1:] / tuned[..., 1:2]
    torch.testing.assert_close(ratio, plain[..., 1:] / plain[..., 1:2], atol=1e-6, rtol=1e-5)
    a0, gap = plain[..., 0], plain[..., 1] - plain[..., 2]  # how a gap between two others changes
    change = gap.abs() * (gamma[:, None] - 1).abs() * a0 / (1 + (gamma[:, None] - 1) * a0)
    torch.testing.assert_close((tuned[..., 1] - tuned[..., 2] - gap).abs(), change, atol=1e-6, rtol=0)


def test_additive_masks_are_added_to():
    mask = torch.tensor([[[[0.0, -3.0], [0.5, 0.0]]]])
    bias = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    want = torch.tensor([[[[1.0, -3.0], [1.5, 0.0]], [[2.0, -3.0], [2.5, 0.0]]]])
    assert torch.equal(with_bias(mask, bias, torch.float32), want)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["llama", "qwen2", "llava"])
def test_equals_scaling_after_softmax(name, batch):
    model, gamma = shared_model(name), some_gamma()
    inputs = prompts(name, batch=batch)
    want = forward(reference_of(model, gamma, first_columns(inputs)), inputs)
    plain = forward(model, inputs)
    with ZeroTuning(model, gamma):
        got = forward(model, inputs)
    assert_close(got, want)
    assert (plain - want).abs().max() > 1e-2 * want.abs().max()


@pytest.mark.parametrize(("name", "keep"), [("llama", None), ("llava", None), ("llava", 0.4)])
def test_generate_with_a_cache(name, keep):
    model, gamma = shared_model(name), some_gamma()
    columns = first_columns(prompts(name, keep, 2))
    options = GREEDY | dict(output_logits=True, return_dict_in_generate=True)
    want = reference_of(model, gamma, columns).generate(**prompts(name, keep, 2), **options)
    with ZeroTuning(model, gamma):
        got = model.generate(**prompts(name, keep, 2), **options)
    assert torch.equal(got.sequences, want.sequences)
    for one, other in zip(got.logits, want.logits, strict=True):
        assert_close(one, other)


def test_ones_are_the_model_itself_and_all_is_given_back():
    model = new_model("llama")
    inputs = prompts("llama", batch=2)
    plain, hooks = forward(model, inputs), [len(m._forward_pre_hooks) for m in model.modules()]
    with ZeroTuning(model, 1.0):
        assert torch.equal(forward(model, inputs), plain)
    tuned = ZeroTuning(model, 2.0)
    assert torch.equal(forward(model, inputs), plain)  # not yet
    assert tuned.install().install().installed
    changed = forward(model, inputs)
    assert not torch.equal(changed, plain)
    tuned.remove()
    tuned.remove()
    assert torch.equal(forward(model, inputs), plain) and not tuned.installed
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    with pytest.raises(RuntimeError, match="inside"), tuned:
        raise RuntimeError("inside")
    assert torch.equal(forward(model, inputs), plain)


def test_heads_and_layers_that_were_not_chosen():
    model = shared_model("llama")
    inputs = prompts("llama")
    seen: dict[str, torch.Tensor] = {}

    def record(module, args):
        seen["heads"] = args[0].unflatten(-1, (NUM_HEADS, -1))

    handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(record)
    plain_logits, plain = forward(model, inputs), seen["heads"]
    gamma = torch.ones(NUM_LAYERS, NUM_HEADS)
    gamma[0, 1] = 3
    with ZeroTuning(model, gamma):
        assert not torch.equal(forward(model, inputs), plain_logits)
    torch.testing.assert_close(seen["heads"][:, :, [0, 2, 3]], plain[:, :, [0, 2, 3]], atol=1e-6, rtol=1e-6)
    changed = (seen["heads"] - plain)[0, :, 1].abs().amax(-1)
    assert changed[0] < 1e-6  # the first query sees the sink only
    assert (changed[1:] > 1e-5).all()
    with ZeroTuning(model, gamma[[1, 0, 2]]):
        forward(model, inputs)
    assert torch.equal(seen["heads"], plain)
    handle.remove()


def test_gamma_near_zero_hides_the_sink():
    """Later queries see what they would see were the key masked out."""
    model, inputs = shared_model("llama"), prompts("llama")
    length = inputs["input_ids"].shape[1]
    with ZeroTuning(model, 1e-30):
        got = forward(model, inputs)
    hidden = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
    hidden[:, :, 1:, 0] = torch.finfo(torch.float32).min
    with torch.no_grad():
        want = model(inputs["input_ids"], attention_mask=hidden).logits[0]
    assert_close(got, want)


@pytest.mark.parametrize(("name", "keep"), [("llama", None), ("qwen2_5_vl", 0.4), ("llava_onevision-video", 0.4)])
def test_padding_does_not_matter(name, keep):
    model = shared_model(name)

    def run(inputs):
        return DecodeSession(model).prefill(**inputs)

    both = prompts(name, keep, 2)
    start = first_columns(both)
    assert start[0] > 0 == start[1]
    one = prompts(name, keep, 1)
    with ZeroTuning(model, some_gamma()):
        assert_close(run(both)[:1], run(one))


def test_a_sink_elsewhere():
    model, gamma = shared_model("llava"), some_gamma()
    inputs = prompts("llava", batch=2)
    starts = first_columns(inputs)
    want = forward(reference_of(model, gamma, [starts[0] + 4, starts[1] + 7]), inputs)
    with ZeroTuning(model, gamma, sink=[4, 7]):
        assert_close(forward(model, inputs), want)


def test_rows_of_one_prompt_share_its_sink():
    """As beams and samples do."""
    model, gamma = shared_model("llama"), some_gamma()
    inputs = {name: values.repeat_interleave(2, dim=0) for name, values in prompts("llama", batch=2).items()}
    start = first_columns(inputs)
    want = forward(reference_of(model, gamma, [start[0] + 1, start[0] + 1, start[2] + 3, start[2] + 3]), inputs)
    with ZeroTuning(model, gamma, sink=[1, 3]):
        assert_close(forward(model, inputs), want)


@pytest.mark.parametrize(("name", "batch"), [("llama", 2), ("llava", 2), ("qwen2_5_vl", 1)])
def test_sinks_are_where_eager_attention_says(name, batch):
    model = shared_model(name)
    inputs = prompts(name, batch=batch)
    twin = copy.deepcopy(model)
    parts = hasattr(model.config, "vision_config")
    twin.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"} if parts else "eager")
    out = twin.generate(
        **prompts(name, batch=batch), max_new_tokens=1, output_attentions=True, return_dict_in_generate=True
    )
    want = []
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        real = mask.nonzero()[:, 0]
        asked = len(real) // 4
        attn = torch.stack([layer[row].mean(0) for layer in out.attentions[0]]).mean(0)
        want.append(int(attn[real[-asked:]].mean(0)[real[:-asked]].argmax()))
    assert find_sinks(model, **inputs) == want
    assert any(want)  # none of these random models has its sink at the start


def test_trees_and_chains_see_the_factor():
    model = shared_model("llama")
    inputs = prompts("llama")
    with ZeroTuning(model, some_gamma()):
        greedy = model.generate(**inputs, max_new_tokens=12)
        tree = model.generate(**inputs, max_new_tokens=12, custom_generate=token_recycling())
        chunks = model.generate(**inputs, max_new_tokens=12, prefill_chunk_size=4)
    assert torch.equal(tree, greedy) and torch.equal(chunks, greedy)
    assert not torch.equal(greedy, model.generate(**inputs, max_new_tokens=12))


def test_with_compression_inside_the_language_model():
    from tokensieve.compression import get_method
    from tokensieve.pipeline.decoder_hooks import DecoderHooks

    model = shared_model("llava")
    with DecoderHooks(model, get_method("fastv").fn(layer=1), 0.4):
        plain = DecodeSession(model).prefill(**prompts("llava", 1.0, 2))
        with ZeroTuning(model, some_gamma()):
            both = DecodeSession(model).prefill(**prompts("llava", 1.0, 2))
            one = DecodeSession(model).prefill(**prompts("llava", 1.0, 1))
        assert_close(both[:1], one)
        assert not torch.allclose(plain, both)
        with pytest.raises(BadOption, match="moves tokens"), ZeroTuning(model, 2.0, sink=3):
            DecodeSession(model).prefill(**prompts("llava", 1.0, 1))
        with pytest.raises(BadOption, match="moves tokens"):
            find_sinks(model, **prompts("llava", 1.0, 1))


def test_half_precision_is_finite():
    model = new_model("llama").to(torch.bfloat16)
    with ZeroTuning(model, 2.0):
        assert forward(model, prompts("llama", batch=2)).isfinite().all()


def test_refusals():
    model, inputs = shared_model("llama"), prompts("llama", batch=2)
    for gamma in (0, -1.0, float("nan"), float("inf"), [1.0, 2.0], torch.ones(2, 4)):
        with pytest.raises(BadOption, match="gamma must be"):
            ZeroTuning(model, gamma)
    for sink in (-1, [], 0.5, [0, "a"]):
        with pytest.raises(BadOption, match="sink must be"):
            ZeroTuning(model, 2.0, sink)
    with pytest.raises(BadOption, match="3 sinks were given for a batch of 2"), ZeroTuning(model, 2.0, [1, 2, 3]):
        forward(model, inputs)
    with pytest.raises(BadOption, match="fewer tokens"), ZeroTuning(model, 2.0, 10):
        forward(model, inputs)
    with pytest.raises(BadOption, match="dynamic cache"), ZeroTuning(model, 2.0):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(BadOption, match="own sink"):
        find_sinks(model, input_ids=torch.ones(1, 1, dtype=torch.long))
    other = copy.deepcopy(model)
    other.config._attn_implementation = "flex_attention"
    with pytest.raises(BadOption, match="'flex_attention' attention takes none"), ZeroTuning(other, 2.0):
        other.model.layers[0].self_attn(hidden_states=torch.zeros(1, 2, 32))
    other.model.layers[2].self_attn.sliding_window = 8
    with pytest.raises(UnsupportedModel, match=r"Layers \[2\]"):
        ZeroTuning(other, 2.0)
    gamma = torch.full((NUM_LAYERS, NUM_HEADS), 2.0)
    gamma[2] = 1
    ZeroTuning(other, gamma)


def test_gamma_of_heads_goes_to_every_layer():
    assert expand_gamma(2, 2, 3).tolist() == [[2.0] * 3] * 2
    assert expand_gamma([1.0, 2.0, 3.0], 2, 3).tolist() == [[1.0, 2.0, 3.0]] * 2


def test_dominant_heads_of_the_released_notebook():
    """SST-2 with gamma 2 in one head: 63.6 became 47.4, 67.8, 65.8 and 72.0 with heads 1, 10, 20 and 30."""
    effect = torch.zeros(32)
    effect[[1, 10, 20, 30]] = torch.tensor([47.4, 67.8, 65.8, 72.0]) - 63.6
    assert dominant_heads(effect, 1.0) == (10, 20, 30)
    assert dominant_heads(effect, 2 / 32) == (10, 30)
    assert dominant_heads(-effect, 1 / 32) == (30,)
    assert dominant_heads(torch.tensor([0.1, -0.2]), 1.0) == (0,)
    assert dominant_heads(torch.zeros(4), 1.0) == ()


def test_search_by_entropy():
    model = shared_model("llama")
    batches = [prompts("llama", batch=2), prompts("llama", batch=1)]

    def score():
        return -answer_entropy(model, batches)

    found = search_gamma(model, score, gammas=(0.3, 4.0), layers=(0, 1), head_share=0.5)
    plain = score()
    assert found.scores[1.0] == pytest.approx(plain) and set(found.scores) == {0.3, 1.0, 4.0}
    assert found.scores[found.best] == max(found.scores.values()) > plain
    assert 0 < len(found.heads) <= 2
    want = torch.ones(NUM_LAYERS, NUM_HEADS)
    want[:2, list(found.heads)] = found.best
    assert torch.equal(found.gamma, want)
    with ZeroTuning(model, found.gamma):
        assert score() == pytest.approx(found.scores[found.best])
    for head in range(NUM_HEADS):
        gamma = torch.ones(NUM_LAYERS, NUM_HEADS)
        gamma[:2, head] = 2
        with ZeroTuning(model, gamma):
            assert score() - plain == pytest.approx(float(found.effects[head]), abs=1e-5)
    logits = torch.cat([DecodeSession(model).prefill(**b) for b in batches]).double()
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    assert answer_entropy(model, batches) == pytest.approx(float(entropy), abs=1e-5)


def test_search_by_labels():
    """Labels are what the model says with one gamma in all heads: the search is to win some of them back."""
    model = shared_model("qwen2")
    generator = torch.Generator().manual_seed(11)
    batches = [{"input_ids": torch.randint(2, 80, (24, 9), generator=generator)}]
    with ZeroTuning(model, 4.0):
        labels = [DecodeSession(model).prefill(**b).argmax(-1) for b in batches]
        assert first_token_accuracy(model, batches, labels) == 1
    plain = first_token_accuracy(model, batches, labels)
    found = search_gamma(model, lambda: first_token_accuracy(model, batches, labels), gammas=(0.5, 4.0), head_share=1.0)
    assert 0 < plain < 1 and found.scores[1.0] == pytest.approx(plain)
    assert found.best == 4.0 and found.scores[4.0] > plain
    with pytest.raises(ValueError):
        first_token_accuracy(model, batches, [])


def test_search_without_effect_and_refusals():
    model = shared_model("llama")
    found = search_gamma(model, lambda: 0.5)
    assert found.heads == () and found.best == 1 and bool((found.gamma == 1).all())
    for options in (dict(head_share=0), dict(layers=[3]), dict(layers=[]), dict(probe=0)):
        with pytest.raises(BadOption):
            search_gamma(model, lambda: 0.5, **options)
