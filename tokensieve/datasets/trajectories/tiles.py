"""Pictures of what a MiniGrid agent sees, looked up cell by cell instead of drawn.

The symbolic view says for each of 7x7 cells the type of thing in it, its colour and its state; 8x8 pixels of a cell
depend on nothing else but on whether the agent stands there. So pictures need not be stored, and a network whose first
layer is linear in 8x8 patches can look its output up as well. Equal, pixel for pixel, to what
`RGBImgPartialObsWrapper(env, tile_size=8)` of minigrid draws.

Shape legend: ... any leading axes, 7 columns, 7 rows, H = W = 56
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tokensieve.errors import BadOption, MissingBackend

VIEW = 7  # cells a side; the agent is in the middle of the last row and looks up
TILE = 8  # pixels a side
NUM_TYPES, NUM_COLOURS, NUM_STATES = 11, 6, 4  # the state of an agent is one of 4 directions; of a door, one of 3
NUM_TILES = NUM_TYPES * NUM_COLOURS * NUM_STATES * 2
_UNSEEN, _AGENT_COLUMN, _AGENT_ROW = 0, VIEW // 2, VIEW - 1


def tile_ids(grids: np.ndarray) -> np.ndarray:
    """Which tile each cell shows, int64 [..., 7, 7] in picture order (rows, then columns), each in [0, NUM_TILES).

    Args:
        grids: uint8 [..., 7, 7, 3], as minigrid observes: [column, row] -> type, colour, state.

    Raises:
        BadOption: another form, or numbers that minigrid has no meaning for.
    """
    grids = check_grids(grids)
    kind, colour, state = np.moveaxis(grids.astype(np.int64), -1, 0)
    ids = ((kind * NUM_COLOURS + colour) * NUM_STATES + state) * 2
    ids[..., _AGENT_COLUMN, _AGENT_ROW] += 1
    return ids.swapaxes(-1, -2)


def render_grids(grids: np.ndarray) -> np.ndarray:
    """Pictures of symbolic views: uint8 [..., 7, 7, 3] to uint8 [..., 56, 56, 3].

    Raises:
        BadOption: see `tile_ids`.
        MissingBackend: minigrid, which draws the tiles, is not installed.
    """
    tiles = tile_table()[tile_ids(grids)]  # [..., row, column, 8, 8, 3]
    return tiles.swapaxes(-4, -3).reshape(*grids.shape[:-3], VIEW * TILE, VIEW * TILE, 3)


@cache
def tile_table() -> np.ndarray:
    """The picture of every tile, uint8 [NUM_TILES, 8, 8, 3], drawn once by minigrid.

    Raises:
        MissingBackend: minigrid is not installed.
    """
    try:
        from minigrid.core.constants import IDX_TO_OBJECT
        from minigrid.core.grid import Grid
        from minigrid.core.world_object import WorldObj
    except ImportError:
        raise missing_minigrid() from None

    table = np.zeros((NUM_TYPES, NUM_COLOURS, NUM_STATES, 2, TILE, TILE, 3), dtype=np.uint8)
    for kind, colour, state in np.ndindex(table.shape[:3]):
        if kind not in IDX_TO_OBJECT:
            continue
        thing = WorldObj.decode(kind, colour, state)
        for agent in (0, 1):
            table[kind, colour, state, agent] = Grid.render_tile(
                thing, agent_dir=3 if agent else None, highlight=kind != _UNSEEN, tile_size=TILE
            )
    table = table.reshape(NUM_TILES, TILE, TILE, 3)
    table.flags.writeable = False
    return table


def check_grids(grids: np.ndarray) -> np.ndarray:
    """`grids`, or BadOption when they are no symbolic views."""
    if not isinstance(grids, np.ndarray) or grids.dtype != np.uint8 or grids.shape[-3:] != (VIEW, VIEW, 3):
        given = f"{grids.dtype} {list(grids.shape)}" if isinstance(grids, np.ndarray) else type(grids).__name__
        raise BadOption(f"grids must be uint8 [..., {VIEW}, {VIEW}, 3], got {given}.")
    if grids.size and (grids.reshape(-1, 3).max(0) >= (NUM_TYPES, NUM_COLOURS, NUM_STATES)).any():
        raise BadOption(
            f"grids hold type, colour and state below {NUM_TYPES}, {NUM_COLOURS} and {NUM_STATES}, "
            f"got up to {grids.reshape(-1, 3).max(0).tolist()}."
        )
    return grids


def missing_minigrid() -> MissingBackend:
    return MissingBackend("minigrid is not installed.", "pip install 'tokensieve[vla]'")
