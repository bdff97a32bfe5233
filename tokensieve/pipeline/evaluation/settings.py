"""What an evaluation compares: all tokens, then every method or stack at every budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tokensieve.compression import check_keep, get_method
from tokensieve.errors import BadOption, TokensieveError
from tokensieve.pipeline.stages import Compression, Stage
from tokensieve.pipeline.vlm import VLM


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the comparison.

    Attributes:
        method: as the user wrote it, `tome:0.5+zoprune` for a stack; "" for all tokens.
        keep: share or number of tokens for every stage that has no budget of its own; 1.0 for all tokens.
        compression: the stages; None for all tokens.
    """

    method: str = ""
    keep: float | int = 1.0
    compression: Compression | None = None

    @property
    def tower(self) -> Stage | None:
        return self.compression.at("tower") if self.compression else None

    @property
    def encoding(self) -> tuple[str, bool]:
        """Equal for settings that share an encoding: the same tower, looked into or not, because looking takes time."""
        return repr(self.tower), "tower" in self.needs

    @property
    def chooses_before_decoder(self) -> bool:
        """Whether there are kept tokens to name before the language model starts."""
        return any(self.compression.at(place) for place in ("tower", "projector")) if self.compression else False

    @property
    def needs(self) -> frozenset[str]:
        return self.compression.needs if self.compression else frozenset()

    def apply(self, vlm: VLM) -> Setting:
        """Sets the compression of the model, and returns the setting as it is there: with the model's own policy.

        Raises:
            BadOption: a method needs a trained policy, and there is none.
            UnsupportedModel: a method cannot work in this model.
        """
        if self.compression is None:
            vlm.compress(None)
            return self
        for stage in self.compression.stages:
            if "policy" in stage.method.needs and stage.options.get("policy") is None and vlm.policy is None:
                raise BadOption(f"{stage.method.name!r} needs a trained policy.", hint="Name it with --policy.")
        vlm.compress(self.compression.stages, positions=self.compression.positions, seed=self.compression.seed)
        return replace(self, compression=vlm.compression)


def make_settings(
    methods: Sequence[str],
    keeps: Sequence[float | int],
    *,
    policy=None,
    options: Mapping[str, object] | None = None,
    positions: str = "preserve",
    seed: int = 0,
) -> list[Setting]:
    """All tokens first, then every method at every budget but 1, in the order given; what is named twice counts once.

    Args:
        methods: names; a stack as `tome+zoprune`, where a stage may have its own budget: `tome:0.5+zoprune`.
        keeps: budgets as `check_keep` takes them; in a stack for every stage without its own.
        policy: a trained policy, its folder or its hub id, for the methods that need one; else that of the model.
        options: of the methods; each goes to those that know it.
        positions, seed: as in `VLM.compress`.

    Raises:
        BadOption: a method, option or budget that is not allowed, or a policy that no method uses.
    """
    options = dict(options or {})
    keeps = list(dict.fromkeys(check_keep(keep) for keep in keeps))
    stacks = {method: _stages(method) for method in dict.fromkeys(methods)}
    named = [get_method(name) for stages in stacks.values() for name, _ in stages]
    if policy is not None:
        if not any("policy" in method.options() for method in named):
            raise BadOption("--policy needs a method that uses it.", hint="Add cacovid to --methods.")
        if isinstance(policy, str):
            from tokensieve.policies.checkpoint import load_policy

            policy = load_policy(policy)  # once for all settings
        options["policy"] = policy
    for option in options:
        if not any(option in method.options() for method in named):
            known = ", ".join(sorted({o for method in named for o in method.options()})) or "none"
            raise BadOption(f"None of the methods has an option {option!r}; they take {known}.")
    settings = [Setting()]
    for method, stages in stacks.items():
        for keep in keeps:
            if keep == 1:
                continue  # all tokens: the setting that is there already
            built = []
            for name, own in stages:
                known = {o: value for o, value in options.items() if o in get_method(name).options()}
                built.append(Stage(name, keep if own is None else own, **known))
            compression = Compression(stages=tuple(built), positions=positions, seed=seed)
            settings.append(Setting(method=method, keep=keep, compression=compression))
    return settings


def usable(vlm: VLM, settings: Sequence[Setting]) -> tuple[list[Setting], dict[str, str]]:
    """The settings that this model can run, and of the other methods why not; the compression is off afterwards."""
    able, left_out = [], {}
    for setting in settings:
        try:
            able.append(setting.apply(vlm))
        except TokensieveError as error:
            left_out[setting.method] = error.message
    vlm.compress(None)
    return able, left_out


def _stages(method: str) -> list[tuple[str, float | int | None]]:
    """`tome:0.5+zoprune` as names with their own budgets. A name may end with a plus: `tome+prumerge+`."""
    parts: list[str] = []
    for part in method.split("+"):
        if parts and (not part or part.startswith(":")):
            parts[-1] += "+" + part
        else:
            parts.append(part.strip())
    stages = [_stage(part) for part in parts]
    if all(own is not None for _, own in stages):
        raise BadOption(f"Every stage of {method!r} has its own budget.", hint="Leave one of them to --keep.")
    return stages


def _stage(part: str) -> tuple[str, float | int | None]:
    name, colon, own = part.partition(":")
    if not colon:
        return name, None
    try:
        budget = float(own)
    except ValueError:
        raise BadOption(f"{own!r} in {part!r} is no budget.", hint="A stack looks like tome:0.5+zoprune.") from None
    return name, check_keep(budget)
