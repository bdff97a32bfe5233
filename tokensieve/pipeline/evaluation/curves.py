"""The two charts of a report: a score over visual tokens, and over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tokensieve.pipeline.evaluation import findings
from tokensieve.pipeline.evaluation.chart import NUM_STYLES, Point, Series, line_chart, mark
from tokensieve.pipeline.evaluation.wording import count, duration, percent, shortened

MAX_HIGHLIGHTED = 5  # curves in colour at first, when there are too many for all of them
DASHES = ("none", "8 4", "2 4", "10 3 2 3", "5 2")  # of curves that share colour and mark


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How a method is drawn: `key` is its class on the page, `shown` whether it is in colour at first."""

    name: str
    key: str
    style: int
    dash: str
    shown: bool

    @property
    def mark(self) -> Markup:
        return mark(self.style)


def curves(summary: Mapping) -> list[Curve]:
    """Every method, best at the smallest budget first."""
    ranked = [s["method"] for s in findings.smallest_budget(summary)]
    names = dict.fromkeys(ranked + [s["method"] for s in summary["settings"] if s["method"] is not None])
    num_shown = len(names) if len(names) <= NUM_STYLES else MAX_HIGHLIGHTED
    return [
        Curve(
            name=name,
            key=f"m{i}",
            style=i % NUM_STYLES,
            dash=DASHES[i // NUM_STYLES % len(DASHES)],
            shown=i < num_shown,
        )
        for i, name in enumerate(names)
    ]


def token_chart(
    summary: Mapping, settings: Sequence[Mapping], curves: Sequence[Curve], score_name: str
) -> Markup | None:
    """The main score over visual tokens; None if all tokens have no score. `settings` as in summary.json."""
    whole = findings.score_of(summary, findings.all_tokens(summary))
    if whole is None:
        return None
    reference = _point(summary, findings.all_tokens(summary), "visual_tokens_full")
    series = []
    for curve in curves[::-1]:
        points = [_point(summary, s, "visual_tokens") for s in settings if s["method"] == curve.name]
        points = [p for p in points if p is not None and p.x > 0]
        # keep=1 is all tokens for every method, so every curve ends there.
        series.append(Series(key=curve.key, style=curve.style, points=(*points, reference)))
    return line_chart(
        series,
        reference=reference,
        reference_label=f"all tokens: {percent(whole['mean'])}",
        description=f"{score_name} over mean visual tokens, a curve for each method. The table below has the numbers.",
        x_title="visual tokens per question",
        y_title=score_name,
        x_text=count,
        y_text=lambda share: f"{share * 100:g}\u202f%",
        log_x=True,
    )


def time_chart(
    summary: Mapping, settings: Sequence[Mapping], curves: Sequence[Curve], score_name: str
) -> Markup | None:
    """The main score over median total time; None without both for all tokens. `settings` have `seconds`."""
    timed = [s | {"total": s["seconds"]["total"]} for s in settings if s["seconds"]["total"] is not None]
    whole = [_point(summary, s, "total") for s in timed if s["method"] is None]
    if not whole or whole[0] is None:
        return None
    series = []
    for curve in curves[::-1]:
        points = [_point(summary, s, "total") for s in timed if s["method"] == curve.name]
        series.append(Series(key=curve.key, style=curve.style, points=tuple(p for p in points if p is not None)))
    unit, factor = ("s", 1) if max(s["total"] for s in timed) >= 1 else ("ms", 1000)
    return line_chart(
        [one for one in series if one.points],
        reference=whole[0],
        reference_label=f"all tokens: {percent(whole[0].y)}",
        description=f"{score_name} over median time per question, a curve for each method. The table has the numbers.",
        x_title=f"median time per question, {unit}",
        y_title=score_name,
        x_text=lambda seconds: f"{seconds * factor:g}",
        y_text=lambda share: f"{share * 100:g}\u202f%",
        star=True,
    )


def _point(summary: Mapping, setting: Mapping, x: str) -> Point | None:
    score = findings.score_of(summary, setting)
    if score is None:
        return None
    low, high = (score["mean"] if score[end] is None else score[end] for end in ("low", "high"))
    name = "all tokens" if setting["method"] is None else f"{shortened(setting['method'])}, keep {setting['keep']:g}"
    title = (
        f"{name}: {percent(score['mean'])} ({percent(low)} to {percent(high)}), "
        f"{count(setting['visual_tokens'])} of {count(setting['visual_tokens_full'])} visual tokens"
    )
    if x == "total":
        title += f", {duration(setting[x])}"
    return Point(x=setting[x], y=score["mean"], low=low, high=high, title=title)
