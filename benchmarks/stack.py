"""What cutting both sides buys: fewer tokens inside the vision tower, and fewer of them into the language model.

    python benchmarks/stack.py --out docs/benchmarks/stack.md

Time is that of a model of true size with random weights, accuracy that of the shipped model on generated clips: the
ways are the same, the models are not. Each way gives the language model about as many visual tokens, a tenth of all.
Fewer patches are encoded by a method in the tower, or by showing every second frame only.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

import tokensieve as ts
from tokensieve.datasets.clip_files import clip_frames
from tokensieve.datasets.clips import make_clip
from tokensieve.pipeline.bench.flops import saved
from tokensieve.pipeline.bench.presets import config_of, random_model
from tokensieve.pipeline.bench.report import machine
from tokensieve.pipeline.bench.run import run
from tokensieve.pipeline.bench.summary import points
from tokensieve.pipeline.evaluation.settings import Setting, make_settings
from tokensieve.pipeline.evaluation.statistics import mean_interval, paired_difference
from tokensieve.pipeline.vlm import VLM

PHASES = ("encode", "select", "prefill", "decode")
FRAMES, FEWER = 8, 4
KEEP = 0.1
BATCH = 25  # clips
NOTES = """
- keep: of the tower's patches, then of the visual tokens. A tower method spreads its tokens over the raster again, so
  the method at the projector always chooses from all places.
- encoder TFLOP: tower and projector for all frames. Both TFLOP leave out what the methods themselves compute.
- Seconds: CPU time of the one thread, medians; wall: the same, all phases, by the clock on the wall.
- ideal: FLOPs with all tokens over FLOPs left in the model; eta: the part of that saving that became time (1 = all).
  Both end to end: tower, projector, choosing, prefill and decode.
- accuracy: exact match in %, greedy, with a 95 % bootstrap interval over clips, and the difference to all tokens.
"""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A setting as `tokensieve bench` and `tokensieve eval` have them, and how many frames are shown."""

    frames: int
    setting: Setting


def ways_of(projectors: list[str], tower_keeps: list[float]) -> list[Way]:
    """All tokens, one side at a time, both sides, and fewer frames."""
    methods = [method.name for method in ts.list_methods() if method.place == "tower"]
    stacks = [f"{m}:{keep:g}+{projector}" for projector in projectors for keep in tower_keeps for m in methods]
    settings = make_settings(projectors, [KEEP])
    for method_or_stack, keeps in ((methods, tower_keeps), (stacks, [KEEP])):
        settings += make_settings(method_or_stack, keeps)[1:]
    fewer = make_settings(projectors, [KEEP * FRAMES / FEWER])[1:]
    return [Way(frames=FRAMES, setting=s) for s in settings] + [Way(frames=FEWER, setting=s) for s in fewer]


# --- time


def timed(name: str, dtype: torch.dtype, ways: list[Way], new_tokens: int, repeats: int) -> list[dict]:
    """What `tokensieve bench` measures of every way."""
    config = config_of(name)
    vlm = VLM(random_model(config, dtype, torch.device("cpu")), name=name)
    found = {}
    for frames in (FRAMES, FEWER):
        mine = [way.setting for way in ways if way.frames == frames and way.setting.compression]
        result = run(vlm, [Setting(), *mine], frames=[frames], batches=[1], new_tokens=[new_tokens], repeats=repeats)
        found |= {(frames, point["method"] or "", point["keep"]): point for point in points(result)}
    return [found[way.frames, way.setting.method, way.setting.keep] for way in ways]


def seconds(point: dict, clock: str) -> dict[str, float]:
    return {phase: point["seconds"][phase][clock] for phase in PHASES}


def total_flops(point: dict) -> int:
    return sum(point["flops"][phase] for phase in ("encode", "prefill", "decode"))


# --- accuracy


