"""onnxruntime on the CPU against PyTorch, eager and compiled: a tower, and the prefill of a language model.

    python benchmarks/onnx_speed.py towers --out docs/benchmarks/onnx_towers.md
    python benchmarks/onnx_speed.py prefill --out docs/benchmarks/onnx_prefill.md

(Not named onnx.py: a script's folder comes first on the import path, so `import onnx` would find it.) Weights are
random, time does not depend on them. Graphs are written into `--folder` once and used again. All ways of a table run
in turns within every repeat; seconds are CPU time, so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch import nn

import tokensieve as ts
from tokensieve.compression import num_to_keep
from tokensieve.export.graph_file import write_graph
from tokensieve.export.language import Decoder, cache_facts, cache_names, decoder_inputs, decoder_outputs
from tokensieve.export.sessions import open_session
from tokensieve.export.tower_runtime import OnnxTower
from tokensieve.export.towers import export_tower
from tokensieve.pipeline.bench.flops import prefill_flops
from tokensieve.pipeline.bench.presets import config_of, language_sizes, random_model
from tokensieve.pipeline.bench.workload import TEXT_TOKENS, num_visual
from tokensieve.pipeline.machine import processor_name
from tokensieve.pipeline.towers.macs import tower_macs

KEEPS = (1.0, 0.5, 0.25)
MOST_FIRST_ROUNDS = 8
NOTES = """
- ms: CPU milliseconds, medians; behind them the fastest and the slowest. The machine's speed drifts, so the other
  columns are medians of what is compared within one repeat.
- ratio: eager over this, at the same keep. speed-up: keep 1 over this, of the same runtime.
- ideal: one over the multiply-accumulates that are left. eta: the part of the ideal saving that became time.
- compile: `torch.compile` for each keep, after rounds of first calls until none compiles any more. The whole of a
  tower; of a language model its forward.
