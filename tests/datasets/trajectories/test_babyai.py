"""Expert episodes of BabyAI and their pictures, against the environment itself."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
pytest.importorskip("minigrid")

from tests.datasets.trajectories.test_episodes import check_equal
from tokensieve.datasets.trajectories import generate_episodes, make_level, render_grids
from tokensieve.datasets.trajectories.babyai import SPLIT_SEEDS, expert_episode, quiet
from tokensieve.datasets.trajectories.episodes import ACTIONS
from tokensieve.datasets.trajectories.tiles import tile_ids, tile_table
from tokensieve.errors import BadOption

LEVELS = ("BabyAI-GoToLocal-v0", "BabyAI-PickupDist-v0", "BabyAI-ActionObjDoor-v0", "BabyAI-UnlockLocal-v0")


@pytest.mark.parametrize("level", [*LEVELS, "BabyAI-PutNextLocal-v0", "BabyAI-BossLevel-v0"])
def test_pictures_are_the_environments_pixel_for_pixel(level):
    from minigrid.wrappers import RGBImgPartialObsWrapper

    env = make_level(level)
    wrapped = RGBImgPartialObsWrapper(env, tile_size=8)
    rng = np.random.default_rng(0)
    grids, pictures = [], []
    with quiet():
        for seed in range(3):
            observed, _ = wrapped.reset(seed=seed)
            for _ in range(30):  # random steps pick up, carry, open and drop
                grids.append(env.gen_obs()["image"])
                pictures.append(observed["image"])
                observed, _, terminated, _, _ = wrapped.step(int(rng.choice([0, 1, 2, 2, 2, 3, 4, 5])))
                if terminated:
                    break
    grids = np.stack(grids)
    np.testing.assert_array_equal(render_grids(grids), np.stack(pictures))
    seen = set(grids.reshape(-1, 3)[:, 0].tolist())
    assert {0, 1, 2} <= seen and len(seen) > 3  # unseen, empty, wall and things


def test_a_linear_layer_on_patches_is_a_look_up():
    grids = generate_episodes(LEVELS[2], 3).grids
    weight = np.random.default_rng(0).normal(size=(8 * 8 * 3, 5))
    pictures = render_grids(grids).reshape(-1, 7, 8, 7, 8, 3).swapaxes(2, 3).reshape(-1, 7, 7, 8 * 8 * 3)
    looked_up = (tile_table().reshape(-1, 8 * 8 * 3) @ weight)[tile_ids(grids)]
    np.testing.assert_allclose(looked_up, pictures @ weight)


def test_replaying_the_actions_solves_the_mission():
    episodes = generate_episodes(LEVELS, 12)
    assert len(episodes) == 12 and episodes.levels.tolist() == list(LEVELS) * 3
    np.testing.assert_array_equal(episodes.seeds, np.arange(12) + SPLIT_SEEDS["train"].start)
    np.testing.assert_array_equal(episodes.actions, episodes.taken)
    for trajectory, level, seed in zip(episodes, episodes.levels, episodes.seeds, strict=True):
        env, reward = make_level(str(level)), 0.0
        with quiet():
            observed, _ = env.reset(seed=int(seed))
            assert trajectory.instruction == observed["mission"]
            for grid, action in zip(trajectory.info["grid"], trajectory.actions["action"], strict=True):
                np.testing.assert_array_equal(grid, observed["image"])
                assert reward == 0
                observed, reward, terminated, _, _ = env.step(int(action))
        assert terminated and reward > 0
    assert trajectory.frames().shape == (len(trajectory), 56, 56, 3)
    assert [env.actions(k).name for k in range(7)] == list(ACTIONS)


def test_noise_disturbs_what_is_done_but_not_the_label():
    clean, noisy = generate_episodes(LEVELS[2], 40), generate_episodes(LEVELS[2], 40, noise=0.3)
    disturbed = (noisy.actions != noisy.taken).mean()
    assert 0.15 < disturbed < 0.35  # a random action is the bot's own in one of seven cases
    assert len(noisy.actions) / len(noisy) > len(clean.actions) / len(clean)
    check_equal(noisy, generate_episodes(LEVELS[2], 40, noise=0.3))  # the same again
    trajectory = noisy[0]
    env, reward = make_level(LEVELS[2]), 0.0
    with quiet():
        observed, _ = env.reset(seed=int(noisy.seeds[0]))
        for grid, action in zip(trajectory.info["grid"], trajectory.actions["taken"], strict=True):
            np.testing.assert_array_equal(grid, observed["image"])
            observed, reward, _, _, _ = env.step(int(action))
    assert reward > 0


def test_processes_make_the_same_episodes_and_say_how_far_they_are():
    heard = {1: [], 2: []}
    made = {
        n: generate_episodes(LEVELS[:2], 120, num_workers=n, progress=lambda *now, n=n: heard[n].append(now))
        for n in heard
    }
    check_equal(made[1], made[2])
    assert heard[1] == heard[2] == [(50, 120), (100, 120), (120, 120)]


def test_splits_share_no_world_and_can_be_made_in_parts():
    ranges = sorted(SPLIT_SEEDS.values(), key=lambda seeds: seeds.start)
    assert all(one.stop <= next_one.start for one, next_one in zip(ranges, ranges[1:], strict=False))
    whole, later = generate_episodes(LEVELS[:2], 8), generate_episodes(LEVELS[:2], 5, first=3)
    np.testing.assert_array_equal(whole.seeds[3:], later.seeds)
    np.testing.assert_array_equal(whole.levels[3:], later.levels)
    np.testing.assert_array_equal(whole[7].info["grid"], later[4].info["grid"])
    assert generate_episodes(LEVELS[0], 1, split="test").seeds[0] in SPLIT_SEEDS["test"]


def test_a_bot_that_fails_leaves_no_episode(monkeypatch):
    from minigrid.utils import baby_ai_bot

    env = make_level(LEVELS[0])
    assert expert_episode(env, LEVELS[0], 1) is not None
    original = env.reset
    monkeypatch.setattr(env, "reset", lambda **k: (original(**k), setattr(env, "max_steps", 1))[0])
    assert expert_episode(env, LEVELS[0], 1) is None  # out of time
    for result in (lambda self, action: 1 / 0, lambda self, action: 6):
        monkeypatch.setattr(baby_ai_bot.BabyAIBot, "replan", result)
        assert expert_episode(make_level(LEVELS[0]), LEVELS[0], 1) is None
        with pytest.raises(BadOption, match="solved none of 2"):
            generate_episodes(LEVELS[0], 2)


def test_nothing_is_printed(capfd):
    generate_episodes("BabyAI-PutNextLocal-v0", 15)  # rejects worlds
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("level", "options", "words"),
    [
        ("BabyAI-None-v0", {}, "no BabyAI level 'BabyAI-None-v0'. There are"),
        ("CartPole-v1", {}, "no BabyAI level"),
        ((), {}, "at least one"),
        (LEVELS[0], {"split": "dev"}, "train, val, test"),
        (LEVELS[0], {"noise": 1.5}, "probability"),
        (LEVELS[0], {"noise": None}, "probability"),
        (LEVELS[0], {"first": -1}, "first"),
        (LEVELS[0], {"first": 4_000_000}, "has 4000000 worlds"),
        (LEVELS[0], {"num_workers": 0}, "num_workers"),
    ],
)
def test_options_that_are_refused(level, options, words):
    with pytest.raises(BadOption, match=words):
        generate_episodes(level, 1, **options)


def test_without_minigrid_one_is_told_what_to_install():
    code = """
import sys
sys.modules["minigrid"] = sys.modules["gymnasium"] = None
import numpy as np
from tokensieve.datasets.trajectories import make_level, render_grids
from tokensieve.errors import MissingBackend
for call in (lambda: make_level("BabyAI-GoToLocal-v0"), lambda: render_grids(np.zeros((7, 7, 3), np.uint8))):
    try:
        call()
    except MissingBackend as error:
        assert "tokensieve[vla]" in str(error)
    else:
        raise SystemExit(1)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
