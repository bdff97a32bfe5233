"""How a report writes numbers and texts for people."""

from __future__ import annotations

from collections.abc import Sequence

MAX_TEXT = 300  # characters of a text that the run did not make up
_TURNS = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)])  # Unicode's embeddings and overrides


def percent(share: float | None) -> str:
    """0.612 as "61.2 %"."""
    return "–" if share is None else f"{share * 100:.1f}\u202f%"


def points(share: float | None) -> str:
    """A difference in percentage points with its sign: "+0.5", "−1.2"."""
    if share is None:
        return "–"
    text = f"{share * 100:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def count(number: float | None) -> str:
    """A number of tokens: whole above 100, else with at most one decimal."""
    if number is None:
        return "–"
    return f"{number:,.0f}" if number >= 100 or abs(number - round(number)) < 0.05 else f"{number:.1f}"


def shortened(text: str) -> str:
    """Untrusted text at a bearable length, on one line, and without what would turn the text around it."""
    text = " ".join(text.translate(_TURNS).split())
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def duration(seconds: float) -> str:
    """0.0123 as "12.3 ms"."""
    if seconds >= 1:
        return f"{seconds:.2f}\u202fs"
    return f"{seconds * 1000:.{0 if seconds >= 0.1 else 1}f}\u202fms"


def listed(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
