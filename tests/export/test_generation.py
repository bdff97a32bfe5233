"""The generation loop against the same done without a cache, and its choices against transformers' own."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import generation as hf

from tests.export import graphs
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export.generation import Decoder, GenerateOptions, choose, generate, options_from

VOCAB, WIDTH = 23, 4
TABLE = np.random.default_rng(0).normal(size=(VOCAB, WIDTH)).astype(np.float32)


def toy(axes: int) -> Decoder:
    model = graphs.toy_decoder(TABLE, axes).SerializeToString()
    return Decoder(ort.InferenceSession(model, providers=["CPUExecutionProvider"]))


def embed(ids_B1: np.ndarray) -> np.ndarray:
    return TABLE[ids_B1]


def prompt(seed: int, length: int, axes: int):
    """Ids, embeddings and positions with gaps, as tokens that were dropped leave them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, length)
    positions = np.sort(rng.choice(3 * length, (axes, length), replace=False), axis=1) if axes > 1 else None
    if axes == 1:
        positions = np.sort(rng.choice(3 * length, length, replace=False))
    return ids, TABLE[ids] + rng.normal(size=(length, WIDTH)).astype(np.float32), positions


def batch(prompts, axes: int):
    longest = max(len(ids) for ids, _, _ in prompts)
    ids_BL = np.zeros((len(prompts), longest), np.int64)
    mask_BL = np.zeros_like(ids_BL)
    embeds_BLD = np.zeros((len(prompts), longest, WIDTH), np.float32)
    positions = np.zeros((axes, len(prompts), longest), np.int64)
    for row, (ids, embeds, place) in enumerate(prompts):
        start = longest - len(ids)
        ids_BL[row, start:], mask_BL[row, start:], embeds_BLD[row, start:] = ids, 1, embeds
        positions[:, row, start:] = place
    return embeds_BLD, mask_BL, positions if axes > 1 else positions[0], ids_BL


def from_scratch(ids, embeds, positions, options: GenerateOptions) -> list[int]:
    """Greedy, with everything computed anew for every token."""
    new: list[int] = []
    following = positions.max() + 1
    while len(new) < options.max_new_tokens and not (new and new[-1] in options.ends):
        logits = graphs.toy_logits(TABLE, embeds, positions)
        for seen in {*ids.tolist(), *new}:
            logits[seen] *= options.repetition_penalty if logits[seen] < 0 else 1 / options.repetition_penalty
        logits[list(options.suppress_tokens)] = -np.inf
        new.append(int(logits.argmax()))
        embeds = np.concatenate([embeds, TABLE[new[-1]][None]])
        place = following + len(new) - 1
        positions = np.concatenate([positions, np.full((*positions.shape[:-1], 1), place)], axis=-1)
    return new


OPTIONS = [
    {},
    {"repetition_penalty": 1.3},
    {"suppress_tokens": (3, 11)},
    {"eos_token_id": [2, 9, 14, 20]},
    {"max_new_tokens": 1},
]


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("given", OPTIONS)
def test_greedy_with_a_cache_is_greedy_without(axes, given):
    options = GenerateOptions(**{"max_new_tokens": 12} | given)
    prompts = [prompt(seed, length, axes) for seed, length in ((1, 5), (2, 9), (3, 2), (4, 9))]
    expected = [from_scratch(*p, options) for p in prompts]
    decoder = toy(axes)
    together = generate(decoder, embed, *batch(prompts, axes), options)
    assert together == expected
    assert len({tuple(row) for row in together}) > 1 or options.max_new_tokens == 1
    if "eos_token_id" in given:
        assert len({len(row) for row in together}) > 1, "no row finishes before another"
    assert [generate(decoder, embed, *batch([p], axes), options)[0] for p in prompts] == expected


def test_the_cache_stays_in_onnxruntime(monkeypatch):
    decoder = toy(1)
    decoder.start(1)
    embeds, mask, positions, _ = batch([prompt(1, 5, 1)], 1)
    decoder.step(embeds, mask, positions)
    first = decoder._cache
    assert all(isinstance(value, ort.OrtValue) for value in first)
    assert [value.shape() for value in first] == [[1, 1, 5, WIDTH]] * 2
    bound = []
    binding = decoder.session.io_binding()
    record = type(binding).bind_ortvalue_input
    monkeypatch.setattr(
        type(binding),
        "bind_ortvalue_input",
        lambda self, name, value: (bound.append((name, value.data_ptr())), record(self, name, value)),
    )
    decoder.step(embeds[:, :1], np.ones((1, 6), np.int64), positions[:, :1])
    assert bound == [
        (f"past_key_values.0.{what}", v.data_ptr()) for what, v in zip(("key", "value"), first, strict=True)
    ]


def test_embeddings_may_stay_in_onnxruntime():
    options = GenerateOptions(max_new_tokens=6)
    arguments = batch([prompt(1, 5, 1)], 1)
    decoder = toy(1)
    kept = generate(decoder, lambda ids: ort.OrtValue.ortvalue_from_numpy(TABLE[ids]), *arguments, options)
    assert kept == generate(decoder, embed, *arguments, options)


