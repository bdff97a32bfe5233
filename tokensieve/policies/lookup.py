"""Parts that are chosen by name: a table is a plain dict, so a new part is one assignment."""

from __future__ import annotations

from collections.abc import Callable

from tokensieve.compression.registry import did_you_mean
from tokensieve.errors import BadOption


def look_up(what: str, name: str, table: dict[str, Callable]) -> Callable:
    """The entry of `table` called `name`.

    Raises:
        BadOption: there is none; the message says `what` was looked for, lists all names and the nearest one.
    """
    if name not in table:
        raise BadOption(
            f"There is no {what} {name!r}; there are {', '.join(sorted(table))}.", hint=did_you_mean(str(name), table)
        )
    return table[name]
