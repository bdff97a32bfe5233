"""The session against forwards of whole sequences, and branches against sessions that never branched."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tests.decoding.models import CASES, new_model, prompts, shared_model
from tests.pipeline.tiny_families import TEXT
from tokensieve.decoding import DecodeSession, Ledger
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.decoder_hooks import DecoderHooks
from tokensieve.pipeline.vlm import VLM

TOLERANCE = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def started(name, keep=None, batch=2, model=None):
    session = DecodeSession(model or shared_model(name))
    return session, session.prefill(**prompts(name, keep, batch, model))


def whole(name, keep, new_BT, batch=2):
    """Logits of prompt and new tokens in one forward without our code, `[B, 1 + T, V]` from the prompt's last on."""
    model, inputs = shared_model(name), prompts(name, keep, batch)
    num = new_BT.shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], new_BT], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(new_BT)], 1)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(new_BT)], 1)
    if keep is not None:
        last = inputs["position_ids"][..., -1:]
        inputs["position_ids"] = torch.cat([inputs["position_ids"], last + torch.arange(1, num + 1)], -1)
    out = model(**inputs, cache=DynamicCache(config=model.config.get_text_config()))
    return out.logits[:, -num - 1 :]


@pytest.mark.parametrize(("name", "keep"), CASES)
def test_prefill_and_steps_equal_one_forward(name, keep):
    session, first = started(name, keep)
    new = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]])
    logits = [first[:, None], session.step(new[:, :1]), session.step(new[:, 1:3]), session.step(new[:, 3:])]
    assert first.dtype == torch.float32 and session.length == prompts(name, keep, 2)["input_ids"].shape[1] + 4
    assert_close(torch.cat(logits, 1), whole(name, keep, new), **TOLERANCE)


@pytest.mark.parametrize(("name", "keep"), CASES)
def test_branches_equal_sessions_that_never_branched(name, keep):
    session, _ = started(name, keep)
    session.fork(3)  # rows 0-2 of the first prompt, 3-5 of the second
    session.step(torch.arange(11, 17)[:, None])
    session.step(torch.arange(31, 37)[:, None])
    session.step(torch.arange(51, 57)[:, None])
    session.select([4, 1, 1])
    session.truncate(2)
    got = session.step(torch.tensor([[71, 72], [73, 74], [75, 76]]))
    for row, (prompt, ids) in enumerate([(1, [15, 71, 72]), (0, [12, 73, 74]), (0, [12, 75, 76])]):
        alone, _ = started(name, keep)
        want = alone.step(torch.tensor([ids, ids]))[prompt, 1:]
        assert_close(got[row], want, **TOLERANCE)


@pytest.mark.parametrize(("name", "keep"), CASES)
def test_a_gathered_tree_equals_its_path(name, keep):
    session, _ = started(name, keep)
    start = session.length
    sees = torch.eye(4, dtype=torch.bool)
    sees[3, 2] = sees[2, 0] = sees[3, 0] = True  # 0 - 2 - 3, and 1 beside 0
    tokens = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]])
    places = session.positions(torch.tensor([0, 0, 1, 2]))
    got = session.step(tokens, positions=places, mask=session.tree_mask(sees))
    alone, _ = started(name, keep)
    assert_close(got[:, [0, 2, 3]], alone.step(tokens[:, [0, 2, 3]]), **TOLERANCE)
    session.gather([*range(start), start, start + 2, start + 3])
    assert session.length == start + 3
    assert_close(session.step(tokens), alone.step(tokens), **TOLERANCE)


@pytest.mark.parametrize("keep", [None, 0.4])
def test_positions_of_qwen_follow_its_rope_delta(keep):
    model = shared_model("qwen2_5_vl")
    session, _ = started("qwen2_5_vl", keep)
    places = session.positions(torch.tensor([0, 3]))
    counted = session.mask_BL.sum(1, keepdim=True) + torch.tensor([0, 3])
    assert model.model.rope_deltas.unique().numel() > 0 and (model.model.rope_deltas != 0).any()
    assert torch.equal(places[0], counted) or keep
    assert torch.equal(places[1:], (counted + model.model.rope_deltas).expand(3, -1, -1))


