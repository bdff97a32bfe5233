"""The plug-in for lmms-eval: its command line on local tasks, and every request by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

from lmms_eval.api.instance import Instance
from loguru import logger

from tokensieve.datasets import read_video, write_clips
from tokensieve.errors import BadOption, MediaError
from tokensieve.pipeline import loader
from tokensieve.pipeline.evaluation.lmms_eval import (
    MAX_NEW_TOKENS,
    TokensieveModel,
    cut,
    generation_options,
    manifest,
)
from tokensieve.pipeline.prompt import run_processor, user_turn

COMPRESSED = "pretrained=tiny,method=zoprune,keep=0.25,device=cpu"
UTILS = """
from pathlib import Path
from PIL import Image

HERE = Path(__file__).parent

def video(doc):
    return [str(HERE / "clips" / doc["video"])]

def still(doc):
    return [Image.open(HERE / "stills" / doc["video"].replace("mp4", "png")).convert("RGB")]

def digit_questions(docs):
    return docs.filter(lambda doc: doc["kind"] == "digit")
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/clips/manifest.jsonl
test_split: test
doc_to_visual: !function utils.{visual}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
GENERATE = """
output_type: generate_until
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOOSE = """
output_type: multiple_choice
process_docs: !function utils.digit_questions
doc_to_choice: ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
metric_list:
  - metric: acc
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two generated clips with questions, their first frames as pictures, and three tasks about them."""
    folder = tmp_path_factory.mktemp("tasks")
    write_clips("test", 2, folder / "clips")
    (folder / "stills").mkdir()
    for clip in (folder / "clips").glob("*.mp4"):
        Image.fromarray(read_video(clip).data[0]).save(folder / "stills" / f"{clip.stem}.png")
    (folder / "utils.py").write_text(UTILS)
    for name, visual, more in (
        ("digit_clips", "video", GENERATE),
        ("digit_stills", "still", GENERATE),
        ("digit_choices", "video", CHOOSE),
    ):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder, visual=visual, more=more))
    return folder


@pytest.fixture(scope="module")
def documents(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "clips" / "manifest.jsonl").read_text().splitlines()]


@pytest.fixture
def model(folder, documents) -> TokensieveModel:
    model = TokensieveModel.create_from_arg_string(COMPRESSED, {"batch_size": 3})
    model.task_dict = {"task": {"test": documents}}
    return model


@pytest.fixture
def video(folder):
    return lambda document: [str(folder / "clips" / document["video"])]


def request(visual, doc_id: int, question: str, wanted) -> Instance:
    """As `ConfigurableTask.construct_requests` makes them."""
    metadata = {"task": "task", "doc_id": doc_id, "repeats": 1}
    return Instance("generate_until", (question, wanted, visual, doc_id, "task", "test"), 0, metadata)


def asked(documents, visual, **wanted) -> list[Instance]:
    return [request(visual, i, d["question"], {"max_new_tokens": 8, **wanted}) for i, d in enumerate(documents)]


def texts(results) -> list[str]:
    return [result.text for result in results]


def test_lmms_eval_finds_the_plug_in_by_itself():
    (entry,) = entry_points(group="lmms_eval.models", name="tokensieve")
    assert entry.load() is manifest
    from lmms_eval.models import get_model

    assert get_model("tokensieve") is TokensieveModel


@pytest.mark.timeout(900)  # it reads the YAML of all its own tasks first
def test_its_command_line_runs_on_local_tasks(folder, documents, model, tmp_path):
    command = [sys.executable, "-m", "lmms_eval", "--model", "tokensieve", "--model_args", COMPRESSED]
    command += ["--tasks", "digit_clips,digit_stills,digit_choices", "--include_path", str(folder), "--batch_size", "2"]
    command += ["--output_path", str(tmp_path), "--log_samples"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HOME": str(tmp_path / "hf")})
    assert done.returncode == 0 and "|digit_choices|" in done.stdout, done.stdout + done.stderr
    (results,) = (json.loads(path.read_text()) for path in tmp_path.rglob("*_results.json"))
    samples = {
        path.stem.split("samples_")[1]: [json.loads(line) for line in path.read_text().splitlines()]
        for path in tmp_path.rglob("*_samples_*.jsonl")
    }
    clips = [str(folder / "clips" / d["video"]) for d in documents]
    stills = [str(folder / "stills" / d["video"].replace("mp4", "png")) for d in documents]
    for name, media in (("digit_clips", clips), ("digit_stills", stills)):
        said = [model.vlm.answer(m, d["question"]).answer for m, d in zip(media, documents, strict=True)]
        assert [sample["filtered_resps"] for sample in samples[name]] == said
        right = np.mean([s == d["answer"] for s, d in zip(said, documents, strict=True)])
        assert results["results"][name]["exact_match,none"] == pytest.approx(right)
    assert results["results"]["digit_clips"]["exact_match,none"] > 0.5
    assert (
        results["results"]["digit_choices"]["acc,none"] == results["results"]["digit_choices"]["exact_match,none"] == 1
    )
    assert len(samples["digit_choices"]) == sum(d["kind"] == "digit" for d in documents)
    still = model.vlm.prepare(stills[0], documents[0]["question"]).visual_tokens(0)
    assert results["throughput"]["avg_visual_tokens_kept"] == (73 + still["kept"]) / 2  # as many questions about each
    assert results["throughput"]["avg_visual_tokens_full"] == (289 + still["full"]) / 2
    counts = samples["digit_clips"][0]["token_counts"][0]
    assert counts["input_tokens"] == model.vlm.answer(clips[0], documents[0]["question"]).prompt_tokens


def test_answers_keep_their_order_whatever_shares_a_batch(model, documents, folder, video):
    def still(document):
        return [Image.open(folder / "stills" / document["video"].replace("mp4", "png"))]

    def long(document):
        return [read_video(folder / "clips" / document["video"], num_frames=12)]

    mixed = asked(documents[:4], video) + asked(documents[:3], still) + asked(documents[:2], long)
    mixed += asked(documents[1:3], video, until="e")
    mixed = [mixed[i] for i in (0, 9, 4, 7, 1, 10, 5, 2, 8, 6, 3)]
    together = model.generate_until(mixed)
    model.batch_size = 1
    alone = [model.generate_until([one])[0] for one in mixed]
    assert together == alone and len(set(texts(alone))) > 3
    assert "e" in together[4].text and together[1].text == together[4].text.partition("e")[0]  # one question


def test_stop_strings_end_the_answer_and_the_work(model, documents, video):
    (whole,) = model.generate_until(asked(documents[:1], video))
    (stopped,) = model.generate_until(asked(documents[:1], video, until=["no such thing", whole.text[-1]]))
    assert stopped.text == whole.text[:-1]
    assert stopped.token_counts.output_tokens < whole.token_counts.output_tokens


@pytest.mark.parametrize(
    ("text", "until", "left"),
    [("a b\n\nc", ["\n\n"], "a b"), ("abc", ["c", "b"], "a"), ("abc", [], "abc"), ("abc", ["x"], "abc")],
)
def test_cut(text, until, left):
    assert cut(text, until) == left


@pytest.mark.parametrize(
    ("wanted", "until", "options"),
    [
        ({}, (), {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}),
        (
            {"max_new_tokens": 4, "temperature": 0, "top_p": 1.0, "num_beams": 2, "until": ["\n", ""]},
            ("\n",),
            {"max_new_tokens": 4, "do_sample": False, "num_beams": 2},
        ),
        ({"temperature": 0.2, "until": "x"}, ("x",), {"do_sample": True, "temperature": 0.2}),
        ({"temperature": 0.2, "do_sample": False}, (), {"do_sample": False}),
        ({"do_sample": True, "top_p": None, "top_k": 5}, (), {"do_sample": True, "top_k": 5}),
        ({"image_aspect_ratio": "original"}, (), {"do_sample": False}),
    ],
)
def test_generation_options(wanted, until, options):
    assert generation_options(wanted) == (until, {"max_new_tokens": MAX_NEW_TOKENS, **options})


def test_no_generation_option_is_passed_over_in_silence(model, documents, video):
    with pytest.raises(BadOption, match="'max_gen_toks'; it takes max_new_tokens, until"):
        model.generate_until(asked(documents[:1], video, max_gen_toks=3))
    said = []
    sink = logger.add(said.append, format="{message}")
    model.generate_until(asked(documents[:2], video, image_aspect_ratio="original"))
    logger.remove(sink)
    assert sum("'image_aspect_ratio' is for LLaVA" in line for line in said) == 1


def test_sampling_reaches_the_model(model, documents, video, monkeypatch):
    given = {}
    answer = model.vlm.answer
    monkeypatch.setattr(model.vlm, "answer", lambda *args, **options: given.update(options) or answer(*args, **options))
    model.generate_until(asked(documents[:1], video, temperature=0.7, top_p=0.9, num_beams=1))
    assert given == {"max_new_tokens": 8, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "num_beams": 1}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            "pretrained=tiny,metod=zoprune",
            "no model argument 'metod'; there are pretrained, method.*Did you mean 'method'",
        ),
        ("pretrained=tiny,method=zoprun", "no method 'zoprun'.*Did you mean 'zoprune'"),
        ("pretrained=tiny,method=zoprune,layer=2", "has an option 'layer'"),
        ("pretrained=tiny,layer=2", "need a method"),
        ("pretrained=tiny,policy=some", "need a method"),
        ("pretrained=tiny,keep=0.5", "need a method"),
        ("pretrained=tiny,method=zoprune,policy=some", "needs a method that uses it"),
        ("pretrained=tiny,method=zoprune,keep=1.5", "keep must be"),
        ("pretrained=tiny,method=zoprune,keep=few", "keep must be a number, got 'few'"),
        ("pretrained=tiny,method=zoprune,positions=odd", "positions must be"),
        ("pretrained=tiny,batch_size=auto", "batch_size must be a whole number above 0, got 'auto'"),
        ("pretrained=tiny,batch_size=0", "batch_size must be"),
        ("pretrained=tiny,batch_size=2,max_batch_size=4", "got 2 with max_batch_size 4"),
    ],
)
def test_bad_arguments_fail_before_weights_are_read(arguments, says, monkeypatch):
    monkeypatch.setattr(loader, "load", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(BadOption, match=says):
        TokensieveModel.create_from_arg_string(arguments)


def test_arguments_reach_the_model(monkeypatch):
    seen = {}
    load = loader.load
    monkeypatch.setattr(loader, "load", lambda *args, **options: seen.update(options) or load(*args, **options))
    model = TokensieveModel.create_from_arg_string(
        "pretrained=tiny,method=tome:0.5+zoprune,keep=40,positions=compact,seed=3,dtype=bfloat16,num_frames=4,fps=2,"
        "backend=decord",
        {"batch_size": "2", "max_batch_size": None, "device": "cpu"},
    )
    assert seen == {"device": "cpu", "dtype": "bfloat16", "revision": None}
    assert model.vlm.model.dtype is torch.bfloat16 and model.device.type == "cpu" and model.batch_size == 2
    assert (model.vlm.compression.name, model.vlm.compression.keep) == ("tome,zoprune", [0.5, 40])
    assert (model.vlm.compression.positions, model.vlm.compression.seed) == ("compact", 3)
    assert model.read_options == {"num_frames": 4, "fps": 2, "backend": "decord"}
    assert TokensieveModel("tiny", device="cpu").vlm.compression is None
    assert TokensieveModel("tiny", method="zoprune", device="cpu").vlm.compression.keep == 0.25
    (stage,) = TokensieveModel("tiny", method="fastv", layer=1, device="cpu").vlm.compression.stages
    assert stage.options == {"layer": 1}


def test_videos_are_read_as_asked(model, documents, video):
    (eight,) = model.generate_until(asked(documents[:1], video))
    model.read_options = {"num_frames": 4}
    (four,) = model.generate_until(asked(documents[:1], video))
    assert four.token_counts.input_tokens < eight.token_counts.input_tokens


def test_every_process_takes_its_own_gpu(monkeypatch):
    def load(name, *, device, **_):
        raise MediaError(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loader, "load", load)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for arguments, device in (({}, "cuda:3"), ({"device": "cpu"}, "cpu")):
        with pytest.raises(MediaError, match=f"^{device}"):
            TokensieveModel("tiny", **arguments)


def test_an_unreadable_video_costs_one_answer(model, documents, video, tmp_path):
    def broken(document):
        return [str(tmp_path / "missing.mp4")] if document is documents[1] else video(document)

    whole = model.generate_until(asked(documents, video))
    requests = asked(documents, broken)
    results = model.generate_until(requests)
    assert results[1].text == "" and results[1].token_counts is None
    assert [r for i, r in enumerate(results) if i != 1] == [r for i, r in enumerate(whole) if i != 1]
    with pytest.raises(MediaError, match="missing.mp4"):
        model.generate_until(requests[1:2])
    with pytest.raises(MediaError, match="missing.mp4"):
        model.loglikelihood([request(broken, 1, "Which?", "4")])


@pytest.mark.parametrize("visuals", [[], None, ["a.png", "b.png"]])
def test_anything_but_one_picture_is_refused(model, documents, visuals):
    with pytest.raises(BadOption, match=r"Document 0 of task \(test\) shows [02] pictures or videos"):
        model.generate_until(asked(documents[:1], lambda _: visuals))


def test_a_placeholder_is_taken_off_the_front_only(model, documents, video):
    plain = asked(documents[:1], video)
    question, *rest = plain[0].arguments
    plain[0].arguments = (f"<image>\n{question}", *rest)
    assert model.generate_until(plain) == model.generate_until(asked(documents[:1], video))
    plain[0].arguments = (f"What is in <image>? {question}", *rest)
    with pytest.raises(BadOption, match="<image> inside its text"):
        model.generate_until(plain)


def test_losses_equal_a_plain_forward_pass(documents, video):
    model = TokensieveModel("tiny", device="cpu")
    model.task_dict = {"task": {"test": documents}}
    continuations = [" 4", "red", lambda document: document["answer"], "three digits"]
    # Two questions about one clip, as tasks have them that put the choices into the question.
    requests = [request(video, 0, documents[i]["question"], text) for i in (0, 1) for text in continuations]
    losses = [result.text for result in model.loglikelihood(requests)]
    for i in (0, 1):
        clip = read_video(video(documents[0])[0])
        inputs = run_processor(model.vlm.processor, [clip], [[user_turn(clip, documents[i]["question"], True)]])
        texts = ["4", "red", documents[0]["answer"], "three digits"]
        for text, (loss, greedy) in zip(texts, losses[4 * i : 4 * i + 4], strict=True):
            ids = torch.tensor([model.vlm.processor.tokenizer.encode(text, add_special_tokens=False)])
            whole = torch.cat([inputs["input_ids"], ids], 1)
            with torch.no_grad():
                out = model.vlm.model(
                    input_ids=whole,
                    attention_mask=torch.ones_like(whole),
                    pixel_values_videos=inputs["pixel_values_videos"],
                )
            logits = out.logits[0, -ids.shape[1] - 1 : -1].log_softmax(-1)
            assert loss == pytest.approx(-logits.gather(1, ids.T).mean().item(), abs=1e-3)
            assert greedy == bool((logits.argmax(-1) == ids[0]).all())
    assert {greedy for _, greedy in losses} == {True, False}


@pytest.mark.parametrize("method", ["zoprune", "fastv"])
def test_the_own_answer_is_the_likeliest(method, documents, video):
    model = TokensieveModel("tiny", method=method, keep=0.25, device="cpu")
    model.task_dict = {"task": {"test": documents}}
    question = documents[0]["question"]
    said = model.vlm.answer(video(documents[0])[0], question).answer
    choices = [said, *(str(digit) for digit in range(10) if str(digit) != said)]
    results = model.loglikelihood([request(video, 0, question, choice) for choice in choices])
    losses, greedy = zip(*(result.text for result in results), strict=True)
    assert greedy == (True, *[False] * 9) and min(losses) == losses[0]


def test_likelihoods_that_mean_nothing_are_refused(model, documents, video):
    with pytest.raises(BadOption, match="asks for the likelihood of nothing"):
        model.loglikelihood([request(video, 0, "Which?", " ")])
    unconditional = request(video, 0, "", "4")
    unconditional.arguments = ("", "4")
    with pytest.raises(BadOption, match="acc_mutual_info"):
        model.loglikelihood([unconditional])


def test_several_rounds_are_refused(model):
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])


def test_clean_lets_go_of_the_model(model):
    model.clean()
    assert model.vlm is None
