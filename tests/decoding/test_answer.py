"""The ledger of an answer, and `tokensieve answer --decode`, on the shipped model."""

from __future__ import annotations

import json

import numpy as np
import pytest

import tokensieve as ts
from tokensieve import decoding
from tokensieve.cli import main
from tokensieve.datasets import clip_frames, make_clip
from tokensieve.pipeline.chat import Chat

QUESTION = "Which way does the red digit move?"


@pytest.fixture(scope="module")
def clips():
    return [clip_frames(make_clip("test", i), 8) for i in range(2)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("clips")
    assert main(["clips", "--out", str(folder), "--count", "2"]) == 0
    return [str(path) for path in sorted(folder.glob("*.mp4"))]


@pytest.fixture
def vlm():
    return ts.load("tiny")


def costs(answer):
    return answer.generated_tokens, answer.drafted_tokens, answer.accepted_tokens, answer.forward_passes


@pytest.mark.parametrize("method", [None, "zoprune", "tome"])
def test_recycled_answers_are_the_greedy_ones(vlm, clips, method):
    vlm.compress(method)
    plain = vlm.answer(clips, QUESTION, max_new_tokens=12, min_new_tokens=12)
    again = vlm.answer(
        clips, QUESTION, max_new_tokens=12, min_new_tokens=12, custom_generate=decoding.token_recycling()
    )
    for one, other in zip(plain, again, strict=True):
        assert (one.answer, one.visual_tokens, one.prompt_tokens) == (
            other.answer,
            other.visual_tokens,
            other.prompt_tokens,
        )
        assert costs(one) == (12, 0, 0, 12)
        assert other.drafted_tokens > other.accepted_tokens and other.generated_tokens == 12


def test_passes_of_beams_and_of_answers_of_unequal_length(vlm, clips):
    first = vlm.processor.tokenizer.encode(vlm.answer(clips[0], QUESTION).answer, add_special_tokens=False)[0]
    ends = [first, vlm.model.generation_config.eos_token_id]  # so that one answer ends before the other
    short, long = vlm.answer(clips, [QUESTION, "How many digits are there?"], max_new_tokens=8, eos_token_id=ends)
    assert short.forward_passes == short.generated_tokens == 1 < long.forward_passes == long.generated_tokens
    beams = vlm.answer(clips[0], QUESTION, max_new_tokens=8, num_beams=3)
    assert beams.forward_passes >= beams.generated_tokens and beams.drafted_tokens == 0
    lookup = vlm.answer(
        clips[0], "left left left left", max_new_tokens=12, min_new_tokens=12, prompt_lookup_num_tokens=2
    )
    assert 1 <= lookup.forward_passes <= 12 and lookup.to_dict()["forward_passes"] == lookup.forward_passes


def test_a_batch_is_answered_one_by_one(vlm, clips):
    custom = decoding.cautious(decoding.punctuation_ids(vlm.processor), min_entropy=0, max_entropy=1e-9)
    options = dict(max_new_tokens=6, do_sample=True, custom_generate=custom)
    both = vlm.answer(clips, QUESTION, **options)
    alone = [vlm.answer(clip, QUESTION, **options) for clip in clips]
    assert [(a.answer, costs(a)[:3]) for a in both] == [(a.answer, costs(a)[:3]) for a in alone]
    assert all(a.drafted_tokens >= 10 for a in both)


def test_a_chat_goes_on_after_every_kind_of_decoding(vlm, clips):
    vlm.compress("zoprune", 0.25)
    marks = decoding.punctuation_ids(vlm.processor)
    kinds = [
        dict(custom_generate=decoding.token_recycling()),
        dict(custom_generate=decoding.best_of(3), do_sample=True, temperature=1e-4),
        dict(
            custom_generate=decoding.cautious(marks, min_entropy=0, max_entropy=1e-9), do_sample=True, temperature=1e-4
        ),
        {},
    ]
    ours, plain = Chat(vlm, clips[0]), Chat(vlm, clips[0])
    questions = ["Which digit is red?", QUESTION, "How many digits are there?", "Which digit is blue?"]
    for question, kind in zip(questions, kinds, strict=True):
        assert ours.ask(question, **kind) == plain.ask(question)


def answered(capsys, *arguments) -> list[dict]:
    capsys.readouterr()
    assert main(["answer", *arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", ["cautious", "best-of", "self-consistency", "token-recycling"])
def test_the_command_answers_with_its_costs(name, files, capsys):
    (record,) = answered(capsys, files[0], QUESTION, "--decode", name, "--method", "zoprune")
    assert record["answer"] and record["visual_tokens"] == {"full": 289, "kept": 73}
    assert record["drafted_tokens"] >= record["accepted_tokens"] and record["forward_passes"] >= 2
    (plain,) = answered(capsys, files[0], QUESTION, "--method", "zoprune")
    assert (plain["drafted_tokens"], plain["forward_passes"]) == (0, plain["generated_tokens"])
    if name == "token-recycling":
        assert record["answer"] == plain["answer"]


def test_options_reach_the_method(files, capsys):
    cold = ("--temperature", "0.0001", "--samples", "3")
    (best,) = answered(capsys, files[0], QUESTION, "--decode", "best-of", *cold)
    (plain,) = answered(capsys, files[0], QUESTION)
    assert best["answer"] == plain["answer"] and best["drafted_tokens"] == 3 * best["generated_tokens"]
    hot = ("--decode", "best-of", "--temperature", "50", "--top_p", "1", "--samples", "1", "--max_new_tokens", "5")
    said = [answered(capsys, files[0], QUESTION, *hot, "--seed", seed)[0]["answer"] for seed in ("1", "1", "2")]
    assert said[0] == said[1] != said[2]


def test_a_matrix_is_read_and_written(files, tmp_path, capsys):
    path = tmp_path / "m.safetensors"
    arguments = [*files, QUESTION, "--decode", "token-recycling", "--matrix", str(path)]
    first = answered(capsys, *arguments)
    learned = decoding.RecyclingMatrix.load(path).successors_Vk
    assert (learned != 0).any()
    again = answered(capsys, *arguments)
    assert [a["answer"] for a in first] == [a["answer"] for a in again]
    assert sum(a["accepted_tokens"] for a in again) > sum(a["accepted_tokens"] for a in first)
    path.write_bytes(b"no matrix")
    assert main(["answer", *arguments]) == 2 and path.read_bytes() == b"no matrix"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--decode", "cautius"], "Did you mean 'cautious'?"),
        (["--decode", "x"], "greedy, cautious"),
        (["--samples", "3"], "--samples does nothing with --decode greedy"),
        (["--decode", "token-recycling", "--temperature", "1"], "it is for cautious, best-of"),
        (["--decode", "best-of", "--matrix", "x"], "it is for token-recycling"),
        (["--decode", "best-of", "--samples", "0"], "num_samples"),
        (["--decode", "cautious", "--samples", "0"], "max_trials"),
    ],
)
def test_bad_use(arguments, words, files, capsys):
    assert main(["answer", files[0], QUESTION, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_people_see_the_costs(files, capsys):
    assert main(["answer", files[0], QUESTION, "--decode", "best-of"]) == 0
    assert "drafted tokens stayed" in capsys.readouterr().err


def test_noise_can_be_asked_too(vlm):
    """Unsure all the way: many trials, and the answer still fits its limit."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    custom = decoding.cautious(decoding.punctuation_ids(vlm.processor))
    answer = vlm.answer(noise, "What?", max_new_tokens=9, do_sample=True, temperature=3.0, custom_generate=custom)
    assert 1 <= answer.generated_tokens <= 9


def test_answers_keep_to_a_schema_file(files, tmp_path, capsys):
    pytest.importorskip("xgrammar")
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"digit": {"enum": [1, 2, 3]}}, "required": ["digit"]}')
    asked = ["answer", *files, QUESTION, "--json", "--max_new_tokens", "40", "--json_schema"]
    for decode in ([], ["--decode", "token-recycling"], ["--decode", "best-of", "--samples", "2"]):
        assert main([*asked, str(schema), *decode]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2
        for line in lines:
            assert set(json.loads(json.loads(line)["answer"])) == {"digit"}
    assert main([*asked, str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().out