def test_embeddings_equal_ids():
    model = shared_model("llama")
    by_ids, _ = started("llama")
    by_embeds, _ = started("llama")
    new = torch.tensor([[11, 12], [21, 22]])
    want, got = by_ids.step(new), by_embeds.step(embeds_BTD=model.get_input_embeddings()(new))
    assert_close(got, want, **TOLERANCE)
    inputs = prompts("llama", batch=2)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    session = DecodeSession(model)
    session.prefill(**inputs)
    assert_close(session.step(new), want, **TOLERANCE)


def test_a_prompt_in_chunks_and_on_top_of_a_cache():
    model, inputs = shared_model("llama"), prompts("llama")
    want = DecodeSession(model).prefill(**inputs)
    config = type(model.generation_config)(prefill_chunk_size=4)
    session = DecodeSession(model)
    assert_close(session.prefill(**prompts("llama"), generation_config=config), want, **TOLERANCE)
    assert session.ledger.forward_passes == 3
    cache = DynamicCache()
    model(inputs["input_ids"][:, :5], cache=cache)
    session = DecodeSession(model)
    assert_close(session.prefill(**prompts("llama"), cache=cache), want, **TOLERANCE)
    assert session.length == 9 == session.cache.get_seq_length()


@pytest.mark.parametrize(("name", "keep"), CASES)
def test_what_plain_models_can_do(name, keep):
    session, _ = started(name, keep)
    assert session.crop_ok and session.tree_ok and session.bias_ok


def test_a_window_cannot_hold_a_tree():
    session, _ = started("gemma3")
    assert session.crop_ok and not session.tree_ok
    with pytest.raises(UnsupportedModel, match="DynamicSlidingWindowLayer"):
        session.require("tree")
    with pytest.raises(UnsupportedModel, match="rearranged"):
        session.gather([0, 1])


def test_methods_inside_the_language_model_cannot_hold_a_tree():
    model = new_model("llava")
    vlm = VLM(model).compress("fastv", 0.4)
    session = DecodeSession(model)
    session.prefill(**vlm.compress_inputs(prompts("llava")))
    assert session.crop_ok and not session.tree_ok
    vlm.compress(None)
    session, _ = started("llava", model=model)
    assert session.tree_ok


@pytest.mark.parametrize(("kind", "can"), [("deaf", []), ("one head", ["tree"]), ("all heads", ["tree", "bias"])])
def test_attention_that_ignores_masks_is_found_out(kind, can):
    def attention(module, query, key, value, attention_mask, **kwargs):
        num, past = query.shape[2], key.shape[2] - query.shape[2]
        if kind == "deaf":
            attention_mask = torch.ones(num, num + past, dtype=torch.bool).tril(past)[None, None]
        elif kind == "one head" and attention_mask is not None:
            attention_mask = attention_mask[:, :1]
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("test-" + kind, attention)
    AttentionMaskInterface.register("test-" + kind, sdpa_mask)
    model = new_model("llama")
    model.set_attn_implementation("test-" + kind)
    session, _ = started("llama", batch=1, model=model)
    assert [need for need in ("tree", "bias") if session._capable(need)] == can


def test_a_cache_that_forgets_to_crop_is_found_out():
    session, _ = started("llama", model=new_model("llama"))

    class Stuck(DynamicCache):
        def crop(self, tokens_to_remove):
            pass

    session.cache.__class__ = Stuck
    assert not session.crop_ok


def test_tests_of_capability_leave_the_session_alone_and_are_not_repeated():
    model = new_model("qwen2_5_vl")
    session, _ = started("qwen2_5_vl", model=model)
    passes = session.ledger.forward_passes
    assert session.tree_ok and session.crop_ok and session.bias_ok and session.ledger.forward_passes > passes
    passes = session.ledger.forward_passes
    assert session.tree_ok and session.crop_ok and session.ledger.forward_passes == passes
    untouched, _ = started("qwen2_5_vl", model=model)
    new = torch.tensor([[11], [21]])
    assert torch.equal(session.step(new), untouched.step(new))