@torch.no_grad()
def answered(vlm: VLM, num_clips: int, ways: list[Way]) -> tuple[list[list[float]], list[int]]:
    """For every way 1 for a right answer and 0 for a wrong one, and the clip of each question."""
    clips = [make_clip("test", i) for i in range(num_clips)]
    right: list[list[float]] = [[] for _ in ways]
    clip_of: list[int] = []
    for first in track(range(0, num_clips, BATCH), "clips", console=Console(stderr=True)):
        batch = clips[first : first + BATCH]
        for turn in range(max(len(clip.questions) for clip in batch)):
            asked = [clip.questions[turn] for clip in batch]
            clip_of += range(first, first + len(batch))
            encoded = {}
            for way, scores in zip(ways, right, strict=True):
                tower = way.setting.tower
                key = (way.frames, repr(tower))
                if key not in encoded:
                    frames = [clip_frames(clip, way.frames) for clip in batch]
                    vlm.compress([tower] if tower else None)
                    encoded[key] = vlm.prepare(frames, [q.text for q in asked], needs={"tower", "question"})
                way.setting.apply(vlm)
                prepared = vlm.reselect(encoded[key])
                ids = vlm.model.generate(**prepared, max_new_tokens=4, do_sample=False)
                texts = vlm.processor.batch_decode(ids[:, prepared["input_ids"].shape[1] :], skip_special_tokens=True)
                scores += [float(t.strip() == q.answer) for t, q in zip(texts, asked, strict=True)]
    vlm.compress(None)
    return right, clip_of


# --- report


def row(way: Way, point: dict, full: dict, right: list[float], right_full: list[float], clip_of: list[int]) -> str:
    cpu_s, wall_s, full_cpu_s = seconds(point, "cpu"), seconds(point, "median"), seconds(full, "cpu")
    flops, full_flops = total_flops(point), total_flops(full)
    total_s, full_s = sum(cpu_s.values()), sum(full_cpu_s.values())
    eta = saved(full_s, total_s, full_flops, flops)
    accuracy = mean_interval(right, clip_of)
    difference = paired_difference(right, right_full, clip_of)
    name = way.setting.method.replace("+", " + ") or "all tokens"
    if way.frames == FEWER:
        name = f"{FEWER} frames, {name}"
    cells = [
        name,
        f"{way.setting.keep:g}",
        f"{point['tokens']['visual']:.0f}",
        f"{point['flops']['encode'] / 1e12:.3g}",
        f"{point['flops']['prefill'] / 1e12:.3g}",
        *(f"{cpu_s[phase]:.2f}" for phase in PHASES),
        f"{total_s:.2f}",
        f"{sum(wall_s.values()):.2f}",
        f"**{full_s / total_s:.2f}**",
        f"{full_flops / flops:.2f}",
        "-" if eta is None else f"{eta:.2f}",
        f"**{100 * accuracy.mean:.1f}** ({100 * accuracy.low:.1f} to {100 * accuracy.high:.1f})",
        f"{100 * difference.mean:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})",
    ]
    return f"| {' | '.join(cells)} |"


def report(options, ways, times, right, clip_of) -> str:
    about = machine(torch.device("cpu"))
    columns = "way | keep | visual tokens | encoder TFLOP | prefill TFLOP | encode s | select s | prefill s | decode s"
    columns += " | all s | wall s | speed-up | ideal | eta | accuracy | difference"
    return "\n".join(
        [
            f"Machine: {about['device']}, {about['threads']} thread(s); Python {about['python']}, torch "
            f"{about['torch']}, transformers {about['transformers']}, tokensieve {about['tokensieve']}. Time: "
            f"{options.model}, random weights, {options.dtype}, {FRAMES} frames, one prompt, {options.new_tokens} new "
            f"tokens, medians of {options.repeats} repeats in turns. Accuracy: the shipped model, {options.clips} test "
            f"clips, {len(clip_of)} questions.",
            "",
            NOTES.strip(),
            "",
            f"| {columns} |",
            f"|{'---|' * (columns.count('|') + 1)}",
            *(
                row(way, point, times[0], mine, right[0], clip_of)
                for way, point, mine in zip(ways, times, right, strict=True)
            ),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-onevision-0.5b", help="preset, or folder with a config, for the time")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of that model")
    parser.add_argument("--projectors", default="norm-diversity", help="methods at the projector")
    parser.add_argument("--tower_keeps", default="0.5,0.3", help="shares of the patches that leave the tower")
    parser.add_argument("--new_tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clips", type=int, default=100, help="clips of four questions each, for the accuracy")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", default="", help="Markdown file; what stands above its table is kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ways = ways_of(options.projectors.split(","), [float(keep) for keep in options.tower_keeps.split(",")])
    right, clip_of = answered(ts.load("tiny"), options.clips, ways)
    times = timed(options.model, getattr(torch, options.dtype), ways, options.new_tokens, options.repeats)
    text = report(options, ways, times, right, clip_of)
    print(text)
    if options.out:
        path = Path(options.out)
        start = path.read_text().split("\n\nMachine: ")[0] if path.exists() else "# Cutting both sides"
        path.write_text(f"{start}\n\n{text}\n")


if __name__ == "__main__":
    main()
