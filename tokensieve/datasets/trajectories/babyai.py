"""Expert episodes of BabyAI levels, made by the bot that comes with minigrid (extra `vla`).

BabyAI: A Platform to Study the Sample Efficiency of Grounded Language Learning, Chevalier-Boisvert and others,
arXiv 1810.08272, in the implementation of minigrid 3. Worlds follow from their seeds alone, and the three splits draw
theirs from ranges that don't meet; what comes out does not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from tokensieve.datasets.sampling import whole
from tokensieve.datasets.trajectories.episodes import ACTIONS, Episodes
from tokensieve.datasets.trajectories.tiles import missing_minigrid
from tokensieve.errors import BadOption

SPLIT_SEEDS = {
    "train": range(1_000_000, 5_000_000),
    "val": range(5_000_000, 9_000_000),
    "test": range(9_000_000, 13_000_000),
}
_DONE = ACTIONS.index("done")
_PER_TASK = 50  # episodes a process makes at once

Progress = Callable[[int, int], None]
"""Called as progress(num_done, num_episodes) as episodes are made or given up."""


def generate_episodes(
    levels: str | Sequence[str],
    num_episodes: int,
    *,
    split: str = "train",
    first: int = 0,
    noise: float = 0.0,
    num_workers: int = 1,
    progress: Progress | None = None,
) -> Episodes:
    """Let the bot solve worlds and keep what it saw and did.

    World k of a split has the seed `SPLIT_SEEDS[split][k]` and the level `levels[k % len(levels)]`. Episodes that the
    bot does not finish in the level's own number of steps are left out: fewer than `num_episodes` may come back.

    Args:
        levels: Names such as "BabyAI-GoToRedBall-v0".
        num_episodes: Worlds to try.
        split: "train", "val" or "test".
        first: Leave out so many worlds of the split.
        noise: With this probability a random action is taken instead; the label stays the bot's.
        num_workers: Processes. More than one needs the usual `if __name__ == "__main__":` in a script.
        progress: Told how many worlds are done.

    Raises:
        BadOption: an unknown level or split, numbers out of range, or no episode that succeeded.
        MissingBackend: minigrid is not installed.
    """
    levels = (levels,) if isinstance(levels, str) else tuple(levels)
    num_episodes, first = whole("num_episodes", num_episodes, least=1), whole("first", first, least=0)
    num_workers = whole("num_workers", num_workers, least=1)
    if not levels:
        raise BadOption("levels must name at least one level.")
    if split not in SPLIT_SEEDS:
        raise BadOption(f"split must be one of {', '.join(SPLIT_SEEDS)}, got {split!r}.")
    if first + num_episodes > len(SPLIT_SEEDS[split]):
        raise BadOption(
            f"The split {split!r} has {len(SPLIT_SEEDS[split])} worlds; {first} + {num_episodes} are asked for."
        )
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise <= 1:
        raise BadOption(f"noise must be a probability from 0 to 1, got {noise!r}.")
    for level in levels:
        make_level(level)  # so that a wrong name is told here and not by a process

    worlds = [(levels[k % len(levels)], SPLIT_SEEDS[split][k]) for k in range(first, first + num_episodes)]
    tasks = [(worlds[k : k + _PER_TASK], float(noise)) for k in range(0, num_episodes, _PER_TASK)]
    parts, num_done = [], 0
    for (task, _), part in zip(tasks, _results(tasks, num_workers), strict=True):
        num_done += len(task)
        if part is not None:
            parts.append(part)
        if progress is not None:
            progress(num_done, num_episodes)
    if not parts:
        raise BadOption(f"The bot solved none of {num_episodes} worlds of {', '.join(levels)}.", "Choose other levels.")
    return Episodes.join(parts)


def make_level(level: str):
    """The bare minigrid environment of a BabyAI level; reset it within `quiet()`.

    Raises:
        BadOption: no such level.
        MissingBackend: minigrid is not installed.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame, which comes with it, must not look for a screen
    try:
        import gymnasium
        import minigrid  # noqa: F401  registers its levels
    except ImportError:
        raise missing_minigrid() from None
    if not isinstance(level, str) or not level.startswith("BabyAI-") or level not in gymnasium.registry:
        known = sorted(name for name in gymnasium.registry if name.startswith("BabyAI-"))
        raise BadOption(f"There is no BabyAI level {level!r}.", f"There are {len(known)}, such as {known[0]}.")
    with quiet():
        return gymnasium.make(level, disable_env_checker=True).unwrapped


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Levels print to the standard output when they throw a world away."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def expert_episode(env, level: str, seed: int, noise: float = 0.0) -> Episodes | None:
    """One episode of the bot, or None where it does not succeed.

    Args:
        env: Of `make_level(level)`.
        level: Its name.
        seed: Of the world, and of the noise.
        noise: Probability of a random action in place of the bot's.
    """
    from minigrid.utils.baby_ai_bot import BabyAIBot

    rng = np.random.default_rng(seed)
    grids, labels, taken = [], [], []
    with quiet():
        observed, _ = env.reset(seed=seed)
        bot, action, reward, is_over = BabyAIBot(env), None, 0.0, False
        while not is_over:
            try:
                label = int(bot.replan(action))
            except Exception:  # it meets states that it was not written for, mostly as failed assertions
                return None
            if label == _DONE:  # it thinks that all is done, and the level does not
                return None
            is_random = noise > 0 and rng.random() < noise
            action = int(rng.integers(len(ACTIONS))) if is_random else label
            grids.append(observed["image"])
            labels.append(label)
            taken.append(action)
            observed, reward, terminated, truncated, _ = env.step(action)
            is_over = terminated or truncated
    if reward <= 0:
        return None
    return Episodes(
        grids=np.stack(grids),
        actions=np.array(labels, dtype=np.uint8),
        taken=np.array(taken, dtype=np.uint8),
        starts=np.array([0, len(grids)], dtype=np.int64),
        seeds=np.array([seed], dtype=np.int64),
        levels=np.array([level]),
        missions=np.array([observed["mission"]]),
    )


def _results(tasks: list, num_workers: int) -> Iterator[Episodes | None]:
    if num_workers == 1:
        yield from map(_make, tasks)
        return
    with ProcessPoolExecutor(min(num_workers, len(tasks)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(_make, tasks)


def _make(task: tuple[list[tuple[str, int]], float]) -> Episodes | None:
    worlds, noise = task
    envs = {level: make_level(level) for level in {level for level, _ in worlds}}
    made = [expert_episode(envs[level], level, seed, noise) for level, seed in worlds]
    made = [episode for episode in made if episode is not None]
    return Episodes.join(made) if made else None
