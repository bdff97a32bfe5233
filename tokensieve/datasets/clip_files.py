"""Generated clips as files: H.264 videos and a manifest of questions and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tokensieve.datasets.clips import DURATION_S, NUM_FRAMES, Clip, make_clip
from tokensieve.datasets.frames import Frames
from tokensieve.errors import BadOption

STEPS = 4  # file frames per trained frame step, so that 8 frames sampled from a file are those of training
SCALE = 2  # at twice the size, 4:2:0 keeps the colour of every pixel of the original


def clip_frames(clip: Clip, num_frames: int = NUM_FRAMES) -> Frames:
    """A clip as `Frames`, without a file: `num_frames` pictures of 96 x 96 spread evenly over 2 seconds."""
    from tokensieve.datasets.render import frame_times, render_clips

    times = frame_times(num_frames)
    return Frames(
        data=render_clips([clip], times)[0].numpy(),
        times_s=times.double().numpy() * DURATION_S,
        duration_s=DURATION_S,
        source=clip.id,
    )


def write_clips(
    split: str, count: int, out: str | Path, seed: int = 0, progress: Callable[[], None] | None = None
) -> Path:
    """Writes `count` clips of a split as `OUT/ID.mp4` and one manifest row per question.

    Rows of `OUT/manifest.jsonl` hold `id`, `video` (relative to the manifest), `kind`, `question`, `answer`.

    Returns:
        The manifest's path.

    Raises:
        BadOption: unknown split, or a count that is not positive.
    """
    from tokensieve.datasets.write import write_video

    if count < 1:
        raise BadOption(f"count must be positive, got {count}.")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        try:
            clip = make_clip(split, index, seed)
        except ValueError as error:
            raise BadOption(str(error)) from None
        frames = clip_frames(clip, (NUM_FRAMES - 1) * STEPS + 1).data
        enlarged = np.repeat(np.repeat(frames, SCALE, 1), SCALE, 2)
        write_video(out / f"{clip.id}.mp4", enlarged, fps=(len(frames) - 1) / DURATION_S, crf=12)
        rows += [
            {
                "id": f"{clip.id}-{q.kind}",
                "video": f"{clip.id}.mp4",
                "kind": q.kind,
                "question": q.text,
                "answer": q.answer,
            }
            for q in clip.questions
        ]
        if progress:
            progress()
    manifest = out / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest
