"""`tokensieve vla collect|tokenise|train|rollout`: behaviour tokens on BabyAI levels, from nothing to a video."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokensieve.commands.output import print_json
from tokensieve.errors import BadOption

RANDOM, SMALL, CLONING = "random", "small", "cloning"
CONTROLS = ("none", "instructions", "codes")
VIDEO_EPISODES = 6
SMALL_LR, VLM_LR = 1e-3, 1.4e-5  # the latter is the paper's


def collect(options) -> int:
    """Episodes of the bot that comes with minigrid."""
    from tokensieve.datasets.trajectories import generate_episodes, write_episodes

    out = _new_file(options.out, ".npz")
    with _progress("episodes", disable=options.json) as progress:
        episodes = generate_episodes(
            options.level,
            options.episodes,
            split=options.split,
            first=options.first,
            noise=options.noise,
            num_workers=options.workers,
            progress=progress,
        )
    write_episodes(out, episodes)
    facts = {"data": str(out), "episodes": len(episodes), "steps": len(episodes.grids)}
    return _tell(options, facts, f"{len(episodes)} episodes with {facts['steps']} steps are in {out}")


def tokenise(options) -> int:
    """Trains a behaviour tokeniser."""
    from tokensieve.datasets.trajectories import read_episodes
    from tokensieve.vla.recipe import babyai_config, train_tokeniser

    out = _new_folder(options.out)
    config = babyai_config(
        levels=tuple(options.levels), trunk_length=options.trunk_length, replan_interval=options.replan
    )
    training = _training(options, out, options.lr)
    tokeniser, metrics = train_tokeniser(read_episodes(options.data), config, training)
    tokeniser.save_pretrained(out)
    facts = {"tokeniser": str(out), "steps": options.steps, "metrics": metrics}
    return _tell(options, facts, f"The behaviour tokeniser is in {out}: use it with --tokeniser {out}")


def train(options) -> int:
    """Trains a planner, or the baseline without one."""
    from tokensieve.datasets.trajectories import read_episodes
    from tokensieve.vla.cloning import CloningConfig
    from tokensieve.vla.recipe import train_cloning, train_planner
    from tokensieve.vla.words import words_of

    out = _new_folder(options.out)
    is_vlm = options.model not in (SMALL, CLONING)
    lr = (VLM_LR if is_vlm else SMALL_LR) if options.lr is None else options.lr
    training = _training(options, out, lr)
    _check_train(options, is_vlm)
    episodes = read_episodes(options.data)
    if options.model == CLONING:
        config = CloningConfig(words=words_of(episodes.missions.tolist()))
        made, metrics = train_cloning(episodes, config, training)
    else:
        tokeniser = _tokeniser(options.tokeniser)
        make = _vlm_planner if is_vlm else _small_planner
        made = make(options, tokeniser, words_of(episodes.missions.tolist()))
        keeps = () if len(options.keep) == 1 else tuple(options.keep)
        with _progress("windows", disable=options.json) as progress:
            metrics = train_planner(made, episodes, tokeniser, training, keeps=keeps, progress=progress)
    made.save_pretrained(out)
    facts = {"planner": str(out), "steps": options.steps, "metrics": metrics}
    return _tell(options, facts, f"The model is in {out}: use it with --planner {out}")


def rollout(options) -> int:
    """Lets an agent act in worlds of the test split."""
    from tokensieve.vla.rollout import roll_out, summarise

    video = None if options.video is None else _new_file(options.video, ".mp4", may_exist=True)
    if options.control not in CONTROLS:
        raise BadOption(f"--control must be one of {', '.join(CONTROLS)}, got {options.control!r}.")
    agent, levels = _agent(options)
    with _progress("episodes", disable=options.json) as progress:
        traces = roll_out(
            agent,
            options.level,
            options.episodes,
            max_steps=options.max_steps,
            batch=options.batch,
            shuffle_instructions=options.control == "instructions",
            seed=options.seed,
            progress=progress,
        )
    facts = summarise(traces)
    if video is not None:
        from tokensieve.vla.episode_video import write_episodes_video

        write_episodes_video(video, traces[:VIDEO_EPISODES], levels)
        facts["video"] = str(video)
    text = (
        f"{100 * facts['success']:.1f} % of {facts['episodes']} episodes succeeded "
        f"({100 * facts['low']:.1f}–{100 * facts['high']:.1f}), {facts['calls_per_step']:.2f} calls of the model a step"
    )
    return _tell(options, facts, text if video is None else f"{text}. The first {VIDEO_EPISODES} are in {video}")


def _check_train(options, is_vlm: bool) -> None:
    if options.model == CLONING:
        if options.tokeniser or options.method or options.start or options.visual != "resampled":
            raise BadOption("--tokeniser, --visual, --start and --method are for planners; cloning has none.")
        return
    if options.tokeniser is None:
        raise BadOption("A planner learns the codes of a behaviour tokeniser.", hint="Add --tokeniser DIR.")
    if options.method is None and options.keep != [1.0]:
        raise BadOption("--keep needs a method that drops tokens.", hint="Add --method norm-diversity.")
    if is_vlm and len(options.keep) > 1:
        raise BadOption("Budgets are drawn for the small planner only; give a VLM one.")
    if is_vlm and (options.visual != "resampled" or options.start):
        raise BadOption("--visual and --start are for the small planner; a VLM has its own tokens and weights.")


def _small_planner(options, tokeniser, words):
    from tokensieve.vla.planner import Planner
    from tokensieve.vla.planner_config import PlannerConfig

    config = PlannerConfig(
        words=words,
        levels=tokeniser.config.levels,
        visual=options.visual,
        memory=tuple(lag for lag in options.memory if lag != 0),
        method=options.method,
        keep=options.keep[0],
    )
    made = Planner(config, seed=options.seed)
    if options.start is not None:
        made.start_from(Planner.from_pretrained(options.start))
    return made.compress(options.method, options.keep[0], seed=options.seed)


def _vlm_planner(options, tokeniser, words):
    from tokensieve.pipeline.loader import load
    from tokensieve.vla.vlm_planner import VLMPlanner

    vlm = load(options.model, dtype="float32")
    if options.method is not None:
        vlm.compress(options.method, options.keep[0], seed=options.seed)
    return VLMPlanner(vlm, tokeniser.config.levels, seed=options.seed)


def _agent(options):
    """Who acts, and the levels of its code or None."""
    from tokensieve.vla.agents import BehaviourAgent, CloningAgent, RandomAgent
    from tokensieve.vla.cloning import CloningPolicy
    from tokensieve.vla.vlm_planner import VLMPlanner

    made = None if options.planner == RANDOM else _planner(options.planner)
    if made is None or isinstance(made, CloningPolicy):
        if options.tokeniser or options.replan or options.method or options.control == "codes":
            raise BadOption("--tokeniser, --replan, --method and --control codes are for planners.")
        if made is None:
            return RandomAgent(seed=options.seed), None
        return CloningAgent(made, greedy=options.greedy, seed=options.seed), None
    if options.tokeniser is None:
        raise BadOption("A planner's codes are acted on by a behaviour tokeniser.", hint="Add --tokeniser DIR.")
    if options.method is None and options.keep is not None:
        raise BadOption("--keep needs a method that drops tokens.", hint="Add --method norm-diversity.")
    if options.method is not None:
        compressed = made.vlm if isinstance(made, VLMPlanner) else made
        compressed.compress(options.method, 0.25 if options.keep is None else options.keep, seed=options.seed)
    agent = BehaviourAgent(
        made,
        _tokeniser(options.tokeniser),
        options.replan,
        shuffle_codes=options.control == "codes",
        greedy=options.greedy,
        seed=options.seed,
    )
    return agent, made.levels


def _planner(name: str):
    """A policy of ours, or a VLM with behaviour tokens."""
    from tokensieve.policies.checkpoint import load_policy
    from tokensieve.vla.cloning import CloningPolicy
    from tokensieve.vla.planner import Planner
    from tokensieve.vla.vlm_planner import VLMPlanner

    if (Path(name) / "tokenizer_config.json").is_file():
        return VLMPlanner.from_pretrained(name)
    made = load_policy(name)
    if not isinstance(made, Planner | CloningPolicy):
        raise BadOption(f"{name!r} holds a {type(made).__name__}, no planner.", hint="Give the --out of `vla train`.")
    return made


def _tokeniser(name: str):
    from tokensieve.vla.tokeniser import BehaviourTokeniser

    return BehaviourTokeniser.from_pretrained(name)


def _training(options, out: Path, lr: float):
    from tokensieve.vla.recipe import Training

    return Training(
        steps=options.steps,
        batch=options.batch,
        lr=lr,
        warmup_steps=min(100, options.steps // 10),
        seed=options.seed,
        logs=out,
        show_progress=not options.json,
    )


def _new_folder(name: str) -> Path:
    out = Path(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadOption(f"{name!r} exists already.", hint="Choose another --out.")
    return out


def _new_file(name: str, suffix: str, may_exist: bool = False) -> Path:
    path = Path(name)
    if path.suffix != suffix or not path.absolute().parent.is_dir():
        raise BadOption(f"Need a file *{suffix} in a folder that exists, got {name!r}.")
    if path.exists() and not (may_exist and path.is_file()):
        raise BadOption(f"{name!r} exists already.", hint="Choose another name.")
    return path


def _tell(options, facts: dict[str, object], text: str) -> int:
    if options.json:
        print_json(facts)
    else:
        print(text)
    return 0


@contextmanager
def _progress(what: str, disable: bool) -> Iterator[Callable[[int, int], None]]:
    """Yields a callback (done, all) that moves a bar on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=disable) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
