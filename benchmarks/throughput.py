"""`tokensieve process` against a plain loop over the same clips: clips per second, and memory at two lengths.

    python benchmarks/throughput.py --out docs/benchmarks/throughput.md

Every way works in a process of its own, in turns within every repeat, so that what else the machine does hits all of
them; seconds are wall-clock, from the first clip to the last row, with the model loaded and warm. The plain loop is
what one writes without this package: open, decode, preprocess, generate, one clip after the other, all tokens.
`plain + method` is the same loop with the compression. `decode only` is the engine without a model: no engine can be
faster.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

QUESTION = "Which digit is red?"
WAYS = ("plain", "plain + method", "engine, all tokens", "engine + method", "decode only")


def make_source(folder: Path, count: int) -> Path:
    """`count` clips of the generated test split, 192 x 192, 29 frames; scenes repeat after 20."""
    from tokensieve.datasets import write_clips

    folder.mkdir(parents=True)
    write_clips("test", min(count, 20), folder / "scenes")
    scenes = sorted((folder / "scenes").glob("*.mp4"))
    for number in range(count):
        box = b"\0\0\0\x0cfree" + number.to_bytes(4, "big")  # unused, makes every file another one
        (folder / f"{number:05d}.mp4").write_bytes(scenes[number % len(scenes)].read_bytes() + box)
    return folder


def plain(paths: list[Path], vlm, num_frames: int, max_new_tokens: int) -> int:
    """The loop that everyone writes; the decoder goes through the whole file."""
    import av
    import numpy as np

    from tokensieve.datasets.frames import Frames

    for path in paths:
        with av.open(str(path)) as container:
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        places = np.linspace(0, len(pictures) - 1, num_frames).round().astype(int)
        data = np.stack([pictures[place] for place in places])
        frames = Frames(data=data, times_s=places / 14, duration_s=len(pictures) / 14, source=str(path))
        vlm.answer(frames, QUESTION, max_new_tokens=max_new_tokens)
    return len(paths)


def engine(paths: list[Path], step, options: argparse.Namespace, out: Path) -> dict[str, float]:
    """The local engine as the command runs it."""
    from tokensieve.datasets.limits import Limits
    from tokensieve.pipeline.batch.engine import run
    from tokensieve.pipeline.batch.folder import Folder
    from tokensieve.pipeline.batch.inputs import find_inputs

    inputs = find_inputs(paths[0].parent, questions=[QUESTION], limit=len(paths)).inputs
    writer = Folder(out).writer(step.schema, "benchmark")
    progress = run(
        inputs,
        step,
        writer,
        limits=Limits(),
        read_options={"num_frames": options.num_frames},
        workers=options.workers,
        ahead_bytes=options.ahead_mb << 20,
    )
    assert progress.counts["ok"] == len(paths), progress.counts
    return {"waited_s": progress.wait_s}


class NoModel:
    """A step that looks at nothing, for the speed of the decoders."""

    def __init__(self):
        from tokensieve.pipeline.batch.rows import answer_schema

        self.schema = answer_schema()

    def add(self, given, frames):
        from tokensieve.pipeline.batch.rows import frames_row, input_row

        return [{**input_row(given), **frames_row(frames)}]

    def finish(self):
        return []


def child(options: argparse.Namespace) -> None:
    """One way, once; prints seconds and peak memory."""
    import torch

    import tokensieve as ts
    from tokensieve.pipeline.batch.answer_step import AnswerStep

    torch.set_num_threads(options.threads)
    paths = sorted(Path(options.source).glob("*.mp4"))[: options.count]
    vlm = None
    if options.way != "decode only":
        vlm = ts.load(options.model, device=options.device)
        vlm.compress(options.method.split(",") if "method" in options.way else None, options.keep)
        plain(paths[:1], vlm, options.num_frames, options.max_new_tokens)  # warm
    facts: dict[str, float] = {}
    start = time.perf_counter()
    if options.way.startswith("plain"):
        plain(paths, vlm, options.num_frames, options.max_new_tokens)
    else:
        step = AnswerStep(vlm, batch=options.batch, max_new_tokens=options.max_new_tokens) if vlm else NoModel()
        with tempfile.TemporaryDirectory() as out:
            facts = engine(paths, step, options, Path(out) / "out")
    seconds = time.perf_counter() - start
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"clips_per_s": len(paths) / seconds, "peak_mb": peak_mb, **facts}))


def measure(options: argparse.Namespace, way: str, source: Path, count: int) -> dict[str, float]:
    """`child` in a process of its own."""
    given = [f"--{name}={value}" for name, value in vars(options).items() if name not in ("out", "smoke", "way")]
    given = [word for word in given if not word.startswith(("--source=", "--count="))]
    command = [sys.executable, __file__, *given, f"--way={way}", f"--source={source}", f"--count={count}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="clips in the comparison of speed")
    parser.add_argument("--short", type=int, default=50, help="clips for the first measurement of memory")
    parser.add_argument("--long", type=int, default=500, help="clips for the second one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--method", default="zoprune", help="a stack: tome,zoprune")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--num_frames", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the model, in every way")
    parser.add_argument("--ahead_mb", type=int, default=64)
    parser.add_argument("--smoke", action="store_true", help="few clips: does it all run?")
    parser.add_argument("--out", default="", help="Markdown file; what stands above its first table is kept")
    parser.add_argument("--way", default="", help=argparse.SUPPRESS)
    parser.add_argument("--source", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        return child(options)
    if options.smoke:
        options.count, options.short, options.long, options.repeats = 6, 3, 6, 1

    import torch
    import transformers

    import tokensieve as ts
    from tokensieve.pipeline.machine import processor_name

    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        source = make_source(Path(folder) / "clips", max(options.count, options.long))
        for _ in range(options.repeats):
            for way in WAYS:
                found[way].append(measure(options, way, source, options.count))
                print(way, found[way][-1], file=sys.stderr, flush=True)
        memory = {count: measure(options, WAYS[3], source, count) for count in (options.short, options.long)}
    lines = [
        f"Machine: {processor_name()}, {options.threads} model thread(s), {options.workers} decoders; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, tokensieve "
        f"{ts.__version__}; `{options.model}`, {options.num_frames} frames, `{options.method}` at keep "
        f"{options.keep:g}, batch {options.batch}; {options.count} clips, median of {options.repeats} repeats in turns "
        "(lowest to highest).",
        "",
        "| way | clips/s | ratio to plain |",
        "|---|---|---|",
    ]
    base = median(one["clips_per_s"] for one in found["plain"])
    for way, runs in found.items():
        speeds = [one["clips_per_s"] for one in runs]
        spread = f"{median(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})"
        lines.append(f"| {way} | {spread} | {median(speeds) / base:.2f} |")
    waited = median(one["waited_s"] for one in found[WAYS[3]])
    lines += ["", f"The model of `{WAYS[3]}` waited {waited:.2f} s of each run for a decoder.", ""]
    peaks = ", ".join(f"{one['peak_mb']:.0f} MiB after {count} clips" for count, one in memory.items())
    lines.append(f"Peak memory of the process with the model, `{WAYS[3]}`: {peaks}.")
    print("\n".join(lines))
    if options.out:
        path = Path(options.out)
        above = path.read_text().split("\n\nMachine: ")[0] if path.exists() else "# Clips per second"
        path.write_text("\n".join([above, "", *lines]) + "\n")


if __name__ == "__main__":
    main()
