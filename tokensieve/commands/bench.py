"""`tokensieve bench`: time, memory and arithmetic of every phase, with and without compression."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokensieve.commands.output import print_json
from tokensieve.errors import BadOption


def run(options) -> int:
    """Measures, or with `--dry_run` only counts, and writes raw rows, a summary and tables into `--out`."""
    import torch

    from tokensieve.compression import check_keep
    from tokensieve.pipeline.bench.presets import config_of, language_sizes
    from tokensieve.pipeline.bench.report import ideal_table
    from tokensieve.pipeline.bench.run import settings_of
    from tokensieve.pipeline.bench.workload import default_frames
    from tokensieve.pipeline.loader import as_device, as_dtype

    for keep in options.keep:
        check_keep(keep)
    for name in ("frames", "batch", "new_tokens"):
        if any(value < 1 for value in options[name] or []):
            raise BadOption(f"--{name} must be whole numbers above 0, got {options[name]}.")
    if options.repeats < 1 or (options.threads is not None and options.threads < 1):
        raise BadOption("--repeats and --threads must be above 0.")
    dtype, device = as_dtype(options.dtype), as_device(options.device)
    config = config_of(options.model)
    frames = options.frames or [default_frames(config)]
    settings = settings_of(options.methods, options.keep, language_sizes(config).width)
    if dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.dry_run:
        _show([ideal_table(config, options.model, frames, options.keep, dtype.itemsize)], options.json)
        return 0
    if options.out is None:
        raise BadOption("--out names the folder for the results.", hint="Only --dry_run does without.")
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadOption(f"--out {options.out!r} cannot be made a folder ({error.strerror}).") from None
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    _measure(options, config, settings, frames, dtype, device, out)
    return 0


def _measure(options, config, settings, frames, dtype, device, out: Path) -> None:
    from tokensieve.pipeline.bench.presets import PRESETS, random_model
    from tokensieve.pipeline.bench.report import NOTES, head, machine, tables_of
    from tokensieve.pipeline.bench.run import run as run_settings
    from tokensieve.pipeline.bench.summary import growth, points
    from tokensieve.pipeline.loader import load, local_folder
    from tokensieve.pipeline.vlm import VLM

    folder = None if options.model in PRESETS else local_folder(options.model)
    stored = folder is not None and any(folder.glob("*.safetensors"))
    if stored:
        vlm = load(options.model, device=device, dtype=dtype)
    else:
        vlm = VLM(random_model(config, dtype, device), name=options.model)
    about = {
        "model": options.model,
        "weights": "stored" if stored else "random",
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": options.repeats,
        "machine": machine(device),
    }
    with open(out / "bench.jsonl", "w", encoding="utf-8") as raw:

        def write(row: dict) -> None:
            raw.write(json.dumps(row) + "\n")
            raw.flush()

        result = run_settings(
            vlm,
            settings,
            frames=frames,
            batches=options.batch,
            new_tokens=options.new_tokens,
            repeats=options.repeats,
            on_row=write,
        )
    found = points(result)
    grown = growth(found)
    summary = {**about, "weight_bytes": result.weight_bytes, "in_use_bytes": result.in_use_bytes}
    summary |= {"refused": result.refused, "points": found, "memory_growth": grown}
    (out / "bench.json").write_text(json.dumps(summary, indent=1) + "\n")
    text = head(about, result.refused)
    blocks = [text, NOTES, *(table.markdown() for table in tables_of(found, grown))]
    (out / "bench.md").write_text("\n\n".join([f"# tokensieve bench: {options.model}", *blocks]) + "\n")
    if options.json:
        for point in found:
            print_json({"model": options.model, **point})
        return
    print(text)
    _show(tables_of(found, grown, spread=False), as_json=False)
    print(f"Wrote bench.jsonl, bench.json and bench.md into {out}.")


def _show(tables, as_json: bool) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        if as_json:
            for row in table.rows:
                print_json(dict(zip(table.columns, row, strict=True)))
        else:
            table.print(console)
