"""Static draft trees: which guesses to check at once, by the ranks that lead to them.

A node is its parent and a rank c: it guesses the c-th likeliest successor of its parent's token. The root is the token
that is known. Nodes come in breadth-first order, the root first.
"""

# Shape legend: T nodes, root included

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from tokensieve.errors import BadOption


@dataclass(frozen=True, eq=False)
class DraftTree:
    """A tree of guesses.

    Args:
        parents: of every node, -1 for the root, which comes first; parents come before their children.
        ranks: of every node among its parent's guesses, 0 the likeliest; that of the root does not count.

    Attributes:
        depth_T: int64, 0 for the root.
        sees_TT: bool, True where column is an ancestor of row, or row itself.
        children: of every node, in order.

    Raises:
        BadOption: no tree, or two nodes with one parent and one rank.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    depth_T: Tensor = field(init=False)
    sees_TT: Tensor = field(init=False)
    children: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        size = len(self.parents)
        ordered = size and self.parents[0] == -1 and all(0 <= p < i for i, p in enumerate(self.parents) if i)
        if not ordered or len(self.ranks) != size or any(rank < 0 for rank in self.ranks):
            raise BadOption("A draft tree needs a root (parent -1) first, parents before children, and ranks from 0.")
        if len(set(zip(self.parents, self.ranks, strict=True))) != size:
            raise BadOption("Two nodes of the draft tree have the same parent and rank.")
        sees = torch.eye(size, dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], start=1):
            sees[node] |= sees[parent]
        children = tuple(tuple(i for i, p in enumerate(self.parents) if p == node) for node in range(size))
        object.__setattr__(self, "sees_TT", sees)
        object.__setattr__(self, "depth_T", sees.sum(1) - 1)
        object.__setattr__(self, "children", children)

    def __len__(self) -> int:
        return len(self.parents)


@lru_cache
def static_tree(num_nodes: int = 80, max_rank: int = 8, max_depth: int = 6) -> DraftTree:
    """The `num_nodes` guesses that are likeliest to be right if rank c is right in proportion to 1 / (c + 1)^2.

    Our own construction (INFERRED): the official template of Token Recycling has 80 nodes down to depth 6 as well, but
    its paths are not published with a rule.

    Args:
        num_nodes: root not counted; fewer are cheaper to check; on a CPU every node costs as much as a token.
        max_rank: ranks below it are used; the k of the matrix.
        max_depth: longest chain of guesses.

    Raises:
        BadOption: a number below 1, or more nodes than such a tree can have.
    """
    if min(num_nodes, max_rank, max_depth) < 1:
        raise BadOption(f"Needed: numbers above 0, got {num_nodes = }, {max_rank = }, {max_depth = }.")
    cost = [1.0 + 2 * math.log(rank + 1) for rank in range(max_rank)]
    found: list[tuple[int, ...]] = [()]
    waiting = [(cost[0], (0,))]
    while waiting and len(found) <= num_nodes:
        total, path = heapq.heappop(waiting)
        found.append(path)
        if path[-1] + 1 < max_rank:
            sibling = (*path[:-1], path[-1] + 1)
            heapq.heappush(waiting, (total - cost[path[-1]] + cost[sibling[-1]], sibling))
        if len(path) < max_depth:
            heapq.heappush(waiting, (total + cost[0], (*path, 0)))
    if len(found) <= num_nodes:
        raise BadOption(f"A tree of {max_rank} ranks and depth {max_depth} has no {num_nodes} nodes.")
    found.sort(key=lambda path: (len(path), path))
    number = {path: i for i, path in enumerate(found)}
    return DraftTree(
        parents=tuple(number[path[:-1]] if path else -1 for path in found),
        ranks=tuple(path[-1] if path else 0 for path in found),
    )