def test_sampling_is_repeatable_and_needs_no_global_state():
    arguments = batch([prompt(1, 5, 1), prompt(2, 7, 1)], 1)
    options = [GenerateOptions(max_new_tokens=20, do_sample=True, seed=seed, temperature=3.0) for seed in (5, 5, 6)]
    before = np.random.get_state()[1].copy()
    first, again, other = (generate(toy(1), embed, *arguments, each) for each in options)
    assert first == again != other
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"top_k": 5}, [hf.TopKLogitsWarper(5)]),
        ({"top_k": 0, "top_p": 0.6}, [hf.TopPLogitsWarper(0.6)]),
        ({"top_k": 0, "top_p": 0.01}, [hf.TopPLogitsWarper(0.01)]),
        ({"temperature": 0.4, "top_k": 9, "top_p": 0.8},
         [hf.TemperatureLogitsWarper(0.4), hf.TopKLogitsWarper(9), hf.TopPLogitsWarper(0.8)]),
        ({"top_k": 0, "temperature": 2.0}, [hf.TemperatureLogitsWarper(2.0)]),
    ],
)  # fmt: skip
def test_what_is_drawn_follows_transformers(options, warpers):
    logits = np.random.default_rng(3).normal(size=(1, 12)).astype(np.float32) * 2
    scores = torch.from_numpy(logits.copy())
    for warp in warpers:
        scores = warp(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    chosen = GenerateOptions(do_sample=True, **options)
    ids = np.zeros((4000, 1), np.int64)
    drawn = choose(np.repeat(logits, 4000, axis=0), ids, chosen, np.random.default_rng(0))
    share = np.bincount(drawn, minlength=12) / 4000
    assert not share[expected == 0].any()
    assert np.abs(share - expected).max() < 0.03


def test_penalty_and_suppression_follow_transformers():
    rng = np.random.default_rng(1)
    ids = rng.integers(0, VOCAB, (6, 9))
    for penalty, shift in ((1.0, 0), (1.7, 0), (0.5, 0), (1.7, -6), (0.5, -6), (1.7, 6)):
        logits = rng.normal(size=(6, VOCAB)).astype(np.float32) + np.float32(shift)
        for suppressed in ((), (1, 4, 8)):
            theirs = torch.from_numpy(logits.copy())
            if penalty != 1:
                theirs = hf.RepetitionPenaltyLogitsProcessor(penalty)(torch.from_numpy(ids), theirs)
            if suppressed:
                theirs = hf.SuppressTokensLogitsProcessor(list(suppressed))(torch.from_numpy(ids), theirs)
            options = GenerateOptions(repetition_penalty=penalty, suppress_tokens=suppressed)
            ours = choose(logits, ids, options, None)
            np.testing.assert_array_equal(ours, theirs.argmax(-1).numpy())


@pytest.mark.parametrize(
    "given",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.0},
        {"max_new_tokens": True},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"repetition_penalty": float("inf")},
        {"seed": -3},
        {"do_sample": 1},
        {"eos_token_id": "</s>"},
        {"suppress_tokens": [-1]},
        {"num_beams": 4},
        {"temprature": 2.0},
    ],
)
def test_options_that_make_no_sense(given):
    with pytest.raises(BadOption) as caught:
        options_from({}, given, ())
    assert next(iter(given)) in str(caught.value)


def test_near_names_are_suggested():
    with pytest.raises(BadOption, match="Did you mean 'temperature'"):
        options_from({}, {"temprature": 1.0}, ())


def test_the_models_own_config():
    config = {
        "repetition_penalty": 1.2,
        "eos_token_id": [4, 5],
        "temperature": 0.2,
        "top_k": 3,
        "do_sample": True,
        "suppress_tokens": [7],
        "min_p": 0.3,
        "num_beams": 1,
    }
    greedy = options_from(config, {}, (9,))
    assert (greedy.do_sample, greedy.repetition_penalty, greedy.ends) == (False, 1.2, {4, 5})
    assert greedy.suppress_tokens == (7, 9)
    with pytest.raises(UnsupportedModel, match="min_p"):
        options_from(config, {"do_sample": True}, ())
    del config["min_p"]
    sampled = options_from(config, {"do_sample": True, "top_k": 8, "eos_token_id": 1}, ())
    assert (sampled.temperature, sampled.top_k, sampled.ends) == (0.2, 8, {1})


@pytest.mark.parametrize(
    "setting", [{"num_beams": 3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 4}, {"guidance_scale": 1.5}]
)
def test_settings_that_this_runtime_lacks_are_refused(setting):
    with pytest.raises(UnsupportedModel, match=next(iter(setting))):
        options_from(setting, {}, ())


def test_a_graph_that_is_no_decoder():
    session = ort.InferenceSession(graphs.linear().SerializeToString(), providers=["CPUExecutionProvider"])
    with pytest.raises(UnsupportedModel, match="not those of a decoder"):
        Decoder(session)
