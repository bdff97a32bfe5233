"""What the cells of a manifest's row mean: texts, answers, choices and seconds, or an error that names the cell."""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Collection

from tokensieve.datasets.tables import Row
from tokensieve.errors import BadOption

COLUMNS = {
    "id": ("id",),
    "media": ("video", "image", "path", "file_name"),
    "question": ("question",),
    "answer": ("answers", "answer"),
    "choices": ("choices", "options"),
    "start_s": ("start_s", "start"),
    "end_s": ("end_s", "end"),
    "kind": ("kind", "category", "question_type"),
}
"""Names of the column that holds a thing; where a row has several, the first counts."""

LETTERS = string.ascii_uppercase
_SCALARS = "text or a number"


class Cells:
    """The cells of one row by what they mean; every method raises BadOption for one that cannot mean that."""

    def __init__(self, row: Row):
        self.row = row

    def column(self, thing: str) -> str | None:
        """The name of the column that holds it in this row."""
        return next((name for name in COLUMNS[thing] if name in self.row.values), None)

    def error(self, thing: str, problem: str, hint: str = "") -> BadOption:
        """For a cell of this row."""
        return BadOption(f'{self.row.where}, column "{self.column(thing)}": {problem}.', hint=hint)

    def missing(self, thing: str) -> BadOption:
        """For a cell that this row lacks."""
        names = " or ".join(f'"{name}"' for name in COLUMNS[thing])
        there = ", ".join(shown(name)[1:-1] for name in self.row.columns[:20])
        verb = "is empty" if any(name in self.row.columns for name in COLUMNS[thing]) else "is missing"
        return BadOption(f"{self.row.where}: {names} {verb}.", hint=f"The row's columns are: {there or 'none'}.")

    def text(self, thing: str) -> str | None:
        """Text that must be text."""
        value = self._value(thing)
        if value is not None and not isinstance(value, str):
            raise self.error(thing, f"must be text, got {shown(value)}")
        return None if value is None else self.plain(thing, value)

    def label(self, thing: str) -> str | None:
        """Text, or a number as text."""
        value = self._value(thing)
        return None if value is None else self._scalar(thing, value)

    def seconds(self, thing: str) -> float | None:
        """A time from 0 up; text that is a number will do."""
        value = self._value(thing)
        if value is None:
            return None
        try:
            seconds = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise self.error(thing, f"must be seconds from 0 up, got {shown(value)}")
        return seconds

    def choices(self) -> list[str]:
        """The choices without letters in front; none is an empty list."""
        value = self._value("choices")
        if value is None:
            return []
        texts = [self._scalar("choices", item) for item in self._list("choices", value)]
        if not 2 <= len(texts) <= len(LETTERS) or len(set(texts)) < len(texts):
            raise self.error("choices", f"must be 2 to {len(LETTERS)} different choices, got {shown(texts)}")
        return _without_letters(texts)

    def answers(self, choices: list[str]) -> tuple[str, ...]:
        """Every accepted answer; with choices, the texts of the right ones."""
        value = self._value("answer")
        if value is None:
            return ()
        if isinstance(value, list) or self.column("answer") == "answers":
            given = [item for item in self._list("answer", value) if item not in (None, "")]
        else:
            given = [value]
        if choices:
            return tuple(dict.fromkeys(choices[self._place(item, choices)] for item in given))
        return tuple(dict.fromkeys(self._scalar("answer", item) for item in given))

    def _value(self, thing: str) -> object | None:
        return self.row.values.get(self.column(thing))

    def _list(self, thing: str, value: object) -> list:
        """A list, or one written as text: a JSON list, or its items with "|" between."""
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise self.error(thing, f"starts like a JSON list and is none: {shown(value)}") from None
        elif isinstance(value, str):
            value = value.split("|")
        return value if isinstance(value, list) else [value]

    def _scalar(self, thing: str, value: object) -> str:
        """As text, stripped; whole numbers without a decimal point, because tables with gaps hold them as floats."""
        if isinstance(value, str) and value.strip():
            return self.plain(thing, value.strip())
        if isinstance(value, float) and math.isfinite(value):
            return str(int(value)) if value.is_integer() and abs(value) < 1e15 else str(value)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e15:
            return str(value)
        a_list = " or a list of them" if thing == "answer" else ""
        raise self.error(thing, f"must be {_SCALARS}{a_list}, got {shown(value)}")

    def plain(self, thing: str, text: str) -> str:
        """The text, if it can be written as UTF-8."""
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
                raise self.error(thing, "has a character that is no Unicode text") from None
        return text

    def _place(self, answer: object, choices: list[str]) -> int:
        """Which choice is right."""
        text, last = self._scalar("answer", answer), len(choices) - 1
        named = _places_by_text(text, choices)
        number = int(text) if re.fullmatch(r"\d{1,2}", text, re.ASCII) else None
        if number is not None and number <= last:
            if not isinstance(answer, str):
                return number
            named.add(number)
        letter = text.strip("().:").upper()
        if len(letter) == 1 and letter in LETTERS[: last + 1]:
            named.add(LETTERS.index(letter))
        if len(named) == 1:
            return named.pop()
        allowed = f"a choice, a letter from A to {LETTERS[last]} or a number from 0 to {last}"
        if named:
            means = " or ".join(shown(choices[i]) for i in sorted(named))
            raise self.error("answer", f"could mean the choice {means}: {shown(answer)}", f"It must be {allowed}.")
        raise self.error("answer", f"must be {allowed}, got {shown(answer)}")


def shown(value: object) -> str:
    """A value for a message, on one line and not too long."""
    text = repr(value[:80] if isinstance(value, (str, bytes, list)) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def all_columns() -> Collection[str]:
    """Every column that is read."""
    return sum(COLUMNS.values(), ())


def _places_by_text(text: str, choices: list[str]) -> set[int]:
    """Choices that are the text, with its letter in front or without; letter case counts only if it must."""
    forms = [(text, text[mark.end() :] if (mark := _mark(text, i)) else text) for i in range(len(choices))]

    def places(fold) -> set[int]:
        return {i for i, form in enumerate(forms) if fold(choices[i]) in map(fold, form)}

    return places(str) or places(str.casefold)


def _mark(text: str, place: int) -> re.Match | None:
    """The letter of a choice in front of it: "A. red", "(A) red", "A: red"."""
    return re.match(rf"\(?{LETTERS[place]}[.):]\s+(?=\S)", text)


def _without_letters(texts: list[str]) -> list[str]:
    """Choices without their letters, if all have them."""
    marks = [_mark(text, place) for place, text in enumerate(texts)]
    return [text[mark.end() :] for text, mark in zip(texts, marks, strict=True)] if all(marks) else texts
