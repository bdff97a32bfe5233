"""Behaviour tokens on BabyAI levels: success against calls of the big model, and with fewer visual tokens.

    python benchmarks/babyai.py --folder runs/babyai --out docs/benchmarks/babyai.md      # 1.5 hours on one core
    python benchmarks/babyai.py --folder runs/babyai-smoke --smoke                        # minutes; says nothing

What is in the folder already is left alone, so that a stopped run goes on where it was; another set of options needs
another folder. `--only 1` does one seed and makes no table, so that seeds can run side by side.

One seed trains a tokeniser, a planner (4 resampled tokens), a cloning policy and, beginning with the planner's weights,
a planner that reads patches, at first all 49, then with budgets drawn for every step. All learn from the same episodes
of the bot and act in the same worlds of the test split, for at most 24 steps unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from tokensieve.datasets.trajectories import Episodes, generate_episodes, read_episodes, write_episodes
from tokensieve.errors import BadOption
from tokensieve.pipeline.machine import processor_name
from tokensieve.vla import (
    BehaviourAgent,
    BehaviourTokeniser,
    CloningAgent,
    CloningConfig,
    CloningPolicy,
    Planner,
    PlannerConfig,
    RandomAgent,
    Training,
    babyai_config,
    roll_out,
    summarise,
    train_cloning,
    train_planner,
    train_tokeniser,
    wilson,
    words_of,
)

KEEPS = (49, 24, 12, 4)
METHODS = ("uniform", "random", "norm-diversity", "divprune")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The sizes of a run: kept in the folder, and compared when it is gone on with."""

    levels: tuple[str, ...] = ("BabyAI-ActionObjDoor-v0",)
    max_steps: int = 24
    episodes: int = 20_000
    trunk_length: int = 4
    tokeniser_steps: int = 900
    planner_steps: int = 4000
    patches_steps: int = 1300
    memory: tuple[int, ...] = (4, 8, 12)
    budget_steps: int = 700
    cloning_steps: int = 2200
    batch: int = 128
    rollouts: int = 300
    seeds: int = 3
    intervals: tuple[int, ...] = (1, 2, 3, 4, 8, 16)
    compressed_interval: int = 4
    patches: bool = True


SMOKE = Setup(
    episodes=300,
    tokeniser_steps=20,
    planner_steps=20,
    patches_steps=20,
    budget_steps=20,
    cloning_steps=20,
    batch=32,
    rollouts=12,
    seeds=1,
)


def check_folder(folder: Path, setup: Setup) -> None:
    """Writes `setup.json`, or refuses a folder of another set-up."""
    folder.mkdir(parents=True, exist_ok=True)
    # More seeds and intervals may follow later.
    sizes = {name: value for name, value in asdict(setup).items() if name not in ("seeds", "intervals")}
    path, text = folder / "setup.json", json.dumps(sizes, indent=2)
    if path.exists() and path.read_text() != text:
        raise BadOption(f"{str(folder)!r} holds a run of another set-up.", hint="Choose another --folder.")
    path.write_text(text)


def episodes_of(folder: Path, setup: Setup) -> Episodes:
    path = folder / "data.npz"
    if not path.exists():
        print("episodes ...", flush=True)
        workers = os.cpu_count() or 1
        write_episodes(path, generate_episodes(setup.levels, setup.episodes, num_workers=workers))
    return read_episodes(path)


def trained(folder: Path, name: str, make: Callable[[Path], tuple[object, dict[str, float]]]) -> None:
    """Leaves a model in `folder/name` with its metrics and seconds, unless it is there."""
    out = folder / name
    if (out / "metrics.json").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    print(f"{out} ...", flush=True)
    start = time.process_time()
    model, metrics = make(out)
    model.save_pretrained(out)
    facts = {"cpu_seconds": time.process_time() - start, **metrics}
    (out / "metrics.json").write_text(json.dumps(facts, indent=2))


