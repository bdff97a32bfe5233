"""Roll-outs in BabyAI worlds: the plan-act loop over batches of environments, and what came of it.

Worlds are those of the test split, whose seeds no training episode has. An episode ends when the level says so, or
after `max_steps`, which counts as a failure.
"""

# Shape legend: B episodes of a batch, A of them that still run, S steps of an episode, d digits of a code, P patches

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tokensieve.datasets.sampling import whole
from tokensieve.datasets.trajectories.babyai import SPLIT_SEEDS, make_level, quiet
from tokensieve.datasets.trajectories.tiles import render_grids
from tokensieve.errors import BadOption
from tokensieve.pipeline.evaluation.statistics import wilson
from tokensieve.vla.agents import Agent, Step, cycle
from tokensieve.vla.targets import named_cells

SPLIT = "test"


@dataclass(kw_only=True, eq=False)
class EpisodeTrace:
    """What happened in one episode.

    Attributes:
        level, seed: of the world.
        instruction: what the world asks for.
        told: what the agent was told; another one in a control.
        success: whether the level says that it was done.
        num_calls: of the big model.
        named_in_view: plans that were made with a thing in view that the instruction names.
        named_kept: those of them whose planner kept at least one such cell as a token; None where tokens are no cells.
        visual_tokens: that the planner read, one entry a plan.
        grids: `[7, 7, 3]` uint8, one a step, what was seen before it.
        actions: one a step.
        digits: `[d]` int64, one a step, the code that was carried out; empty where there are none.
        kept: one a step: `[P]` bool, what the plan made at this step saw; None where none was, or tokens are no cells.
    """

    level: str
    seed: int
    instruction: str
    told: str
    success: bool = False
    num_calls: int = 0
    named_in_view: int = 0
    named_kept: int | None = None
    visual_tokens: list[float] = field(default_factory=list)
    grids: list[np.ndarray] = field(default_factory=list)
    actions: list[int] = field(default_factory=list)
    digits: list[np.ndarray] = field(default_factory=list)
    kept: list[np.ndarray | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.actions)


