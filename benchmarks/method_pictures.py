"""What each method keeps of one clip: a row of frames per method, for docs/methods.md.

python benchmarks/method_pictures.py --out docs/pictures/methods.png
"""

from __future__ import annotations

import argparse

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import tokensieve as ts
from tokensieve.datasets.clip_files import clip_frames
from tokensieve.datasets.clips import make_clip

METHODS = (
    "uniform",
    "evs",
    "divprune",
    "zoprune",
    "visionzip",
    "fastvid",
    "holitom",
    "prunevid",
    "cdpruner",
    "vidcom2",
)
FRAMES = (0, 2, 5, 7)
WIDTH, LABEL = 150, 150


def rows(vlm, clip_index: int, keep: float) -> list[tuple[str, np.ndarray]]:
    """A name and `[frames, height, width, 3]` pictures for every method."""
    frames = clip_frames(make_clip("test", clip_index))
    question = make_clip("test", clip_index).questions[0].text
    prepared = vlm.compress(None).prepare(frames, question, needs={"tower", "question"})
    made = []
    for method in METHODS:
        again = vlm.compress(method, keep).reselect(prepared)
        (mask,) = ts.kept_masks(again.items[0], again.plans[0])
        labels = [f"{t:.1f} s" for t in frames.times_s]
        made.append((method, ts.captioned_frames(frames.data, mask, labels=labels, width=WIDTH)[list(FRAMES)]))
    vlm.compress(None)
    return made


def sheet(made: list[tuple[str, np.ndarray]]) -> Image.Image:
    """Two columns of methods."""
    font = ImageFont.load_default(size=15)
    height, width = made[0][1].shape[1:3]
    half = (len(made) + 1) // 2
    column = LABEL + len(FRAMES) * (width + 4)
    picture = Image.new("RGB", (2 * column, half * (height + 6)), (250, 250, 248))
    draw = ImageDraw.Draw(picture)
    for i, (name, tiles) in enumerate(made):
        left, top = (i // half) * column, (i % half) * (height + 6)
        draw.text((left + LABEL - 10, top + height // 2 - 16), name, fill=(30, 30, 34), font=font, anchor="ra")
        for j, tile in enumerate(tiles):
            picture.paste(Image.fromarray(tile), (left + LABEL + j * (width + 4), top))
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=int, default=3)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--out", default="docs/pictures/methods.png")
    options = parser.parse_args()
    sheet(rows(ts.load("tiny"), options.clip, options.keep)).quantize(256).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
