"""How much of the compute that tower methods remove turns into time: `eta`, for ViT-B/16 of three libraries.

    python benchmarks/towers.py --repeats 7 --threads 1 --out docs/benchmarks/towers.md

Weights and pictures are random; time does not depend on them. All ways run one after another within each repeat, so
that a busy machine slows all of them. `--smoke` runs tiny towers to see that everything works.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import open_clip
import timm
import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

import tokensieve as ts
from tokensieve.pipeline.machine import processor_name
from tokensieve.pipeline.towers import compress_tower, tower_macs

METHODS = tuple(method.name for method in ts.list_methods() if method.place == "tower")
NOTES = """
- MACs left: `tower_macs` of the tokens that entered and left each block, over the same of the whole tower. What a
  method itself costs is in its time, not in its MACs.
- CPU ms: seconds of the one thread, medians; wall ms beside it, which other work on the machine makes longer.
- ideal: one over MACs left. speed-up: median CPU time of the whole tower over that of the row.
- eta = (t_full - t) / (t_full (1 - MACs left)): 1 is every multiply-accumulate saved turned into time, above 1 more
  than that. From medians, once of CPU time, once of wall time.
"""


@dataclass(frozen=True)
class Size:
    side: int
    patch: int
    width: int
    depth: int
    heads: int


BASE = Size(side=224, patch=16, width=768, depth=12, heads=12)
SMOKE = Size(side=32, patch=4, width=48, depth=4, heads=4)


def timm_tower(size: Size) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=size.side,
        patch_size=size.patch,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        num_classes=0,
    )


def open_clip_tower(size: Size) -> nn.Module:
    return open_clip.transformer.VisionTransformer(
        image_size=size.side,
        patch_size=size.patch,
        width=size.width,
        layers=size.depth,
        heads=size.heads,
        mlp_ratio=4.0,
        output_dim=size.width,
    )


def transformers_sizes(size: Size) -> dict[str, int]:
    return dict(
        image_size=size.side,
        patch_size=size.patch,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
    )


TOWERS: dict[str, Callable[[Size], nn.Module]] = {
    "timm vit_base_patch16_224": timm_tower,
    "open_clip ViT-B-16": open_clip_tower,
    "transformers CLIP ViT-B/16": lambda size: CLIPVisionModel(CLIPVisionConfig(**transformers_sizes(size))),
    "transformers SigLIP ViT-B/16, no pooling head": lambda size: SiglipVisionModel(
        SiglipVisionConfig(**transformers_sizes(size), vision_use_head=False)
    ),
}
NO_CLASS_TOKEN = "SigLIP"
NO_PRE_NORM = ("timm", "SigLIP")


@dataclass(frozen=True, kw_only=True)
class Way:
    """A method (None for the whole tower) and its budget, with what was measured of it."""

    method: str | None
    keep: float
    tokens: tuple[int, ...]
    macs: int
    cpu_s: list[float]
    wall_s: list[float]


def macs(name: str, size: Size, tokens: tuple[int, ...]) -> int:
    return tower_macs(
        tokens,
        width=size.width,
        patch_size=size.patch,
        num_prefix=int(NO_CLASS_TOKEN not in name),
        pre_norm=not any(kind in name for kind in NO_PRE_NORM),
    )


def run(tower: nn.Module, pixels: Tensor, method: str | None, keep: float) -> tuple[float, float, tuple[int, ...]]:
    """CPU seconds, wall seconds, and tokens per block (of a reduced tower)."""
    with compress_tower(tower, method, keep) if method else nullcontext() as handle:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        tower(pixels)
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    return cpu_s, wall_s, handle.trace.tokens_per_block if method else ()


@torch.inference_mode()
def measure(name: str, size: Size, dtype: torch.dtype, batch: int, keeps: list[float], repeats: int) -> list[Way]:
    torch.manual_seed(0)
    tower = TOWERS[name](size).eval().to(dtype)
    pixels = torch.randn(batch, 3, size.side, size.side).to(dtype)
    num_tokens = (size.side // size.patch) ** 2 + int(NO_CLASS_TOKEN not in name)
    ways = []
    for method, keep in [(None, 1.0), *((method, keep) for keep in keeps for method in METHODS)]:
        *_, tokens = run(tower, pixels, method, keep)  # the first call
        tokens = tokens or (num_tokens,) * (size.depth + 1)
        ways.append(Way(method=method, keep=keep, tokens=tokens, macs=macs(name, size, tokens), cpu_s=[], wall_s=[]))
    for _ in range(repeats):
        for way in ways:
            cpu_s, wall_s, _ = run(tower, pixels, way.method, way.keep)
            way.cpu_s.append(cpu_s)
            way.wall_s.append(wall_s)
    return ways


def eta(full_s: list[float], way_s: list[float], share: float) -> float:
    full, mine = statistics.median(full_s), statistics.median(way_s)
    return (full - mine) / (full * (1 - share))


def table(title: str, ways: list[Way]) -> str:
    full = ways[0]
    lines = [
        f"## {title}",
        "",
        "| method | keep | tokens at the end | MACs left | CPU ms | fastest to slowest | wall ms | ideal | speed-up | "
        "eta (CPU) | eta (wall) |",
        f"|{'---|' * 11}",
    ]
    for way in ways:
        cpu, wall, share = statistics.median(way.cpu_s), statistics.median(way.wall_s), way.macs / full.macs
        cells = [
            f"`{way.method}`" if way.method else "all tokens",
            f"{way.keep:g}",
            str(way.tokens[-1]),
            f"{share:.3f}",
            f"{cpu * 1e3:,.0f}",
            f"{min(way.cpu_s) * 1e3:,.0f} to {max(way.cpu_s) * 1e3:,.0f}",
            f"{wall * 1e3:,.0f}",
            f"{1 / share:.2f}",
            f"{statistics.median(full.cpu_s) / cpu:.2f}",
            f"**{eta(full.cpu_s, way.cpu_s, share):.2f}**" if way.method else "-",
            f"{eta(full.wall_s, way.wall_s, share):.2f}" if way.method else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="times each way is run, after a first call")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--batch", type=int, default=8, help="pictures per call")
    parser.add_argument("--keeps", default="0.7,0.5,0.3", help="shares of the patches left at the end")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--towers", default="", help="only towers with one of these words in their name")
    parser.add_argument("--smoke", action="store_true", help="tiny towers: do they all run?")
    parser.add_argument("--out", default="", help="Markdown file; what stands above its first table is kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keeps = [float(keep) for keep in options.keeps.split(",")]
    size = SMOKE if options.smoke else BASE
    wanted = options.towers.split(",")
    parts = [
        f"Machine: {processor_name()}, {options.threads} thread(s); Python {platform.python_version()}, torch "
        f"{torch.__version__}, timm {timm.__version__}, open_clip {open_clip.__version__}, transformers "
        f"{transformers.__version__}, tokensieve {ts.__version__}; {size.side} x {size.side} pixels, batch "
        f"{options.batch}; median of {options.repeats} interleaved repeats after a first call.",
        NOTES.strip(),
    ]
    for name in TOWERS:
        if any(word in name for word in wanted):
            for dtype in options.dtypes.split(","):
                ways = measure(name, size, getattr(torch, dtype), options.batch, keeps, options.repeats)
                parts.append(table(f"{name}, {dtype}", ways))
                print(parts[-1], flush=True)
    text = "\n\n".join(parts)
    if options.out:
        path = Path(options.out)
        start = path.read_text().split("\n\nMachine: ")[0] if path.exists() else "# What shorter towers save"
        path.write_text(f"{start}\n\n{text}\n")


if __name__ == "__main__":
    main()
