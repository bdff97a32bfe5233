"""Output shared by the commands: JSON lines for programs, tables for people."""

from __future__ import annotations

import json

from tokensieve.errors import TokensieveError


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


def load_compressed(options):
    """The model of `_model` in cli.py, with its compression set; bad options fail before weights are read."""
    from tokensieve.compression import check_keep, get_method
    from tokensieve.pipeline.loader import load

    check_keep(options.keep)
    if options.method is not None:
        get_method(options.method).check_options(dict(options.options))
    vlm = load(options.model, device=options.device, dtype=options.dtype)
    return vlm.compress(
        options.method, options.keep, positions=options.positions, seed=options.seed, **dict(options.options)
    )
