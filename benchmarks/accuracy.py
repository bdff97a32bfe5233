"""Exact match of the shipped model on generated clips, for every method and budget, with blind baselines.

    python benchmarks/accuracy.py --clips 500 --out docs/benchmarks/accuracy.md

Every clip is encoded once; each method then selects from the same visual tokens and the model generates its
answer greedily. Intervals are 95 % Wilson intervals over questions.
"""

from __future__ import annotations

import argparse
import platform
from collections import Counter, defaultdict
from math import sqrt
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track

import tokensieve as ts
from tokensieve.datasets.clip_files import clip_frames
from tokensieve.datasets.clips import COUNTS, DIRECTIONS, KINDS, make_clip

KEEPS = (0.5, 0.25, 0.1, 0.05)
BATCH = 32  # clips
NUM_GUESSED = 4000  # clips for the baselines that need no model


def answers(vlm, prepared, keep=1.0, method=None) -> list[str]:
    """Greedy answers of a batch that is encoded already."""
    prepared = vlm.compress(method, keep).reselect(prepared)
    ids = vlm.model.generate(**prepared, max_new_tokens=4, do_sample=False)
    return vlm.processor.batch_decode(ids[:, prepared["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def evaluate(vlm, clips, settings) -> dict[tuple, Counter]:
    """`(kind, right)` counts per setting; settings are `(method or None, keep)` and the two blind ones."""
    score: dict[tuple, Counter] = defaultdict(Counter)
    for first in track(range(0, len(clips), BATCH), "clips", console=Console(stderr=True)):
        batch = clips[first : first + BATCH]
        frames = [clip_frames(clip) for clip in batch]
        for turn in range(max(len(clip.questions) for clip in batch)):
            asked = [clip.questions[turn] for clip in batch]

            def tally(setting, texts, asked=asked):
                for question, text in zip(asked, texts, strict=True):
                    score[setting][question.kind, text.strip() == question.answer] += 1

            prepared = vlm.prepare(frames, [q.text for q in asked])
            for method, keep in settings:
                tally((method, keep), answers(vlm, prepared, keep, method))
            grey = [ts.Frames(data=f.data * 0 + 90, times_s=f.times_s, duration_s=2.0, source="grey") for f in frames]
            tally("image-blind: the model sees grey frames", answers(vlm, vlm.prepare(grey, [q.text for q in asked])))
            tally("question-blind: the model is asked “?”", answers(vlm, vlm.prepare(frames, ["?"] * len(asked))))
    return score


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


def row(name: str, keep: str, counts: Counter) -> str:
    right, total = (sum(n for (_, ok), n in counts.items() if ok in wanted) for wanted in ((True,), (True, False)))
    p, z = right / total, 1.96
    centre, half = (
        (p + z * z / (2 * total)) / (1 + z * z / total),
        z * sqrt(p * (1 - p) / total + z * z / (4 * total**2)),
    )
    half /= 1 + z * z / total
    kinds = [f"{100 * counts[k, True] / (counts[k, True] + counts[k, False]):.1f}" for k in KINDS]
    return f"| {name} | {keep} | **{100 * p:.1f}** ({100 * (centre - half):.1f}–{100 * (centre + half):.1f}) | " + (
        " | ".join(kinds) + " |"
    )


def report(clips, score, model: str, split: str) -> str:
    questions = sum(len(clip.questions) for clip in clips)
    head = f"| method | keep | all kinds, % (95 % interval) | {' | '.join(KINDS)} |\n|---|---|---|{'---|' * len(KINDS)}"
    full = [s for s in score if isinstance(s, tuple) and s[0] is None]
    blind = [s for s in score if isinstance(s, str)]
    rest = [s for s in score if isinstance(s, tuple) and s[0] is not None]
    lines = [row("all tokens", "1", score[s]) for s in full]
    lines += [row(s[0], f"{s[1]:g}", score[s]) for s in sorted(rest, key=lambda s: (-s[1], s[0]))]
    lines += [row(s, "1", score[s]) for s in blind]
    many = [make_clip(split, i) for i in range(NUM_GUESSED)]
    lines.append(row(f"image-blind: most frequent answer to the question ({NUM_GUESSED} clips)", "-", prior(many)))
    lines.append(row(f"question-blind: any true answer about the clip ({NUM_GUESSED} clips)", "-", blind_oracle(many)))
    guess = " | ".join(f"{100 * chance(kind):.1f}" for kind in KINDS)
    return "\n".join(
        [
            f"Model `{model}`, split `{split}`, {len(clips)} clips, {questions} questions, exact match, greedy.",
            f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), float32, batches of {BATCH} clips, "
            f"torch {torch.__version__}, transformers {transformers.__version__}, tokensieve {ts.__version__}.",
            "",
            head,
            *lines,
            f"| uniform guess | - | | {guess} |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--split", default="test")
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default=",".join(m.name for m in ts.list_methods("projector")))
    parser.add_argument("--keeps", default=",".join(map(str, KEEPS)))
    parser.add_argument("--out", default="", help="Markdown file; its first paragraph is kept, the table replaced")
    options = parser.parse_args()
    methods = [m for m in options.methods.split(",") if m]
    settings = [(None, 1.0)] + [(m, float(k)) for k in options.keeps.split(",") for m in methods]
    clips = [make_clip(options.split, i, options.seed) for i in range(options.clips)]
    text = report(clips, evaluate(ts.load(options.model), clips, settings), options.model, options.split)
    print(text)
    if options.out:
        path = Path(options.out)
        start = path.read_text().split("\n\nModel `")[0] if path.exists() else "# Accuracy of the shipped model"
        path.write_text(f"{start}\n\n{text}\n")


if __name__ == "__main__":
    main()