def roll_out(
    agent: Agent,
    levels: str | Sequence[str],
    num_episodes: int,
    *,
    max_steps: int | None = None,
    first: int = 0,
    batch: int = 64,
    shuffle_instructions: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[EpisodeTrace]:
    """Lets an agent act in `num_episodes` worlds; world k has level `levels[k % len(levels)]`.

    Args:
        agent: who acts.
        levels: names such as "BabyAI-ActionObjDoor-v0".
        num_episodes: worlds of the test split.
        max_steps: after which an episode has failed; None for the level's own number.
        first: leave out so many worlds.
        batch: environments at once; draws of actions, not worlds, depend on it.
        shuffle_instructions: control: every episode's agent is told the instruction of another one of its batch.
        seed: of the shuffle.
        progress: called as progress(num_done, num_episodes).

    Raises:
        BadOption: an unknown level, or numbers out of range.
        MissingBackend: minigrid is not installed.
    """
    levels = (levels,) if isinstance(levels, str) else tuple(levels)
    num_episodes, first = whole("num_episodes", num_episodes, least=1), whole("first", first, least=0)
    batch, seeds = whole("batch", batch, least=1), SPLIT_SEEDS[SPLIT]
    if max_steps is not None:
        whole("max_steps", max_steps, least=1)
    if not levels or first + num_episodes > len(seeds):
        raise BadOption(f"Need at least one level and at most {len(seeds)} worlds, got {first} + {num_episodes}.")
    envs: dict[tuple[int, str], object] = {}  # by place in the batch and level, used again by later batches
    traces: list[EpisodeTrace] = []
    for start in range(first, first + num_episodes, batch):
        worlds = range(start, min(start + batch, first + num_episodes))
        pairs = []
        for place, k in enumerate(worlds):
            level = levels[k % len(levels)]
            if (place, level) not in envs:
                envs[place, level] = make_level(level)
            pairs.append((level, envs[place, level]))
        traces += _roll_batch(agent, pairs, [seeds[k] for k in worlds], max_steps, shuffle_instructions, seed + start)
        if progress is not None:
            progress(len(traces), num_episodes)
    return traces


def _roll_batch(agent, pairs, seeds, max_steps, shuffle_instructions: bool, shuffle_seed: int) -> list[EpisodeTrace]:
    traces, grids = [], []
    with quiet():
        for (level, env), seed in zip(pairs, seeds, strict=True):
            observed, _ = env.reset(seed=seed)
            grids.append(observed["image"])
            traces.append(EpisodeTrace(level=level, seed=seed, instruction=observed["mission"], told=""))
        told = cycle(len(traces), shuffle_seed).tolist() if shuffle_instructions else range(len(traces))
        for trace, source in zip(traces, told, strict=True):
            trace.told = traces[source].instruction
        agent.begin([trace.told for trace in traces])
        rows = list(range(len(traces)))
        while rows:
            seen_A773 = np.stack([grids[row] for row in rows])
            step = agent.act(torch.from_numpy(render_grids(seen_A773)), torch.tensor(rows))
            _record(step, [traces[row] for row in rows], seen_A773)
            left = []
            for row, action in zip(rows, step.actions.tolist(), strict=True):
                observed, reward, terminated, truncated, _ = pairs[row][1].step(action)
                grids[row] = observed["image"]
                traces[row].success = bool(terminated and reward > 0)
                out_of_time = max_steps is not None and len(traces[row]) >= max_steps
                if not (terminated or truncated or out_of_time):
                    left.append(row)
            rows = left
    return traces


def _record(step: Step, traces: Sequence[EpisodeTrace], seen_A773: np.ndarray) -> None:
    planned = step.planned
    kept_AP = None if planned is None or planned.kept is None else planned.kept.cpu().numpy()
    for i, trace in enumerate(traces):
        trace.num_calls += step.num_calls
        trace.grids.append(seen_A773[i])
        trace.actions.append(int(step.actions[i]))
        if step.digits is not None:
            trace.digits.append(step.digits[i].numpy())
        if planned is not None:
            trace.visual_tokens.append(planned.num_visual)
        trace.kept.append(None if kept_AP is None else kept_AP[i])
    if planned is None:
        return
    named_AP = named_cells([trace.told for trace in traces], seen_A773).reshape(len(traces), -1)
    for i, trace in enumerate(traces):
        trace.named_in_view += int(named_AP[i].any())
        if kept_AP is not None:
            trace.named_kept = (trace.named_kept or 0) + int((named_AP[i] & kept_AP[i]).any())


def summarise(traces: Sequence[EpisodeTrace]) -> dict[str, object]:
    """Success with its interval, calls and visual tokens of some episodes, as JSON can hold them.

    `success_by_verb` groups episodes by the first two words of their instruction ("go to", "pick up", "open the").
    `calls_per_step` is calls over steps of all episodes. `named_kept` is the share, of the plans that were made with a
    named thing in view, whose planner kept at least one of its cells; None where there is none.
    """
    num_right = sum(trace.success for trace in traces)
    low, high = wilson(num_right, len(traces))
    by_verb = defaultdict(list)
    for trace in traces:
        by_verb[" ".join(trace.instruction.split()[:2])].append(trace.success)
    num_steps, in_view = sum(map(len, traces)), sum(trace.named_in_view for trace in traces)
    kept = [trace.named_kept for trace in traces if trace.named_kept is not None]
    visual = [count for trace in traces for count in trace.visual_tokens]
    lengths = [len(trace) for trace in traces if trace.success]
    return {
        "episodes": len(traces),
        "success": num_right / len(traces),
        "low": low,
        "high": high,
        "calls_per_step": sum(trace.num_calls for trace in traces) / num_steps,
        "steps": num_steps,
        "mean_steps_of_successes": sum(lengths) / len(lengths) if lengths else None,
        "visual_tokens": sum(visual) / len(visual) if visual else None,
        "plans": len(visual),
        "named_in_view": in_view,
        "named_kept": sum(kept) / in_view if kept and in_view else None,
        "success_by_verb": {
            verb: {"episodes": len(found), "success": sum(found) / len(found)}
            for verb, found in sorted(by_verb.items())
        },
    }
