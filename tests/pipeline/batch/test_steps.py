"""Steps: a row is what the model says of its clip alone, whatever shares its batch and whatever breaks beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tokensieve.datasets.limits import Limits
from tokensieve.errors import BadOption
from tokensieve.pipeline.batch import answer_step
from tokensieve.pipeline.batch.ahead import decode
from tokensieve.pipeline.batch.answer_step import AnswerStep
from tokensieve.pipeline.batch.feature_step import FeatureStep, token_times
from tokensieve.pipeline.batch.inputs import Failure, find_inputs
from tokensieve.pipeline.batch.rows import table_of
from tokensieve.pipeline.batch.tasks import feed

QUESTIONS = ["Which digit is red?", "How many digits are there?"]
ORDERS = ([0, 1, 2, 3], [3, 1, 0, 2])


@pytest.fixture(scope="module")
def decoded(clips):
    found = find_inputs(clips, questions=QUESTIONS).inputs[:4]
    read = [(given, decode(given, Limits(), {"num_frames": 2})) for given in found]
    one_frame = decode(found[2], Limits(), {"num_frames": 1})  # a picture among the videos
    read[2] = found[2], one_frame
    return read


def rows_of(step, decoded):
    rows = [row for one in decoded for row in feed(step, *one)] + step.finish()
    return {row["path"]: row for row in rows}


@pytest.mark.parametrize("method", [None, "zoprune", "cdpruner", "fastv", ["tome", "uniform"]], ids=str)
def test_rows_are_what_the_model_answers_in_any_batch(method, decoded, plain_vlm):
    vlm = plain_vlm.compress(method, 0.5)
    steps = [AnswerStep(vlm, batch=batch, max_new_tokens=4) for batch in (1, 3, 100)]
    rows = [
        rows_of(step, [decoded[place] for place in order])
        for step, order in zip(steps, (*ORDERS, ORDERS[0]), strict=True)
    ]
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 4
    assert vlm.compression is None if method is None else vlm.compression.name
    for given, frames in decoded[1:3]:
        row = rows[0][given.path]
        assert row["status"] == "ok" and row["num_frames"] == frames.num_frames
        for place, question in enumerate(QUESTIONS):
            answer = vlm.answer(frames, question, max_new_tokens=4)
            assert row["answers"][place] == answer.answer
            assert row["visual_tokens_full"] == answer.visual_tokens["full"]
            left = answer.visual_tokens.get("last_layer", answer.visual_tokens["kept"])
            assert row["visual_tokens"][place] == left
            assert row["prompt_tokens"][place] == answer.prompt_tokens
            assert row["generated_tokens"][place] == answer.generated_tokens


def test_pixels_are_gone_while_a_batch_forms(decoded, plain_vlm):
    step = AnswerStep(plain_vlm, batch=100, max_new_tokens=2)
    given, frames = decoded[0]
    step.add(given, frames)
    (waiting,) = step._waiting
    assert all(prompt.clips == [] for prompt in waiting.prompts) and waiting.frames.data.base.nbytes <= 1
    step.finish()


def test_what_cannot_be_asked_costs_its_own_answer(decoded, plain_vlm):
    given, frames = decoded[0]
    mixed = replace(given, questions=("Look: <video>", QUESTIONS[0]))
    hopeless = replace(given, questions=("Look: <video>",), path="hopeless")
    rows = rows_of(AnswerStep(plain_vlm, max_new_tokens=2), [(mixed, frames), (hopeless, frames), decoded[1]])
    partial, failed, fine = rows[given.path], rows["hopeless"], rows[decoded[1][0].path]
    assert (partial["status"], partial["stage"], partial["answers"][0]) == ("partial", "encode", None)
    assert partial["answers"][1] and partial["visual_tokens"][0] is None
    assert (failed["status"], failed["error_type"]) == ("failed", "BadOption") and "answers" not in failed
    assert fine["status"] == "ok"
    table_of([partial, failed, fine], AnswerStep(plain_vlm).schema, "abc").validate(full=True)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_prompt_that_breaks_its_batch(batch, decoded, plain_vlm, monkeypatch):
    expected = rows_of(AnswerStep(plain_vlm, batch=1, max_new_tokens=2), decoded[:2])
    real = answer_step.answer_all
    poisoned = len(decoded[0][0].questions)

    def breaking(vlm, prompts, plans, **options):
        if any(id(prompt) in poison for prompt in prompts):
            raise RuntimeError("0xdead")
        return real(vlm, prompts, plans, **options)

    step = AnswerStep(plain_vlm, batch=batch, max_new_tokens=2)
    poison: set[int] = set()
    monkeypatch.setattr(answer_step, "answer_all", breaking)
    real_encode = answer_step.encode_clip

    def encode(vlm, frames, questions, needs):
        prompts = real_encode(vlm, frames, questions, needs)
        if len(poison) < poisoned:
            poison.update(id(prompt) for prompt in prompts)
        return prompts

    monkeypatch.setattr(answer_step, "encode_clip", encode)
    rows = rows_of(step, decoded[:2])
    bad, good = rows[decoded[0][0].path], rows[decoded[1][0].path]
    assert (bad["status"], bad["stage"], bad["error_type"]) == ("failed", "answer", "RuntimeError")
    assert "0xdead" not in bad["message"] and good == expected[decoded[1][0].path]


def test_no_memory_on_the_gpu_ends_the_run(decoded, plain_vlm, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    step = AnswerStep(plain_vlm, batch=1)
    monkeypatch.setattr(answer_step, "answer_all", full)
    with pytest.raises(torch.OutOfMemoryError):
        step.add(*decoded[0])


def test_partial_media(decoded, plain_vlm):
    given, frames = decoded[0]
    row = rows_of(AnswerStep(plain_vlm, max_new_tokens=2), [(given, replace(frames, partial=True, notes=("lost",)))])
    assert row[given.path]["status"] == "partial" and row[given.path]["notes"] == ["lost"]
    assert None not in row[given.path]["answers"]


def test_a_failure_becomes_a_row(decoded, plain_vlm):
    given = replace(decoded[0][0], path="a\udcff")
    failure = Failure(stage="decode", error_type="X", message="about a\udcff", retryable=True)
    (row,) = feed(AnswerStep(plain_vlm), given, failure)
    assert (row["status"], row["stage"], row["path"], row["message"]) == ("failed", "decode", r"a\xff", r"about a\xff")


@pytest.mark.parametrize(("method", "keep"), [(None, 1.0), ("zoprune", 0.25), ("tome", 0.5), ("prumerge+", 0.25)])
def test_features_are_what_the_language_model_gets(method, keep, decoded, plain_vlm):
    vlm = plain_vlm.compress(method, keep)
    step = FeatureStep(vlm)
    for given, frames in decoded[1:3]:
        (row,) = step.add(given, frames)
        prepared = vlm.prepare(frames, given.questions[0])
        (item,), (plan,) = prepared.items, prepared.plans
        grid = item.tokens.grids[0]
        assert row["features"].shape == (len(plan.kept), 192) and row["visual_tokens"] == [len(plan.kept)]
        if len(item.slots) == len(item.candidates) + 1:  # a video: its one structural token is the last
            received = item.kept_features(plan)[:-1].detach().float().numpy()
            assert np.array_equal(row["features"], received)
            is_merged = not np.array_equal(received, item.tokens.features[plan.kept].float().numpy())
            assert is_merged == (plan.merge is not None) == (method == "prumerge+")
        flat = np.ravel_multi_index(row["positions"][:, 1:].T, grid)
        if len(item.tokens.grids) == 1:
            assert flat.tolist() == plan.kept.tolist() and not row["positions"][:, 0].any()
            assert row["times_s"] == frames.times_s[row["positions"][:, 1]].tolist()
        np.testing.assert_allclose(row["pooled"], row["features"].mean(0), rtol=0, atol=1e-5)
        assert row["grids"].tolist() == [list(grid) for grid in item.tokens.grids]
        table_of([row], step.schema, "abc").validate(full=True)


def test_features_in_half_precision(decoded, plain_vlm, monkeypatch):
    step = FeatureStep(plain_vlm, dtype="float16")
    (row,) = step.add(*decoded[0])
    (whole,) = FeatureStep(plain_vlm).add(*decoded[0])
    assert row["features"].dtype == np.float16
    assert np.array_equal(row["features"], whole["features"].astype(np.float16))
    monkeypatch.setattr("tokensieve.pipeline.batch.feature_step.kept_candidates", lambda *_: torch.full((1, 192), 1e6))
    (row,) = step.add(*decoded[0])
    assert (row["status"], row["stage"]) == ("failed", "answer") and "float16" in row["message"]


def test_what_has_no_features(decoded, plain_vlm):
    with pytest.raises(BadOption, match="float16"):
        FeatureStep(plain_vlm, dtype="int8")
    with pytest.raises(BadOption, match="inside the language model"):
        FeatureStep(plain_vlm.compress("fastv"))
    for option in ({"batch": 0}, {"max_new_tokens": 0}):
        with pytest.raises(BadOption, match="above 0"):
            AnswerStep(plain_vlm, **option)


def test_token_times(decoded):
    frames = replace(decoded[0][1], data=np.zeros((5, 2, 2, 3), np.uint8), times_s=np.arange(5.0))
    assert token_times(5, frames).tolist() == [0, 1, 2, 3, 4]
    assert token_times(3, frames).tolist() == [0, 2, 4]  # pairs, the last frame twice
    assert token_times(1, frames).tolist() == [0]
