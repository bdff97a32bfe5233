"""Evaluations: any batch size and any interruption give the same files, the numbers are those of `VLM.answer`, and what
goes wrong costs a row or one clear sentence."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import tokensieve as ts
from tests.pipeline.tiny_processors import make_vlm, noise
from tokensieve.compression import list_methods
from tokensieve.datasets.manifest import Record, generated_records
from tokensieve.errors import BadOption, TokensieveError
from tokensieve.pipeline.evaluation import answers, run, store
from tokensieve.pipeline.evaluation.answers import answer_all, choice_logliks
from tokensieve.pipeline.evaluation.prompts import encode_clip
from tokensieve.pipeline.evaluation.protocol import Protocol, check_scores, clips_of
from tokensieve.pipeline.evaluation.run import evaluate
from tokensieve.pipeline.evaluation.settings import make_settings, usable
from tokensieve.pipeline.evaluation.summary import summarise, summarise_timings
from tokensieve.pipeline.vlm import VLM
from tokensieve.policies.light_scorer import LightScorer

# Evidence from everywhere: features, the tower's attention, the question, the tower itself, the decoder, and stacks.
METHODS = ["zoprune", "prumerge+", "cdpruner", "fastv", "tome:0.5+random+fastv"]
SAME = ("run.json", "answers.parquet", "summary.json")


@pytest.fixture(scope="module")
def vlm():
    return ts.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def records():
    all_ = generated_records("test", 2)
    return [*all_[:3], *all_[6:]]  # three and two questions


@pytest.fixture(scope="module")
def finished(vlm, records, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    return out, evaluate(vlm, records, protocol(METHODS), out, batch=1)


def protocol(methods=("uniform",), keeps=(0.05,), **options) -> Protocol:
    settings = make_settings(methods, keeps, seed=options.pop("seed", 0))
    return Protocol(settings=tuple(settings), **({"max_new_tokens": 4} | options))


def rows(out) -> list[dict]:
    return pq.read_table(out / "answers.parquet").to_pylist()


def files(out) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in SAME}


# --- what comes out


@pytest.mark.parametrize("batch", [3, 8])
def test_batch_size_changes_no_byte(batch, vlm, records, finished, tmp_path):
    evaluate(vlm, records, protocol(METHODS), tmp_path, batch=batch)
    assert files(tmp_path) == files(finished[0])


@pytest.mark.parametrize("number", range(len(METHODS) + 1))
def test_rows_are_what_the_model_answers(number, vlm, records, finished):
    setting = protocol(METHODS).settings[number]
    setting.apply(vlm)
    mine = [row for row in rows(finished[0]) if row["setting"] == number]
    assert [row["id"] for row in mine] == [record.id for record in records]
    for row, record in list(zip(mine, records, strict=True))[::2]:
        answer = vlm.answer(record.load(), record.question, max_new_tokens=4)
        left = answer.visual_tokens.get("last_layer", answer.visual_tokens["kept"])
        assert (row["said"], row["prompt_tokens"]) == (answer.answer, answer.prompt_tokens)
        assert (row["visual_tokens"], row["visual_tokens_full"]) == (left, answer.visual_tokens["full"])
        assert row["exact"] == float(answer.answer == record.answers[0])
        prepared = vlm.prepare(record.load(), record.question)
        kept = prepared.plans[0].kept.tolist() if setting.chooses_before_decoder else None
        assert row["kept"] == kept
    vlm.compress(None)


def test_summary_and_timings(finished, records):
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (summary["clips"], summary["questions"], summary["main_score"]) == (2, 5, "exact")
    assert [s["method"] for s in summary["settings"]] == [None, *METHODS]
    for setting in summary["settings"]:
        mine = [row for row in rows(out) if row["setting"] == setting["setting"]]
        assert setting["scores"]["exact"]["mean"] == np.mean([row["exact"] for row in mine])
        assert setting["visual_tokens"] == np.mean([row["visual_tokens"] for row in mine])
        assert setting["failed"] == 0 and (setting["scores"]["exact"]["difference"] is None) == (not setting["setting"])
    seconds = pq.read_table(out / "timings.parquet").to_pylist()
    assert all(row[f"{phase}_s"] > 0 for row in seconds for phase in ("read", "encode", "select", "generate"))
    # Settings that leave the tower alone share an encoding; looking into the tower, or shortening it, is another one.
    encode = [{row["encode_s"] for row in seconds if row["setting"] == number} for number in range(len(METHODS) + 1)]
    assert encode[0] == encode[1] == encode[3] == encode[4] and len(encode[0]) == 2
    assert len(set.union(*encode)) == 2 * 3
    timings = json.loads((out / "timings.json").read_text())
    totals = [sum(v for k, v in row.items() if k.endswith("_s")) for row in seconds if row["setting"] == 0]
    assert timings["settings"][0]["seconds"]["total"] == pytest.approx(np.median(totals))


def test_shares_of_a_summary():
    """By hand: two clips, one failed question, and a score that does not apply everywhere."""
    table = {
        "setting": [0, 0, 0, 1, 1, 1],
        "method": ["", "", "", "uniform", "uniform", "uniform"],
        "keep": [1.0] * 3 + [0.25] * 3,
        "clip": ["a", "a", "b"] * 2,
        "id": ["a1", "a2", "b1"] * 2,
        "kind": ["x", None, "x"] * 2,
        "exact": [1.0, 0.0, 1.0, 0.0, 1.0, None],
        "anls": [None, None, 0.5, None, None, None],
        "visual_tokens": [8, 8, 4, 2, 2, None],
        "visual_tokens_full": [8, 8, 4, 8, 8, None],
        "prompt_tokens": [10, 10, 6, 4, 4, None],
        "error": [None] * 5 + ["BadMedia: no"],
    }
    answers_ = pa.table({k: pa.array(v) for k, v in table.items()})
    full, fewer = summarise(answers_, ["exact", "anls"], model="m")["settings"]
    assert full["scores"]["exact"]["mean"] == pytest.approx(2 / 3) and full["scores"]["anls"]["n"] == 1
    assert (fewer["failed"], fewer["scores"]["exact"]["n"], fewer["visual_tokens"]) == (1, 2, 2.0)
    assert fewer["scores"]["exact"]["difference"]["mean"] == 0.0  # of a1 and a2; b1 has no pair
    assert fewer["scores"]["anls"] == {"mean": None, "low": None, "high": None, "n": 0, "difference": None}
    assert full["kinds"] == {"x": {"mean": 1.0, "n": 2}} and fewer["kinds"] == {"x": {"mean": 0.0, "n": 1}}
    seconds = {f"{p}_s": [1.0, 2.0, 9.0, 1.0, 3.0, None] for p in ("read", "encode", "select", "generate")}
    timings = pa.table({"setting": table["setting"], **seconds})
    assert [s["seconds"]["total"] for s in summarise_timings(timings, answers_)["settings"]] == [8.0, 8.0]


# --- rounding


def test_near_ties_are_decided_alone(vlm, records):
    """Two tokens with equal logits: a batch whose rounding favours the other one must not win."""
    prompts = encode_clip(vlm.compress(None), records[0].load(), [r.question for r in records[:3]], ())
    plans = [vlm.reselect(prompt).plans for prompt in prompts]
    (said,) = answer_all(vlm, prompts[:1], plans[:1], batch=1, max_new_tokens=1)
    best = vlm.processor.tokenizer.convert_tokens_to_ids(said.text)
    other = best + 1

    def tie(_, args, logits):
        logits[..., other] = logits[..., best] - 1e-6
        if len(logits) > 1:
            logits[..., other] += 2e-6
        return logits

    hook = vlm.model.lm_head.register_forward_hook(tie)
    try:
        alone = answer_all(vlm, prompts, plans, batch=1, max_new_tokens=1)
        together = answer_all(vlm, prompts, plans, batch=3, max_new_tokens=1)
    finally:
        hook.remove()
    assert alone[0].text == said.text and [a.text for a in together] == [a.text for a in alone]


def test_a_batch_is_used_where_nothing_is_close(vlm, records, monkeypatch):
    sizes = []
    generate = vlm.model.generate
    monkeypatch.setattr(vlm.model, "generate", lambda **k: sizes.append(len(k["input_ids"])) or generate(**k))
    prompts = encode_clip(vlm.compress(None), records[0].load(), [r.question for r in records[:4]], ())
    plans = [vlm.reselect(prompt).plans for prompt in prompts]
    answer_all(vlm, prompts, plans, batch=3, max_new_tokens=2)
    assert sizes == [3, 1]
    monkeypatch.setattr(answers, "ROUNDING", {torch.float32: 10.0})
    answer_all(vlm, prompts, plans, batch=4, max_new_tokens=2)
    assert sizes[2:] == [4, 1, 1, 1, 1]
    vlm.compress("fastv", 0.25)  # chooses by numbers that rounding moves
    answer_all(vlm, prompts, plans, batch=4, max_new_tokens=2)
    assert sizes[7:] == [1, 1, 1, 1]
    vlm.compress(None)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next", "paligemma"])
def test_images_of_all_sizes_share_a_batch(name, tmp_path):
    """Prompts of unequal length, with grids and sizes of their own."""
    records = [
        Record(id=f"{i}{j}", clip=str(i), source=png(noise(1, 20 + 12 * i, 28)[0]), question=question, answers=("a",))
        for i in range(3)
        for j, question in enumerate(("what?", "which way does it move?"))
    ]
    vlm = make_vlm(name)
    for batch in (1, 6):
        summary = evaluate(vlm, records, protocol(["uniform"], [0.5]), tmp_path / str(batch), batch=batch)
        assert not any(setting["failed"] for setting in summary["settings"])
    assert files(tmp_path / "1") == files(tmp_path / "6")


def png(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# --- interruptions


class Killed(BaseException):
    """What no handler of an ordinary error sees."""


@pytest.mark.parametrize("moment", range(0, 26, 3))
@pytest.mark.parametrize("place", ["write", "replace"])
def test_a_kill_at_any_write(moment, place, vlm, records, finished, tmp_path, monkeypatch):
    """The rows are those of a real run; the kill comes while a file is half written, or before it is moved."""
    parts = {n: pq.read_table(finished[0] / "parts" / f"{n:06d}.parquet").to_pylist() for n in range(2)}
    monkeypatch.setattr(run, "ask", lambda vlm, clips, *_: {clip.number: parts[clip.number] for clip in clips})
    left = [moment]

    def count_down() -> bool:
        left[0] -= 1
        return left[0] < 0

    replace_file, whole = os.replace, store.write_whole
    monkeypatch.setattr(
        os, "replace", lambda a, b: _kill() if place == "replace" and count_down() else replace_file(a, b)
    )

    def write_whole(path, write):
        def half(temporary):
            write(temporary)
            if place == "write" and count_down():
                temporary.write_bytes(temporary.read_bytes()[:20])
                _kill()

        whole(path, half)

    monkeypatch.setattr(store, "write_whole", write_whole)
    killed = 0
    while True:
        try:
            evaluate(vlm, records, protocol(METHODS), tmp_path, batch=1 + killed)
            break
        except Killed:
            killed += 1
            left[0] = 10**6
    assert files(tmp_path) == files(finished[0]) and not list(tmp_path.rglob("*.tmp"))
    assert killed == (moment < 7)  # run.json, two parts, four files at the end


def _kill():
    raise Killed


def test_going_on_with_another_batch_size(vlm, records, finished, tmp_path, monkeypatch):
    asked = []
    ask = run.ask

    def once(vlm, clips, *rest):
        asked.append([clip.number for clip in clips])
        if len(asked) == 3:  # the first call warms up
            raise Killed
        return ask(vlm, clips, *rest)

    monkeypatch.setattr(run, "ask", once)
    seen = []
    with pytest.raises(Killed):
        evaluate(vlm, records, protocol(METHODS), tmp_path, batch=2)
    evaluate(vlm, records, protocol(METHODS), tmp_path, batch=5, progress=lambda *done: seen.append(done))
    assert asked == [[0], [0], [1], [1], [1]] and seen == [(1, 0), (2, 0)]
    assert files(tmp_path) == files(finished[0])
    monkeypatch.setattr(run, "ask", None)  # a finished run asks nothing
    assert evaluate(vlm, records, protocol(METHODS), tmp_path) == finished[1]


def changed_weight(vlm):
    with torch.no_grad():
        vlm.model.lm_head.weight[0, 0] += 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(keeps=(0.5,)), "settings"),
        (dict(methods=("random",)), "settings"),
        (dict(seed=1), "seed"),
        (dict(scores=("contains",)), "scores"),
        (dict(max_new_tokens=5), "max_new_tokens: 4 there, 5 now"),
        (dict(read_options={"num_frames": 4}), "read_options"),
        (dict(count=2), "data_sha256"),
        (dict(answers=("7",)), "data_sha256"),
        (dict(source=b"another file"), "data_sha256"),
        (dict(id="another"), "data_sha256"),
        (dict(weight=True), "model_sha256"),
        (dict(data="other"), 'data: "" there, "other" now'),
    ],
    ids=str,
)
def test_other_options_do_not_mix(change, words, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ask", fake_ask)
    vlm = ts.load("tiny", device="cpu")
    evaluate(vlm, generated_records("test", 1), protocol(), tmp_path, command="one")
    evaluate(vlm, generated_records("test", 1), protocol(), tmp_path, batch=2, command="two")
    before = files(tmp_path)
    records = generated_records("test", change.pop("count", 1))
    records[0] = replace(
        records[0], **{name: change.pop(name) for name in ("answers", "source", "id") if name in change}
    )
    if change.pop("weight", False):
        changed_weight(vlm)
    data = change.pop("data", "")
    with pytest.raises(BadOption, match="other options") as error:
        evaluate(vlm, records, protocol(**change), tmp_path, data=data)
    assert words in str(error.value) and files(tmp_path) == before


def fake_ask(vlm, clips, protocol, scores, batch):
    """Rows without a model."""
    said = dict(said="1", visual_tokens=1, visual_tokens_full=1, prompt_tokens=1, error=None)
    seconds = dict(read_s=1.0, encode_s=1.0, select_s=1.0, generate_s=1.0)
    return {
        clip.number: [
            {"setting": number, "method": setting.method, "keep": setting.keep, "clip": record.clip, "id": record.id}
            | dict.fromkeys(scores, 1.0)
            | said
            | seconds
            for number, setting in enumerate(protocol.settings)
            for record in clip.records
        ]
        for clip in clips
    }


def damage(path, how):
    if how == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif how == "garbage":
        path.write_bytes(b"PAR1" + os.urandom(200) + b"PAR1")
    elif how == "another table":
        pq.write_table(pa.table({"setting": [0]}), path)
    elif how == "another clip":
        shutil.copy(path.with_name("000001.parquet"), path)
    elif how == "fewer rows":
        table = pq.read_table(path)
        pq.write_table(table.slice(1), path)
    elif how == "another run":
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({b"tokensieve_evaluation": b"0" * 64}), path)


@pytest.mark.parametrize("how", ["cut", "garbage", "another table", "another clip", "fewer rows", "another run"])
def test_parts_that_are_not_ours(how, vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ask", fake_ask)
    records = generated_records("test", 2)
    evaluate(vlm, records, protocol(), tmp_path)
    before = files(tmp_path)
    part = tmp_path / "parts" / "000000.parquet"
    damage(part, how)
    with pytest.raises(BadOption, match="000000.parquet.*(damaged|another).* Delete it"):
        evaluate(vlm, records, protocol(), tmp_path)
    part.unlink()
    evaluate(vlm, records, protocol(), tmp_path)
    assert files(tmp_path) == before


def test_folders_that_are_not_ours(vlm, records, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ask", fake_ask)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadOption, match="is a file"):
        evaluate(vlm, records, protocol(), tmp_path / "file")
    with pytest.raises(BadOption, match="holds other files"):
        evaluate(vlm, records, protocol(), tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "run.json").write_text("[" * 100_000)
    with pytest.raises(BadOption, match="run.json' cannot be read"):
        evaluate(vlm, records, protocol(), broken)
    evaluate(vlm, records, protocol(), tmp_path / "new")
    (tmp_path / "new" / "run.json").unlink()
    with pytest.raises(BadOption):
        evaluate(vlm, records, protocol(), tmp_path / "new")
    orphans = tmp_path / "orphans"
    shutil.copytree(tmp_path / "new" / "parts", orphans / "parts")
    with pytest.raises(BadOption, match="parts but no run.json"):
        evaluate(vlm, records, protocol(), orphans)


def test_two_runs_at_a_time(vlm, records, tmp_path, monkeypatch):
    def second(*arguments):
        with pytest.raises(BadOption, match="Another run"):
            evaluate(vlm, records, protocol(), tmp_path)
        return fake_ask(*arguments)

    monkeypatch.setattr(run, "ask", second)
    evaluate(vlm, records, protocol(), tmp_path)


def test_a_full_disk_is_one_sentence(vlm, records, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "ask", fake_ask)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(TokensieveError, match="cannot be written: No space left on device"):
        evaluate(vlm, records, protocol(), tmp_path)


# --- what goes wrong in a clip


def test_bad_media_and_refusals_cost_their_rows(vlm, tmp_path):
    """A broken file, a question that cannot be asked, and a method that refuses every clip."""

    def refuse(tokens):
        raise BadOption("not these")

    good = generated_records("test", 1)[:3]
    records = [
        Record(id="broken", source=b"not a picture", question="What?", answers=("1",)),
        Record(id="picture", source=png(noise(1, 96, 96)[0]), question="What?", answers=("1",)),
        replace(good[0], question="What <image>?"),
        *good[1:],
    ]
    settings = [*make_settings(["uniform"], [0.25]), *make_settings(["cacovid"], [0.25], policy=refuse)[1:]]
    spec = replace(protocol(), settings=tuple(settings))
    summary = evaluate(vlm, records, spec, tmp_path, batch=3)
    found = {(row["setting"], row["id"]): row for row in rows(tmp_path)}
    assert summary["clips"] == 3 and [setting["failed"] for setting in summary["settings"]] == [2, 2, 5]
    assert [s["scores"]["exact"]["n"] for s in summary["settings"]] == [3, 3, 0]
    for (setting, id_), row in found.items():
        assert (row["error"] is None) == (row["exact"] is not None) == (row["said"] is not None)
        if id_ == "broken":
            assert row["error"].startswith("BadMedia: ")
        elif id_ == good[0].id:
            assert row["error"].startswith("BadOption: ") and "<image>" in row["error"]
        elif setting == 2:
            assert row["error"] == "BadOption: not these"
    timings = pq.read_table(tmp_path / "timings.parquet").to_pylist()
    assert all((row["generate_s"] is None) == bool(found[row["setting"], row["id"]]["error"]) for row in timings)


def test_a_run_without_any_good_clip(vlm, tmp_path):
    records = [Record(id=str(i), source=bytes([i]), question="What?", answers=("1",)) for i in range(2)]
    summary = evaluate(vlm, records, protocol(), tmp_path)
    assert [s["failed"] for s in summary["settings"]] == [2, 2] and summary["settings"][1]["visual_tokens"] is None
    assert json.loads((tmp_path / "timings.json").read_text())["settings"][0]["seconds"]["total"] is None


# --- choices


@pytest.fixture(scope="module")
def chosen():
    """Digits with four choices each, the right one in turn first, second ..."""
    records = []
    for record in generated_records("test", 8):
        if record.kind == "digit":
            digit, place = int(record.answers[0]), len(records) % 4
            others = [str((digit + 3 * i) % 10) for i in (1, 2, 3)]
            choices = (*others[:place], record.answers[0], *others[place:])
            records.append(replace(record, choices=choices))
    return records


def test_hidden_choices_are_rated_by_what_the_model_would_say(vlm, chosen, tmp_path):
    assert len(chosen) > 2
    spec = protocol(["zoprune"], scores=("choice-likelihood", "exact"), choices="hidden")
    summary = evaluate(vlm, chosen, spec, tmp_path)
    assert all(setting["scores"]["choice-likelihood"]["mean"] > 0.7 for setting in summary["settings"])
    answered = [row for row in rows(tmp_path) if row["exact"] == 1]
    assert answered and all(row["choice-likelihood"] == 1 for row in answered)


def test_listed_choices(vlm, chosen, tmp_path):
    spec = protocol()
    assert spec.prompt(chosen[0]).splitlines()[1:] == [
        *(f"{letter}. {text}" for letter, text in zip("ABCD", chosen[0].choices, strict=True)),
        "Answer with the letter of the right choice.",
    ]
    assert spec.continuations(chosen[0]) == "ABCD" and check_scores(spec, chosen) == ("choice-letter",)
    assert check_scores(spec, [*chosen, *generated_records("test", 1)]) == ("exact", "choice-letter")
    evaluate(vlm, chosen[:1], protocol(scores=("choice-letter", "choice-likelihood")), tmp_path)
    for row in rows(tmp_path):
        assert row["choice-letter"] in (0, 1) and row["choice-likelihood"] in (0, 1)
        assert row["question"] == chosen[0].question and row["choices"] == list(chosen[0].choices)


@pytest.mark.parametrize("method", [None, "zoprune", "tome"])
def test_likelihoods_are_those_of_one_forward(method, vlm, records):
    """Teacher forcing in a single pass over prompt and choice, without a cache."""
    (record,) = records[:1]
    vlm.compress(method, 0.25)
    (prompt,) = encode_clip(vlm, record.load(), [record.question], ())
    again = vlm.reselect(prompt)
    choices = ["3", "four digits", "red"]
    logliks, lengths = choice_logliks(vlm, prompt, again.plans, choices)
    for choice, loglik, length in zip(choices, logliks, lengths, strict=True):
        ids = torch.tensor([vlm.processor.tokenizer.encode(choice, add_special_tokens=False)])
        arguments = dict(vlm.reselect(prompt))
        end = arguments["position_ids"][..., -1:] + 1
        more = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": end + torch.arange(ids.shape[1]),
        }
        for name, value in more.items():
            arguments[name] = torch.cat([arguments[name], value], -1)
        with torch.no_grad():
            logits = vlm.model(**arguments).logits[0, -ids.shape[1] - 1 : -1].float()
        suppressed = [vlm.model.config.image_token_id, vlm.model.config.video_token_id]
        logits[:, suppressed] = -math.inf
        want = logits.log_softmax(-1).gather(1, ids.T).sum()
        assert length == ids.shape[1] and loglik == pytest.approx(float(want), abs=1e-4)
    vlm.compress(None)


def test_likelihoods_inside_the_language_model_do_not_read_the_choice(vlm, records):
    """fastv ranks tokens by the last token of the prompt: what it keeps for a choice is what it keeps for an answer."""
    (record,) = records[:1]
    vlm.compress("fastv", 0.1)
    (prompt,) = encode_clip(vlm.compress(None), record.load(), [record.question], ())
    vlm.compress("fastv", 0.1)
    plans = vlm.reselect(prompt).plans
    (said,) = answer_all(vlm, [prompt], [plans], batch=1, max_new_tokens=3)
    (best, other), _ = choice_logliks(vlm, prompt, plans, [said.text, "purple"])
    assert best > other and best > -1
    vlm.compress(None)


@pytest.mark.parametrize(
    ("options", "with_choices", "words"),
    [
        (dict(scores=("choice-letter",)), False, "no question has choices"),
        (dict(scores=("exact",)), True, "answered by a letter"),
        (dict(scores=("exat",)), False, "Did you mean 'exact'"),
        (dict(choices="shown"), True, "listed"),
        (dict(max_new_tokens=0), False, "max_new_tokens"),
    ],
    ids=str,
)
def test_scores_that_do_not_fit(options, with_choices, words, vlm, records, chosen, tmp_path):
    with pytest.raises(BadOption) as error:
        evaluate(vlm, chosen if with_choices else records, protocol(**options), tmp_path)
    assert words in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [(dict(question=None), "no question"), (dict(answers=()), "no answer"), (dict(choices=("1",) * 27), "27 choices")],
)
def test_questions_that_cannot_be_scored(change, words, vlm, records, tmp_path):
    with pytest.raises(BadOption, match=words):
        evaluate(vlm, [*records, replace(records[0], id="odd", **change)], protocol(), tmp_path)
    with pytest.raises(BadOption, match="no questions"):
        evaluate(vlm, [], protocol(), tmp_path)


def test_questions_about_parts_of_a_video_are_clips_of_their_own():
    one = Record(id="1", clip="v", source=b"v", start_s=0.0, end_s=1.0)
    clips = clips_of([one, replace(one, id="2", start_s=1.0, end_s=2.0), replace(one, id="3")])
    assert [[record.id for record in clip.records] for clip in clips] == [["1", "3"], ["2"]]


# --- settings


def described(settings) -> list[tuple]:
    stages = [[(s.method.name, s.keep) for s in one.compression.stages] if one.compression else [] for one in settings]
    return [(one.method, one.keep, of) for one, of in zip(settings, stages, strict=True)]


def test_what_methods_and_budgets_make():
    assert described(make_settings(["uniform", "tome:0.5+prumerge+", "uniform"], [1, 0.25, 64, 0.25])) == [
        ("", 1.0, []),
        ("uniform", 0.25, [("uniform", 0.25)]),
        ("uniform", 64, [("uniform", 64)]),
        ("tome:0.5+prumerge+", 0.25, [("tome", 0.5), ("prumerge+", 0.25)]),
        ("tome:0.5+prumerge+", 64, [("tome", 0.5), ("prumerge+", 64)]),
    ]
    assert described(make_settings(["prumerge+:0.5+fastv"], [0.1]))[1][2] == [("prumerge+", 0.5), ("fastv", 0.1)]
    assert described(make_settings(["zoprune"], [1.0])) == [("", 1.0, [])]


@pytest.mark.parametrize(
    ("methods", "keeps", "options", "words"),
    [
        (["zoprun"], [0.5], {}, "Did you mean 'zoprune'"),
        (["zoprune+evs"], [0.5], {}, "one method in each place"),
        (["tome:half+zoprune"], [0.5], {}, "'half' in 'tome:half' is no budget"),
        (["tome:0+zoprune"], [0.5], {}, "fraction in (0, 1]"),
        (["tome:0.5"], [0.5], {}, "its own budget"),
        (["zoprune"], [0], {}, "fraction in (0, 1]"),
        (["zoprune"], [0.5], {"policy": "x"}, "--policy needs a method"),
        (["zoprune"], [0.5], {"options": {"stp": 1}}, "'stp'"),
        (["zoprune"], [0.5], {"positions": "kept"}, "positions"),
    ],
    ids=str,
)
def test_settings_that_are_refused(methods, keeps, options, words):
    with pytest.raises(BadOption) as error:
        make_settings(methods, keeps, **options)
    assert words in str(error.value)


def test_methods_that_a_model_cannot_run_are_named(vlm):
    methods = [m.name for m in list_methods()]
    able, left_out = usable(VLM(vlm.model, vlm.processor), make_settings(methods, [0.5]))
    assert len(able) == len(methods) and "needs a trained policy" in left_out.pop("cacovid") and not left_out
    able, left_out = usable(make_vlm("qwen2_vl"), make_settings(["tome", "uniform"], [0.5]))
    assert [one.method for one in able] == ["", "uniform"] and "vision tower" in left_out["tome"]


def test_a_policy_of_the_model_itself(vlm, records, tmp_path):
    """It is used, its question is recorded, and it tells runs apart; without any, the method is refused."""
    wish = protocol(["cacovid"])
    with pytest.raises(BadOption, match="needs a trained policy"):
        evaluate(VLM(vlm.model, vlm.processor), records[:1], wish, tmp_path)
    width = vlm.model.config.text_config.hidden_size
    for seed in (0, 1):
        own = VLM(vlm.model, vlm.processor, policy=LightScorer(width, seed=seed))
        if seed:
            with pytest.raises(BadOption, match="settings: "):
                evaluate(own, records[:1], wish, tmp_path)
        else:
            summary = evaluate(own, records[:1], wish, tmp_path)
            assert [setting["failed"] for setting in summary["settings"]] == [0, 0]


def test_a_trained_policy_is_part_of_the_options(vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ask", fake_ask)
    for seed, name in enumerate(("a", "b")):
        LightScorer(vlm.model.config.text_config.hidden_size, seed=seed).save_pretrained(tmp_path / name)
    records = generated_records("test", 1)
    for name in ("a", "a", "b"):
        settings = tuple(make_settings(["cacovid", "uniform"], [0.25], policy=str(tmp_path / name)))
        if name == "b":
            with pytest.raises(BadOption, match="settings"):
                evaluate(vlm, records, Protocol(settings=settings), tmp_path / "out")
        else:
            evaluate(vlm, records, Protocol(settings=settings), tmp_path / "out")
