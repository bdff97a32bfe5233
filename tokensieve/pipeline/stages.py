"""What `VLM.compress` sets: one method with its budget in each place where tokens may leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import torch

from tokensieve.compression import Method, Plan, VisualTokens, check_keep, get_method
from tokensieve.compression.registry import PLACES
from tokensieve.errors import BadOption

POSITIONS = ("preserve", "compact")


class Stage:
    """A method with its budget and options: one step of a stack.

    Args:
        method: a name from `tokensieve.list_methods()`.
        keep: share in (0, 1] or whole number of the tokens that reach this stage.
        **options: the method's own options; a policy may be a folder or hub id.

    Raises:
        BadOption: unknown method or option, or a budget that is not allowed.

    Example:
        >>> vlm.compress(["zoprune", Stage("fastv", keep=0.5, layer=3)], keep=0.25)
    """

    def __init__(self, method: str, keep: float | int = 0.25, **options):
        self.method: Method = get_method(method)
        self.keep = check_keep(keep)
        self.method.check_options(options)
        if isinstance(options.get("policy"), str | PathLike):
            from tokensieve.policies.checkpoint import load_policy

            options["policy"] = load_policy(options["policy"])
        self.options = options

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"Stage({self.method.name!r}, keep={self.keep}{options})"


@dataclass(frozen=True, kw_only=True)
class Compression:
    """The stages in force, at most one in each place.

    Attributes:
        stages: in the order of the places: tower, projector, decoder.
        positions: "preserve" or "compact", see `VLMAdapter.emit`.
        seed: of the generator that every item gets afresh, so that batches equal single calls.
    """

    stages: tuple[Stage, ...]
    positions: str = "preserve"
    seed: int = 0

    def __post_init__(self) -> None:
        places = [stage.method.place for stage in self.stages]
        if len(set(places)) < len(places) or not places:
            names = ", ".join(f"{s.method.name!r} ({s.method.place})" for s in self.stages) or "none"
            raise BadOption(f"A stack takes one method in each place ({', '.join(PLACES)}), got {names}.")
        object.__setattr__(self, "stages", tuple(sorted(self.stages, key=lambda s: PLACES.index(s.method.place))))
        if self.positions not in POSITIONS:
            raise BadOption(f"positions must be one of {POSITIONS}, got {self.positions!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise BadOption(f"seed must be a whole number from 0 to 2**63 - 1, got {self.seed!r}.")

    def at(self, place: str) -> Stage | None:
        """The stage in one place, if there is one."""
        return next((stage for stage in self.stages if stage.method.place == place), None)

    @property
    def needs(self) -> frozenset[str]:
        """What the encoder must record for the method at the projector and for what its options bring along."""
        stage = self.at("projector")
        if stage is None:
            return frozenset()
        return frozenset(stage.method.needs).union(*(getattr(value, "needs", ()) for value in stage.options.values()))

    @property
    def name(self) -> str:
        """The methods' names, joined by commas as on the command line."""
        return ",".join(stage.method.name for stage in self.stages)

    @property
    def keep(self) -> float | int | list[float | int]:
        """The budget, or the budgets of a stack."""
        keeps = [stage.keep for stage in self.stages]
        return keeps[0] if len(keeps) == 1 else keeps

    def select(self, tokens: VisualTokens) -> Plan | None:
        """The plan of the method at the projector for one item; None if there is no such method."""
        stage = self.at("projector")
        if stage is None:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        return stage.method(tokens, stage.keep, generator=generator, **stage.options)


def build_stages(
    methods: str | Stage | Sequence[str | Stage], keep: float | int | Sequence[float | int], options: dict[str, object]
) -> tuple[Stage, ...]:
    """Stages from what a user typed.

    Args:
        methods: a name, a `Stage`, or a list of either.
        keep: one budget for every name, or one for each entry; a `Stage` has its own.
        options: of the method; with several, each option goes to the methods that know it.

    Raises:
        BadOption: unequal lengths, a name or option that no method has, or options beside a `Stage`.
    """
    methods = [methods] if isinstance(methods, str | Stage) else list(methods)
    keeps = list(keep) if isinstance(keep, Sequence) and not isinstance(keep, str) else [keep] * len(methods)
    if len(keeps) != len(methods):
        raise BadOption(
            f"Got {len(methods)} methods and {len(keeps)} budgets.",
            hint="Give one `keep` for all of them, or one for each.",
        )
    if options and any(isinstance(m, Stage) for m in methods):
        raise BadOption("Options beside a Stage have no owner.", hint="Give them to the Stage.")
    known = {name: get_method(name).options() for name in methods if isinstance(name, str)}
    for option in options:
        if len(known) != 1 and not any(option in of_method for of_method in known.values()):
            raise BadOption(f"None of {', '.join(known)} has an option {option!r}.")
    stages = []
    for method, budget in zip(methods, keeps, strict=True):
        if isinstance(method, str):
            own = options if len(known) == 1 else {k: v for k, v in options.items() if k in known[method]}
            method = Stage(method, budget, **own)
        elif not isinstance(method, Stage):
            raise BadOption(f"A method is a name or a Stage, got {type(method).__name__}.")
        stages.append(method)
    return tuple(stages)


def with_policy(stages: Sequence[Stage], policy) -> tuple[Stage, ...]:
    """The stages, where those that need a policy and have none get this one (which may be None)."""
    return tuple(
        Stage(stage.method.name, stage.keep, **{**stage.options, "policy": policy})
        if "policy" in stage.method.needs and stage.options.get("policy") is None
        else stage
        for stage in stages
    )
