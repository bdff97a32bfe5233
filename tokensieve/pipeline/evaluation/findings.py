"""What an evaluation says, in words: the sentences at the top of its report, computed from summary.json."""

from __future__ import annotations

from collections.abc import Mapping

from tokensieve.pipeline.evaluation.wording import count, percent, points, shortened

Setting = Mapping[str, object]

# name -> (what it is called, what it means)
SCORES = {
    "exact": ("exact match", "the share of answers that are a right answer, whatever their case and punctuation"),
    "contains": ("answers that contain the right one", "the share of answers in which a right answer is found"),
    "anls": ("ANLS", "how near each answer's spelling comes to a right answer (0 when less than half of it fits)"),
    "rouge-l": ("ROUGE-L", "how much of the right answer's word order each answer shares (F-measure)"),
    "choice-letter": ("right choice by letter", "the share of questions where the answer names the right choice"),
    "choice-likelihood": (
        "right choice by likelihood",
        "the share of questions where the model finds the right choice the likeliest",
    ),
}


def score_of(summary: Mapping, setting: Setting) -> Mapping | None:
    """The main score of a setting, None if nothing could be scored."""
    score = setting["scores"].get(summary["main_score"])
    return score if score and score["mean"] is not None else None


def all_tokens(summary: Mapping) -> Setting:
    """The setting without a method."""
    return next(s for s in summary["settings"] if s["method"] is None)


def smallest_budget(summary: Mapping) -> list[Setting]:
    """The scored settings at the smallest budget, best first; equal ones in the order of the summary."""
    scored = [s for s in summary["settings"] if s["method"] is not None and score_of(summary, s)]
    if not scored:
        return []
    keep = min(scored, key=lambda s: s["visual_tokens"])["keep"]
    return sorted((s for s in scored if s["keep"] == keep), key=lambda s: -score_of(summary, s)["mean"])


def without_loss(summary: Mapping) -> Setting | None:
    """The setting with the fewest visual tokens whose paired difference does not lie wholly below 0."""
    fine = [s for s in _compared(summary) if score_of(summary, s)["difference"]["high"] >= 0]
    return min(fine, key=lambda s: (s["visual_tokens"], -score_of(summary, s)["mean"]), default=None)


def _compared(summary: Mapping) -> list[Setting]:
    """The settings whose difference from all tokens has an interval."""
    scores = [(s, score_of(summary, s)) for s in summary["settings"] if s["method"] is not None]
    return [s for s, score in scores if score and score["difference"] and score["difference"]["high"] is not None]


def key_finding(summary: Mapping) -> str:
    """Which method keeps most at the smallest budget, and whether the next one can be told from it."""
    ranked = smallest_budget(summary)
    if not ranked:
        return "Only all visual tokens were tried, so there is nothing to compare yet."
    best, full = ranked[0], all_tokens(summary)
    mine, whole = score_of(summary, best), score_of(summary, full)
    text = (
        f"With {count(best['visual_tokens'])} of {count(best['visual_tokens_full'])} visual tokens "
        f"(keep {best['keep']:g}), {shortened(best['method'])} keeps most: {percent(mine['mean'])}"
    )
    text += f" against {percent(whole['mean'])} with all tokens." if whole else "."
    if len(ranked) == 1:
        return text
    following = ranked[1]
    its = score_of(summary, following)
    text += f" The next best, {shortened(following['method'])}, reaches {percent(its['mean'])}"
    if its["high"] is None or mine["low"] is None:
        return text + "; one clip does not tell how much of that is chance."
    if its["high"] >= mine["low"]:
        return text + "; their intervals overlap, so this run does not settle which of the two is better."
    return text + "; their intervals do not overlap."


def loss_finding(summary: Mapping) -> str:
    """How few tokens will do without a measurable loss."""
    if not _compared(summary):
        return ""
    setting = without_loss(summary)
    if setting is None:
        return "Every method lost measurably at every budget that was tried."
    difference = score_of(summary, setting)["difference"]
    tokens, method = count(setting["visual_tokens"]), shortened(setting["method"])
    return (
        f"The fewest tokens at which these questions show no measurable loss: {tokens}, by {method} at keep "
        f"{setting['keep']:g}. It scores {points(difference['mean'])} points against all tokens, 95\u202f% interval "
        f"{points(difference['low'])} to {points(difference['high'])}."
    )
