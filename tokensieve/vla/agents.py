"""Who acts in a batch of environments: a planner with a policy decoder, plain cloning, or chance.

    begin(instructions)                      a new batch of episodes
    act(frames, rows) -> actions, plan       one step of those that still run; the plan, if the big model was asked

All episodes of a batch begin together, so they are planned for together: at steps 0, N, 2N, ...
"""

# Shape legend: B episodes of a batch, A of them that still run, H height, W width in pixels, d digits of a code

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tokensieve.errors import BadOption
from tokensieve.vla.cloning import CloningPolicy
from tokensieve.vla.decoder import History
from tokensieve.vla.memory import Memory
from tokensieve.vla.planner_config import BehaviourPlanner, Planned
from tokensieve.vla.tokeniser import BehaviourTokeniser
from tokensieve.vla.trunks import NO_ACTION


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One step of an agent.

    Attributes:
        actions: `[A]` int64.
        num_calls: how often the big model was asked for each of them at this step: 0 or 1.
        planned: what it said, rows as in `actions`; None if it was not asked, or is no planner.
        digits: `[A, d]` int64, the codes that are being carried out; None where there are none.
    """

    actions: Tensor
    num_calls: int
    planned: Planned | None = None
    digits: Tensor | None = None


class Agent(Protocol):
    """See the module."""

    def begin(self, instructions: Sequence[str]) -> None:
        """New episodes with these instructions; all earlier ones are over."""

    def act(self, frames: Tensor, rows: Tensor) -> Step:
        """Actions for frames `[A, H, W, 3]` of episodes `rows` `[A]`: rising, and none that was left out before."""


class RandomAgent:
    """Any action, all equally likely.

    Args:
        num_actions: to choose from.
        seed: of the draws.
    """

    def __init__(self, num_actions: int = 7, seed: int = 0):
        self.num_actions, self._draws = num_actions, torch.Generator().manual_seed(seed)

    def begin(self, instructions: Sequence[str]) -> None:
        """Nothing to prepare."""

    def act(self, frames: Tensor, rows: Tensor) -> Step:
        """See `Agent`."""
        return Step(actions=torch.randint(self.num_actions, (len(rows),), generator=self._draws), num_calls=0)


class CloningAgent:
    """Plain behaviour cloning, for which the whole network is asked at every step.

    Args:
        policy: trained.
        greedy: the likeliest action instead of a draw.
        seed: of the draws.
    """

    def __init__(self, policy: CloningPolicy, *, greedy: bool = False, seed: int = 0):
        self.policy = policy.eval()
        self._draws = None if greedy else torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def begin(self, instructions: Sequence[str]) -> None:
        """Reads the instructions."""
        self._numbers, self._history = self.policy.instruct(instructions), None
        self._rows = torch.arange(len(instructions))

    def act(self, frames: Tensor, rows: Tensor) -> Step:
        """See `Agent`."""
        stays = torch.isin(self._rows, rows)
        self._rows, self._numbers = rows, self._numbers[stays]
        history = None if self._history is None else rows_of(self._history, stays)
        actions, self._history = self.policy.act(frames, self._numbers, history=history, generator=self._draws)
        return Step(actions=actions[:, 0], num_calls=1)


class BehaviourAgent:
    """The OmniJARVIS loop: the planner says a code, the decoder acts on it for N steps with a history of its own.

    The decoder begins afresh with every plan; the paper does not say whether it should.

    Args:
        planner: the big model.
        tokeniser: whose decoder acts.
        replan_interval: N; None for the tokeniser's own.
        shuffle_codes: control: every episode is acted with the code that was planned for another one.
        greedy: the likeliest action instead of a draw. Codes are always the likeliest.
        seed: of the draws.

    Raises:
        BadOption: planner and tokeniser have different levels, or N is below 1.
    """

    def __init__(
        self,
        planner: BehaviourPlanner,
        tokeniser: BehaviourTokeniser,
        replan_interval: int | None = None,
        *,
        shuffle_codes: bool = False,
        greedy: bool = False,
        seed: int = 0,
    ):
        interval = tokeniser.config.replan_interval if replan_interval is None else replan_interval
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise BadOption(f"The plan must hold for at least 1 step, got {interval!r}.")
        if planner.levels != tokeniser.config.levels:
            raise BadOption(
                f"The planner says codes of levels {list(planner.levels)}, the tokeniser reads "
                f"{list(tokeniser.config.levels)}.",
                hint="Use the tokeniser that the planner was trained with.",
            )
        if len(tokeniser.config.num_actions) != 1:
            raise BadOption("Grid worlds have actions of one part.", hint="Use a tokeniser of BabyAI episodes.")
        self.planner, self.tokeniser, self.interval = planner, tokeniser.eval(), interval
        planner.network.eval()
        self.shuffle_codes, self._seed = shuffle_codes, seed
        self._draws = None if greedy else torch.Generator().manual_seed(seed)

    def begin(self, instructions: Sequence[str]) -> None:
        """Forgets everything."""
        num = len(instructions)
        self._instructions, self._step = list(instructions), 0
        self._rows, self._history = torch.arange(num), None
        self._said = torch.zeros(num, len(self.planner.levels), dtype=torch.int64)
        self._previous = torch.full((num, 1), NO_ACTION)
        self._frames: deque[Tensor] = deque(maxlen=max(self.planner.memory, default=0))  # of all episodes, newest last
        self._donor = cycle(num, self._seed) if self.shuffle_codes else torch.arange(num)

    def act(self, frames: Tensor, rows: Tensor) -> Step:
        """See `Agent`."""
        stays = torch.isin(self._rows, rows)
        self._rows, self._previous = rows, self._previous[stays]
        planned = None
        if self._step % self.interval == 0:
            instructions = [self._instructions[row] for row in rows.tolist()]
            planned = self.planner.plan(frames, instructions, self._memory(frames))
            self._said[rows] = planned.digits
            self._digits, self._history = self._said[self._donor[rows]], None
        else:
            self._digits, self._history = self._digits[stays], rows_of(self._history, stays)
        actions, self._history = self.tokeniser.act(
            frames,
            self.tokeniser.config.fsq.digits_to_codes(self._digits),
            previous=self._previous,
            history=self._history,
            generator=self._draws,
        )
        self._remember(frames)
        self._previous, self._step = actions, self._step + 1
        return Step(actions=actions[:, 0], num_calls=int(planned is not None), planned=planned, digits=self._digits)

    def _memory(self, frames: Tensor) -> Memory | None:
        if not self.planner.memory:
            return None
        known = [lag <= len(self._frames) for lag in self.planner.memory]
        nothing = torch.zeros_like(frames)
        seen = [
            self._frames[-lag][self._rows] if there else nothing
            for lag, there in zip(self.planner.memory, known, strict=True)
        ]
        return Memory(frames=torch.stack(seen, 1), there=torch.tensor(known).expand(len(frames), -1))

    def _remember(self, frames: Tensor) -> None:
        if self._frames.maxlen:
            of_all = frames.new_zeros(len(self._instructions), *frames.shape[1:])
            of_all[self._rows] = frames
            self._frames.append(of_all)


def rows_of(history: History, stays: Tensor) -> History:
    """The history of the rows under a mask `[B]` bool."""
    layers = tuple((key[stays], value[stays]) for key, value in history.layers)
    return History(layers, history.mask[stays])


def cycle(num: int, seed: int) -> Tensor:
    """`[num]` int64: for each the number of another one, all in one random circle; of a single one itself."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other