def train_seed(folder: Path, episodes: Episodes, setup: Setup, seed: int) -> None:
    """All models of one seed."""
    words = words_of(episodes.missions.tolist())

    def training(steps: int, logs: Path) -> Training:
        return Training(steps=steps, batch=setup.batch, seed=seed, warmup_steps=min(100, steps // 10), logs=logs)

    def tokeniser(out: Path):
        config = babyai_config(trunk_length=setup.trunk_length)
        return train_tokeniser(episodes, config, training(setup.tokeniser_steps, out))

    def planner(visual: str, out: Path):
        tok = BehaviourTokeniser.from_pretrained(folder / "tokeniser")
        config = PlannerConfig(words=words, levels=tok.config.levels, visual=visual, memory=setup.memory)
        model, steps = Planner(config, seed=seed), setup.planner_steps
        if visual == "patches":
            model, steps = model.start_from(Planner.from_pretrained(folder / "resampled")), setup.patches_steps
        return model, train_planner(model, episodes, tok, training(steps, out))

    def with_budgets(out: Path):
        tok = BehaviourTokeniser.from_pretrained(folder / "tokeniser")
        model = Planner.from_pretrained(folder / "patches-all").compress("random", KEEPS[0], seed=seed)
        return model, train_planner(model, episodes, tok, training(setup.budget_steps, out), keeps=KEEPS)

    def cloning(out: Path):
        return train_cloning(episodes, CloningConfig(words=words), training(setup.cloning_steps, out))

    trained(folder, "tokeniser", tokeniser)
    trained(folder, "resampled", partial(planner, "resampled"))
    trained(folder, "cloning", cloning)
    if setup.patches:
        trained(folder, "patches-all", partial(planner, "patches"))
        trained(folder, "patches", with_budgets)


def settings(setup: Setup) -> list[tuple[str, dict[str, object]]]:
    """Name and options of every roll-out of a seed."""
    found = [("random actions", {"who": "random"}), ("cloning, every step", {"who": "cloning"})]
    found += [(f"ours, N = {n}", {"who": "resampled", "interval": n}) for n in setup.intervals]
    control = setup.compressed_interval
    for what in ("codes", "instructions"):
        found.append((f"ours, N = {control}, {what} shuffled", {"who": "resampled", "interval": control, what: True}))
    if setup.patches:
        patches = {"who": "patches", "interval": control}
        found.append((f"patches, all {KEEPS[0]}", patches))
        for method in METHODS:
            for keep in KEEPS[1:]:
                found.append((f"patches, {method}, {keep}", patches | {"method": method, "keep": keep}))
    return found


def agent_of(folder: Path, options: dict[str, object], seed: int):
    if options["who"] == "random":
        return RandomAgent(seed=seed)
    if options["who"] == "cloning":
        return CloningAgent(CloningPolicy.from_pretrained(folder / "cloning"), greedy=True)
    planner = Planner.from_pretrained(folder / str(options["who"]))
    if options["who"] == "patches":
        planner.compress(options.get("method"), options.get("keep", 1.0), seed=seed)
    tokeniser = BehaviourTokeniser.from_pretrained(folder / "tokeniser")
    return BehaviourAgent(
        planner, tokeniser, options["interval"], shuffle_codes="codes" in options, greedy=True, seed=seed
    )


def evaluate_seed(folder: Path, setup: Setup, seed: int) -> None:
    """Every roll-out that `folder/results` lacks."""
    (folder / "results").mkdir(exist_ok=True)
    waiting = [(name, options, _result(folder, name)) for name, options in settings(setup)]
    waiting = [one for one in waiting if not one[2].exists()]
    for _, options, path in track(waiting, f"roll-outs, seed {seed}", console=Console(stderr=True)):
        traces = roll_out(
            agent_of(folder, options, seed),
            setup.levels,
            setup.rollouts,
            max_steps=setup.max_steps,
            shuffle_instructions="instructions" in options,
            seed=seed,
        )
        part = path.with_suffix(".part")
        part.write_text(json.dumps(summarise(traces), indent=2))
        part.replace(path)


def report(folder: Path, setup: Setup) -> str:
    """Markdown: one table of all settings, and how long trainings took."""
    head = "| agent | success, % (95 %) | seeds | calls a step | visual tokens | named cell kept, % |"
    lines = [head, "|---|---|---|---|---|---|"]
    for name, _ in settings(setup):
        found = _of_seeds(folder, setup, partial(_result, name=name))
        num = sum(one["episodes"] for one in found)
        low, high = wilson(sum(round(one["success"] * one["episodes"]) for one in found), num)
        share = sum(one["success"] * one["episodes"] for one in found) / num
        each = ", ".join(f"{100 * one['success']:.1f}" for one in found)
        cells = [name, f"**{100 * share:.1f}** ({100 * low:.1f}–{100 * high:.1f})", each, f"{_calls(found):.2f}"]
        cells += [_mean(found, "visual_tokens", ".0f"), _mean(found, "named_kept", ".1f", 100)]
        lines.append(f"| {' | '.join(cells)} |")
    times = []
    for what in ("tokeniser", "resampled", "cloning", "patches-all", "patches"):
        facts = _of_seeds(folder, setup, lambda seed, what=what: seed / what / "metrics.json")
        if not facts:
            continue
        times.append(f"{what} {sum(one['cpu_seconds'] for one in facts) / len(facts):.0f} s")
    return "\n".join(
        [
            f"{', '.join(setup.levels)}; {setup.rollouts} episodes a seed, {setup.seeds} seed(s), at most "
            f"{setup.max_steps} steps, the likeliest actions and codes; {setup.episodes} episodes of the bot to learn "
            "from. Intervals are Wilson's over episodes of all seeds; they hold nothing about the spread of trainings, "
            "which the seeds show. "
            f"CPU seconds of a seed: {', '.join(times)}. {processor_name()}, one thread, bfloat16 autocast, "
            f"torch {torch.__version__}. Named cell kept: of plans with a cell in view that holds a thing of the "
            "instruction, the share whose planner kept one.",
            "",
            *lines,
        ]
    )


def draw(folder: Path, setup: Setup, out: Path) -> None:
    """Success over calls of the big model, and over patches: a point a seed, their mean a line. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def points(name: str) -> tuple[float, list[float]]:
        """Calls a step, and success of every seed in percent."""
        found = _of_seeds(folder, setup, partial(_result, name=name))
        return _calls(found), [100 * one["success"] for one in found]

    # Okabe and Ito's palette, told apart with colour-blind eyes.
    colours = ["#0072B2", "#009E73", "#D55E00", "#E69F00"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    ours = [points(f"ours, N = {n}") for n in setup.intervals]
    left.plot([calls for calls, _ in ours], [sum(each) / len(each) for _, each in ours], color=colours[0])
    for n, (calls, each) in zip(setup.intervals, ours, strict=True):
        left.scatter([calls] * len(each), each, color=colours[0], s=14, label="behaviour tokens" if n == 1 else None)
        left.annotate(f"N = {n}", (calls, min(each)), (4, -12), textcoords="offset points", fontsize=8)
    control = setup.compressed_interval
    others = {
        "cloning": "cloning, every step",
        "instructions of another episode": f"ours, N = {control}, instructions shuffled",
        "random actions": "random actions",
    }
    for (label, name), colour, mark in zip(others.items(), colours[1:], "s^v", strict=True):
        calls, each = points(name)
        left.scatter([calls] * len(each), each, color=colour, s=22, marker=mark, label=label)
    left.set(
        xlabel="calls of the big model per step", ylabel="episodes that succeed, %", ylim=(0, 103), xlim=(-0.05, 1.1)
    )
    for method, colour in zip(METHODS, colours, strict=True):
        values = [points(f"patches, all {KEEPS[0]}")[1], *(points(f"patches, {method}, {k}")[1] for k in KEEPS[1:])]
        right.plot(KEEPS, [sum(each) / len(each) for each in values], color=colour, label=method)
        for keep, each in zip(KEEPS, values, strict=True):
            right.scatter([keep] * len(each), each, color=colour, s=14)
    right.set(xlabel=f"visual tokens of {KEEPS[0]}, a plan every {control} steps", xticks=KEEPS)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(out, dpi=110)


def _of_seeds(folder: Path, setup: Setup, file: Callable[[Path], Path]) -> list[dict]:
    """What a file says in the folder of every seed that has it."""
    paths = [file(folder / f"seed{s}") for s in range(setup.seeds)]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def _calls(found: Sequence[dict]) -> float:
    """Of the big model, per step of all episodes."""
    return sum(one["calls_per_step"] * one["steps"] for one in found) / sum(one["steps"] for one in found)


def _mean(found: Sequence[dict], name: str, form: str, factor: float = 1) -> str:
    values = [one[name] for one in found if one[name] is not None]
    return f"{factor * sum(values) / len(values):{form}}" if values else "-"


def _result(folder: Path, name: str) -> Path:
    slug = "".join(c if c.isalnum() else "-" for c in name)
    return folder / "results" / f"{slug}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/babyai"), help="of data, models and results")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--levels", nargs="+", default=Setup.levels, help="in turns; another folder for others")
    parser.add_argument("--max_steps", type=int, default=Setup.max_steps, help="more for levels of several rooms")
    parser.add_argument("--seeds", type=int, default=None, help="3, of a smoke run 1")
    parser.add_argument("--episodes", type=int, default=None, help="worlds for the bot")
    parser.add_argument("--no_patches", action="store_true", help="leave out the planner that reads patches")
    parser.add_argument("--only", type=int, default=None, help="one seed, without the table")
    parser.add_argument(
        "--out", type=Path, default=None, help="Markdown file; what stands above its conditions is kept"
    )
    parser.add_argument("--picture", type=Path, default=None, help="of the table: *.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {name: getattr(options, name) for name in ("seeds", "episodes") if getattr(options, name) is not None}
    sizes |= {"levels": tuple(options.levels), "max_steps": options.max_steps, "patches": not options.no_patches}
    setup = replace(SMOKE if options.smoke else Setup(), **sizes)
    check_folder(options.folder, setup)
    episodes = episodes_of(options.folder, setup)
    for seed in range(setup.seeds) if options.only is None else [options.only]:
        folder = options.folder / f"seed{seed}"
        train_seed(folder, episodes, setup, seed)
        evaluate_seed(folder, setup, seed)
    if options.only is not None:
        return
    if options.picture is not None:
        draw(options.folder, setup, options.picture)
    text = report(options.folder, setup)
    if options.out is None:
        print(text)
    else:
        start = f"{', '.join(setup.levels)}; "
        above = options.out.read_text().split("\n\n" + start)[0] if options.out.exists() else "# Behaviour tokens"
        options.out.write_text(f"{above}\n\n{text}\n")


if __name__ == "__main__":
    main()
