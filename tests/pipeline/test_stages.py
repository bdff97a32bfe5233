"""What `VLM.compress` takes: names, stages, stacks, budgets and options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tokensieve
from tests.pipeline.test_adapter import masked_full
from tests.pipeline.tiny_families import FAMILIES, make_inputs, make_model
from tokensieve import VLM, Stage, list_methods
from tokensieve.datasets.clip_files import clip_frames
from tokensieve.datasets.clips import make_clip
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.stages import Compression, build_stages, with_policy
from tokensieve.policies.light_scorer import LightScorer


def names(stages):
    return [(s.method.name, s.keep, s.options) for s in stages]


@pytest.mark.parametrize(
    "methods, keep, options, expected",
    [
        ("zoprune", 0.5, {"step": 0.1}, [("zoprune", 0.5, {"step": 0.1})]),
        (["zoprune"], [64], {}, [("zoprune", 64, {})]),
        (["tome", "zoprune"], 0.5, {}, [("tome", 0.5, {}), ("zoprune", 0.5, {})]),
        (["tome", "zoprune"], [0.5, 0.25], {"step": 0.1}, [("tome", 0.5, {}), ("zoprune", 0.25, {"step": 0.1})]),
        ([Stage("zoprune", 0.1, step=0.2), "fastv"], 0.5, {}, [("zoprune", 0.1, {"step": 0.2}), ("fastv", 0.5, {})]),
        (Stage("evs", 3), 0.5, {}, [("evs", 3, {})]),
    ],
)
def test_what_a_user_types(methods, keep, options, expected):
    assert names(build_stages(methods, keep, options)) == expected


@pytest.mark.parametrize(
    "methods, keep, options, message",
    [
        ("zoprun", 0.5, {}, "Did you mean 'zoprune'"),
        ("zoprune", 0, {}, "keep"),
        ("zoprune", 0.5, {"stp": 1}, "Did you mean 'step'"),
        (["tome", "zoprune"], [0.5], {}, "2 methods and 1 budgets"),
        (["tome", "zoprune"], 0.5, {"stp": 1}, "None of tome, zoprune has an option 'stp'"),
        ([Stage("zoprune")], 0.5, {"step": 1}, "no owner"),
        ([3], 0.5, {}, "name or a Stage, got int"),
    ],
)
def test_what_is_refused(methods, keep, options, message):
    with pytest.raises(BadOption) as error:
        build_stages(methods, keep, options)
    assert message in str(error.value)


@pytest.mark.parametrize("methods", [["zoprune", "evs"], ["fastv", "pyramiddrop"], ["tome", "zoprune", "tome"], []])
def test_one_method_a_place(methods):
    with pytest.raises(BadOption, match="one method in each place"):
        Compression(stages=build_stages(methods, 0.5, {}))


def test_stages_run_in_the_order_of_their_places():
    stack = Compression(stages=build_stages(["fastv", "tome", "zoprune"], [0.1, 0.2, 0.3], {}))
    assert stack.name == "tome,zoprune,fastv" and stack.keep == [0.2, 0.3, 0.1]
    assert stack.at("decoder").method.name == "fastv" and stack.needs == {"features", "projector"}
    assert repr(stack.at("projector")) == "Stage('zoprune', keep=0.3)"


def test_options_may_need_something_themselves():
    class Scorer:
        needs = ("tower",)

        def __call__(self, tokens):
            raise NotImplementedError

    stack = Compression(stages=build_stages("cacovid", 0.5, {"policy": Scorer()}))
    assert {"tower", "features", "frames"} <= stack.needs


class TestPolicyFolder:
    """`policy=` may be what `save_pretrained` wrote."""

    @pytest.fixture
    def policy(self):
        return LightScorer(32, frame_head=False, seed=3).eval()

    @pytest.mark.parametrize("kind", [str, Path])
    def test_a_folder_is_the_policy_in_it(self, policy, kind, tmp_path):
        policy.save_pretrained(tmp_path)
        (stage,) = build_stages("cacovid", 0.25, {"policy": kind(tmp_path)})
        read = stage.options["policy"]
        assert isinstance(read, LightScorer) and not read.training
        assert Compression(stages=(stage,)).needs >= {"question", "features", "frames"}
        vlm, inputs = VLM(make_model("llava_onevision-video")), make_inputs("llava_onevision-video", 2)
        plans = [
            vlm.compress("cacovid", 0.25, policy=p).compress_inputs(inputs).plans for p in (kind(tmp_path), policy)
        ]
        for got, want in zip(*plans, strict=True):
            assert torch.equal(got.kept, want.kept) and got.num_kept == 4

    def test_the_caller_keeps_its_options(self, policy, tmp_path):
        policy.save_pretrained(tmp_path)
        options = {"policy": str(tmp_path)}
        build_stages("cacovid", 0.25, options)
        assert options == {"policy": str(tmp_path)}

    def test_what_is_no_policy(self, tmp_path):
        with pytest.raises(BadOption, match="no folder 'nowhere'"):
            Stage("cacovid", policy="nowhere")
        with pytest.raises(UnsupportedModel, match="config.json"):
            Stage("cacovid", policy=tmp_path)
        with pytest.raises(BadOption, match="no option 'policy'"):
            Stage("zoprune", policy=tmp_path)


class TestVLM:
    """The stack inside a model: tower, projector and decoder together."""

    @pytest.fixture
    def vlm(self):
        vlm = VLM(make_model("llava"))
        yield vlm
        vlm.compress(None)

    def test_a_tower_stage_leaves_out_what_the_tower_merged(self, vlm):
        inputs = make_inputs("llava", 2)
        prepared = vlm.compress("tome", 0.5).compress_inputs(inputs)
        assert [plan.num_kept for plan in prepared.plans] == [8] * len(prepared.items)
        full = vlm.compress(None).compress_inputs(inputs)
        merged = {
            i
            for i, p in enumerate(prepared.plans)
            if not torch.equal(prepared.items[i].features, full.items[i].features)
        }
        assert len(merged) == len(prepared.items)

    def test_a_full_tower_budget_changes_nothing(self, vlm):
        inputs = make_inputs("llava", 2)
        full = vlm.compress_inputs(inputs)
        prepared = vlm.compress("tome", 1.0).compress_inputs(inputs)
        for got, want in zip(prepared.items, full.items, strict=True):
            assert torch.equal(got.features, want.features)
        assert all(plan.num_kept == 16 for plan in prepared.plans)

    def test_each_stage_has_its_own_budget(self, vlm):
        inputs = make_inputs("llava", 2)
        prepared = vlm.compress(["tome", "divprune", "fastv"], [0.5, 0.25, 0.5]).compress_inputs(inputs)
        assert [plan.num_kept for plan in prepared.plans] == [4] * len(prepared.items)
        vlm.model.generate(**prepared, max_new_tokens=2, do_sample=False)
        kept = [prepared.visual_tokens(row)["kept"] for row in range(2)]
        assert [layers[-1] for layers in vlm._decoder.kept_per_layer] == [k // 2 for k in kept]
        assert [layers[0] for layers in vlm._decoder.kept_per_layer] == kept

    def test_taking_it_off_leaves_no_trace(self, vlm):
        inputs = make_inputs("llava", 1)
        options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
        plain = vlm.model.generate(**inputs, **options)
        vlm.compress(["tome", "divprune", "fastv"], [0.5, 0.25, 0.5])
        vlm.model.generate(**vlm.compress_inputs(inputs), **options)
        vlm.compress(None)
        assert torch.equal(vlm.model.generate(**inputs, **options), plain)

    def test_reselect_needs_the_same_tower(self, vlm):
        prepared = vlm.compress_inputs(make_inputs("llava", 1))
        with pytest.raises(BadOption, match="prepare again"):
            vlm.compress("tome", 0.5).reselect(prepared)

    def test_what_was_not_recorded_is_named(self, vlm):
        prepared = vlm.compress("uniform", 0.5).compress_inputs(make_inputs("llava", 1))
        with pytest.raises(BadOption, match="attention of the vision tower"):
            vlm.compress("visionzip", 0.5).reselect(prepared)
        prepared = vlm.compress("uniform", 0.5).compress_inputs(make_inputs("llava", 1), needs={"tower"})
        assert vlm.compress("visionzip", 0.5).reselect(prepared).plans[0].num_kept == 8

    def test_a_bad_stack_leaves_the_old_one(self, vlm):
        before = vlm.compress("uniform", 0.5).compression
        with pytest.raises(BadOption):
            vlm.compress(["tome", "nothing"], 0.5)
        assert vlm.compression is before


UNREDUCED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "idefics3")


@pytest.mark.parametrize("method", [m.name for m in list_methods("tower")])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_tower_methods_in_every_family(family, method):
    vlm = VLM(make_model(family))
    if family in UNREDUCED:
        before = vlm.compress("uniform", 0.5).compression
        with pytest.raises(UnsupportedModel):
            vlm.compress(method, 0.5)
        assert vlm.compression is before
        return
    inputs = make_inputs(family, 2)
    whole = vlm.compress(method, 1.0).compress_inputs(inputs)
    plain = vlm.compress(None).compress_inputs(inputs)
    shorter = vlm.compress(method, 0.4).compress_inputs(inputs)
    for all_, full, fewer in zip(whole.items, plain.items, shorter.items, strict=True):
        assert torch.equal(all_.features, full.features) and all_.tower_plan.num_kept == len(full.tokens)
        assert not torch.equal(fewer.features, full.features)
        pooled = family in ("gemma3", "llava_next_video", "llava_onevision-video")  # a token of 4 patches stays
        assert 0 < fewer.tower_plan.num_kept < len(full.tokens) + pooled
    # What goes into the language model is the shortened tower's output at the places it kept.
    full, mask = masked_full(vlm.adapter, inputs, shorter.items, shorter.plans)
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    got = vlm.model.generate(**shorter, **options)[:, shorter["input_ids"].shape[1] :]
    want = vlm.model.generate(**full, **options)[:, full["input_ids"].shape[1] :]
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["llava_onevision-video", "llava_next", "paligemma"])
def test_a_full_stack_in_one_model(family):
    vlm = VLM(make_model(family))
    inputs = make_inputs(family, 2)
    prepared = vlm.compress(["tome", "visionzip", "fastv"], [0.6, 0.5, 0.5]).compress_inputs(inputs)
    vlm.model.generate(**prepared, max_new_tokens=3, do_sample=False)
    for row, left in enumerate(vlm.last_layer_tokens()):
        tokens = prepared.visual_tokens(row)
        assert left < tokens["kept"] < tokens["full"]
    vlm.compress(None)


class TestPolicyOfAModel:
    """What `VLM.policy` is for: methods that need a policy and are given none."""

    def test_stages_without_a_policy_get_it(self):
        own = LightScorer(32, question_aware=False)
        stages = with_policy(build_stages(["tome", "cacovid"], 0.5, {}), own)
        assert [s.options for s in stages] == [{}, {"policy": own}]
        assert stages[1].keep == 0.5

    def test_a_policy_that_is_given_stays(self):
        own, given = LightScorer(32, question_aware=False), LightScorer(32, question_aware=False, seed=1)
        (stage,) = with_policy((Stage("cacovid", 0.3, policy=given, importance=0.4),), own)
        assert stage.options == {"policy": given, "importance": 0.4}

    def test_none_changes_nothing(self):
        (stage,) = with_policy(build_stages("cacovid", 0.5, {}), None)
        assert stage.options.get("policy") is None

    def test_the_shipped_model_has_one(self):
        vlm = tokensieve.load("tiny", device="cpu").compress("cacovid", keep=0.05)
        clip = make_clip("val", 0)
        frames, questions = clip_frames(clip), [q.text for q in clip.questions]
        kept = [vlm.prepare(frames, question).plans[0].kept for question in questions]
        assert [len(k) for k in kept] == [14] * len(questions)
        again = [vlm.prepare(frames, question).plans[0].kept for question in questions]
        assert all(map(torch.equal, kept, again))
        assert len({tuple(k.tolist()) for k in kept}) > 1  # it reads the question
        staged = tokensieve.load("tiny", device="cpu").compress(Stage("cacovid", 0.05))
        assert torch.equal(staged.prepare(frames, questions[0]).plans[0].kept, kept[0])
