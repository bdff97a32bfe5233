"""The shipped model exported to ONNX against PyTorch: logits and greedy tokens on clips, answers on the test split.

    python benchmarks/onnx_parity.py --clips 400 --out docs/benchmarks/onnx_parity.md

Every method is exported once, at the first budget; all budgets run on that one file. The export itself compares logits
and six greedy tokens on `--examples` clips at that budget and at half of it, and fails where they differ. Then both
answer all questions of the test split, each by its own way from frames to text. Exits with 1 if an accuracy differs by
more than `--allowed` percentage points.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections import Counter
from pathlib import Path

import onnxruntime
import torch
import transformers
from rich.console import Console
from rich.progress import track

import tokensieve as ts
from tokensieve.datasets.clip_files import clip_frames
from tokensieve.datasets.clips import make_clip
from tokensieve.export import OnnxVLM, export_vlm
from tokensieve.export.verify import Example
from tokensieve.pipeline.machine import processor_name

METHODS = (None, "zoprune", "divprune", "evs", "cacovid", "visionzip")
BATCH = 16  # clips
MAX_NEW_TOKENS = 4  # longest answer about a generated clip
BAR = Console(stderr=True)


def export(vlm: ts.VLM, folder: Path, method: str | None, keep: float, num_examples: int) -> tuple[OnnxVLM, dict]:
    """The exported model, and what its verification found."""
    clips = [make_clip("test", i) for i in range(num_examples)]
    examples = [Example(clip_frames(clip), clip.questions[0].text) for clip in clips]
    out = folder / str(method)
    manifest = export_vlm(vlm.compress(method, keep=keep), out, examples=examples)
    return OnnxVLM.from_pretrained(out, "cpu", threads=torch.get_num_threads()), dict(manifest.verified)


def ask(vlm: ts.VLM, runtimes: dict[str | None, OnnxVLM], keeps: list[float], num_clips: int) -> dict[tuple, Counter]:
    """Counts of `pytorch` and `onnx` (right answers), `equal` (same text) and `asked`, per method and budget."""
    found: dict[tuple, Counter] = {}
    for first in track(range(0, num_clips, BATCH), "clips", console=BAR):
        clips = [make_clip("test", i) for i in range(first, min(first + BATCH, num_clips))]
        frames = [clip_frames(clip) for clip in clips]
        for turn in range(max(len(clip.questions) for clip in clips)):
            asked = [clip.questions[turn] for clip in clips]
            questions = [question.text for question in asked]
            prepared = vlm.compress(None).prepare(frames, questions, needs={"tower", "question"})
            for method, runtime in runtimes.items():
                for keep in keeps if method else [1.0]:
                    shorter = vlm.compress(method, keep).reselect(prepared)
                    ids = vlm.model.generate(**shorter, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
                    new = ids[:, shorter["input_ids"].shape[1] :]
                    ours = [text.strip() for text in vlm.processor.batch_decode(new, skip_special_tokens=True)]
                    answers = runtime.answer(frames, questions, keep=keep, max_new_tokens=MAX_NEW_TOKENS)
                    count = found.setdefault((method, keep), Counter())
                    for question, text, answer in zip(asked, ours, answers, strict=True):
                        count["asked"] += 1
                        count["pytorch"] += text == question.answer
                        count["onnx"] += answer.answer == question.answer
                        count["equal"] += text == answer.answer
    vlm.compress(None)
    return found


def table(found: dict[tuple, Counter], verified: dict[str | None, dict]) -> str:
    lines = [
        "| method | keep | PyTorch, % | ONNX, % | same answer | logits | features | others kept | greedy tokens |",
        "|" + "---|" * 9,
    ]
    for (method, keep), count in found.items():
        worst, answers = verified[method]["differences"], verified[method]["answers"]
        asked = count["asked"]
        tokens, equal = (sum(each[name] for each in answers) for name in ("tokens", "equal_tokens"))
        cells = [
            method or "none",
            f"{keep:g}",
            f"**{100 * count['pytorch'] / asked:.1f}**",
            f"**{100 * count['onnx'] / asked:.1f}**",
            f"{count['equal']} of {asked}",
            f"{worst['logits']:.0e}",
            f"{worst.get('features', 0):.0e}",
            f"{100 * worst['unequal_kept']:.1f} %",
            f"{equal} of {tokens}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=400, help="of the test split, four questions each")
    parser.add_argument("--examples", type=int, default=20, help="clips that the export itself is verified on")
    parser.add_argument("--keeps", default="0.25,0.1", help="budgets; the first is exported")
    parser.add_argument("--allowed", type=float, default=0.2, help="difference of accuracies, percentage points")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", default="", help="Markdown file; what stands above its conditions is kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keeps = [float(keep) for keep in options.keeps.split(",")]
    vlm = ts.load("tiny", device="cpu")
    runtimes, verified = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for method in track(METHODS, "exports", console=BAR):
            runtimes[method], verified[method] = export(vlm, Path(folder), method, keeps[0], options.examples)
        found = ask(vlm, runtimes, keeps, options.clips)
    conditions = (
        f"Model `tiny`, split `test`, {options.clips} clips; exports verified on {options.examples} clips at two "
        f"budgets. {processor_name()}, {options.threads} thread(s), float32; Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, onnxruntime {onnxruntime.__version__}, "
        f"tokensieve {ts.__version__}."
    )
    text = table(found, verified)
    print(text)
    if options.out:
        path = Path(options.out)
        start = path.read_text().split("\n\nModel `tiny`")[0] if path.exists() else "# ONNX against PyTorch"
        path.write_text(f"{start}\n\n{conditions}\n\n{text}\n")
    apart = {setting: 100 * abs(count["pytorch"] - count["onnx"]) / count["asked"] for setting, count in found.items()}
    if (worst := max(apart.values())) > options.allowed:
        raise SystemExit(f"Accuracies differ by up to {worst:.2f} percentage points; {options.allowed} are allowed.")


if __name__ == "__main__":
    main()
