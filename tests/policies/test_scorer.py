"""CaCoVID's scorer network: the official numbers, the language model's own layer, and what each token may see."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.compression.helpers import load_golden, plain, random_inputs
from tests.pipeline.tiny_families import make_inputs, make_model
from tokensieve.compression import Question
from tokensieve.compression.cacovid import select_by_policy
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.vlm import VLM
from tokensieve.policies.scorer import PolicyScorer

FAMILIES = ["llava", "llava_onevision-video", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def qwen_config(**changes):
    from transformers import Qwen2Config

    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=97)
    return Qwen2Config(**sizes | dict(num_hidden_layers=3, rms_norm_eps=1e-6) | changes)


def released():
    golden = load_golden("cacovid_policy-d32")
    return golden, {key.removeprefix("in_sd."): v for key, v in golden.items() if key.startswith("in_sd.")}


def video(frames=4, height=2, width=3, num_text=6, num_before=2, seed=1, dtype=torch.float32):
    tokens = plain(random_inputs(frames * height * width, 32, seed).to(dtype), grids=((frames, height, width),))
    text = Question(embeds=random_inputs(num_text, 32, seed + 50).to(dtype), num_before=num_before)
    return dataclasses.replace(tokens, question=text)


def with_text(tokens, places):
    """The same tokens with other words at the given places of the text."""
    embeds = tokens.question.embeds.clone()
    embeds[places] = random_inputs(len(embeds), embeds.shape[1], 99)[places]
    return dataclasses.replace(tokens, question=dataclasses.replace(tokens.question, embeds=embeds))


def assert_same(got, expected, **tolerance):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance or {"rtol": 1e-5, "atol": 1e-6})


# --- parity with the official code


@pytest.mark.parametrize("attention, suffix", [("bidirectional", ""), ("causal", "_causal")])
@pytest.mark.parametrize("prefix", ["", "compression_policy."])
def test_logits_are_the_official_ones(attention, suffix, prefix):
    golden, state = released()
    params = golden["params"]
    state = {prefix + key: value for key, value in state.items()}
    state[prefix + "mode_selection.0.weight"] = torch.zeros(3, 32)
    if prefix:
        state["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(7, 7)
    scorer = PolicyScorer.from_released(state, qwen_config(), attention)
    expected = golden[f"out_token_logits{suffix}"], golden[f"out_frame_logits{suffix}"]
    embeds, mask = golden["in_inputs_embeds"], golden["in_video_mask"].bool()
    assert_same(scorer.logits(embeds, mask, [params["t"]])[0], expected, **CLOSE)

    pre, num_tokens = params["pre"], params["t"] * params["h"] * params["w"]
    tokens = plain(embeds[0, pre : pre + num_tokens], grids=((params["t"], params["h"], params["w"]),))
    text = torch.cat([embeds[0, :pre], embeds[0, pre + num_tokens :]])
    tokens = dataclasses.replace(tokens, question=Question(embeds=text, num_before=pre))
    with torch.no_grad():
        token_logits, frame_logits = scorer(tokens)
    assert_same((token_logits, frame_logits), expected, **CLOSE)
    if attention == "bidirectional":
        share, cap = params["keep"], params["max_sample_ratio_for_each_frame"]
        chosen = select_by_policy(token_logits, frame_logits, share, importance=params["imp_ratio"], frame_cap=cap)
        assert torch.equal(chosen.kept, golden["out_mask"].nonzero()[:, 0])


def test_released_weights_are_causal_unless_told_otherwise():
    assert PolicyScorer.from_released(released()[1], qwen_config()).attention == "causal"


@pytest.mark.parametrize(
    "spoil, config, message",
    [
        (lambda state: {}, qwen_config(), "must hold one CaCoVID policy, found 0"),
        (lambda state: state | {f"b.{k}": v for k, v in state.items()}, qwen_config(), "one CaCoVID policy, found 2"),
        (lambda state: {k: v for k, v in state.items() if "frame" not in k}, qwen_config(), "does not fit"),
        (lambda state: state, qwen_config(hidden_size=64), "does not fit"),
    ],
)
def test_other_states_are_refused(spoil, config, message):
    with pytest.raises(UnsupportedModel, match=message):
        PolicyScorer.from_released(spoil(released()[1]), config)


# --- the layer of a language model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_is_the_language_models_own(family):
    model = make_model(family)
    scorer = PolicyScorer.init_from(model, "bidirectional" if family == "paligemma" else "causal")  # as it is itself
    decoder = model.get_decoder()
    embeds = random_inputs(30, 32)[None]
    with torch.no_grad():
        expected = decoder(inputs_embeds=embeds, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(scorer._hidden(embeds, None), expected)
        before = scorer._hidden(embeds, None)
        for weight in decoder.layers[0].parameters():
            weight.zero_()
        torch.testing.assert_close(scorer._hidden(embeds, None), before)  # a copy


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_token_sees(family):
    model = make_model(family)
    tokens = video()
    changes = {}
    for attention in ("bidirectional", "causal"):
        scorer = PolicyScorer.init_from(model, attention)
        with torch.no_grad():
            plain_logits = scorer(tokens)
            for name, places in {"prefix": [0, 1], "question": [2, 3, 4, 5]}.items():
                other = scorer(with_text(tokens, places))
                changes[attention, name] = [
                    float((a - b).abs().max()) for a, b in zip(plain_logits, other, strict=True)
                ]
    assert changes["causal", "question"] == [0, 0]
    del changes["causal", "question"]
    assert all(min(change) > 1e-6 for change in changes.values()), changes


def test_the_config_of_the_whole_model_will_do():
    model = make_model("llava_onevision-video")
    whole, text = PolicyScorer(model.config), PolicyScorer(model.config.text_config)
    assert whole.options() == text.options() == PolicyScorer(text.options()["decoder"]).options()


def test_init_from_is_float32_and_keeps_heads_of_its_own():
    model = make_model("llava_onevision-video").bfloat16()
    scorer = PolicyScorer.init_from(model)
    assert {p.dtype for p in scorer.parameters()} == {torch.float32} and scorer.attention == "bidirectional"
    layer = model.get_decoder().layers[0]
    assert torch.equal(scorer.layers[0].mlp.up_proj.weight, layer.mlp.up_proj.weight.float())
    assert torch.equal(scorer.layernorm.weight, torch.ones(32))
    widths = [tuple(m.weight.shape) for m in scorer.token_compress if isinstance(m, nn.Linear)]
    assert widths == [(16, 32), (8, 16), (4, 8), (2, 4), (2, 2)]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Module()])
def test_models_without_a_language_model_are_refused(model):
    with pytest.raises(UnsupportedModel, match="has no language model with layers"):
        PolicyScorer.init_from(model)


def test_a_layer_that_cannot_be_copied_is_refused():
    model = make_model("llava")
    model.get_decoder().layers[0].mlp.up_proj = nn.Sequential(model.get_decoder().layers[0].mlp.up_proj)
    with pytest.raises(UnsupportedModel, match="Layer 0 of LlavaFor.* cannot be copied.*without quantisation"):
        PolicyScorer.init_from(model)


def test_configs_without_rotary_positions_are_refused():
    from transformers import BertConfig, GPT2Config

    for config in (BertConfig(num_hidden_layers=1), GPT2Config()):
        with pytest.raises(UnsupportedModel, match="no decoder layers with rotary positions"):
            PolicyScorer(config)
    with pytest.raises(UnsupportedModel, match="does not know this kind of language model"):
        PolicyScorer({"model_type": "no-such-model", "hidden_size": 8})


# --- batches


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_a_batch_is_one_by_one(attention):
    scorer = PolicyScorer(qwen_config(), attention)
    batch = [
        video(),
        video(3, 2, 2, num_text=9, num_before=0, seed=2),
        video(4, 2, 3, num_text=0, num_before=0, seed=3),
    ]
    together = scorer.forward_batch(batch)
    for tokens, got in zip(batch, together, strict=True):
        assert got[0].shape == (len(tokens), 2) and got[1].shape == (tokens.grids[0][0], 2)
        assert_same(got, scorer(tokens))


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_padding_may_stand_on_either_side(attention):
    scorer = PolicyScorer(qwen_config(), attention)
    embeds, place = random_inputs(20, 32)[None], torch.arange(20)
    is_video = ((place >= 4) & (place < 16))[None]
    expected = scorer.logits(embeds, is_video, [3])[0]
    padding, none = random_inputs(5, 32, 7)[None], torch.zeros(1, 5, dtype=torch.bool)
    for left in (True, False):
        joined = lambda pad, x, left=left: torch.cat([pad, x] if left else [x, pad], 1)  # noqa: E731
        mask = joined(none, torch.ones(1, 20, dtype=torch.bool))
        got = scorer.logits(joined(padding, embeds), joined(none, is_video), [3], mask)[0]
        assert_same(got, expected)
        scorer.zero_grad()
        got[0].sum().backward()
        assert all(p.grad.isfinite().all() for p in scorer.layers.parameters())


def test_padding_in_front_sees_itself_alone():
    scorer = PolicyScorer(qwen_config(), "causal")
    embeds = random_inputs(6, 32)[None]
    hidden = scorer._hidden(embeds, torch.tensor([[0, 0, 1, 1, 1, 1]]))
    for place in (0, 1):
        torch.testing.assert_close(hidden[:, place], scorer._hidden(embeds[:, place : place + 1], None)[:, 0])


def test_an_image_with_all_its_views_is_one_frame():
    scorer = PolicyScorer(qwen_config())
    tokens = dataclasses.replace(plain(random_inputs(24, 32), grids=((1, 2, 4), (1, 4, 4))), question=video().question)
    assert [x.shape for x in scorer(tokens)] == [(24, 2), (1, 2)]


def test_frame_logits_are_of_the_mean_before_the_norm():
    scorer = PolicyScorer(qwen_config())
    tokens = video()
    embeds = torch.cat([tokens.question.embeds[:2], tokens.features, tokens.question.embeds[2:]])[None]
    hidden = scorer._hidden(embeds, None)[0, 2:26]
    mean = hidden.view(4, 6, 32).mean(1)
    assert_same(
        scorer(tokens), (scorer.token_compress(scorer.layernorm(hidden)), scorer.frame_compress(scorer.layernorm(mean)))
    )


# --- dtype, seed, gradient


def test_half_precision_gives_float32_logits_and_float32_positions():
    scorer = PolicyScorer(qwen_config())
    expected = scorer(video())
    got = scorer(video(dtype=torch.bfloat16))  # a float32 scorer beside a model in half precision
    assert_same(got, expected, rtol=0.1, atol=0.05)
    half = scorer.bfloat16()(video())
    assert all(x.dtype == torch.float32 for x in (*got, *half))
    assert_same(half, expected, rtol=0.1, atol=0.05)
    assert scorer._rotary[0].inv_freq.dtype == torch.float32


def test_the_seed_decides_and_the_global_generator_rests():
    state = torch.get_rng_state()
    first = PolicyScorer(qwen_config(), seed=3)(video())
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert_same(PolicyScorer(qwen_config(), seed=3)(video()), first, rtol=0, atol=0)
    assert not torch.equal(PolicyScorer(qwen_config(), seed=4)(video())[0], first[0])
    torch.set_rng_state(state)


def test_gradients_reach_every_weight_through_both_heads():
    scorer = PolicyScorer(qwen_config())
    token_logits, frame_logits = scorer(video())
    (token_logits.square().sum() + frame_logits.square().sum()).backward()
    # A bias of keys moves all of a token's attention alike.
    idle = [n for n, p in scorer.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in idle if not n.endswith("k_proj.bias")] == []


# --- as a policy


@pytest.mark.parametrize("family", ["llava_onevision-video", "qwen2_5_vl", "qwen3_vl"])
def test_a_model_is_compressed_by_it(family):
    vlm = VLM(make_model(family))
    scorer = PolicyScorer.init_from(vlm.model)
    assert scorer.needs == ("question",)
    vlm.compress("cacovid", keep=0.25, policy=scorer)
    kept = [vlm.compress_inputs(make_inputs(family, 2)).plans for _ in range(2)]
    for plan, again in zip(*kept, strict=True):
        assert torch.equal(plan.kept, again.kept) and plan.num_kept == max(1, int(plan.num_tokens * 0.25))


@pytest.mark.parametrize("attention", ["", "flash", None, True])
def test_unknown_attention_is_refused(attention):
    with pytest.raises(BadOption, match="attention must be one of"):
        PolicyScorer(qwen_config(), attention)


def test_bad_tokens_are_refused():
    scorer = PolicyScorer(qwen_config())
    with pytest.raises(BadOption, match="reads the question.*come without.*needs="):
        scorer(dataclasses.replace(video(), question=None))
    with pytest.raises(BadOption, match="reads features of width 32, got 16"):
        scorer(plain(random_inputs(24, 16)))
    with pytest.raises(BadOption, match=r"embeddings must be \[tokens, 32\], got \(6, 8\)"):
        scorer(dataclasses.replace(video(), question=Question(embeds=torch.zeros(6, 8))))
    with pytest.raises(BadOption, match="7 video tokens cannot be 2 frames"):
        scorer.logits(random_inputs(9, 32)[None], (torch.arange(9) < 7)[None], [2])
    with pytest.raises(BadOption, match="0 video tokens cannot be"):
        scorer.logits(random_inputs(9, 32)[None], torch.zeros(1, 9, dtype=torch.bool), [2])
