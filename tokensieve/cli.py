"""The command line: names and options only; each command is one call into a room.

Parsers are built for the command that was asked for and nothing heavy is imported before it runs, so that
`tokensieve --help` answers at once.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser, Namespace

from tokensieve import __version__
from tokensieve.errors import BadOption, TokensieveError

INTERRUPTED = 130


class Command(NamedTuple):
    help: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 fine, 1 failed, 2 wrong option, 3 a medium could not be used, 4 a model could not be used,
    130 interrupted. With several media the others are still done and the code is that of the last failure.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    words = [word for word in argv if not word.startswith("-")]
    wanted = words[0] if words else None
    parser = build_parser(wanted)
    try:
        if wanted == "train" and words[1:2] and words[1] in POLICY_TRAINERS:
            from tokensieve.commands import train_policy

            argv.remove("train")
            argv.remove(words[1])
            return train_policy.run(words[1], argv)
        if any(word.startswith("--config") for word in argv):
            from tokensieve.commands.config_file import check_config_files

            check_config_files(argv)
        options = parser.parse_args(argv)
        if wanted is None:
            parser.print_help()
            return 0
        return _dispatch(COMMANDS, options)
    except ArgumentError as error:
        print(f"tokensieve: {error}{_suggestion(str(error), wanted)}", file=sys.stderr)
        return BadOption.exit_code
    except TokensieveError as error:
        _report(error, as_json="--json" in argv)
        return error.exit_code
    except KeyboardInterrupt:
        print("tokensieve: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `tokensieve methods | head`
        sys.stderr.close()
        return 0


def _dispatch(commands: Mapping[str, Command], options: Namespace) -> int:
    return commands[options.subcommand].run(options[options.subcommand])


def build_parser(wanted: str | None) -> ArgumentParser:
    """The parser, with the options of the wanted command only."""
    parser = ArgumentParser(
        prog="tokensieve",
        description="Vision-language models that look at fewer visual tokens and keep their answers.",
        version=__version__,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(required=False, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = ArgumentParser(description=command.help, exit_on_error=False)
        commands.add_subcommand(name, sub, help=command.help)
        if name == wanted:
            command.add_options(sub)
    return parser


def _suggestion(message: str, wanted: str | None) -> str:
    """' Did you mean --keep?' for the first unknown option in an error message."""
    given = re.search(r"--[\w.-]+", message)
    if not given or wanted not in COMMANDS:
        return ""
    sub = ArgumentParser(exit_on_error=False)
    COMMANDS[wanted].add_options(sub)
    near = difflib.get_close_matches(given.group(), [s for a in sub._actions for s in a.option_strings], n=1)
    return f" Did you mean {near[0]}?" if near and near[0] != given.group() else ""


def _report(error: TokensieveError, as_json: bool) -> None:
    if as_json:
        from tokensieve.commands.output import error_object, print_json

        print_json(error_object(error))
    else:
        print(f"tokensieve: {error}", file=sys.stderr)


def _common(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--json", action=ActionYesNo, default=False, help="one JSON object a line, for programs")


def _model(parser: ArgumentParser) -> None:
    parser.add_argument("--model", type=str, default="tiny", help="shipped model, folder or Hugging Face id")
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, cuda:1 ...; a GPU if there is one")
    parser.add_argument("--dtype", type=str, default="auto", help="auto, float32, bfloat16 or float16")
    _method(parser, default=None)
    parser.add_argument("--positions", type=str, default="preserve", help="preserve or compact")
    parser.add_argument("--seed", type=int, default=0, help="for methods that draw at random")


def _method(parser: ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--method", type=str | None, default=default, help="see `tokensieve methods`; a stack: tome,zoprune; none: all"
    )
    parser.add_argument("--policy", type=str | None, default=None, help="of cacovid: folder or hub id of a policy")
    parser.add_argument(
        "--keep",
        type=_budgets,
        default=None,
        help="share (0.25) or number (64) of tokens per clip; 0.25 by default, of an exported model its own",
    )
    parser.add_argument(
        "--options", type=dict[str, str | int | float | bool], default={}, help="of the method: --options.step 0.1"
    )


def _budgets(value: object) -> float | list[float]:
    """0.25, or `0.5,0.25` for a stack."""
    if isinstance(value, str) and "," in value:
        return [float(part) for part in value.split(",")]
    return [float(part) for part in value] if isinstance(value, list) else float(value)


class _Listed:
    """Parses `1,0.25`, a list from a file, or a single value."""

    def __init__(self, kind: type):
        self.kind = kind

    def __call__(self, value: object) -> list:
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        return [self.kind(part) for part in parts]

    def __repr__(self) -> str:  # what --help shows
        return f"{self.kind.__name__},..."


def _video(parser: ArgumentParser) -> None:
    parser.add_argument("--num_frames", type=int | None, default=None, help="frames spread over the clip; 8 by default")
    parser.add_argument("--fps", type=float | None, default=None, help="frames per second instead of a number")
    parser.add_argument("--start_s", type=float | None, default=None, help="start of the part to look at, seconds")
    parser.add_argument("--end_s", type=float | None, default=None, help="end of the part to look at, seconds")
    parser.add_argument("--backend", type=str, default="pyav", help="pyav, decord or torchcodec")


def _answer_options(parser: ArgumentParser) -> None:
    parser.add_argument("clip", nargs="+", type=str, help="videos, images or folders of frames")
    parser.add_argument("question", type=str, help="asked about every clip")
    _model(parser)
    _video(parser)
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer")
    parser.add_argument(
        "--decode", type=str, default="greedy", help="greedy, cautious, best-of, self-consistency or token-recycling"
    )
    parser.add_argument(
        "--samples", type=int | None, default=None, help="answers drawn to choose from, 8; of cautious: most trials, 10"
    )
    parser.add_argument("--temperature", type=float | None, default=None, help="of draws; 0.6, of cautious 0.8")
    parser.add_argument("--top_p", type=float | None, default=None, help="of draws; 0.9")
    parser.add_argument(
        "--matrix", type=str | None, default=None, help="of token-recycling: file to begin with, if there, and to write"
    )
    parser.add_argument(
        "--json_schema", type=str | None, default=None, help="file with a JSON schema that answers keep to"
    )
    _common(parser)


def _export_options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, required=True, help="new folder for the graphs")
    _model(parser)
    parser.add_argument(
        "--tower",
        type=str | None,
        default=None,
        help="a CLIP-like model instead: timm:NAME, transformers:ID or open_clip:ARCHITECTURE/WEIGHTS",
    )
    parser.add_argument("--precision", type=str, default="fp32", help="fp32, fp16 or int8 (weights)")
    parser.add_argument("--verify", action=ActionYesNo, default=True, help="compare every graph with PyTorch")
    _common(parser)


def _show_options(parser: ArgumentParser) -> None:
    parser.add_argument("clip", type=str, help="video, image or folder of frames")
    parser.add_argument("--out", nargs="+", type=str, default=["kept.png"], help="files to write: .png and .mp4")
    parser.add_argument("--question", type=str, default="Describe the video.", help="for methods that read it")
    _model(parser)
    parser.set_defaults(method="zoprune")
    _video(parser)
    _common(parser)


def _clips_options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, required=True, help="folder for the MP4s and manifest.jsonl")
    parser.add_argument("--split", type=str, default="test", help="train, val or test: disjoint digit images")
    parser.add_argument("--count", type=int, default=20, help="number of clips")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other clips")
    _common(parser)


def _methods_options(parser: ArgumentParser) -> None:
    parser.add_argument("--markdown", action=ActionYesNo, default=False, help="the table of docs/methods.md")
    _common(parser)


def _demo_options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, default="demo", help="folder for the clip and the picture")
    _method(parser, default="zoprune")
    _common(parser)


def _bench_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=str,
        default="tiny",
        help="llava-onevision-0.5b or -7b, llava-1.5-7b, qwen2.5-vl-3b or -7b (random weights), tiny, a folder or a "
        "Hugging Face id (weights are used where the folder has them)",
    )
    parser.add_argument(
        "--methods", type=_Listed(str), default=[], help="zoprune,fastv; a stack: tome:0.5+zoprune; all if left out"
    )
    parser.add_argument("--keep", type=_Listed(float), default=[0.25], help="budgets: 0.25,0.1")
    parser.add_argument(
        "--frames", type=_Listed(int), default=None, help="of a prompt; several (8,16,32) show how memory grows"
    )
    parser.add_argument("--batch", type=_Listed(int), default=[1], help="prompts at once: 1,4")
    parser.add_argument("--new_tokens", type=_Listed(int), default=[1, 32], help="lengths of the answer: 1,32")
    parser.add_argument("--repeats", type=int, default=5, help="measured runs of every setting, in turns")
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, cuda:1 ...; a GPU if there is one")
    parser.add_argument("--dtype", type=str, default="auto", help="float32, bfloat16 or float16; auto: by device")
    parser.add_argument("--threads", type=int | None, default=None, help="CPU threads")
    parser.add_argument("--out", type=str | None, default=None, help="folder for bench.jsonl, bench.json and bench.md")
    parser.add_argument("--dry_run", action=ActionYesNo, default=False, help="only what the sizes say; runs nothing")
    _common(parser)


def _eval_options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, required=True, help="new folder; or that of a stopped run, to go on with it")
    parser.add_argument("--model", type=str, default="tiny", help="shipped model, folder or Hugging Face id")
    parser.add_argument(
        "--methods", type=_Listed(str), default=[], help="zoprune,fastv; a stack: tome:0.5+zoprune; all if left out"
    )
    parser.add_argument("--keep", type=_Listed(float), default=[0.25], help="budgets: 0.5,0.25; all tokens always run")
    parser.add_argument(
        "--data", type=str | None, default=None, help="JSONL, CSV or Parquet, or a dataset folder; else generated clips"
    )
    parser.add_argument("--split", type=str | None, default=None, help="of generated clips (test) or a dataset folder")
    parser.add_argument("--limit", type=int | None, default=None, help="the first clips only; of generated ones 100")
    parser.add_argument(
        "--scores",
        type=_Listed(str),
        default=[],
        help="exact,contains,anls,rouge-l,choice-letter,choice-likelihood; the first is the main one",
    )
    parser.add_argument("--choices", type=str, default="listed", help="listed in the prompt with letters, or hidden")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--batch", type=int, default=8, help="prompts at once; changes no answer")
    parser.add_argument("--policy", type=str | None, default=None, help="of cacovid: folder or hub id of a policy")
    parser.add_argument(
        "--options", type=dict[str, str | int | float | bool], default={}, help="of the methods: --options.step 0.1"
    )
    parser.add_argument("--positions", type=str, default="preserve", help="preserve or compact")
    parser.add_argument("--seed", type=int, default=0, help="for methods that draw at random")
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, cuda:1 ...; a GPU if there is one")
    parser.add_argument("--dtype", type=str, default="auto", help="auto, float32, bfloat16 or float16")
    _video(parser)
    _common(parser)


def _process_options(parser: ArgumentParser) -> None:
    parser.add_argument("source", type=str, help="folder of videos, glob in quotes, or manifest (JSONL, CSV, Parquet)")
    parser.add_argument("--out", type=str, required=True, help="new folder; or that of a stopped job, to go on with it")
    parser.add_argument("--task", type=str, default="answer", help="answer, caption or features")
    parser.add_argument(
        "--question", nargs="+", type=str, default=[], help="one or more, for clips whose row has none of its own"
    )
    _model(parser)
    _video(parser)
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--feature_dtype", type=str, default="float32", help="float32 or float16, as stored")
    parser.add_argument("--batch", type=int, default=8, help="prompts at once; changes no answer")
    parser.add_argument("--engine", type=str, default="local", help="local; ray: actors, each with a model")
    parser.add_argument(
        "--address", type=str | None, default=None, help="of a Ray cluster: HOST:PORT or auto; else Ray starts here"
    )
    parser.add_argument(
        "--workers",
        type=int | None,
        default=None,
        help="decoders at once, as many as processors; of ray: in every actor, 1, with GPUs their share of processors",
    )
    parser.add_argument("--ahead_mb", type=int, default=512, help="decoded frames that may wait for the model, MiB")
    parser.add_argument("--timeout_s", type=float, default=120.0, help="longest time for decoding one file")
    parser.add_argument("--memory_mb", type=int, default=3072, help="most memory for decoding one file, MiB")
    parser.add_argument("--rows", type=int, default=256, help="most rows of a part")
    parser.add_argument("--seconds", type=float, default=30.0, help="longest that a finished row waits for its part")
    parser.add_argument("--limit", type=int | None, default=None, help="the first clips only")
    parser.add_argument("--retry_failed", action=ActionYesNo, default=False, help="do failed clips once more")
    parser.add_argument(
        "--mix", action=ActionYesNo, default=False, help="keep rows made with other options in the folder"
    )
    parser.add_argument(
        "--allow_outside", action=ActionYesNo, default=False, help="let links and paths lead out of the source's folder"
    )
    _common(parser)


def _tiny_options(parser: ArgumentParser) -> None:
    from tokensieve.pipeline.tiny_recipe import STAGES, TinyRecipe

    parser.add_argument("--out", type=str, default="runs/tiny", help="folder for models and logs")
    parser.add_argument("--stages", nargs="+", type=str, default=list(STAGES), help="which stages to run")
    parser.add_class_arguments(TinyRecipe, None)
    _common(parser)


def _train_options(parser: ArgumentParser) -> None:
    trainers = parser.add_subcommands(metavar="WHAT")
    for name, trainer in TRAINERS.items():
        sub = ArgumentParser(description=trainer.help, exit_on_error=False)
        trainers.add_subcommand(name, sub, help=trainer.help)
        trainer.add_options(sub)
    for name, text in POLICY_TRAINERS.items():  # they bring a parser of their own: see `main`
        trainers.add_subcommand(name, ArgumentParser(description=text, exit_on_error=False), help=text)


def _collect_options(parser: ArgumentParser) -> None:
    _levels(parser)
    parser.add_argument("--episodes", type=int, default=2000, help="worlds that the bot tries")
    parser.add_argument("--out", type=str, required=True, help="new file: *.npz")
    parser.add_argument("--split", type=str, default="train", help="train, val or test: disjoint seeds")
    parser.add_argument("--first", type=int, default=0, help="leave out so many worlds of the split")
    parser.add_argument("--noise", type=float, default=0.0, help="share of steps with a random action instead")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    _common(parser)


def _levels(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--level", type=_Listed(str), default=["BabyAI-ActionObjDoor-v0"], help="one or more, in turns: A,B"
    )


def _steps(parser: ArgumentParser, steps: int) -> None:
    parser.add_argument("--data", type=str, required=True, help="episodes of `vla collect`")
    parser.add_argument("--out", type=str, required=True, help="new folder")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=128, help="windows of episodes a step")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and draws")


def _tokenise_options(parser: ArgumentParser) -> None:
    _steps(parser, 900)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--levels", type=_Listed(int), default=[8, 6, 5], help="of the code; 8,8,8,6,5 in the paper")
    parser.add_argument("--trunk_length", type=int, default=4, help="steps that a code describes; 128 in the paper")
    parser.add_argument("--replan", type=int, default=4, help="steps between plans, kept with the tokeniser")
    _common(parser)


def _planner_options(parser: ArgumentParser) -> None:
    _steps(parser, 4000)
    parser.add_argument("--tokeniser", type=str | None, default=None, help="folder of `vla tokenise`")
    parser.add_argument(
        "--model",
        type=str,
        default="small",
        help="small: a planner for grid worlds; tiny, a folder or hub id: a vision-language model; cloning: the "
        "baseline without behaviour tokens",
    )
    parser.add_argument("--lr", type=float | None, default=None, help="peak; 1e-3, of a vision-language model 1.4e-5")
    parser.add_argument("--visual", type=str, default="resampled", help="of small: 4 tokens resampled, or patches")
    parser.add_argument(
        "--memory",
        type=_Listed(int),
        default=[4, 8, 12],
        help="of small: steps back of remembered frames, 0: none",
    )
    parser.add_argument("--start", type=str | None, default=None, help="small planner to begin with, of another visual")
    parser.add_argument("--method", type=str | None, default=None, help="that drops patches, or the model's tokens")
    parser.add_argument("--keep", type=_Listed(float), default=[1.0], help="budget; of several each step draws one")
    _common(parser)


def _rollout_options(parser: ArgumentParser) -> None:
    parser.add_argument("--planner", type=str, required=True, help="folder of `vla train`, or random")
    parser.add_argument("--tokeniser", type=str | None, default=None, help="folder of `vla tokenise`")
    _levels(parser)
    parser.add_argument("--episodes", type=int, default=300, help="worlds of the test split")
    parser.add_argument("--replan", type=int | None, default=None, help="steps between plans; the tokeniser's own")
    parser.add_argument("--max_steps", type=int | None, default=None, help="24, say, instead of the level's own limit")
    parser.add_argument("--method", type=str | None, default=None, help="that drops visual tokens; as trained")
    parser.add_argument("--keep", type=float | None, default=None, help="its budget: share or number; 0.25")
    parser.add_argument("--control", type=str, default="none", help="none; instructions or codes of other episodes")
    parser.add_argument("--greedy", action=ActionYesNo, default=False, help="the likeliest action instead of a draw")
    parser.add_argument("--batch", type=int, default=64, help="environments at once")
    parser.add_argument("--video", type=str | None, default=None, help="file for the first episodes: *.mp4")
    parser.add_argument("--seed", type=int, default=0, help="of draws")
    _common(parser)


def _vla_options(parser: ArgumentParser) -> None:
    steps = parser.add_subcommands(metavar="WHAT")
    for name, step in VLA.items():
        sub = ArgumentParser(description=step.help, exit_on_error=False)
        steps.add_subcommand(name, sub, help=step.help)
        step.add_options(sub)


def _lazy(name: str, function: str = "run") -> Callable[[Namespace], int]:
    """A function of `tokensieve.commands.<name>`, imported when it is called."""

    def run(options: Namespace) -> int:
        import importlib

        return getattr(importlib.import_module(f"tokensieve.commands.{name}"), function)(options)

    return run


POLICY_TRAINERS = {
    "cacovid": "train a compression policy by rewards (CaCoVID)",
    "rank": "train a compression policy to rank the tokens of a whole video",
    "distil": "train a compression policy without labels, from the model that sees all tokens",
}
TRAINERS = {"tiny": Command("train the shipped model from nothing", _tiny_options, _lazy("train_tiny"))}
VLA = {
    "collect": Command("let the bot of BabyAI levels make episodes", _collect_options, _lazy("vla", "collect")),
    "tokenise": Command("train a behaviour tokeniser on them", _tokenise_options, _lazy("vla", "tokenise")),
    "train": Command("train a planner that writes behaviour tokens", _planner_options, _lazy("vla", "train")),
    "rollout": Command("let planner and tokeniser act in new worlds", _rollout_options, _lazy("vla", "rollout")),
}
COMMANDS = {
    "demo": Command(
        "ask the shipped model about a clip, with all and with a quarter of the tokens", _demo_options, _lazy("demo")
    ),
    "answer": Command("answer a question about one or more clips", _answer_options, _lazy("answer")),
    "show": Command("draw what the model still looks at", _show_options, _lazy("show")),
    "methods": Command("list the compression methods", _methods_options, _lazy("methods")),
    "eval": Command("compare methods: accuracy, tokens and time in one report", _eval_options, _lazy("evaluate")),
    "process": Command("work through a folder or manifest of clips, one row each", _process_options, _lazy("process")),
    "bench": Command("measure time and memory with and without compression", _bench_options, _lazy("bench")),
    "export": Command("write a compressed model as ONNX graphs", _export_options, _lazy("export")),
    "clips": Command("write generated clips with questions and answers", _clips_options, _lazy("clips")),
    "train": Command("train a model", _train_options, partial(_dispatch, TRAINERS)),
    "vla": Command("behaviour tokens: collect, tokenise, train, rollout", _vla_options, partial(_dispatch, VLA)),
}


if __name__ == "__main__":
    sys.exit(main())
