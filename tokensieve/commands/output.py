"""Output shared by the commands: JSON lines for programs, tables for people."""

from __future__ import annotations

import json
from pathlib import Path

from tokensieve.errors import BadOption, TokensieveError

DEFAULT_KEEP = 0.25


def print_json(record: object) -> None:
    """One object on one line of standard output."""
    print(json.dumps(record, ensure_ascii=False), flush=True)


def error_object(error: TokensieveError, **where: object) -> dict[str, object]:
    """An error as plain types."""
    facts = {"type": type(error).__name__, "message": error.message, "hint": error.hint, "retryable": error.retryable}
    return {**where, "error": facts}


def read_options(options) -> dict[str, object]:
    """The options of `_video` in cli.py that were given, as keyword arguments of `read_video`."""
    names = ("num_frames", "fps", "start_s", "end_s")
    given = {name: options[name] for name in names if options[name] is not None}
    return given | ({"backend": options.backend} if options.backend != "pyav" else {})


def budgets_of(options) -> list[float]:
    """What `--keep` says, one number a stage."""
    if options.keep is None:
        return [DEFAULT_KEEP]
    return options.keep if isinstance(options.keep, list) else [options.keep]


def stages_of(options):
    """The stages that `--method`, `--keep` and `--options` name, None for all tokens; fails before weights are read.

    `--method tome,zoprune --keep 0.5,0.25` is a stack of two.
    """
    from tokensieve.compression import check_keep
    from tokensieve.pipeline.stages import build_stages

    budgets = budgets_of(options)
    if options.method is None:
        for budget in budgets:
            check_keep(budget)
        if options.policy is not None:
            raise BadOption("--policy needs a method that uses it.", hint="Add --method cacovid.")
        return None
    names = options.method.split(",")
    own = dict(options.options) | ({} if options.policy is None else {"policy": options.policy})
    return list(build_stages(names, budgets * len(names) if len(budgets) == 1 else budgets, own))


def load_compressed(options):
    """The model of `_model` in cli.py, with its compression set."""
    from tokensieve.pipeline.loader import load

    stages = stages_of(options)
    vlm = load(options.model, device=options.device, dtype=options.dtype)
    return vlm.compress(stages, positions=options.positions, seed=options.seed)


def load_answering(options):
    """As `load_compressed`, or for an exported folder its runtime; and the budget to ask it with, None for its own."""
    from tokensieve.export.manifest import NAME

    if not (Path(options.model) / NAME).is_file():
        return load_compressed(options), {}
    from tokensieve.export.runtime import OnnxVLM

    given = {name: options[name] for name in ("method", "policy", "options") if options[name]}
    if options.dtype != "auto" or options.positions != "preserve" or given:
        raise BadOption(
            f"{options.model!r} is an exported model: its method, options, policy, positions and precision are fixed.",
            hint="Only --keep and --device can be chosen; export it again for the others.",
        )
    budgets = budgets_of(options)
    if len(budgets) > 1:
        raise BadOption("An exported model takes one budget.")
    device = None if options.device is None else options.device.partition(":")[0]
    vlm = OnnxVLM.from_pretrained(options.model, provider=device)
    return vlm, {} if options.keep is None else {"keep": budgets[0]}