"""

Ways = dict[tuple[str, float], Callable[[], object]]


def tower_ways(folder: Path, method: str, batch: int, sizes: dict) -> tuple[Ways, dict[float, float]]:
    """Ways to embed a batch of pictures, and the share of multiply-accumulates left at every budget."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(projection_dim=512, **sizes)
    pixels = torch.randn(batch, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(1))
    ways, left = {}, {}
    for keep in KEEPS:
        model = CLIPVisionModelWithProjection(config).eval()
        out = folder / f"tower-{method}-{keep:g}-{config.num_hidden_layers}"
        if not out.exists():
            export_tower(model, out, method=None if keep == 1 else method, keep=keep, verify=False)
        exported = OnnxTower.from_pretrained(out, "cpu", threads=torch.get_num_threads())
        tokens = [1 + (config.image_size // config.patch_size) ** 2] * (config.num_hidden_layers + 1)
        if keep < 1:
            handle = ts.compress_tower(model, method, keep)
            model(pixels)
            tokens = handle.trace.tokens_per_block
        left[keep] = _macs(config, tokens)
        compiled = torch.compile(model, dynamic=False)
        ways["eager", keep] = lambda model=model: model(pixels).image_embeds
        ways["compile", keep] = lambda compiled=compiled: compiled(pixels).image_embeds
        ways["onnxruntime", keep] = lambda exported=exported: exported.encode_image(pixels.numpy())
    return ways, {keep: value / left[1.0] for keep, value in left.items()}


def _macs(config, tokens) -> float:
    return tower_macs(
        tokens,
        width=config.hidden_size,
        patch_size=config.patch_size,
        mlp_width=config.intermediate_size,
        out_width=config.projection_dim,
    )


def prefill_ways(folder: Path, name: str, frames: int) -> tuple[Ways, dict[float, float]]:
    """Ways to read a prompt, and the share of FLOPs left at every budget."""
    config = config_of(name)
    model = random_model(config, torch.float32, torch.device("cpu"))
    path = folder / f"decoder-{name.replace('/', '-')}.onnx"
    if not path.exists():
        inputs, shapes = decoder_inputs(model, torch.float32)
        with torch.no_grad():
            write_graph(Decoder(model).eval(), path, inputs, shapes, decoder_outputs(model))
    session = open_session(folder, path.name, "cpu", torch.get_num_threads())
    text, facts, sizes = model.model.language_model, cache_facts(model), language_sizes(config)
    empty = np.zeros((1, facts["num_kv_heads"], 0, facts["head_dim"]), np.float32)
    ways, left = {}, {}
    for keep in KEEPS:
        length = TEXT_TOKENS + num_to_keep(keep, num_visual(config, frames))
        left[keep] = prefill_flops(sizes, length)
        embeds = torch.randn(1, length, sizes.width, generator=torch.Generator().manual_seed(2))
        feed = dict.fromkeys(cache_names("past_key_values", facts["num_layers"]), empty) | {
            "inputs_embeds": embeds.numpy(),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length)[None],
        }

        def read(run: nn.Module, embeds=embeds):
            return model.lm_head(run(inputs_embeds=embeds, use_cache=True).last_hidden_state[:, -1:])

        compiled = torch.compile(text, dynamic=False)
        ways["eager", keep] = lambda read=read: read(text)
        ways["compile", keep] = lambda read=read, compiled=compiled: read(compiled)
        ways["onnxruntime", keep] = lambda feed=feed: session.run(None, feed)[0]
    return ways, {keep: value / left[1.0] for keep, value in left.items()}


def warm(ways: Ways, title: str) -> Ways:
    """The ways that can run, after rounds of first calls: two, and more as long as a round still compiled something."""
    able, compiled = dict(ways), -1
    for turn in range(MOST_FIRST_ROUNDS):
        for key, way in list(able.items()):
            try:
                way()
            except Exception as error:  # torch.compile has many
                Console(stderr=True).print(f"{title}, {key}: {type(error).__name__}")
                del able[key]
        before, compiled = compiled, sum(torch._dynamo.utils.counters["frames"].values())
        if turn and compiled == before:
            return able
    raise SystemExit(f"{title}: still compiling after {MOST_FIRST_ROUNDS} rounds of first calls.")


@torch.no_grad()
def measure(ways: Ways, repeats: int, title: str) -> dict[tuple[str, float], list[float]]:
    """CPU seconds of every way, all in turns; a way that cannot run is left out."""
    able = warm(ways, title)
    seconds: dict[tuple[str, float], list[float]] = {key: [] for key in able}
    for _ in track(range(repeats), title, console=Console(stderr=True)):
        for key, way in able.items():
            start = time.process_time()
            way()
            seconds[key].append(time.process_time() - start)
    return seconds


def table(title: str, seconds: dict[tuple[str, float], list[float]], left: dict[float, float]) -> str:
    lines = [f"## {title}", "", "| runtime | keep | ideal | ms | ratio to eager | speed-up | eta |", "|" + "---|" * 7]
    for (runtime, keep), values in sorted(seconds.items(), key=lambda item: (-item[0][1], item[0][0])):
        spread = f"{1000 * median(values):,.0f} ({1000 * min(values):,.0f} to {1000 * max(values):,.0f})"
        ratio = _median_ratio(seconds["eager", keep], values)
        speedup = eta = "-"
        if keep < 1 and (runtime, 1.0) in seconds:
            gain = _median_ratio(seconds[runtime, 1.0], values)
            speedup, eta = f"{gain:.2f}", f"**{(1 - 1 / gain) / (1 - left[keep]):.2f}**"
        lines.append(f"| {runtime} | {keep:g} | {1 / left[keep]:.2f} | {spread} | {ratio:.2f} | {speedup} | {eta} |")
    return "\n".join(lines)


def _median_ratio(above: list[float], below: list[float]) -> float:
    return median(a / b for a, b in zip(above, below, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["towers", "prefill"])
    parser.add_argument("--folder", default="runs/onnx", help="where the graphs are kept")
    parser.add_argument("--method", default="evit", help="in the tower")
    parser.add_argument("--batches", default="1,8", help="pictures per call")
    parser.add_argument("--model", default="llava-onevision-0.5b", help="preset, or folder with a config")
    parser.add_argument("--frames", type=int, default=8, help="of the prompt")
    parser.add_argument("--repeats", type=int, default=0, help="25 of towers, 5 of the prefill")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it all run?")
    parser.add_argument("--out", default="", help="Markdown file; what stands above its first table is kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # the models of a table share their code, and each has its own graphs
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    sizes |= dict(image_size=224, patch_size=16)
    if options.smoke:
        sizes |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=64)
    options.repeats = options.repeats or (25 if options.what == "towers" else 5)
    parts = [
        f"Machine: {processor_name()}, {options.threads} thread(s); Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, onnxruntime {onnxruntime.__version__}, "
        f"tokensieve {ts.__version__}; float32; {options.repeats} repeats in turns, after first calls.",
        NOTES.strip(),
    ]
    if options.what == "prefill":
        title = f"Prefill of {options.model}, {options.frames} frames"
        found = {title: partial(prefill_ways, folder, options.model, options.frames)}
    else:
        title = f"CLIP ViT-B/16, `{options.method}` in the tower, batch "
        batches = map(int, options.batches.split(","))
        found = {title + str(batch): partial(tower_ways, folder, options.method, batch, sizes) for batch in batches}
    for title, make in found.items():
        ways, left = make()
        parts.append(table(title, measure(ways, options.repeats, title), left))
        print(parts[-1], flush=True)
    if options.out:
        path = Path(options.out)
        start = path.read_text().split("\n\nMachine: ")[0] if path.exists() else "# onnxruntime against PyTorch"
        path.write_text("\n\n".join([start, *parts]) + "\n")


if __name__ == "__main__":
    main()
