"""Budgets in whole numbers: `keep` as a fraction in (0, 1] or a count, and its shares of tiles and frames.

Needs no torch, so that exported models share the very rules that they were compressed by.
"""

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


def share_budget(counts: list[int], num_keep: int) -> list[int]:
    """Splits `num_keep` over tiles of `counts` tokens: equal shares, the remainder to the first tiles.

    A tile with fewer tokens than its share keeps them all, and the rest is shared again among the
    others. With fewer tokens than tiles, the first tiles (the base view comes first) get one each.

        share_budget([25, 30, 30, 24], 30) == [8, 8, 7, 7]
        share_budget([9, 2, 9], 12) == [5, 2, 5]
    """
    shares = [0] * len(counts)
    left = num_keep
    while left:
        open_tiles = [i for i, count in enumerate(counts) if shares[i] < count]
        each, extra = divmod(left, len(open_tiles))
        for rank, i in enumerate(open_tiles):
            given = min(counts[i] - shares[i], each + (rank < extra))
            shares[i] += given
            left -= given
    return shares


def even_shares(num_frames: int, total: int) -> list[int]:
    """Splits `total` over frames as evenly as whole numbers can, the remainder spread over time.

    even_shares(4, 10) == [3, 2, 3, 2]
    """
    ends = [(2 * t * total + num_frames) // (2 * num_frames) for t in range(num_frames + 1)]
    return [end - start for start, end in zip(ends[:-1], ends[1:], strict=True)]
