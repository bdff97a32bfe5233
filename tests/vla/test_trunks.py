"""Episodes in trunks: nothing lost, nothing invented."""

import pytest
import torch

from tests.vla.fixture import episode
from tokensieve.errors import BadOption
from tokensieve.vla import BehaviourConfig, Trunks, cut_trunks, join_trunks, num_plans


def test_300_steps_are_128_128_and_44():
    frames, actions = episode(300, side=4)
    cut = cut_trunks(frames, actions, 128)
    assert cut.mask.sum(1).tolist() == [128, 128, 44] and cut.mask[2, :44].all() and not cut.mask[2, 44:].any()
    assert torch.equal(cut.frames[cut.mask], frames) and torch.equal(cut.actions[cut.mask], actions)
    assert not cut.frames[2, 44:].any() and not cut.actions[2, 44:].any()


def test_previous_actions_run_on_across_trunks():
    frames, actions = episode(10)
    cut = cut_trunks(frames, actions[:, 0], 4)
    assert cut.previous[cut.mask][:, 0].tolist() == [-1, *actions[:-1, 0].tolist()]
    assert torch.equal(cut.actions[cut.mask], actions)


@pytest.mark.parametrize("num_steps", [1, 4, 5, 8])
def test_lengths(num_steps):
    cut = cut_trunks(*episode(num_steps), 4)
    assert len(cut) == -(-num_steps // 4) and int(cut.mask.sum()) == num_steps and cut.mask.shape[1] == 4


def test_parts_and_joins():
    first, second = (cut_trunks(*episode(10, seed=seed), 4) for seed in (0, 1))
    joined = join_trunks([first, second])
    assert len(joined) == 6 and torch.equal(joined[3:].frames, second.frames)
    assert torch.equal(joined[[5, 0]].actions, torch.stack([second.actions[2], first.actions[0]]))
    assert joined.to("cpu").mask.device.type == "cpu"


def test_what_is_refused():
    frames, actions = episode(6)
    good = cut_trunks(frames, actions, 4)
    parts = {name: getattr(good, name) for name in ("frames", "actions", "previous", "mask")}
    for call in (
        lambda: cut_trunks(frames, actions, 0),
        lambda: cut_trunks(frames, actions, True),
        lambda: cut_trunks(frames, actions[:5], 4),
        lambda: cut_trunks(frames[:0], actions[:0], 4),
        lambda: cut_trunks(frames[0], actions, 4),
        lambda: cut_trunks(frames.float(), actions, 4),
        lambda: cut_trunks(frames, actions.float(), 4),
        lambda: Trunks(**parts | {"mask": good.mask[:1]}),
        lambda: Trunks(**parts | {"previous": good.previous[..., 0]}),
        lambda: Trunks(**parts | {"mask": good.mask.long()}),
        lambda: good[0],
        lambda: join_trunks([]),
        lambda: join_trunks([good, cut_trunks(frames, actions, 3)]),
    ):
        with pytest.raises(BadOption):
            call()


@pytest.mark.parametrize(("num_steps", "interval", "plans"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (64, 1, 64)])
def test_calls_of_the_big_model(num_steps, interval, plans):
    assert num_plans(num_steps, interval) == plans == len(range(0, num_steps, interval))


def test_no_plans_without_an_interval():
    for steps, interval in ((-1, 4), (4, 0)):
        with pytest.raises(BadOption):
            num_plans(steps, interval)


@pytest.mark.parametrize(
    "options",
    [
        {"width": 0},
        {"width": 30, "num_heads": 4},
        {"width": True},
        {"width": 64.0},
        {"num_heads": 1000},
        {"frame_size": (56, 50)},
        {"frame_size": (56,)},
        {"frame_size": 56},
        {"patch_size": 0},
        {"num_actions": ()},
        {"num_actions": (7, 0)},
        {"levels": (8, 1)},
        {"levels": (2, 8), "fsq_variant": "pypi"},
        {"fsq_variant": "torch"},
        {"summary": "mean"},
        {"trunk_length": 0},
        {"replan_interval": 0},
        {"encoder_sees_actions": 1},
        {"decoder_sees_previous_action": None},
    ],
)
def test_options_that_are_refused(options):
    with pytest.raises(BadOption):
        BehaviourConfig(**options)


def test_defaults_are_the_papers():
    config = BehaviourConfig()
    assert config.levels == (8, 8, 8, 6, 5) and (config.trunk_length, config.replan_interval) == (128, 32)
    assert not config.encoder_sees_actions and not config.decoder_sees_previous_action
    assert config.summary == "vector" and config.fsq.num_codes == 15360
