"""`tokensieve clips --out DIR`: generated clips as MP4 files with a manifest."""

from __future__ import annotations

from tokensieve.commands.output import print_json


def run(options) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from tokensieve.datasets import write_clips

    with Progress(console=Console(stderr=True), disable=options.json) as progress:
        task = progress.add_task("writing clips", total=options.count)
        manifest = write_clips(
            options.split, options.count, options.out, options.seed, progress=lambda: progress.advance(task)
        )
    if options.json:
        print_json({"manifest": str(manifest), "clips": options.count})
    else:
        print(f"{options.count} clips and {manifest}")
    return 0
