"""How much the sensitivity of ZOO-Prune costs, and whether the cheaper forms rank tokens alike.

LLaVA-1.5 sizes: 576 tokens, a 1024 -> 4096 -> 4096 MLP with GELU, 64 directions, float32, random weights
and random tokens of spread length. The ways are timed one after another within each repeat, so that a busy
machine slows all of them; compare the ratios. Every time includes the whole method: scores and selection.

    python benchmarks/zoprune_estimators.py --repeats 3 --threads 1
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from torch import nn

from tokensieve.compression import Projector, TwoLayerMLP, VisualTokens, get_method, in_dtype_of_input
from tokensieve.compression.sensitivity import _GAIN_MATRICES
from tokensieve.compression.zoprune import sensitivity
from tokensieve.pipeline.machine import processor_name

NUM_KEEP = 128

# what the table calls it, method, options, forget the kept matrix first?
WAYS = [
    ("`zo` (the paper's)", "zoprune", {"estimator": "zo"}, False),
    ("`zo-factorised`", "zoprune", {"estimator": "zo-factorised"}, False),
    ("default, first call", "zoprune", {}, True),
    ("default, later calls", "zoprune", {}, False),
    ("selection alone (`norm-diversity`)", "norm-diversity", {}, False),
]


def llava_tokens(num_tokens: int, width_in: int, width_out: int) -> VisualTokens:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out))
    module.requires_grad_(False)
    inputs = torch.randn(num_tokens, width_in) * (0.5 + 1.5 * torch.rand(num_tokens, 1))
    return VisualTokens(
        features=module(inputs),
        grids=((1, 1, num_tokens),),
        crop=torch.zeros(num_tokens, dtype=torch.int64),
        projector=Projector(
            inputs=inputs,
            fn=in_dtype_of_input(module),
            to_tokens=lambda score: score,
            mlp=TwoLayerMLP(w1=module[0].weight, b1=module[0].bias, w2=module[2].weight, act=module[1]),
        ),
    )


def timed(method: str, tokens: VisualTokens, options: dict, forget: bool) -> float:
    if forget:
        _GAIN_MATRICES.clear()
    start = time.perf_counter()
    get_method(method)(tokens, NUM_KEEP, **options)
    return time.perf_counter() - start


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="times each way is run")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--tokens", type=int, default=576)
    parser.add_argument("--width-in", type=int, default=1024)
    parser.add_argument("--width-out", type=int, default=4096)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokens = llava_tokens(args.tokens, args.width_in, args.width_out)
    zo = sensitivity(tokens, estimator="zo")  # also the warm-up
    others = {
        "zo-factorised, same directions": sensitivity(tokens, estimator="zo-factorised"),
        "default (exact)": sensitivity(tokens),
        "zo-factorised, other directions": sensitivity(
            tokens, torch.Generator().manual_seed(1), estimator="zo-factorised"
        ),
        "norm of the projected token": tokens.features.norm(dim=-1),
    }
    seconds = {label: [] for label, *_ in WAYS}
    for _ in range(args.repeats):
        for label, method, options, forget in WAYS:
            seconds[label].append(timed(method, tokens, options, forget))

    print(
        f"{processor_name()}, {args.threads} thread(s); Python {platform.python_version()}, torch {torch.__version__}; "
        f"float32, {args.tokens} tokens, {args.width_in} -> {args.width_out} -> {args.width_out}, 64 directions, "
        f"{NUM_KEEP} kept; median of {args.repeats} interleaved repeats.\n"
    )
    paper = statistics.median(seconds[WAYS[0][0]])
    print("| way | median s | fastest to slowest s | share of `zo` |\n|---|---|---|---|")
    for label, times in seconds.items():
        median = statistics.median(times)
        print(f"| {label} | {median:.3f} | {min(times):.3f} to {max(times):.3f} | {median / paper:.4f} |")
    print("\n| score compared with `zo` | Spearman | mean relative difference |\n|---|---|---|")
    for label, score in others.items():
        difference = "-" if "norm" in label else f"{(score / zo - 1).abs().mean().item():.2e}"
        print(f"| {label} | {spearman(score, zo):.5f} | {difference} |")
    kept = {name: get_method("zoprune")(tokens, NUM_KEEP, estimator=name).mask() for name in ("zo", "exact")}
    print(f"\nKept by both `zo` and the default: {(kept['zo'] & kept['exact']).sum()} of {NUM_KEEP}.")


if __name__ == "__main__":
    main()
