"""Line charts as small inline SVG: colours come from the page's style sheet, so one drawing serves light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 500, 370
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 44, 54
_MARKS = (  # one shape for each colour, so that neither is needed to tell curves apart
    '<circle r="4.5"/>',
    '<rect x="-4" y="-4" width="8" height="8"/>',
    '<path d="M0-5.5 5 4H-5Z"/>',
    '<path d="M0-6 6 0 0 6-6 0Z"/>',
    '<path d="M0 5.5-5-4H5Z"/>',
    '<path d="M-1.7-5.2h3.4v3.5h3.5v3.4h-3.5v3.5h-3.4v-3.5h-3.5v-3.4h3.5z"/>',
)
NUM_STYLES = len(_MARKS)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured setting: a place, the interval of its height, and what it says when pointed at."""

    x: float
    y: float
    low: float
    high: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Series:
    """A curve. `style` picks colour and mark (see `NUM_STYLES`), `key` names it in the style sheet."""

    key: str
    style: int
    points: tuple[Point, ...]


def mark(style: int) -> Markup:
    """The mark of a style, as an SVG of its own for legends."""
    return Markup('<svg class="mark" viewBox="-8 -8 16 16" aria-hidden="true">{}</svg>').format(
        Markup(_MARKS[style % NUM_STYLES])
    )


def line_chart(
    series: Sequence[Series],
    *,
    reference: Point,
    reference_label: str,
    description: str,
    x_title: str,
    y_title: str,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    log_x: bool = False,
    star: bool = False,
) -> Markup:
    """Curves of shares (0 to 1), their intervals shaded, and a horizontal line for what they are held against.

    Args:
        series: drawn in this order, so the most important one comes last.
        reference: height of the horizontal line.
        reference_label: stands on that line.
        description: for people who do not see the drawing.
        x_title, y_title: of the axes.
        x_text, y_text: how numbers of an axis are written.
        log_x: a logarithmic x axis; all x must be above 0.
        star: marks the reference's own x with a star.

    Returns:
        An `<svg>` element; all text is escaped.
    """
    points = [point for one in series for point in one.points]
    xs = [p.x for p in points] + [reference.x]
    left, right = (min(xs), max(xs)) if log_x else _padded(min(xs), max(xs))
    if left == right:
        left, right = left / 1.5, right * 1.5
    x_ticks = _log_ticks(left, right) if log_x else _ticks(left, right)
    heights = [v for p in [*points, reference] for v in (p.low, p.high)]
    y_ticks = [y for y in _ticks(min(heights), max(heights), outside=True) if y <= 1]
    bottom, top = y_ticks[0], y_ticks[-1]

    def scale_x(x: float) -> float:
        share = math.log(x / left) / math.log(right / left) if log_x else (x - left) / (right - left)
        return round(_LEFT + 8 + share * (WIDTH - _LEFT - _RIGHT - 16), 1)

    def scale_y(y: float) -> float:
        return round(HEIGHT - _BOTTOM - (y - bottom) / (top - bottom) * (HEIGHT - _TOP - _BOTTOM), 1)

    right_edge, floor = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for y in y_ticks:
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(_LEFT, scale_y(y), right_edge))
        parts.append(_text(_LEFT - 8, scale_y(y) + 4.5, y_text(y), "end"))
    for x in x_ticks:
        parts.append(Markup('<path class="tick" d="M{} {}v5"/>').format(scale_x(x), floor))
        parts.append(_text(scale_x(x), floor + 20, x_text(x), "middle"))
    parts.append(_text((_LEFT + right_edge) / 2, HEIGHT - 10, x_title, "middle", "title"))
    parts.append(_text(0, 14, y_title, "start", "title"))
    y, low, high = (scale_y(v) for v in (reference.y, reference.low, reference.high))
    parts.append(
        Markup('<rect class="all-band" x="{}" y="{}" width="{}" height="{}"/><path class="all" d="M{} {}H{}"/>').format(
            _LEFT, high, right_edge - _LEFT, round(low - high, 1), _LEFT, y, right_edge
        )
    )
    parts.append(_text(_LEFT + 6, y - 6, reference_label, "start", "all-label"))
    parts += [_series(one, scale_x, scale_y) for one in series]
    if star:
        parts.append(
            Markup('<g class="star" transform="translate({} {})"><title>{}</title>{}</g>').format(
                scale_x(reference.x),
                y,
                reference.title,
                Markup('<path d="M0-8 2-2.7 7.6-2.5 3.2 1 4.7 6.5 0 3.3-4.7 6.5-3.2 1-7.6-2.5-2-2.7Z"/>'),
            )
        )
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, description, Markup("").join(parts)
    )


def _series(one: Series, scale_x, scale_y) -> Markup:
    points = sorted(one.points, key=lambda p: p.x)
    line = [(scale_x(p.x), scale_y(p.y)) for p in points]
    band = [(scale_x(p.x), scale_y(p.high)) for p in points] + [(scale_x(p.x), scale_y(p.low)) for p in points[::-1]]
    marks = [
        Markup('<g transform="translate({} {})"><title>{}</title><circle class="hit" r="10"/>{}</g>').format(
            *place, point.title, Markup(_MARKS[one.style % NUM_STYLES])
        )
        for place, point in zip(line, points, strict=True)
    ]
    return Markup(
        '<g class="series {}"><polygon class="band" points="{}"/><polyline class="line" points="{}"/>{}</g>'
    ).format(one.key, _places(band), _places(line), Markup("").join(marks))


def _places(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in places)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        kind, x, round(y, 1), anchor, text
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.06 * (high - low)
    return max(0.0, low - room), high + room


def _ticks(low: float, high: float, outside: bool = False) -> list[float]:
    """Four to seven round numbers inside [low, high], or around it if `outside`."""
    span = (high - low) or max(abs(high), 1e-3)
    step = next(s for s in _steps(span / 100) if span / s <= 6)
    first, last = (math.floor, math.ceil) if outside else (math.ceil, math.floor)
    start, stop = first(low / step - 1e-9), last(high / step + 1e-9)
    stop = max(stop, start + 1) if outside else stop
    return [round(i * step, 12) for i in range(start, stop + 1)]


def _steps(start: float):
    power = math.floor(math.log10(start))
    while True:
        yield from (factor * 10.0**power for factor in (1, 2, 2.5, 5))
        power += 1


def _log_ticks(left: float, right: float) -> list[float]:
    """1, 2, 5, 10 ... inside the axis; its right end, all tokens, always has a tick and room for it."""
    first, last = math.floor(math.log10(left)), math.ceil(math.log10(right))
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    return [t for t in ticks if left * 0.999 <= t < right * 0.8] + [right]
