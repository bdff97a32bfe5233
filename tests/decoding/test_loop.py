"""What every method does with the arguments of `generate`: honours them or refuses them."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, MaxTimeCriteria, StoppingCriteria

import tokensieve as ts
from tests.decoding.models import prompts, shared_model
from tokensieve import decoding
from tokensieve.decoding.loop import _REFUSED, LOST, check_arguments
from tokensieve.errors import BadOption

MARKS = range(0, 90, 7)
METHODS = {
    "cautious": lambda: decoding.cautious(MARKS),
    "best_of": lambda: decoding.best_of(3),
    "token_recycling": decoding.token_recycling,
}
SAMPLED = {"cautious": True, "best_of": True, "token_recycling": False}
# Options that reach our loops through `generate` itself, processors or criteria, or that plain decoding ignores too.
HONOURED = set(
    """max_length max_new_tokens min_length min_new_tokens max_time stop_strings do_sample cache_config max_cache_len
    temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty
    encoder_repetition_penalty no_repeat_ngram_size bad_words_ids renormalize_logits forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    sequence_bias token_healing guidance_scale watermarking_config return_dict_in_generate pad_token_id bos_token_id
    eos_token_id encoder_no_repeat_ngram_size decoder_start_token_id prefill_chunk_size disable_compile
    early_stopping length_penalty diversity_penalty low_memory is_assistant num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold max_matching_ngram_size assistant_lookbehind
    target_lookbehind assistant_ensemble_weight continuous_batching_config""".split()
)


def generate(method, name="llama", keep=None, batch=1, **options):
    custom = METHODS[method]() if isinstance(method, str) else method
    sample = SAMPLED.get(method, True)
    inputs = prompts(name, keep, batch)
    options = dict(max_new_tokens=12, do_sample=sample, custom_generate=custom) | options
    return shared_model(name).generate(**inputs, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "option",
    [
        dict(num_beams=2),
        dict(num_return_sequences=2, do_sample=True),
        dict(use_cache=False),
        dict(prompt_lookup_num_tokens=3),
        dict(output_scores=True, return_dict_in_generate=True),
        dict(output_logits=True, return_dict_in_generate=True),
        dict(output_hidden_states=True, return_dict_in_generate=True),
        dict(output_attentions=True, return_dict_in_generate=True),
        dict(cache_implementation="static"),
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_without_a_place_are_refused(method, option):
    with pytest.raises(BadOption, match=f"no place for {next(iter(option))}"):
        generate(method, **option)


def test_every_option_of_transformers_is_either_refused_or_honoured():
    options = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    assert options - HONOURED - set(_REFUSED) == set()
    assert not HONOURED & set(_REFUSED)


@pytest.mark.parametrize("method", ["cautious", "token_recycling"])
def test_one_prompt_at_a_time(method):
    with pytest.raises(BadOption, match="one prompt at a time, got 2"):
        generate(method, batch=2)
    model, inputs = shared_model("llama"), prompts("llama", batch=2)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(BadOption, match="one prompt at a time, got 2"):
        model.generate(inputs_embeds=embeds, custom_generate=METHODS[method](), max_new_tokens=3)


@pytest.mark.parametrize("method", ["cautious", "token_recycling"])
def test_processors_that_remember_are_refused_by_methods_that_branch(method):
    with pytest.raises(BadOption, match="UnbatchedClassifierFreeGuidance"):
        generate(method, guidance_scale=1.5)


def test_stop_strings_do_not_pass_silently():
    with pytest.raises(ValueError, match="tokenizer"):
        generate("best_of", stop_strings=["a"])


@pytest.mark.parametrize("name", LOST)
def test_arguments_that_generate_drops_are_refused_beside_ours(name):
    with pytest.raises(BadOption, match=name):
        check_arguments({"custom_generate": decoding.best_of(2), name: object()})
    check_arguments({name: object()})


def test_answer_and_ask_refuse_them(clip_frames):
    vlm, given = ts.load("tiny"), {"custom_generate": decoding.token_recycling(), "streamer": object()}
    with pytest.raises(BadOption, match="streamer"):
        vlm.answer(clip_frames, "What?", **given)
    with pytest.raises(BadOption, match="streamer"):
        ts.Chat(vlm, clip_frames).ask("What?", **given)


@pytest.fixture
def clip_frames():
    import numpy as np

    return np.zeros((2, 96, 96, 3), np.uint8)


class StopAfter(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("method", METHODS)
def test_criteria_end_the_answer_at_their_token(method):
    assert generate(method, stopping_criteria=[StopAfter(14)]).shape == (1, 14)
    assert generate(method, stopping_criteria=[MaxTimeCriteria(0.0)]).shape == (1, 10)
    assert generate(method, max_new_tokens=1).shape == (1, 10)


@pytest.mark.parametrize("method", METHODS)
def test_answers_end_with_the_end_token(method):
    """Any of many ids may end it."""
    ends = list(range(0, 97, 3))
    out = generate(method, eos_token_id=ends, max_new_tokens=40, return_dict_in_generate=True)
    new = out.sequences[0, 9:].tolist()
    assert new[-1] in ends and not set(new[:-1]) & set(ends) and out.ledger.generated_tokens == len(new)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "keep"), [("llama", None), ("llava", 0.4), ("qwen2_5_vl", None)])
def test_the_cache_holds_all_but_the_last_token(method, name, keep):
    """It goes on where the answer ended."""
    out = generate(method, name, keep, return_dict_in_generate=True)
    assert out.details["method"] == method
    assert {layer.keys.shape[0] for layer in out.cache.layers} == {1}
    assert {layer.get_seq_length() for layer in out.cache.layers} == {out.sequences.shape[1] - 1}


def test_a_cache_of_the_caller_is_continued():
    model = shared_model("llama")
    first = generate("cautious", return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([[5, 6]])], 1)
    options = dict(max_new_tokens=8, do_sample=False)
    want = model.generate(more, **options)
    out = model.generate(more, cache=first.cache, custom_generate=decoding.token_recycling(), **options)
    assert torch.equal(out, want)


@pytest.mark.parametrize("method", METHODS)
def test_draws_come_from_the_seed_alone(method):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generate(method)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(generate(method), first)


def test_another_seed_another_answer():
    made = [generate(decoding.cautious(MARKS, seed=s), do_sample=True).tolist() for s in range(4)]
    assert len({str(ids) for ids in made}) > 1


@pytest.mark.parametrize("method", METHODS)
def test_prompts_of_embeddings(method):
    model, inputs = shared_model("llama"), prompts("llama")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    options = dict(max_new_tokens=8, do_sample=SAMPLED[method], custom_generate=METHODS[method]())
    want = model.generate(**inputs, **options)
    got = model.generate(inputs_embeds=embeds, **options | {"custom_generate": METHODS[method]()})
    assert torch.equal(got, want[:, 9:])
