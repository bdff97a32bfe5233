"""Trained policies on the shipped model, three seeds each: trains them, evaluates them on the test split, draws curves.

    python benchmarks/policies.py train --jobs 2       # into runs/policies; what is there already is left alone
    python benchmarks/policies.py evaluate --clips 400 --out docs/benchmarks/policies.md
    python benchmarks/policies.py draw --out docs/pictures/learning.png    # needs matplotlib

An answer counts where greedy generation would say exactly the right one; that is found by teacher forcing (see
`tokensieve.pipeline.policy.judging`). Rows of training-free methods come from docs/benchmarks/accuracy.md, of the same
clips.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track

import tokensieve as ts

RANK = "rank --data.clips 900 --data.batch 3 --model.lr 0.004 --max_steps 300"
CACOVID = (
    "cacovid --data.clips 1200 --data.batch 3 --model.scorer cacovid --model.reward loglik --model.rounds 1 "
    "--model.rate 0.04 --model.min_rate 0.04 --model.max_rate 0.04 --model.token_subsets 16 --model.frame_subsets 8 "
    "--max_steps 800"
)
DISTIL = (
    "distil --data.clips 800 --data.batch 4 --model.lr 0.003 --model.first_heat 0.3 --model.last_heat 0.1 "
    "--model.min_keep 0.02 --model.max_keep 0.1 --max_steps 1500"
)
SETUPS = {
    "distil": ("light scorer, distilled (no labels)", DISTIL),
    "rank": ("light scorer, ranking", RANK),
    "cacovid": ("CaCoVID scorer, bidirectional", CACOVID),
    "cacovid-causal": ("CaCoVID scorer, causal: question-blind", CACOVID + " --model.attention causal"),
    "distil-blind": ("light scorer, distilled, question-blind", DISTIL + " --model.question_aware false"),
}
SEEDS = (0, 1, 2)
KEEPS = (0.25, 0.1, 0.05)
FOLDER = Path("runs/policies")
ACCURACY = Path("docs/benchmarks/accuracy.md")


def train(jobs: int, setups: list[str]) -> None:
    """All trainings of these set-ups that are not there yet, `jobs` at a time, one thread each."""

    def run(name: str, words: str, seed: int) -> None:
        out = FOLDER / f"{name}-{seed}"
        if (out / "policy").exists():
            return
        shutil.rmtree(out, ignore_errors=True)  # one that was cut off starts anew, so that its time can be told
        out.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        command = [sys.executable, "-c", "import sys; from tokensieve.cli import main; sys.exit(main())", "train"]
        options = f"{words} --model.seed {seed} --data.seed {seed} --trainer.val_check_interval 100"
        with open(f"{out}.log", "w") as log:
            subprocess.run(
                [*command, *options.split(), "--out", str(out), "--trainer.enable_progress_bar", "false"],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                check=True,
            )
        (out / "seconds.json").write_text(json.dumps(time.perf_counter() - start))
        print(f"{out}: {time.perf_counter() - start:.0f} s", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(run, name, SETUPS[name][1], seed) for seed in SEEDS for name in setups]
        for job in waiting:
            job.result()


@torch.no_grad()
def evaluate(clips: int) -> dict[tuple[str, int, float], float]:
    """Share of right answers per set-up, seed and budget."""
    from tokensieve.compression import get_method
    from tokensieve.datasets.clip_files import clip_frames
    from tokensieve.datasets.clips import make_clip
    from tokensieve.pipeline.policy.judging import subset_rewards
    from tokensieve.pipeline.policy.samples import encode_samples
    from tokensieve.pipeline.policy.scoring import SubsetScorer
    from tokensieve.policies.checkpoint import load_policy

    vlm, method, bar = ts.load("tiny", device="cpu"), get_method("cacovid"), Console(stderr=True)
    judge, samples = SubsetScorer(vlm), []
    for clip in track([make_clip("test", i) for i in range(clips)], "clips", console=bar):
        questions, answers = [q.text for q in clip.questions], [q.answer for q in clip.questions]
        samples += encode_samples(vlm, clip_frames(clip), questions, answers)
    found = {}
    folders = [(name, seed, FOLDER / f"{name}-{seed}" / "policy") for name in SETUPS for seed in SEEDS]
    for name, seed, folder in track([f for f in folders if f[2].exists()], "policies", console=bar):
        policy = load_policy(folder)
        for keep in KEEPS:
            right = 0.0
            for sample in samples:
                mask_N = method(sample.tokens, keep, policy=policy).mask()
                right += float(subset_rewards(judge, sample, mask_N[None], "match")[0])
            found[name, seed, keep] = right / len(samples)
    return found


def training_free() -> dict[str, dict[float, float]]:
    """Percent per method and budget, from the accuracy page."""
    found: dict[str, dict[float, float]] = defaultdict(dict)
    for line in ACCURACY.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 4 and cells[3].startswith("**") and cells[1] != "-":
            found[cells[0]][float(cells[1])] = float(cells[3].split("**")[1])
    return found


def report(found: dict[tuple[str, int, float], float], clips: int) -> str:
    free = training_free()
    full = free.pop("all tokens")[1.0]
    rows = []
    for name, (label, _) in SETUPS.items():
        seeds = [seed for seed in SEEDS if (name, seed, KEEPS[0]) in found]
        if not seeds:
            continue
        cells, means = [], []
        for keep in KEEPS:
            values = [100 * found[name, seed, keep] for seed in seeds]
            means.append(sum(values) / len(values))
            cells.append(f"**{means[-1]:.1f}** ({min(values):.1f}–{max(values):.1f})")
        minutes = [json.loads((FOLDER / f"{name}-{s}" / "seconds.json").read_text()) / 60 for s in seeds]
        count = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
        cells.append(f"{count}, {sum(minutes) / len(minutes):.0f} min each")
        rows.append((means[-1], f"| {label} | {' | '.join(cells)} |"))
    for method, by_keep in free.items():
        if all(keep in by_keep for keep in KEEPS):
            cells = [f"{by_keep[keep]:.1f}" for keep in KEEPS]
            rows.append((by_keep[KEEPS[-1]], f"| `{method}` | {' | '.join(cells)} | - |"))
    rows.sort(key=lambda row: -row[0])
    return "\n".join(
        [
            f"Model `tiny`, split `test`, {clips} clips, exact match in %, {full:.1f} % with all tokens; mean and "
            f"range of the seeds. {platform.machine()} CPU, float32, torch {torch.__version__}, transformers "
            f"{transformers.__version__}, tokensieve {ts.__version__}.",
            "",
            f"| policy or method | {' | '.join(f'keep {keep:g}' for keep in KEEPS)} | training |",
            f"|---|{'---|' * len(KEEPS)}---|",
            *(row for _, row in rows),
        ]
    )


def draw(out: str) -> None:
    """Validation accuracy at the smallest budget over optimizer steps: the mean of the seeds, and every seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Okabe and Ito's palette, told apart with colour-blind eyes.
    colours = ["#0072B2", "#009E73", "#D55E00", "#E69F00", "#56B4E9"]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for axis, keep in zip(axes, (0.1, 0.05), strict=True):
        for colour, (name, (label, _)) in zip(colours, SETUPS.items(), strict=True):
            curves = []
            for seed in SEEDS:
                points = _curve(FOLDER / f"{name}-{seed}", f"val_match_keep{keep:g}")
                if points:
                    curves.append(points)
                    axis.plot(*zip(*points, strict=True), color=colour, alpha=0.3, linewidth=1)
            if curves:
                steps = [step for step, _ in curves[0]]
                means = [sum(curve[i][1] for curve in curves) / len(curves) for i in range(len(steps))]
                axis.plot(
                    steps, means, color=colour, linewidth=2, marker="o", markersize=3, label=label.replace("`", "")
                )
        axis.set(title=f"{100 * keep:g} % of the visual tokens", xlabel="optimizer steps")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("right answers, validation clips, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(out, dpi=110)


def _curve(folder: Path, column: str) -> list[tuple[int, float]]:
    """`(steps, percent)` of the last log of a run."""
    logs = sorted(folder.glob("logs/version_*/metrics.csv"))
    if not logs:
        return []
    with open(logs[-1]) as file:
        return [(int(row["step"]) + 1, 100 * float(row[column])) for row in csv.DictReader(file) if row.get(column)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "evaluate", "draw"])
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--setups", default=",".join(SETUPS), help="which to train")
    parser.add_argument("--clips", type=int, default=400, help="of the test split")
    parser.add_argument("--out", default="", help="Markdown page (its first paragraphs stay), or picture")
    options = parser.parse_args()
    if options.what == "train":
        if unknown := set(setups := options.setups.split(",")) - set(SETUPS):
            parser.error(f"--setups: {sorted(unknown)} unknown; there are {', '.join(SETUPS)}")
        train(options.jobs, setups)
    elif options.what == "draw":
        draw(options.out)
    else:
        text = report(evaluate(options.clips), options.clips)
        print(text)
        if options.out:
            path = Path(options.out)
            start = path.read_text().split("\n\nModel `")[0] if path.exists() else "# Trained policies"
            path.write_text(f"{start}\n\n{text}\n")


if __name__ == "__main__":
    main()
