"""`VLM` with the real processor of every family: without compression it is the model itself, with it the counts are
right, a batch equals its prompts one by one, and bad input gives an error of ours."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.pipeline.tiny_families import EOS, IMAGE, VIDEO, make_model
from tests.pipeline.tiny_processors import RECIPES, letters_only, make_vlm, noise, shared_vlm
from tokensieve.datasets.frames import Frames
from tokensieve.errors import BadMedia, BadOption, MediaNotFound, UnsupportedModel
from tokensieve.pipeline.prompt import as_frames, run_processor, shows_video, user_turn
from tokensieve.pipeline.vlm import VLM

NEW = 5
GREEDY = dict(max_new_tokens=NEW, min_new_tokens=NEW)
QUESTIONS = ["what?", "which way does it move?"]
# Visual tokens of 4 frames and of one image of 20 x 28 pixels, and what half of the candidates leaves of them. Class
# tokens (Video-LLaVA) and newlines (LLaVA-NeXT, OneVision) always stay.
COUNTS = {
    "llava": ((64, 32), (16, 8)),
    "llava_next": ((280, 152), (70, 38)),
    "llava_next_video": ((16, 8), (70, 38)),
    "llava_onevision": ((17, 9), (31, 17)),
    "video_llava": ((68, 36), (16, 8)),
    "qwen2_vl": ((16, 8), (8, 4)),
    "qwen2_5_vl": ((16, 8), (8, 4)),
    "qwen3_vl": ((16, 8), (8, 4)),
    "internvl": ((16, 8), (4, 2)),
    "smolvlm": ((16, 8), (20, 10)),
    "idefics3": ((16, 8), (20, 10)),
    "gemma3": ((16, 8), (4, 2)),
    "paligemma": ((64, 32), (16, 8)),
}
# Families in which the frames of a video are images of their own to a method.
SEPARATE_FRAMES = {"llava_next"}


@pytest.fixture(params=list(RECIPES))
def vlm(request) -> VLM:
    return shared_vlm(request.param).compress(None)


@pytest.fixture
def small() -> VLM:
    return shared_vlm("llava_onevision").compress(None)


def media(kind: str, seed: int = 0) -> np.ndarray:
    return noise(4, seed=seed) if kind == "video" else noise(1, seed=seed)[0]


def family_name(vlm: VLM) -> str:
    return vlm.name.removeprefix("tiny-")


def processed(vlm: VLM, arrays: list, questions: list[str]):
    clips = [as_frames(a) for a in arrays]
    video = shows_video(vlm.processor, clips[0])
    inputs = run_processor(
        vlm.processor, clips, [[user_turn(c, q, video)] for c, q in zip(clips, questions, strict=True)]
    )
    inputs.pop("labels", None)
    return inputs


def new_ids(model, arguments, **options) -> list[list[int]]:
    ids = model.generate(**arguments, do_sample=False, **(GREEDY | {"suppress_tokens": [IMAGE, VIDEO]} | options))
    return ids[:, arguments["input_ids"].shape[1] :].tolist()


def own_answers(vlm: VLM, arrays: list, questions: list[str]) -> list[list[int]]:
    """The model and its processor, without tokensieve."""
    return new_ids(vlm.model, processed(vlm, arrays, questions))


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("compression", [None, "uniform"])
def test_keeping_everything_is_the_model_itself(vlm, kind, compression):
    vlm.compress(compression, keep=1.0)
    arrays = [media(kind), media(kind, seed=1)]
    want = own_answers(vlm, arrays[:1], QUESTIONS[:1])
    assert new_ids(vlm.model, vlm.prepare(arrays[0], QUESTIONS[0])) == want
    answer = vlm.answer(arrays[0], QUESTIONS[0], **GREEDY)
    assert answer.answer == vlm.processor.batch_decode(want, skip_special_tokens=True)[0].strip()
    assert answer.visual_tokens["full"] == answer.visual_tokens["kept"]
    assert new_ids(vlm.model, vlm.prepare(arrays, QUESTIONS)) == own_answers(vlm, arrays, QUESTIONS)


@pytest.mark.parametrize("kind", ["video", "image"])
def test_half_of_the_tokens(vlm, kind):
    vlm.compress("uniform", keep=0.5)
    full, kept = COUNTS[family_name(vlm)][kind == "image"]
    arrays = [media(kind), media(kind, seed=1)]
    singles = [vlm.answer(a, q, **GREEDY) for a, q in zip(arrays, QUESTIONS, strict=True)]
    prepared = vlm.prepare(arrays[0], QUESTIONS[0])
    assert singles[0].visual_tokens == {"full": full, "kept": kept}
    assert singles[0].prompt_tokens == prepared["input_ids"].shape[1] == prepared.full_prompt_tokens[0] - full + kept
    assert singles[0].generated_tokens == NEW
    together = vlm.answer(arrays, QUESTIONS, **GREEDY)
    for one, other in zip(singles, together, strict=True):
        assert (one.answer, one.visual_tokens, one.prompt_tokens) == (
            other.answer,
            other.visual_tokens,
            other.prompt_tokens,
        )


def test_dropping_changes_the_prompt_not_the_question(vlm):
    """What stays is the text and half of the features, in order."""
    vlm.compress("uniform", keep=0.5)
    prepared = vlm.prepare(media("video"), QUESTIONS[0])
    inputs = processed(vlm, [media("video")], QUESTIONS[:1])
    placeholders = torch.tensor([IMAGE, VIDEO])
    text = [ids[~torch.isin(ids, placeholders)] for ids in (prepared["input_ids"][0], inputs["input_ids"][0])]
    assert torch.equal(*text)
    assert not {k for k in prepared if k.startswith("pixel") or k.endswith("grid_thw") or k == "labels"}


def test_frames_are_one_item_with_a_frame_axis(vlm):
    items = vlm.prepare(media("video"), QUESTIONS[0]).items
    if family_name(vlm) in SEPARATE_FRAMES:
        assert len(items) == 4
    else:
        (item,) = items
        assert len(item.tokens.grids) == 1
        frames = 2 if family_name(vlm).startswith("qwen") else 4
        assert item.tokens.grids[0][0] == frames


def test_two_clips_of_unequal_size_and_one_question():
    vlm = shared_vlm("qwen2_5_vl").compress("uniform", keep=0.5)
    arrays = [noise(4), noise(6, 40, 20)]
    together = vlm.answer(arrays, "what?", **GREEDY)
    assert [a.answer for a in together] == [vlm.answer(a, "what?", **GREEDY).answer for a in arrays]
    several = vlm.answer(arrays[0], QUESTIONS, **GREEDY)
    assert [a.answer for a in several] == [vlm.answer(arrays[0], q, **GREEDY).answer for q in QUESTIONS]


def test_positions_make_a_difference(small):
    at_full, at_compact = (
        small.compress("uniform", 0.25, positions=p).prepare(noise(4), "what?")["position_ids"]
        for p in ("preserve", "compact")
    )
    assert at_full.max() > at_compact.max() == at_compact.shape[1] - 1


def test_answer_as_text_and_as_json(small):
    answer = small.compress("random", np.float32(0.5), seed=3).answer(noise(4), "what?", **GREEDY)
    assert str(answer) == answer.answer
    record = json.loads(json.dumps(answer.to_dict()))
    assert set(record["seconds"]) == {"read", "encode", "select", "generate"}
    assert (record["method"], record["keep"], record["model"]) == ("random", 0.5, "tiny-llava_onevision")
    plain = small.compress(None).answer(noise(4), "what?", **GREEDY)
    assert (plain.method, plain.keep) == (None, 1.0)


def test_notes_of_the_clip_reach_the_answer(small):
    clip = Frames(data=noise(4), times_s=np.arange(4.0), duration_s=4.0, source="x", partial=True, notes=("cut",))
    assert small.answer(clip, "what?", max_new_tokens=1).notes == ("cut",)


def test_seeds(small):
    def plan(seed):
        return small.compress("random", 0.5, seed=seed).prepare(noise(4), "what?").plans

    assert torch.equal(plan(1)[0].mask(), plan(1)[0].mask())
    assert not torch.equal(plan(1)[0].mask(), plan(2)[0].mask())
    together = small.compress("random", 0.5, seed=1).prepare([noise(4), noise(4, seed=1)], "what?").plans
    assert all(torch.equal(p.mask(), plan(1)[0].mask()) for p in together)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (dict(method="unifrom"), "Did you mean 'uniform'"),
        (dict(method="uniform", step=2), "no option 'step'"),
        (dict(method="uniform", keep=0), "keep"),
        (dict(method="uniform", keep=float("nan")), "keep"),
        (dict(method="uniform", positions="both"), "positions"),
        (dict(method="random", seed="x"), "seed"),
        (dict(method="random", seed=-1), "seed"),
    ],
)
def test_bad_compression_leaves_the_old_one(small, given, word):
    before = small.compress("random", 0.5).compression
    with pytest.raises(BadOption, match=word):
        small.compress(**given)
    assert small.compression is before
    assert small.compress(None).compression is None


@pytest.mark.parametrize(
    ("media", "question"),
    [
        ([], "what?"),
        ([], []),
        ([noise(4), noise(4)], ["what?"]),
        (noise(4), ""),
        (noise(4), " \n"),
        (noise(4), None),
        ([noise(4)], [["what?"]]),
        (None, "what?"),
        (noise(4).astype(np.float32), "what?"),
        (noise(4)[..., :1], "what?"),
        (noise(4)[:0], "what?"),
        (noise(4)[:, :, :, 0], "what?"),
        ((noise(4), noise(1)), "what?"),
        ({"a": 1}, "what?"),
        ([noise(4), noise(1)[0]], "what?"),
        (noise(4), "what is <video> ?"),
        (noise(4), "what is <image> ?"),
        ([noise(4), noise(3)], "what?"),
    ],
)
def test_bad_input(small, media, question):
    with pytest.raises(BadOption):
        small.answer(media, question)


def test_images_and_videos_share_no_batch(vlm):
    with pytest.raises(BadOption, match="cannot share a batch"):
        vlm.answer([noise(4), noise(1)[0]], "what?")


def test_media_that_is_not_there(small, tmp_path):
    with pytest.raises(MediaNotFound):
        small.answer(tmp_path / "nothing.mp4", "what?")
    empty = Frames(data=noise(4)[:0], times_s=np.zeros(0), duration_s=0.0, source="x")
    with pytest.raises(BadMedia):
        small.answer(empty, "what?")


def test_picture_from_a_file_and_from_pil(small, tmp_path):
    from PIL import Image

    picture = Image.fromarray(noise(1)[0])
    picture.save(tmp_path / "a.png")
    texts = {small.answer(m, "what?", **GREEDY).answer for m in (noise(1)[0], picture, tmp_path / "a.png")}
    assert len(texts) == 1
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-300])
    with pytest.raises(BadMedia):
        small.answer(Image.open(tmp_path / "cut.png"), "what?")


def test_without_a_processor():
    with pytest.raises(BadOption, match="no processor"):
        VLM(make_model("llava")).answer(noise(4), "what?")


def test_a_model_of_another_kind():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    with pytest.raises(UnsupportedModel, match="'llama'"):
        VLM(LlamaForCausalLM(config))


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, None])
def test_max_new_tokens(small, wrong):
    with pytest.raises(BadOption, match="max_new_tokens"):
        small.answer(noise(4), "what?", max_new_tokens=wrong)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl", "gemma3", "smolvlm"])
def test_beams_of_a_batch_equal_those_of_its_prompts(name):
    vlm = shared_vlm(name).compress("uniform", keep=0.5)
    arrays = [noise(4), noise(4, seed=1)]
    together = vlm.answer(arrays, QUESTIONS, num_beams=3, **GREEDY)
    assert [a.answer for a in together] == [
        vlm.answer(a, q, num_beams=3, **GREEDY).answer for a, q in zip(arrays, QUESTIONS, strict=True)
    ]
    want = new_ids(vlm.model, vlm.prepare(arrays[0], QUESTIONS[0]), num_beams=3)
    assert together[0].answer == vlm.processor.batch_decode(want, skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize("where", ["argument", "config given", "config of the model"])
def test_beams_where_prompts_keep_different_numbers(where):
    """InternVL holds all images in one tensor, which beams would pair with the wrong prompts."""
    from transformers import GenerationConfig

    vlm = make_vlm("internvl").compress("uniform", keep=0.5)
    options = {"num_beams": 3} | GREEDY
    if where == "config given":
        options = {"generation_config": GenerationConfig(pad_token_id=0, eos_token_id=EOS, **options)}
        options["max_new_tokens"] = NEW
    elif where == "config of the model":
        vlm.model.generation_config.num_beams = options.pop("num_beams")
    arrays = [media("image"), noise(1, 20, 60)[0]]
    together = vlm.answer(arrays, "what?", **options)
    assert len({a.visual_tokens["kept"] for a in together}) == 2
    assert [a.answer for a in together] == [vlm.answer(a, "what?", **options).answer for a in arrays]


def test_several_sequences(small):
    options = dict(num_beams=3, num_return_sequences=2, **GREEDY)
    one = small.answer(noise(4), "what?", **options)
    assert len(one) == 2 and one[0].answer != one[1].answer
    many = small.answer([noise(4), noise(4, seed=1)], "what?", **options)
    assert [len(answers) for answers in many] == [2, 2]
    assert [a.answer for a in many[0]] == [a.answer for a in one]


def test_sampling(small):
    torch.manual_seed(0)
    texts = {small.answer(noise(4), "what?", do_sample=True, temperature=5.0, **GREEDY).answer for _ in range(3)}
    assert len(texts) == 3


def test_options_of_generate_are_passed_on(small):
    from transformers import GenerationConfig

    answer = small.answer(noise(4), "what?", return_dict_in_generate=True, output_scores=True, **GREEDY)
    assert answer.answer == small.answer(noise(4), "what?", **GREEDY).answer
    torch.manual_seed(0)
    config = GenerationConfig(do_sample=True, temperature=5.0, eos_token_id=None, pad_token_id=0)
    texts = {small.answer(noise(4), "what?", generation_config=config, max_new_tokens=NEW).answer for _ in range(3)}
    assert len(texts) == 3


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl", "internvl"])
def test_placeholders_are_never_generated(name):
    """A head that prefers placeholders to everything else, whatever the user wants suppressed besides."""
    vlm = make_vlm(name)
    bias = {IMAGE: 100.0, VIDEO: 90.0, 200: 80.0, 201: 70.0}
    if not hasattr(vlm.model.config, "video_token_id"):  # InternVL's videos fill image placeholders
        del bias[VIDEO]
    vlm.model.set_output_embeddings(Biased(vlm.model.get_output_embeddings(), bias))
    assert new_ids(vlm.model, vlm.prepare(noise(4), "what?"), suppress_tokens=[0])[0] == [IMAGE] * NEW
    got = [vlm.processor.tokenizer.decode([i]) for i in (200, 201)]
    assert vlm.answer(noise(4), "what?", **GREEDY).answer == (got[0] * NEW).strip()
    assert vlm.answer(noise(4), "what?", suppress_tokens=[200], **GREEDY).answer == (got[1] * NEW).strip()


class Biased(torch.nn.Module):
    def __init__(self, head, bias: dict[int, float]):
        super().__init__()
        self.head, self.bias, self.weight = head, bias, head.weight

    def forward(self, x):
        logits = self.head(x)
        logits[..., list(self.bias)] += torch.tensor(list(self.bias.values()), dtype=logits.dtype)
        return logits


class Script(torch.nn.Module):
    """A head that makes row `b` generate `rows[b]`, whatever it saw."""

    def __init__(self, head, rows: list[list[int]]):
        super().__init__()
        self.weight, self.rows, self.step = head.weight, rows, 0

    def forward(self, x):
        logits = torch.zeros(*x.shape[:2], self.weight.shape[0])
        for b, row in enumerate(self.rows):
            logits[b, -1, row[min(self.step, len(row) - 1)]] = 1.0
        self.step += 1
        return logits


@pytest.mark.parametrize("pad", [0, EOS, None])
def test_generated_tokens_count_the_end_token_but_not_the_padding(pad):
    vlm = make_vlm("llava_onevision")
    vlm.model.generation_config.pad_token_id = pad
    a, b = 200, 201
    for rows, counts in [
        ([[a, b, EOS], [a, b, a, b, a, b]], [3, 6]),
        ([[EOS], [a, EOS]], [1, 2]),
        ([[a, 0, b, EOS], [a] * 6], [4, 6]),  # a generated pad token is a token
    ]:
        vlm.model.set_output_embeddings(Script(vlm.model.get_output_embeddings(), rows))
        answers = vlm.answer([noise(4), noise(4)], "what?", max_new_tokens=6)
        assert [answer.generated_tokens for answer in answers] == counts


def test_generated_tokens_with_a_stop_string(small):
    vlm = make_vlm("llava_onevision")
    a, b = vlm.processor.tokenizer.convert_tokens_to_ids(["a", "b"])
    vlm.model.set_output_embeddings(Script(vlm.model.get_output_embeddings(), [[a, b, b], [a, a, a, a, a, a]]))
    answers = vlm.answer(
        [noise(4), noise(4)], "what?", max_new_tokens=6, stop_strings=["ab"], tokenizer=vlm.processor.tokenizer
    )
    assert [(x.answer, x.generated_tokens) for x in answers] == [("ab", 2), ("aaaaaa", 6)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(vlm, dtype):
    half = VLM(make_vlm(family_name(vlm)).model.to(dtype), vlm.processor).compress("zoprune", keep=0.5)
    for kind in ("video", "image"):
        prepared = half.prepare(media(kind), "what?")
        assert all(item.features.dtype == dtype for item in prepared.items)
        assert half.answer(media(kind), "what?", **GREEDY).generated_tokens == NEW


def test_training_on_compressed_prompts(vlm):
    vlm.compress("uniform", keep=0.5)
    inputs = processed(vlm, [media("video"), media("video", seed=1)], QUESTIONS)
    inputs["labels"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    inputs["labels"][torch.isin(inputs["input_ids"], torch.tensor([IMAGE, VIDEO]))] = -100
    vlm.model.zero_grad()
    arguments = vlm.compress_inputs(inputs, target="forward")
    assert arguments["labels"].shape == arguments["input_ids"].shape
    loss = vlm.model(**arguments).loss
    loss.backward()
    assert loss.isfinite()
    into_tower = [p.grad for n, p in vlm.model.named_parameters() if any(w in n for w in ("vision", "visual", "tower"))]
    assert any(g is not None and g.abs().sum() > 0 for g in into_tower)
    vlm.model.zero_grad()
    assert "labels" not in vlm.compress_inputs(inputs)


def test_inputs_are_left_as_they_are(vlm):
    inputs = processed(vlm, [media("video")], QUESTIONS[:1])
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    vlm.compress("uniform", keep=0.5).compress_inputs(inputs)
    assert all(torch.equal(inputs[k], v) for k, v in before.items())


@pytest.mark.parametrize("inputs", [{}, {"input_ids": [[1, 2]]}, {"input_ids": torch.tensor([1, 2])}])
def test_inputs_without_ids(small, inputs):
    with pytest.raises(BadOption, match="input_ids"):
        small.compress_inputs(inputs)


def test_text_alone(small):
    ids = small.processor.tokenizer("hello", return_tensors="pt")["input_ids"]
    prepared = small.compress("uniform", keep=0.5).compress_inputs({"input_ids": ids})
    assert prepared.items == [] and prepared.visual_tokens(0) == {"full": 0, "kept": 0}
    assert new_ids(small.model, prepared) == new_ids(small.model, {"input_ids": ids})


def hooks(model) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + ("forward" in vars(m))
        for m in model.modules()
    )


def test_the_model_is_left_alone(vlm, monkeypatch):
    before = hooks(vlm.model)
    vlm.compress("zoprune", keep=0.5).answer(media("video"), "what?", max_new_tokens=1)
    assert hooks(vlm.model) == before
    inputs = processed(vlm, [media("video")], QUESTIONS[:1])
    inputs["input_ids"] = inputs["input_ids"][:, :-40]  # some placeholders are gone
    if int(torch.isin(inputs["input_ids"], torch.tensor([IMAGE, VIDEO])).sum()) == 0:
        inputs["input_ids"][:] = 150
    monkeypatch.setattr(type(vlm.adapter.projector), "forward", broken)
    with pytest.raises(ZeroDivisionError):
        vlm.compress_inputs(inputs)
    assert hooks(vlm.model) == before


def broken(self, *args, **kwargs):
    raise ZeroDivisionError


def test_wrong_number_of_placeholders(small):
    inputs = processed(small, [media("video")], QUESTIONS[:1])
    inputs["input_ids"] = inputs["input_ids"][inputs["input_ids"] != VIDEO][None]
    with pytest.raises(BadOption, match="placeholders"):
        small.compress_inputs(inputs)


def test_letters_are_what_an_answer_can_be_made_of(small):
    text = small.answer(noise(4), "what?", suppress_tokens=letters_only(small), **GREEDY).answer
    assert text.isalpha() and text.islower() and len(text) == NEW


def test_reselect_is_prepare_without_encoding_again():
    vlm, clips = make_vlm("llava_onevision"), [noise(4), noise(4, seed=1)]
    first = vlm.compress("uniform", 0.5).prepare(clips, ["one", "a longer two"])
    again = vlm.compress("random", 0.25, seed=3).reselect(first)
    want = vlm.prepare(clips, ["one", "a longer two"])
    assert torch.equal(again["input_ids"], want["input_ids"]) and again.clips is first.clips
    assert all(torch.equal(a.kept, b.kept) for a, b in zip(again.plans, want.plans, strict=True))
    features = [p["mm_encoder_outputs"]["video"].pooler_output for p in (again, want)]
    assert torch.equal(*features)
    assert again.seconds["encode"] == first.seconds["encode"]
