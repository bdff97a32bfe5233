"""Exact match of the shipped model on generated clips, for every method and budget, with blind baselines.

    python benchmarks/accuracy.py --clips 400 --out docs/benchmarks/accuracy.md --page docs/results.md

Every clip is encoded once; each method then selects from the same visual tokens and the model generates its
answer greedily. Methods in the vision tower encode anew. Intervals are 95 % Wilson intervals over questions.
Methods that need a trained policy are left out for a model that comes without one.
"""

from __future__ import annotations

import argparse
import platform
from collections import Counter, defaultdict
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track

import tokensieve as ts
from tokensieve.datasets.clip_files import clip_frames
from tokensieve.datasets.clips import COUNTS, DIRECTIONS, KINDS, make_clip
from tokensieve.pipeline.evaluation.statistics import wilson
from tokensieve.policies.checkpoint import load_policy

KEEPS = (0.5, 0.25, 0.1, 0.05)
PAGE_KEEPS = (0.25, 0.1, 0.05)  # of the short table in docs/results.md
PAGE_MARKS = ("<!-- accuracy: written by benchmarks/accuracy.py -->", "<!-- end of accuracy -->")
BATCH = 32  # clips
NUM_GUESSED = 4000  # clips for the baselines that need no model


def generate(vlm, prepared) -> list[str]:
    """Greedy answers of a batch under the compression in force."""
    ids = vlm.model.generate(**prepared, max_new_tokens=4, do_sample=False)
    return vlm.processor.batch_decode(ids[:, prepared["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def evaluate(vlm, clips, settings, policies=()) -> tuple[dict[tuple, Counter], dict[tuple, tuple[float, float]]]:
    """`(kind, right)` counts per setting, and its mean visual tokens in the first and in the last decoder layer.

    Settings are `(method or None, keep)`; the two blind ones are added. A method may be the name of one of the
    `policies`, trained scorers by name, which `cacovid` then selects with.
    """
    score: dict[tuple, Counter] = defaultdict(Counter)
    tokens: dict[tuple, list[tuple[int, int]]] = defaultdict(list)
    for first in track(range(0, len(clips), BATCH), "clips", console=Console(stderr=True)):
        batch = clips[first : first + BATCH]
        frames = [clip_frames(clip) for clip in batch]
        for turn in range(max(len(clip.questions) for clip in batch)):
            asked = [clip.questions[turn] for clip in batch]

            def tally(setting, texts, asked=asked):
                for question, text in zip(asked, texts, strict=True):
                    score[setting][question.kind, text.strip() == question.answer] += 1

            questions = [q.text for q in asked]
            prepared = vlm.compress(None).prepare(frames, questions, needs={"tower", "question"})
            for method, keep in settings:
                own = {"policy": policies[method]} if method in policies else {}
                name = "cacovid" if method in policies else method
                if method is not None and ts.get_method(name).place == "tower":
                    shorter = vlm.compress(name, keep).prepare(frames, questions)
                else:
                    shorter = vlm.compress(name, keep, **own).reselect(prepared)
                tally((method, keep), generate(vlm, shorter))
                entered = [shorter.visual_tokens(row)["kept"] for row in range(len(batch))]
                left = vlm.last_layer_tokens() or entered
                tokens[method, keep] += zip(entered, left, strict=True)
            vlm.compress(None)
            grey = [ts.Frames(data=f.data * 0 + 90, times_s=f.times_s, duration_s=2.0, source="grey") for f in frames]
            tally("image-blind: the model sees grey frames", generate(vlm, vlm.prepare(grey, [q.text for q in asked])))
            tally("question-blind: the model is asked “?”", generate(vlm, vlm.prepare(frames, ["?"] * len(asked))))
    means = {setting: tuple(sum(of) / len(of) for of in zip(*kept, strict=True)) for setting, kept in tokens.items()}
    return score, means


def prior(clips, train_clips: int = 5000) -> Counter:
    """The best guess from the question's text alone: the most frequent answer to it in the training split."""
    seen: dict[str, Counter] = defaultdict(Counter)
    for i in range(train_clips):
        for question in make_clip("train", i).questions:
            seen[question.text][question.answer] += 1
    score = Counter()
    for clip in clips:
        for q in clip.questions:
            guess = seen[q.text].most_common(1)[0][0] if q.text in seen else ""
            score[q.kind, guess == q.answer] += 1
    return score


def blind_oracle(clips) -> Counter:
    """What seeing everything is worth without the question: a true answer about the clip, drawn at random."""
    score = Counter()
    for clip in clips:
        for q in clip.questions:
            for guess in clip.questions:
                score[q.kind, guess.answer == q.answer] += 1
    return score


def chance(kind: str) -> float:
    """Share that a uniform guess among the possible answers of a kind gets."""
    sizes = {"colour": 5, "count": len(COUNTS) - 1, "direction": len(DIRECTIONS), "total": 3}
    return 1 / sizes.get(kind, 10)


def share(counts: Counter) -> tuple[float, int]:
    """Share of right answers, and how many there were."""
    total = sum(counts.values())
    return sum(n for (_, right), n in counts.items() if right) / total, total


def row(name: str, keep: str, counts: Counter, tokens: tuple[float, float] | None = None) -> str:
    p, total = share(counts)
    low, high = wilson(sum(n for (_, right), n in counts.items() if right), total)
    kinds = [f"{100 * counts[k, True] / (counts[k, True] + counts[k, False]):.1f}" for k in KINDS]
    shown = [] if tokens is None else list(dict.fromkeys(f"{mean:.0f}" for mean in tokens))
    cells = [name, keep, " → ".join(shown) or "-", f"**{100 * p:.1f}** ({100 * low:.1f}–{100 * high:.1f})", *kinds]
    return f"| {' | '.join(cells)} |"


def machine() -> str:
    return (
        f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), float32, batches of {BATCH} clips, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, tokensieve {ts.__version__}."
    )


def report(clips, score, tokens, model: str, split: str) -> str:
    questions = sum(len(clip.questions) for clip in clips)
    head = (
        f"| method | keep | visual tokens, first → last layer | all kinds, % (95 % interval) | "
        f"{' | '.join(KINDS)} |\n|---|---|---|---|{'---|' * len(KINDS)}"
    )
    full = [s for s in score if isinstance(s, tuple) and s[0] is None]
    blind = [s for s in score if isinstance(s, str)]
    rest = [s for s in score if isinstance(s, tuple) and s[0] is not None]
    lines = [row("all tokens", "1", score[s], tokens[s]) for s in full]
    lines += [row(s[0], f"{s[1]:g}", score[s], tokens[s]) for s in sorted(rest, key=lambda s: (-s[1], s[0]))]
    lines += [row(s, "1", score[s]) for s in blind]
    many = [make_clip(split, i) for i in range(NUM_GUESSED)]
    lines.append(row(f"image-blind: most frequent answer to the question ({NUM_GUESSED} clips)", "-", prior(many)))
    lines.append(row(f"question-blind: any true answer about the clip ({NUM_GUESSED} clips)", "-", blind_oracle(many)))
    guess = " | ".join(f"{100 * chance(kind):.1f}" for kind in KINDS)
    return "\n".join(
        [
            f"Model `{model}`, split `{split}`, {len(clips)} clips, {questions} questions, exact match, greedy.",
            machine(),
            "",
            head,
            *lines,
            f"| uniform guess | - | - | | {guess} |",
        ]
    )


def short_table(clips, score, model: str) -> str:
    """Accuracy of every method at the budgets of `PAGE_KEEPS`, the best first."""
    questions = sum(len(clip.questions) for clip in clips)
    methods = {s[0] for s in score if isinstance(s, tuple) and s[0] is not None}
    per_method = {m: [100 * share(score[m, keep])[0] for keep in PAGE_KEEPS] for m in methods}
    full = 100 * share(score[None, 1.0])[0]
    lines = [
        f"Exact match in %, {questions} questions about {len(clips)} test clips, model `{model}` "
        f"({full:.1f} % with all tokens), {machine()}",
        "",
        f"| method | place | {' | '.join(f'keep {keep:g}' for keep in PAGE_KEEPS)} |",
        f"|---|---|{'---|' * len(PAGE_KEEPS)}",
    ]
    for method in sorted(methods, key=lambda m: -sum(per_method[m])):
        cells = " | ".join(f"{p:.1f}" for p in per_method[method])
        place = ts.get_method(method).place if method in method_names() else "projector"
        lines.append(f"| `{method}` | {place} | {cells} |")
    return "\n".join(lines)


def method_names() -> set[str]:
    return {m.name for m in ts.list_methods()}


def fill_page(path: Path, text: str) -> None:
    """Replaces what stands between the two marks of a page."""
    before, rest = path.read_text().split(PAGE_MARKS[0])
    _, after = rest.split(PAGE_MARKS[1])
    path.write_text(f"{before}{PAGE_MARKS[0]}\n{text}\n{PAGE_MARKS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--split", default="test")
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default="", help="with commas; all that the model has what they need for")
    parser.add_argument("--keeps", default=",".join(map(str, KEEPS)))
    parser.add_argument("--policies", nargs="*", default=[], help="trained policies: NAME=FOLDER ...")
    parser.add_argument("--out", default="", help="Markdown file; its first paragraph is kept, the table replaced")
    parser.add_argument("--page", default="", help="Markdown file with the two marks for the short table")
    options = parser.parse_args()
    vlm = ts.load(options.model)
    methods = [m for m in options.methods.split(",") if m] or [
        m.name for m in ts.list_methods() if "policy" not in m.needs or vlm.policy is not None
    ]
    policies = {name: load_policy(folder) for name, folder in (p.split("=", 1) for p in options.policies)}
    methods += policies
    settings = [(None, 1.0)] + [(m, float(k)) for k in options.keeps.split(",") for m in methods]
    clips = [make_clip(options.split, i, options.seed) for i in range(options.clips)]
    score, tokens = evaluate(vlm, clips, settings, policies)
    text = report(clips, score, tokens, options.model, options.split)
    print(text)
    if options.out:
        path = Path(options.out)
        start = path.read_text().split("\n\nModel `")[0] if path.exists() else "# Accuracy of the shipped model"
        path.write_text(f"{start}\n\n{text}\n")
    if options.page:
        fill_page(Path(options.page), short_table(clips, score, options.model))


if __name__ == "__main__":
    main()
