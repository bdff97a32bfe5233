"""Small clips that differ, made once and copied under many names."""

from __future__ import annotations

from pathlib import Path

import pytest

import tokensieve as ts
from tokensieve.datasets import clip_frames, make_clip, write_video


def many_clips(folder: Path, count: int) -> Path:
    """`count` videos of 4 frames; no two files are equal, and there are five different scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = []
    for index in range(min(5, count)):
        write_video(folder / "scene.mp4", clip_frames(make_clip("test", index, 0), 4).data, fps=2)
        scenes.append((folder / "scene.mp4").read_bytes())
    (folder / "scene.mp4").unlink()
    for number in range(count):  # an unused box at the end, as the format allows
        box = b"\0\0\0\x0cfree" + number.to_bytes(4, "big")
        (folder / f"clip-{number:03d}.mp4").write_bytes(scenes[number % len(scenes)] + box)
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """Six clips; not to be changed."""
    return many_clips(tmp_path_factory.mktemp("clips"), 6)


@pytest.fixture(scope="session")
def vlm():
    """The shipped model; tests that set a compression take it off again."""
    return ts.load("tiny", device="cpu")


@pytest.fixture
def plain_vlm(vlm):
    """The shipped model without compression, before and after."""
    yield vlm.compress(None)
    vlm.compress(None)