def test_the_ledger():
    ledger = Ledger()
    session = DecodeSession(shared_model("llava"), ledger)
    inputs = prompts("llava", batch=2)
    session.prefill(**inputs)
    assert ledger.prompt_tokens == int(inputs["attention_mask"].sum()) and ledger.visual_tokens == 64
    session.step(torch.tensor([[3], [4]]))
    session.fork(2)
    session.step(torch.tensor([[3, 4]] * 4))
    assert ledger.forward_passes == 3 and ledger.computed_tokens == inputs["input_ids"].numel() + 2 + 8
    assert ledger.to_dict()["generated_tokens"] == 0


def test_hooks_of_the_ledger_come_off():
    model = new_model("llama")
    session, _ = started("llama", model=model)
    with pytest.raises(RuntimeError):
        session.step(torch.tensor([[3], [4]]), mask=torch.zeros(7, 7, 7, 7))
    assert not model._forward_pre_hooks


def test_what_is_refused():
    model = shared_model("llama")
    with pytest.raises(BadOption, match="prefill"):
        DecodeSession(model).fork(2)
    with pytest.raises(BadOption, match="input_ids or inputs_embeds"):
        DecodeSession(model).prefill()
    with pytest.raises(BadOption, match="StaticCache"):
        DecodeSession(model).prefill(**prompts("llama"), cache=StaticCache(config=model.config, max_cache_len=30))
    session, _ = started("llama")
    with pytest.raises(BadOption, match="new DecodeSession"):
        session.prefill(**prompts("llama"))
    with pytest.raises(BadOption, match="either ids or embeddings"):
        session.step()
    with pytest.raises(BadOption, match="2 rows, but 1"):
        session.step(torch.tensor([[3]]))
    with pytest.raises(BadOption, match="take 11 tokens off 11"):
        session.truncate(11)


def test_encoder_decoder_models_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20, decoder_start_token_id=0)
    with pytest.raises(UnsupportedModel, match="decoder only"):
        DecodeSession(T5ForConditionalGeneration(config))


def test_forks_follow_methods_inside_the_language_model():
    """Rows of two prompts that lost different tokens in layer 1."""
    from tests.pipeline.decoder_reference import emitted, stage_of
    from tests.pipeline.tiny_families import make_inputs
    from tokensieve.pipeline.adapter import VLMAdapter

    adapter = VLMAdapter(new_model("llava_onevision-video"))
    inputs = make_inputs("llava_onevision-video", 2)
    with DecoderHooks(adapter.model, stage_of("fastv"), 0.4):
        session, alone = DecodeSession(adapter.model), DecodeSession(adapter.model)
        session.prefill(**emitted(adapter, inputs))
        session.fork(2)
        session.step(torch.tensor([[11], [12], [13], [14]]))
        got = session.step(torch.tensor([[21], [22], [23], [24]]))
        alone.prefill(**emitted(adapter, inputs))
        alone.step(torch.tensor([[12], [13]]))
        want = alone.step(torch.tensor([[22], [23]]))
    assert_close(got[1:3], want, **TOLERANCE)


@pytest.mark.parametrize("window", [6, 40])
def test_layers_with_a_window_are_branched_and_cut_back(window):
    """Shorter than the prompt, or longer than everything."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=window, query_pre_attn_scalar=8)
    model = Gemma3ForCausalLM(config).eval()
    model.get_output_embeddings().weight.data *= 20
    session, alone = DecodeSession(model), DecodeSession(model)
    session.prefill(**prompts("llama", batch=2))
    assert session.crop_ok and not session.tree_ok
    session.fork(2)
    for ids in ([11, 12, 13, 14], [31, 32, 33, 34], [41, 42, 43, 44]):
        session.step(torch.tensor(ids)[:, None])
    session.select([1, 2])
    session.truncate(2)
    got = [session.step(torch.tensor([[71], [73]])), session.step(torch.tensor([[72], [74]]))]
    alone.prefill(**prompts("llama", batch=2))
    want = alone.step(torch.tensor([[12, 71, 72], [13, 73, 74]]))
    assert_close(torch.cat(got, 1), want[:, 1:], **TOLERANCE)
