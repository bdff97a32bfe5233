"""Where the things are that an instruction of a BabyAI level names: the ground truth about which tokens matter."""

# Shape legend: B views, 7 x 7 cells, picture order: rows, then columns

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tokensieve.datasets.trajectories.tiles import check_grids
from tokensieve.errors import BadOption

# Numbers that minigrid gives to types and colours.
TYPES = {"door": 4, "key": 5, "ball": 6, "box": 7}
COLOURS = {"red": 0, "green": 1, "blue": 2, "purple": 3, "yellow": 4, "grey": 5}
_NAMED = re.compile(rf"\b(?:({'|'.join(COLOURS)}) )?({'|'.join(TYPES)}|object)\b")


def named_cells(instructions: Sequence[str], grids: np.ndarray) -> np.ndarray:
    """Which cells of each view hold a thing that its instruction names by type and colour, bool `[B, 7, 7]`.

    "object" is any type. Words about places ("behind you") are not read, so all things of the kind count; the agent's
    own cell, which shows what it carries, counts too.

    Args:
        instructions: one a view.
        grids: uint8 `[B, 7, 7, 3]`, as minigrid observes.

    Raises:
        BadOption: the numbers of both differ, grids are none, or an instruction names no thing.
    """
    if check_grids(grids).ndim != 4 or len(grids) != len(instructions):
        raise BadOption(f"Need one instruction per view, got {len(instructions)} and grids {list(grids.shape)}.")
    kind_B77, colour_B77 = grids[..., 0].swapaxes(1, 2), grids[..., 1].swapaxes(1, 2)
    cells_B77 = np.zeros(kind_B77.shape, dtype=bool)
    for row, text in enumerate(instructions):
        found = _NAMED.findall(text.lower())
        if not found:
            raise BadOption(f"{text!r} names no {', '.join(TYPES)} or object.")
        for colour, kind in found:
            kinds = list(TYPES.values()) if kind == "object" else [TYPES[kind]]
            matches = np.isin(kind_B77[row], kinds)
            cells_B77[row] |= matches & (colour_B77[row] == COLOURS[colour]) if colour else matches
    return cells_B77
