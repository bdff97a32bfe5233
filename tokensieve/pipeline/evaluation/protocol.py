"""What every clip is put through: settings, scores, and how questions are put to the model."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tokensieve.datasets.manifest import Record
from tokensieve.datasets.sampling import Sampling
from tokensieve.datasets.video import BACKENDS
from tokensieve.errors import BadOption
from tokensieve.pipeline.evaluation.scores import SCORES, choice_likelihood
from tokensieve.pipeline.evaluation.settings import Setting
from tokensieve.policies.lookup import look_up

LIKELIHOOD = "choice-likelihood"
BY_CHOICE = ("choice-letter", LIKELIHOOD)
CHOICES = ("listed", "hidden")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What every clip is put through.

    Attributes:
        settings: all tokens first; a setting's number is its place.
        scores: names from `SCORES` and "choice-likelihood", the main one first; () takes what fits the questions.
        choices: "listed" puts the choices of a question into its prompt, with letters, and expects a letter; "hidden"
            asks the bare question and expects the text of a choice.
        max_new_tokens: longest answer.
        read_options: of `Record.load`: num_frames or fps, start_s, end_s, backend.

    Raises:
        BadOption: a score or a way to show choices that is not known, a longest answer that is not positive, or frames
            that cannot be chosen so.
    """

    settings: tuple[Setting, ...]
    scores: tuple[str, ...] = ()
    choices: str = "listed"
    max_new_tokens: int = 32
    read_options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.scores:
            look_up("score", name, {**SCORES, LIKELIHOOD: choice_likelihood})
        if self.choices not in CHOICES:
            raise BadOption(f"choices must be one of {CHOICES}, got {self.choices!r}.")
        if self.max_new_tokens < 1:
            raise BadOption(f"max_new_tokens must be above 0, got {self.max_new_tokens}.")
        if (backend := self.read_options.get("backend", "pyav")) not in BACKENDS:
            raise BadOption(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
        Sampling(**{name: value for name, value in self.read_options.items() if name != "backend"})

    def lists_choices(self, record: Record) -> bool:
        return bool(record.choices) and self.choices == "listed"

    def prompt(self, record: Record) -> str:
        """What the model is asked."""
        if not self.lists_choices(record):
            return record.question
        listed = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, record.choices, strict=False)]
        return "\n".join([record.question, *listed, "Answer with the letter of the right choice."])

    def continuations(self, record: Record) -> Sequence[str]:
        """What the model would say for each choice."""
        return string.ascii_uppercase[: len(record.choices)] if self.lists_choices(record) else record.choices

    def applies(self, score: str, record: Record) -> bool:
        """Whether a score can be told of a question: letters are no text, and without choices there is none to take."""
        if score in BY_CHOICE:
            return bool(record.choices)
        return not self.lists_choices(record)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """All questions about one clip, and its place in the run."""

    number: int
    records: tuple[Record, ...]


def check_scores(protocol: Protocol, records: Sequence[Record]) -> tuple[str, ...]:
    """The scores of a run: those asked for, or what fits.

    Raises:
        BadOption: no questions, a question without text or answer, one with too many choices to list, or a score that
            applies to no question.
    """
    if not records:
        raise BadOption("There are no questions.")
    for record in records:
        if record.question is None or not record.answers:
            raise BadOption(f"{record.id!r} has no {'question' if record.question is None else 'answer'}.")
        if protocol.lists_choices(record) and len(record.choices) > len(string.ascii_uppercase):
            raise BadOption(f"{record.id!r} has {len(record.choices)} choices, more than there are letters.")
    fitting = [name for name in ("exact", "choice-letter") if any(protocol.applies(name, r) for r in records)]
    scores = tuple(dict.fromkeys(protocol.scores)) or tuple(fitting[:1] if protocol.choices == "hidden" else fitting)
    for name in scores:
        if not any(protocol.applies(name, record) for record in records):
            why = "no question has choices" if name in BY_CHOICE else "every question is answered by a letter"
            raise BadOption(f"The score {name!r} applies to nothing here: {why}.", hint=_HINTS[name in BY_CHOICE])
    return scores


_HINTS = {True: "Leave it out, or give the manifest a column of choices.", False: "Use choice-letter, or hide choices."}


def clips_of(records: Sequence[Record]) -> list[Clip]:
    """Questions about the same part of the same source are asked of one encoding; in order of first appearance."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault((record.clip, record.source, record.start_s, record.end_s), []).append(record)
    return [Clip(number=number, records=tuple(group)) for number, group in enumerate(groups.values())]
