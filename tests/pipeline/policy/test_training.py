"""What both trainers owe: frozen parts stay frozen, resuming and several processes change no number."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from tests.pipeline.policy.training import KINDS, _few_questions, few_questions, fit, make_module, weights  # noqa: F401
from tokensieve.errors import BadOption
from tokensieve.pipeline.policy.data import Asked, PolicyData

both = pytest.mark.parametrize("kind", KINDS)


class Crash(L.Callback):
    """The power goes off in the middle of a batch."""

    def __init__(self, at: int):
        self.at = at

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step >= self.at:
            raise RuntimeError("power")


def crash(module, at: int, **options) -> None:
    with pytest.raises(RuntimeError, match="power"):
        fit(module, callbacks=[Crash(at)], **options)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "kind, scorer", [("cacovid", "light"), ("cacovid", "cacovid"), ("rank", "light"), ("distil", "light")]
)
def test_only_the_policy_learns(kind, scorer, tmp_path):
    module = make_module(kind, scorer=scorer, val_keeps=[0.1])
    model = module.judge.vlm.model
    before, untrained = {k: v.clone() for k, v in model.state_dict().items()}, weights(module)
    trainer = fit(module, 4, out=tmp_path)
    assert same(before, dict(model.state_dict())) and not model.training
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    policy = {id(p) for p in module.policy.parameters()}
    for optimizer in trainer.optimizers:
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == policy
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {k.split(".")[0] for k in state["state_dict"]} == {"policy"}
    assert {id(p) for p in module.parameters()} == policy
    changed = [k for k, v in weights(module).items() if not torch.equal(v, untrained[k])]
    assert changed == list(untrained)


@both
def test_the_tower_runs_once_a_clip_and_all_subsets_in_one_batch(kind):
    module = make_module(kind)
    adapter = module.judge.vlm.adapter
    tower, batches = [], []
    adapter.base.vision_tower.register_forward_hook(lambda *_: tower.append(1))
    adapter.base.language_model.register_forward_pre_hook(
        lambda _, __, kw: batches.append(kw["inputs_embeds"].shape[0]), with_kwargs=True
    )
    fit(module, 8, data=PolicyData(clips=2, batch=2))
    assert len(tower) == 2
    if kind != "distil":
        subsets = {"cacovid": 6, "rank": 5}[kind]
        assert batches == [subsets, 1] * 3 + [subsets] * 3 * 7  # 3 questions; without any visual token once
    else:
        assert batches[-8:] == [3] * 8  # the rest is what the teacher said, once


@both
def test_a_resumed_run_gives_the_same_numbers(kind, tmp_path):
    straight = make_module(kind)
    fit(straight, 6)

    stopped = make_module(kind)
    crash(stopped, 4, max_steps=6, out=tmp_path)
    resumed = make_module(kind, seed=0)
    with torch.no_grad():
        resumed.policy.token_head[1].weight.zero_()  # all must come from the checkpoint
    data = PolicyData(clips=3, batch=1)
    trainer = fit(resumed, 6, data=data, ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 6 and data.steps_done * KINDS[kind][1].get("rounds", 1) == 6
    assert same(weights(resumed), weights(straight))


class _Plain:
    """Plain gradient descent, whose steps are as exact as the gradients; each of these is written to a file."""

    grads_to = None

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.policy.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

    def step(self, *args):
        loss = super().step(*args)
        if self.grads_to and self.global_rank == 0:
            grads = {name: p.grad.clone() for name, p in self.policy.named_parameters()}
            torch.save(grads, self.grads_to / f"{self.trainer.world_size}-{self.global_step}.pt")
        return loss


def plain(kind: str, folder=None, **options):
    module_class, own = KINDS[kind]
    module = type("Plain", (_Plain, module_class), {})(**{**own, **options})
    module.grads_to = folder
    return module


def assert_close(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name in got:
        torch.testing.assert_close(got[name], want[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@both
def test_two_processes_equal_one(kind, tmp_path):
    one, two = plain(kind, tmp_path), plain(kind, tmp_path)
    before = weights(one)
    steps = 2 * KINDS[kind][1].get("rounds", 1)
    # Of six clips, those that the two processes get at a time have different numbers of questions.
    fit(one, steps, data=PolicyData(clips=6, batch=2))
    fit(two, steps, data=PolicyData(clips=6, batch=1), devices=2, strategy="ddp_fork")
    largest = []
    for step in range(1, steps + 1):
        got, want = (torch.load(tmp_path / f"{world}-{step}.pt") for world in (2, 1))
        assert_close(got, want)
        largest.append(max(float(g.abs().max()) for g in want.values()))
    assert max(largest) > 1e-2, largest
    assert_close(weights(two), weights(one))
    assert not same(weights(one), before)


@both
def test_a_batch_in_parts_equals_a_batch(kind):
    whole, parts = plain(kind), plain(kind, accumulate=2)
    backwards = []
    parts.on_after_backward = lambda: backwards.append(1)
    for module in (whole, parts):
        fit(module, 2, data=PolicyData(clips=5, batch=3))
    assert len(backwards) == 4
    assert_close(weights(parts), weights(whole))


def test_validation_of_two_processes_is_that_of_one():
    options = dict(limit_val_batches=1.0, check_val_every_n_epoch=None, val_check_interval=1, num_sanity_val_steps=0)
    found = []
    for extra, val_clips in (({}, 4), (dict(devices=2, strategy="ddp_fork"), 4), ({}, 3)):
        module = make_module("distil", lr=1e-12, val_keeps=[0.02, 0.01])  # so slow that all stay alike
        data = PolicyData(clips=3, val_clips=val_clips, batch=1)
        found.append(fit(module, 1, data=data, **options, **extra).callback_metrics)
    one, two, fewer = ({k: float(v) for k, v in metrics.items() if k.startswith("val")} for metrics in found)
    assert one == two and set(one) == {"val_match_keep0.02", "val_match_keep0.01"}
    assert one != fewer


def test_clips_of_one_name_are_told_apart(tmp_path):
    module = make_module("distil")
    (clip,) = few_questions("train", 1)
    other = few_questions("val", 1)[0]
    twin = Asked(clip.id, other.questions, other.answers, other.source)
    first, second = (module.samples([c])[0] for c in (clip, twin))
    assert first.question == clip.questions[0] and second.question == twin.questions[0]
    assert module.samples([clip])[0] is first


def test_memory_for_clips_is_bounded():
    clips = few_questions("train", 3)
    (sample, *_) = make_module("distil").samples(clips[:1])
    one = (289 + 288) * 192 * 4 + sample.item.tokens.projector.inputs.nbytes  # one newline is no candidate
    module = make_module("distil", cache_gib=2.5 * one / 2**30)
    first = module.samples(clips[:1])[0]
    assert module.samples(clips[:1])[0] is first
    assert len(module.samples(clips)) == 4 and len(module._encoded) == 2
    assert module.samples(clips[:1])[0] is not first and module._encoded_bytes == 2 * one


@both
def test_bfloat16(kind):
    module = make_module(kind)
    before = weights(module)
    trainer = fit(module, 2, precision="bf16-mixed")
    assert all(v.isfinite().all() for v in weights(module).values()) and not same(weights(module), before)
    assert all(v.dtype == torch.float32 for v in weights(module).values())
    assert trainer.callback_metrics["loss"].isfinite()


def test_what_is_refused():
    with pytest.raises(BadOption, match="precision"):
        fit(make_module("cacovid"), 2, precision="bf16-true")
    with pytest.raises(BadOption, match="number of steps"):
        fit(make_module("cacovid"), -1)
    options = {"scorer": "heavy", "lr": 0.0, "warmup": 2, "accumulate": 0, "cache_gib": 0.0, "seed": -1}
    for name, value in options.items():
        with pytest.raises(BadOption, match=name):
            make_module("cacovid", **{name: value})
    with pytest.raises(BadOption, match="keep"):
        make_module("cacovid", val_keeps=[0])
