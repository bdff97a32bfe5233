"""Optimizer steps per second of policy training, against a loop that encodes and generates each subset separately.

    python benchmarks/policy_throughput.py --out docs/benchmarks/policy_throughput.md

One step: G subsets of one question's tokens are drawn from the policy and rewarded by the frozen model, and the policy
takes one CaCoVID update. The variants take turns; medians over the repeats. Both loops draw the same subsets, and the
answers of the batched one are checked against those of the plain one.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import transformers

import tokensieve as ts
from tokensieve.compression import Plan
from tokensieve.datasets.clip_files import clip_frames
from tokensieve.datasets.clips import make_clip
from tokensieve.pipeline.policy.judging import subset_rewards
from tokensieve.pipeline.policy.samples import encode_samples
from tokensieve.pipeline.policy.scoring import SubsetScorer
from tokensieve.policies import Decisions, cacovid_loss
from tokensieve.policies.light_scorer import LightScorer
from tokensieve.policies.ocss import ocss_subsets


def plain_answers(vlm, frames, question: str, masks_GN) -> list[str]:
    """The straightforward loop: every subset reads, encodes and generates for itself."""
    texts = []
    for mask_N in masks_GN:
        prepared = vlm.prepare(frames, question)
        plan = Plan(mask_N.nonzero()[:, 0], len(mask_N))
        emitted = vlm.adapter.emit(prepared.inputs, prepared.items, [plan])
        ids = vlm.model.generate(**emitted, max_new_tokens=16, do_sample=False)
        new = ids[:, emitted["input_ids"].shape[1] :]
        texts += [t.strip() for t in vlm.processor.batch_decode(new, skip_special_tokens=True)]
    return texts


def step(policy, optimizer, tokens, rewards_of, num_subsets: int, rate: float, generator) -> None:
    """One draw, judgement and update."""
    with torch.no_grad():
        old = policy(tokens)[0]
    masks = ocss_subsets(old, tokens.grids[0][0], rate, num_subsets, generator=generator).mask
    rewards = rewards_of(masks)
    logits = policy(tokens)[0]
    decisions = Decisions(logits=logits, old_logits=old, chosen=masks, rewards=rewards)
    optimizer.zero_grad()
    cacovid_loss(decisions).total.backward()
    optimizer.step()


def measure(num_subsets: int, rate: float, repeats: int, model: str = "tiny") -> dict[str, float]:
    """Median seconds of a step, by variant."""
    vlm = ts.load(model)
    judge = SubsetScorer(vlm)
    width = vlm.model.config.get_text_config().hidden_size
    policies = {name: LightScorer(width) for name in ("plain", "generated", "forced")}
    optimizers = {name: torch.optim.AdamW(p.parameters()) for name, p in policies.items()}
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    for repeat in range(repeats + 1):  # the first is thrown away
        clip = make_clip("train", repeat)
        frames, asked = clip_frames(clip), clip.questions[0]
        for name, policy in policies.items():
            start = time.perf_counter()
            (sample,) = encode_samples(vlm, frames, [asked.text], [asked.answer])
            if name == "plain":
                rewards_of = partial(plain_rewards, vlm, frames, asked)
            else:
                kind = "exact" if name == "generated" else "match"
                rewards_of = partial(subset_rewards, judge, sample, kind=kind)
            generator = torch.Generator().manual_seed(repeat)
            step(policy, optimizers[name], sample.tokens, rewards_of, num_subsets, rate, generator)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
        if repeat == 0:
            check_equal(vlm, judge, frames, sample, num_subsets)
    return {name: statistics.median(times) for name, times in seconds.items()}


def plain_rewards(vlm, frames, asked, masks_GN) -> torch.Tensor:
    """1 for every subset whose generated answer is right."""
    return torch.tensor([float(text == asked.answer) for text in plain_answers(vlm, frames, asked.text, masks_GN)])


def check_equal(vlm, judge, frames, sample, num_subsets: int) -> None:
    """The batched answers must be those of the plain loop."""
    order = torch.rand(num_subsets, len(sample.tokens), generator=torch.Generator().manual_seed(0)).argsort(1)
    masks = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :14], True)
    if judge.answers(sample, masks) != plain_answers(vlm, frames, sample.question, masks):
        raise SystemExit("The batched answers differ from those of the plain loop.")


def report(times: dict[str, float], num_subsets: int, rate: float, repeats: int) -> str:
    rows = {
        "plain": "a loop: encode and generate for every subset",
        "generated": "one encoding, all subsets generated in one batch (`reward=exact`)",
        "forced": "one encoding, all subsets teacher-forced in one batch (`reward=match`)",
    }
    lines = [
        f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), float32, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, tokensieve {ts.__version__}; model `tiny`, G = {num_subsets} "
        f"subsets, rate {rate:g}, light scorer, median of {repeats}.",
        "",
        "| one optimizer step | s | steps/s | times faster |",
        "|---|---|---|---|",
    ]
    for name, text in rows.items():
        lines.append(f"| {text} | {times[name]:.3f} | {1 / times[name]:.2f} | {times['plain'] / times[name]:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subsets", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    text = report(
        measure(options.subsets, options.rate, options.repeats), options.subsets, options.rate, options.repeats
    )
    print(text)
    if options.out:
        command = "```\npython benchmarks/policy_throughput.py --out docs/benchmarks/policy_throughput.md\n```"
        Path(options.out).write_text(f"# Steps per second of policy training\n\n{command}\n\n{text}\n")


if __name__ == "__main__":
    main()
