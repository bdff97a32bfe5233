"""Generated clip questions: handwritten digits that move over moving textures, with exact answers.

Two kinds of scene. In a *crowd* one to four digits of different classes and colours are all in view and
move along an axis. In a *sequence* two to four digits show up one after the other. Coloured shapes that
are no digits distract in both. A clip is a small description (`Clip`); `render.render_clips` turns it
into pixels at any set of times, so the tensors used for training and the files used for everything
else come from one source.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokensieve.datasets.digits import digit_ids

FRAME_SIZE = 96  # pixels, square
NUM_FRAMES = 8  # frames the shipped model is trained on
DURATION_S = 2.0
COLOURS = {
    "red": (235, 50, 45),
    "green": (40, 200, 70),
    "blue": (60, 110, 255),
    "yellow": (245, 215, 50),
    "purple": (190, 70, 225),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
COUNTS = ("zero", "one", "two", "three", "four")
SHAPES = ("disc", "square", "cross", "triangle")

# kind -> (what it takes to answer, phrasings)
KINDS = {
    "digit": ("one frame", ("Which digit is {colour}?", "What number is the {colour} digit?")),
    "colour": ("one frame", ("What colour is the {digit}?", "Which colour does the {digit} have?")),
    "count": ("counting", ("How many digits are there?", "How many digits can you see at once?")),
    "direction": ("motion", ("Which way does the {colour} digit move?", "Where is the {colour} digit going?")),
    "first": ("order", ("Which digit appears first?", "Which digit comes first?")),
    "last": ("order", ("Which digit appears last?", "Which digit comes last?")),
    "after": ("order", ("Which digit comes after the {digit}?", "What digit follows the {digit}?")),
    "total": ("counting over time", ("How many digits appear in all?", "How many digits appear one by one?")),
}
CROWD_KINDS = ("digit", "colour", "count", "direction")
SEQUENCE_KINDS = ("first", "last", "after", "total")
_U = np.linspace(0, 1, NUM_FRAMES)  # times at which movers must keep clear of each other


@dataclass(frozen=True, kw_only=True)
class Mover:
    """One digit or shape. Positions are the centre in pixels at the clip's start and end; `on` and `off`
    bound its visibility as fractions of the clip."""

    label: int  # 0..9, or -1 for a shape that is no digit
    glyph: int  # index into digits.glyphs(), or into SHAPES
    colour: str
    size: float  # pixels
    start: tuple[float, float]
    end: tuple[float, float]
    on: float = -1.0
    off: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Question:
    kind: str
    text: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A scene to render and every question that can be asked about it."""

    id: str
    movers: tuple[Mover, ...]
    background_seed: int
    questions: tuple[Question, ...]


def make_clip(split: str, index: int, seed: int = 0) -> Clip:
    """Clip `index` of a split: the same arguments always give the same clip.

    Raises:
        ValueError: unknown split or negative index.
    """
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}.")
    glyph_ids = digit_ids(split)
    rng = np.random.default_rng([seed, sorted(("train", "val", "test")).index(split), index])
    sequence = bool(rng.random() < 0.5)
    # Drawn before any attempt to place them, so that crowded scenes are as frequent as they should be.
    count = int(rng.integers(2, 5) if sequence else rng.integers(1, 5))
    build = _sequence if sequence else _crowd
    while (movers := build(rng, glyph_ids, count)) is None:
        pass
    digits = [m for m in movers if m.label >= 0]
    questions = _sequence_questions(rng, digits) if sequence else _crowd_questions(rng, digits)
    return Clip(
        id=f"{split}-{seed}-{index:06d}",
        movers=tuple(movers),
        background_seed=int(rng.integers(2**31)),
        questions=tuple(questions),
    )


def _crowd(rng: np.random.Generator, glyph_ids, count: int) -> list[Mover] | None:
    labels = rng.permutation(10)[:count]
    colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:count]]
    movers: list[Mover] = []
    for label, colour in zip(labels, colours, strict=True):
        size = float(rng.uniform(24, 30))
        if not _place(rng, movers, label=int(label), glyph=int(rng.choice(glyph_ids[label])), colour=colour, size=size):
            return None
    return _with_shapes(rng, movers)


