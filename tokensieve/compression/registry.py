"""The registry of compression methods: register once, appear in tests, docs, benchmarks and the CLI."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tokensieve.compression.budget import num_to_keep
from tokensieve.compression.plan import Plan, keep_all
from tokensieve.compression.tokens import VisualTokens
from tokensieve.errors import BadOption

PLACES = ("tower", "projector", "decoder")
EFFECTS = ("prunes", "merges")
NEEDS = ("features", "projector", "frames", "tower", "question", "attention", "keys", "policy")

_RECORDED = "It is recorded for methods that need it: set the method before VLM.prepare, or give its `needs`."
# Parts of `VisualTokens` that may be missing: what they are called, and what to do without.
_EVIDENCE = {
    "projector": (
        "projector and its input",
        "Use 'norm-diversity' or 'divprune', which look at the features only.",
    ),
    "tower": ("attention of the vision tower", _RECORDED),
    "question": ("question", _RECORDED),
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A registered method: the function and the facts people choose by.

    Attributes:
        name: as users type it.
        fn: at the projector `fn(tokens, num_keep, *, generator=None, **options) -> Plan`. In the tower and in the
            decoder `fn(*, **options)` makes a stage: see `compression/tower_stage.py`, `compression/decoder_stage.py`.
        title: paper title, or what the baseline does.
        url: where to read it ("" for a plain baseline).
        place: where tokens leave: "tower", "projector" or "decoder".
        effect: "prunes" or "merges".
        needs: what it looks at: "features" (the tokens themselves), "projector" (and what enters it), "frames"
            (a video's raster), "tower" (attention or keys of the vision tower, for methods at the projector),
            "attention" or "keys" (of the layers it works in), "question", "policy" (a trained scorer);
            () for only how many tokens there are.
        output_length: "exact", or a sentence that says how the count may differ from the budget.
        follows_tokens: the same tokens stay when the places inside the frames are shuffled.
        licence: licence of the official code, "" if there is none.
        differs: what we do differently from the official code.
    """

    name: str
    fn: Callable[..., Plan]
    title: str
    url: str = ""
    place: str = "projector"
    effect: str = "prunes"
    needs: tuple[str, ...] = ("features",)
    output_length: str = "exact"
    follows_tokens: bool = False
    licence: str = ""
    differs: str = ""

    @property
    def question_aware(self) -> bool:
        """Whether another question may keep other tokens."""
        return "question" in self.needs

    def options(self) -> dict[str, object]:
        """The method's own keyword options and their defaults."""
        parameters = inspect.signature(self.fn).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "generator"}

    def __call__(
        self,
        tokens: VisualTokens,
        keep: float | int,
        *,
        generator: torch.Generator | None = None,
        **options,
    ) -> Plan:
        """Selects within the budget; a budget of all tokens returns them all without running the method.

        No gradient is recorded (the plan is made of whole numbers; gradients flow through `apply_plan`),
        and autocast is off, because methods choose float32 where they need it.

        Raises:
            BadOption: `keep` is out of range, an option is not one of `options()`, the method works in another
                place, it needs something that these tokens come without, or it looks at features and some are
                NaN or infinite.
        """
        if self.place != "projector":
            raise BadOption(
                f"{self.name!r} works in the {self.place}, not on a set of visual tokens.",
                hint="Use VLM.compress, or compress_tower for a bare vision tower.",
            )
        self.check_options(options)
        num_keep = num_to_keep(keep, len(tokens))
        if num_keep == len(tokens):
            return keep_all(len(tokens), tokens.features.device)
        for need, (words, hint) in _EVIDENCE.items():
            if need in self.needs and getattr(tokens, need) is None:
                raise BadOption(f"{self.name!r} needs the {words}, and these tokens come without.", hint=hint)
        device = tokens.features.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            # One sum tells as much as a look at every number, without a mask as large as the features.
            if "features" in self.needs and not tokens.features.sum(dtype=torch.float64).isfinite():
                raise BadOption(
                    f"Some visual tokens are NaN or infinite, so {self.name!r} cannot compare them.",
                    hint="Check the model's weights and dtype: float16 overflows in some vision towers.",
                )
            return self.fn(tokens, num_keep, generator=generator, **options)

    def check_options(self, options: dict[str, object]) -> None:
        """Raises BadOption, with a suggestion, if an option is unknown to this method."""
        allowed = self.options()
        for option in options:
            if option not in allowed:
                raise BadOption(
                    f"{self.name!r} has no option {option!r}; it takes {sorted(allowed) or 'none'}.",
                    hint=did_you_mean(option, allowed),
                )


_METHODS: dict[str, Method] = {}


def register_method(name: str, **facts) -> Callable[[Callable[..., Plan]], Callable[..., Plan]]:
    """Decorator that puts `fn` into the registry under `name` with the given `Method` facts.

    Raises:
        ValueError: the name is taken, or a fact is not one of the allowed words.
    """

    def register(fn: Callable[..., Plan]) -> Callable[..., Plan]:
        if name in _METHODS:
            raise ValueError(f"A method named {name!r} is already registered.")
        method = Method(name=name, fn=fn, **facts)
        if method.place not in PLACES:
            raise ValueError(f"place must be one of {PLACES}, got {method.place!r}.")
        if method.effect not in EFFECTS:
            raise ValueError(f"effect must be one of {EFFECTS}, got {method.effect!r}.")
        if not set(method.needs) <= set(NEEDS):
            raise ValueError(f"needs must be some of {NEEDS}, got {method.needs!r}.")
        _METHODS[name] = method
        return fn

    return register


def get_method(name: str) -> Method:
    """The registered method of that name.

    Raises:
        BadOption: there is none; the message lists all names and the nearest one.
    """
    if name not in _METHODS:
        raise BadOption(
            f"There is no method {name!r}; there are {', '.join(sorted(_METHODS))}.",
            hint=did_you_mean(name, _METHODS),
        )
    return _METHODS[name]


def list_methods(place: str | None = None) -> list[Method]:
    """All registered methods by name, or those of one place."""
    return [m for _, m in sorted(_METHODS.items()) if place in (None, m.place)]


def did_you_mean(word: str, allowed) -> str:
    """'Did you mean X?' for the nearest allowed word, or an empty string."""
    near = difflib.get_close_matches(word, list(allowed), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""
