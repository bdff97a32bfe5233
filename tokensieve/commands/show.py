"""`tokensieve show CLIP`: what the model still looks at, as a contact sheet (.png) or a video (.mp4)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tokensieve.commands.output import load_compressed, print_json, read_options
from tokensieve.errors import BadOption


def run(options) -> int:
    for path in options.out:
        if Path(path).suffix not in (".png", ".mp4"):
            raise BadOption(f"--out must end in .png or .mp4, got {path!r}.")
        if not Path(path).absolute().parent.is_dir():
            raise BadOption(f"--out names a file in a folder that does not exist: {path!r}.", hint="Create it first.")
    vlm = load_compressed(options)
    prepared = vlm.prepare(options.clip, options.question, **read_options(options))
    masks = draw(vlm, prepared, options.out, title=f"{Path(options.clip).name}: ")
    tokens = prepared.visual_tokens(0)
    if options.json:
        print_json(
            {
                "clip": options.clip,
                "out": options.out,
                "visual_tokens": tokens,
                "kept_per_frame": [mask.sum((1, 2)).tolist() for mask in masks],
                "seconds": prepared.seconds,
                "model": vlm.name,
                "method": options.method,
                "keep": vlm.compression.keep if vlm.compression else 1.0,
                "notes": list(prepared.clips[0].notes),
            }
        )
    else:
        print(f"{tokens['kept']} of {tokens['full']} visual tokens kept; wrote {', '.join(options.out)}")
        for note in prepared.clips[0].notes:
            print(f"  note: {note}")
    return 0


def draw(vlm, prepared, out: list[str], title: str = "") -> list[np.ndarray]:
    """Writes the pictures of the first prompt of a prepared batch; returns the rasters it drew, `[t, h, w]` bool."""
    from tokensieve.datasets import write_video
    from tokensieve.pipeline.picture import VIEWS, captioned_frames, contact_sheet, seen_area, shown_masks

    clip = prepared.clips[0]
    frames = seen_area(clip.data, vlm.processor)
    tokens = prepared.visual_tokens(0)
    method = f" by {vlm.compression.name}" if vlm.compression else ""
    title = f"{title}{tokens['kept']} of {tokens['full']} visual tokens kept{method}"
    mine = [(item, plan) for item, plan in zip(prepared.items, prepared.plans, strict=True) if item.row == 0]
    rasters = shown_masks(*zip(*mine, strict=True), clip.num_frames)
    if clip.num_frames > 1:
        tiles = [captioned_frames(frames, rasters[0], labels=[f"{t:.2f} s" for t in clip.times_s])]
    else:
        names = VIEWS[: len(rasters)]
        tiles = [captioned_frames(frames, mask, labels=[name]) for name, mask in zip(names, rasters, strict=True)]
    tiles = np.concatenate(tiles)
    for path in out:
        if Path(path).suffix == ".png":
            contact_sheet(tiles, title).save(path)
        else:
            spacing_s = float(np.diff(clip.times_s).mean()) if clip.num_frames > 1 else 1.0
            write_video(path, tiles, fps=min(30.0, max(0.5, 1 / (spacing_s or 1.0))))
    return rasters