def _sequence(rng: np.random.Generator, glyph_ids, count: int) -> list[Mover] | None:
    labels = rng.permutation(10)[:count]
    # Each digit is in view for at least two of the eight sampled frames; the borders fall between frames.
    frames = np.full(count, NUM_FRAMES // count)
    frames[rng.permutation(count)[: NUM_FRAMES % count]] += 1
    borders = (np.concatenate([[0], np.cumsum(frames)]) - 0.5) / (NUM_FRAMES - 1)
    movers: list[Mover] = []
    for i, label in enumerate(labels):
        look = dict(
            label=int(label),
            glyph=int(rng.choice(glyph_ids[label])),
            colour=str(rng.choice(list(COLOURS))),
            size=float(rng.uniform(24, 30)),
        )
        if not _place(rng, movers, on=float(borders[i]), off=float(borders[i + 1]), **look):
            return None
    return _with_shapes(rng, movers)


def _with_shapes(rng: np.random.Generator, movers: list[Mover]) -> list[Mover]:
    for _ in range(int(rng.integers(0, 3))):
        # A shape that finds no room is left out: nothing is ever asked about shapes.
        _place(
            rng,
            movers,
            label=-1,
            glyph=int(rng.integers(len(SHAPES))),
            colour=str(rng.choice(list(COLOURS))),
            size=float(rng.uniform(12, 20)),
        )
    return movers


def _place(rng: np.random.Generator, movers: list[Mover], *, size: float, **look) -> bool:
    """Appends a mover with a random axis-aligned path that keeps clear of the others; False if none is found."""
    tries = 40
    step = np.array(list(DIRECTIONS.values())[rng.integers(4)])  # drawn once, so that crowding cannot bias it
    travel = rng.uniform(26, 56, size=(tries, 1))
    room = np.maximum(FRAME_SIZE - size - travel * np.abs(step), 0)
    start = size / 2 + rng.random((tries, 2)) * room + travel * (step < 0)
    end = start + travel * step
    path = start[:, None] + (end - start)[:, None] * _U[:, None]  # [tries, frames, 2]
    clear = np.ones(tries, bool)
    on, off = look.get("on", -1.0), look.get("off", 2.0)
    for other in movers:
        together = (_U > max(on, other.on)) & (_U < min(off, other.off))
        other_path = np.array(other.start) + np.subtract(other.end, other.start) * _U[:, None]
        gap = np.abs(path - other_path).max(-1)
        clear &= (gap > 0.42 * (size + other.size))[:, together].all(-1)
    if not clear.any():
        return False
    i = int(clear.argmax())
    movers.append(Mover(size=size, start=tuple(start[i].tolist()), end=tuple(end[i].tolist()), **look))
    return True


def _ask(rng: np.random.Generator, kind: str, answer: str, **names: str) -> Question:
    phrasings = KINDS[kind][1]
    return Question(kind=kind, text=phrasings[rng.integers(len(phrasings))].format(**names), answer=answer)


def _crowd_questions(rng: np.random.Generator, digits: list[Mover]) -> list[Question]:
    asked = [digits[i] for i in rng.integers(len(digits), size=3)]
    dx, dy = np.sign(np.subtract(asked[2].end, asked[2].start)).astype(int)
    direction = next(name for name, step in DIRECTIONS.items() if step == (dx, dy))
    return [
        _ask(rng, "digit", str(asked[0].label), colour=asked[0].colour),
        _ask(rng, "colour", asked[1].colour, digit=str(asked[1].label)),
        _ask(rng, "count", COUNTS[len(digits)]),
        _ask(rng, "direction", direction, colour=asked[2].colour),
    ]


def _sequence_questions(rng: np.random.Generator, digits: list[Mover]) -> list[Question]:
    i = int(rng.integers(len(digits) - 1))
    return [
        _ask(rng, "first", str(digits[0].label)),
        _ask(rng, "last", str(digits[-1].label)),
        _ask(rng, "after", str(digits[i + 1].label), digit=str(digits[i].label)),
        _ask(rng, "total", COUNTS[len(digits)]),
    ]
