"""Output shared by the commands: JSON lines for programs, tables for people."""

from __future__ import annotations

import json

from tokensieve.errors import BadOption, TokensieveError


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


def stages_of(options):
    """The stages that `--method`, `--keep` and `--options` name, None for all tokens; fails before weights are read.

    `--method tome,zoprune --keep 0.5,0.25` is a stack of two.
    """
    from tokensieve.compression import check_keep
    from tokensieve.pipeline.stages import build_stages

    budgets = options.keep if isinstance(options.keep, list) else [options.keep]
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
