"""A budget is one argument: `keep`, a fraction in (0, 1] or a whole number of tokens."""

from __future__ import annotations

import math
from numbers import Real

from tokensieve.errors import BadOption


def check_keep(keep: float | int) -> float | int:
    """Returns `keep`: a fraction in (0, 1], or a whole number of tokens from 2 up.

    Up to 1 it is a fraction and above 1 a count, whatever its Python type, so `1` and `1.0` both mean
    "all tokens" and a value typed on a command line means what it means in Python.

    Raises:
        BadOption: anything else (0, negative, NaN, 2.5, a bool).
    """
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise BadOption(f"keep must be a number, got {keep!r}.")
    if not math.isfinite(keep) or keep <= 0 or (keep > 1 and keep != int(keep)):
        raise BadOption(
            f"keep must be a fraction in (0, 1] or a whole number of tokens, got {keep}.",
            hint="Give 0.25 for a quarter of the tokens, or 64 for a count.",
        )
    return int(keep) if keep > 1 else float(keep)


def num_to_keep(keep: float | int, num_tokens: int) -> int:
    """How many of `num_tokens` a budget allows: `round(keep * N)`, at least 1, at most N.

    Rounds half to even, as DivPrune's code does; ZOO-Prune and EVS truncate, so at the same fraction
    they may keep one token less than here. Give a whole number to reproduce a published count.
    """
    keep = check_keep(keep)
    wanted = keep if isinstance(keep, int) else round(keep * num_tokens)
    return min(num_tokens, max(1, wanted))
