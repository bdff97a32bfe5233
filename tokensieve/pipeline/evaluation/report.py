"""`report.html`: what an evaluation found, as one page that a person can read without the docs and without a network.

Questions, answers and names come from manifests and models and are untrusted: the template escapes them, and the page
forbids every fetch and every script but its own (Content-Security-Policy).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tokensieve.pipeline.evaluation import findings
from tokensieve.pipeline.evaluation.curves import Curve, curves, time_chart, token_chart
from tokensieve.pipeline.evaluation.extremes import Extremes, Frame
from tokensieve.pipeline.evaluation.store import write_whole
from tokensieve.pipeline.evaluation.wording import count, duration, listed, percent, points, shortened

MAX_KINDS = 12  # columns of the tables by kind
FULL_SHADE = 0.3  # loss with the strongest colour
PARTS = ("read", "encode", "select", "generate", "total")


def write_report(out_dir: Path, extremes: Mapping[str, Extremes] | None = None, command: str = "") -> Path:
    """Writes `OUT/report.html` from `summary.json`, `timings.json` and `run.json` beside it.

    Args:
        out_dir: the folder of a finished evaluation.
        extremes: what `draw_extremes` returns, by method; left out, the page has no clips.
        command: repeats the evaluation when it is typed into a shell.

    Returns:
        The page's path. Equal input gives equal bytes.
    """
    read = {
        name: json.loads((out_dir / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("summary", "timings", "run")
    }
    path = out_dir / "report.html"
    text = page(**read, extremes=extremes or {}, command=command)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def page(
    *, summary: Mapping, timings: Mapping, run: Mapping, extremes: Mapping[str, Extremes], command: str = ""
) -> str:
    """The page as text, from the files of an evaluation as they were read."""
    reference = findings.all_tokens(summary)
    settings = _with_times(summary["settings"], timings, reference["setting"])
    methods = curves(summary)
    kinds = Counter({kind: cell["n"] for kind, cell in reference["kinds"].items()})
    score_name, meaning = findings.SCORES.get(summary["main_score"], (summary["main_score"], "a score of its own"))
    environment = _environment(_range(summary))
    script = environment.loader.get_source(environment, "page.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        summary=summary,
        settings=sorted(settings, key=lambda s: (s["method"] is not None, -s["keep"], _descending(summary, s))),
        reference=reference,
        methods=methods,
        measured=_measured(summary, methods, score_name, meaning),
        finding=findings.key_finding(summary),
        loss=findings.loss_finding(summary),
        score_name=score_name,
        score_meaning=meaning,
        other_scores=[name for name in summary["scores"] if name != summary["main_score"]],
        token_chart=token_chart(summary, settings, methods, score_name),
        parts=PARTS,
        time_chart=time_chart(summary, settings, methods, score_name),
        kinds=kinds.most_common(MAX_KINDS),
        kinds_left_out=max(0, len(kinds) - MAX_KINDS),
        budgets=_budgets(summary) if kinds else [],
        extremes=_extremes(extremes, methods),
        machine=timings["machine"],
        command=command,
        facts=_flat(run),
        style=Markup(environment.loader.get_source(environment, "style.css")[0]),
        script=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),
    )


def _with_times(settings: Sequence[Mapping], timings: Mapping, whole: int) -> list[dict]:
    """Settings with their median seconds, None where there are none, and how much faster than all tokens they are."""
    seconds = {timed["setting"]: timed["seconds"] for timed in timings["settings"]}
    base = seconds.get(whole, {}).get("total")
    merged = []
    for setting in settings:
        mine = {part: seconds.get(setting["setting"], {}).get(part) for part in PARTS}
        speedup = base / mine["total"] if base and mine["total"] and setting["setting"] != whole else None
        merged.append({**setting, "seconds": mine, "speedup": speedup})
    return merged


def _descending(summary: Mapping, setting: Mapping) -> float:
    score = findings.score_of(summary, setting)
    return -score["mean"] if score else 1.0


def _measured(summary: Mapping, methods: Sequence[Curve], score_name: str, meaning: str) -> str:
    """One plain sentence, and one that says what the score means."""
    keeps = sorted({s["keep"] for s in summary["settings"] if s["method"] is not None}, reverse=True)
    budgets = f", at keep {listed([f'{keep:g}' for keep in keeps])}" if keeps else ""
    fewer = f" and again with fewer, chosen by {_number(len(methods), 'method')}{budgets}" if methods else ""
    return (
        f"{_number(summary['questions'], 'question')} about {_number(summary['clips'], 'clip')} "
        f"({shortened(summary['data'])}) were answered with all visual tokens{fewer}. "
        f"Accuracy here is {score_name}: {meaning}."
    )


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _budgets(summary: Mapping) -> list[dict]:
    """Settings by budget, the smallest first, each best first."""
    tried = [s for s in summary["settings"] if s["method"] is not None and findings.score_of(summary, s)]
    tried.sort(key=lambda s: _descending(summary, s))
    fewest = {
        keep: min(s["visual_tokens"] for s in tried if s["keep"] == keep)
        for keep in dict.fromkeys(s["keep"] for s in tried)
    }
    return [
        {"keep": keep, "settings": [s for s in tried if s["keep"] == keep]} for keep in sorted(fewest, key=fewest.get)
    ]


def _extremes(extremes: Mapping[str, Extremes], methods: Sequence[Curve]) -> list[tuple[str, Extremes]]:
    """In the order of the methods."""
    return [(method.name, extremes[method.name]) for method in methods if method.name in extremes]


def _flat(values: Mapping, before: str = "") -> list[tuple[str, str]]:
    """Nested JSON as names and texts, for the list of options."""
    facts = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            facts += _flat(value, f"{before}{name}.")
        else:
            facts.append((f"{before}{name}", value if isinstance(value, str) else json.dumps(value)))
    return facts


def _range(summary: Mapping) -> tuple[float, float]:
    """Lowest and highest end of all intervals, for the small ones in the table."""
    scores = [findings.score_of(summary, s) for s in summary["settings"]]
    ends = [score[end] for score in scores if score for end in ("low", "mean", "high") if score[end] is not None]
    return (min(ends), max(ends)) if ends and min(ends) < max(ends) else (0.0, 1.0)


def _environment(ends: tuple[float, float]) -> Environment:
    environment = Environment(
        loader=PackageLoader("tokensieve", "assets/report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "bare": lambda share: f"{share * 100:.1f}",
        "points": points,
        "count": count,
        "short": shortened,
        "duration": duration,
        "opening": lambda text: text[:1].upper() + text[1:],
        "blank": lambda value: "" if value is None else value,
        "data_uri": _data_uri,
        "shade": _shade,
        "direction": _direction,
        "place": lambda share: round(100 * (share - ends[0]) / (ends[1] - ends[0]), 1),
    }
    return environment


def _data_uri(frame: Frame) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(frame.jpeg).decode()


def _shade(cell: Mapping | None, whole: Mapping | None) -> Markup:
    """The style of a table cell: the more was lost or gained against all tokens, the stronger its colour."""
    if not cell or not whole or cell["mean"] is None or whole["mean"] is None:
        return Markup("")
    change = cell["mean"] - whole["mean"]
    return Markup(' style="--{}:{}"').format(
        "gain" if change > 0 else "loss", round(min(1.0, abs(change) / FULL_SHADE), 2)
    )


def _direction(difference: Mapping) -> str:
    """Class of a difference whose interval does not reach 0."""
    if difference["low"] is None:
        return ""
    return "worse" if difference["high"] < 0 else "better" if difference["low"] > 0 else ""
