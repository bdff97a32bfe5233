"""One reading job from path to pictures, the same code inside the isolated process and without it.

A job is plain data so that it can cross a process border; pictures leave through a callback one at a
time, so that the process that decodes never holds the whole result.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction

import numpy as np

from tokensieve.datasets.decode_pyav import Report, Request
from tokensieve.datasets.demux import list_packets, open_container, video_stream
from tokensieve.datasets.images import durations_ms, is_animated, list_folder, open_image, read_still, rgb_of
from tokensieve.datasets.limits import Limits, fit_side
from tokensieve.datasets.sampling import Picks, Sampling, apply_short, pick
from tokensieve.datasets.sources import Source, open_source
from tokensieve.errors import BadMedia, MediaError, MediaTooLarge

BACKENDS = {
    "pyav": "decode_pyav",
    "decord": "decode_decord",
    "torchcodec": "decode_torchcodec",
}
KINDS = ("video", "image", "folder")

Sink = Callable[[float, np.ndarray, int], None]
"""Called as sink(time_s, rgb, most_pictures) for each distinct picture."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to read."""

    kind: str
    """One of KINDS."""
    path: str
    """Local path, already checked by sources.check_path."""
    root: str | None = None
    """Folder that the path may not lead out of."""
    sampling: Sampling = Sampling()
    """Which frames."""
    limits: Limits = Limits()
    """Budget."""
    backend: str = "pyav"
    """One of BACKENDS."""
    max_side: int | None = None
    """Scale down to this many pixels on the longer side."""
    drop_corrupt: bool = False
    """Treat frames that the decoder marks as damaged as lost."""
    folder_fps: float = 1.0
    """Frames per second of a folder of frames."""

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> Job:
        return cls(**{**data, "sampling": Sampling(**data["sampling"]), "limits": Limits(**data["limits"])})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a job found beside the pictures."""

    order: list[int]
    """For each frame of the result, the number of the picture (in order of delivery) it is."""
    duration_s: float
    """Length of the source."""
    partial: bool
    """Whether something asked for is missing or damaged."""
    notes: tuple[str, ...]
    """What."""


def run(job: Job, sink: Sink) -> Outcome:
    """Do the job; raises TokensieveError only."""
    try:
        if job.kind == "folder":
            return _read_folder(job, sink)
        if job.kind == "image":
            sink(0.0, read_still(job.path, root=job.root, limits=job.limits, max_side=job.max_side), 1)
            return _still_outcome()
        with open_source(job.path, root=job.root, limits=job.limits) as source:
            return (_read_video if source.kind == "video" else _read_image)(job, source, sink)
    except MemoryError:
        raise MediaTooLarge(
            f"Decoding {job.path!r} needs more memory than limits.memory_bytes={job.limits.memory_bytes} allows.",
            "Give max_side to scale while decoding, or raise the limit if you trust the file.",
        ) from None


def _read_video(job: Job, source: Source, sink: Sink) -> Outcome:
    with open_container(source) as container:
        stream = video_stream(container, source, job.limits)
        width, height = fit_side(stream.codec_context.width, stream.codec_context.height, job.max_side)
        table = list_packets(container, stream, source, job.limits)
    first = int(table.shown_pts[0])
    if source.reader == "gif" and table.num_packets == 1:  # a still image that happens to be a GIF
        picks = Picks(index=np.zeros(1, dtype=np.int64))
    else:
        picks = pick(job.sampling, table.shown_pts, table.end_pts, table.time_base, job.limits)
    job.limits.check_total(len(picks.index), width, height)
    wanted = [int(pts) for pts in table.shown_pts[np.unique(picks.index)]]
    emitted: dict[int, int] = {}  # pts -> number of the picture

    def take(pts: int, pixels: np.ndarray) -> None:
        emitted[pts] = len(emitted)
        sink(float((pts - first) * table.time_base), pixels, len(wanted))

    module = importlib.import_module(f"tokensieve.datasets.{BACKENDS[job.backend]}")
    report = getattr(module, BACKENDS[job.backend])(
        Request(
            source=source,
            table=table,
            wanted=wanted,
            limits=job.limits,
            max_side=job.max_side,
            drop_corrupt=job.drop_corrupt,
        ),
        take,
    )
    if not emitted:
        raise BadMedia(f"{source.name!r}: not one of the {len(wanted)} pictures asked for could be decoded.")
    lost = (*table.notes, *picks.notes, *_losses(report, wanted, emitted))
    order, repeats = _order([int(p) for p in table.shown_pts[picks.index]], emitted, job.sampling)
    return Outcome(
        order=order,
        duration_s=float((table.end_pts - first) * table.time_base),
        partial=bool(lost),
        notes=lost + repeats + (("the picture size changes: scaled to the first",) if report.resized else ()),
    )


def _losses(report: Report, wanted: list[int], emitted: dict[int, int]) -> tuple[str, ...]:
    notes = []
    if report.num_failed:
        notes.append(f"{report.num_failed} packets could not be decoded and were skipped")
    if report.num_corrupt:
        notes.append(
            f"{report.num_corrupt} decoded frames are marked as damaged, {len(report.corrupt_pts)} of them are returned"
        )
    num_lost = sum(pts not in emitted for pts in wanted)
    if num_lost and (notes or len(report.stand_in) < num_lost):  # without damage: frames meant to be hidden
        notes.append(f"{num_lost} of {len(wanted)} frames are lost; the one shown before stands in")
    return tuple(notes)


def _order(asked: list[int], emitted: dict[int, int], sampling: Sampling):
    """Picture numbers for the asked times, after the `short` policy. For a lost picture, the nearest one before it
    stands in (the backend delivers it), or the first one of all."""
    have = np.array(sorted(emitted), dtype=np.int64)
    at = np.searchsorted(have, np.array(asked, dtype=np.int64), side="right") - 1
    shown = have[np.maximum(at, 0)].tolist()
    kept = apply_short(shown, sampling.short)
    num_distinct = len(set(shown))
    notes = ()
    if num_distinct < len(shown):
        done = "repeated" if sampling.short == "repeat" else "returned once"
        notes = (f"{len(shown)} frames asked for, {num_distinct} different ones in that range: {done}",)
    return [emitted[pts] for pts in kept], notes


def _read_image(job: Job, source: Source, sink: Sink) -> Outcome:
    """A still gives one frame whatever was asked; an animation is sampled like a video."""
    with open_image(source, job.limits) as image:
        if not is_animated(image):
            sink(0.0, rgb_of(image, source, job.max_side), 1)
            return _still_outcome()
        announced = image.n_frames
        ends_ms = np.cumsum(durations_ms(image, source, job.limits)).astype(np.int64)
        starts_ms = np.concatenate([[0], ends_ms[:-1]]).astype(np.int64)
        picks = pick(job.sampling, starts_ms, int(ends_ms[-1]), Fraction(1, 1000), job.limits)
        job.limits.check_total(len(picks.index), *fit_side(*image.size, job.max_side))
        wanted = np.unique(picks.index)
        for number in wanted:
            image.seek(int(number))
            sink(float(starts_ms[number]) / 1000, rgb_of(image.copy(), source, job.max_side), len(wanted))
    lost = picks.notes
    if len(ends_ms) < announced:
        lost += (f"the file announces {announced} frames, {len(ends_ms)} are there",)
    order, repeats = _order([int(n) for n in picks.index], {int(n): i for i, n in enumerate(wanted)}, job.sampling)
    return Outcome(order=order, duration_s=float(ends_ms[-1]) / 1000, partial=bool(lost), notes=lost + repeats)


def _read_folder(job: Job, sink: Sink) -> Outcome:
    paths = list_folder(job.path, root=job.root, limits=job.limits)
    frame_s = 1 / Fraction(job.folder_fps).limit_denominator(10**6)
    picks = pick(job.sampling, np.arange(len(paths)), len(paths), frame_s, job.limits)
    wanted = np.unique(picks.index)
    first_size = None
    for number in wanted:
        try:
            pixels = read_still(paths[number], root=job.root, limits=job.limits, max_side=job.max_side)
        except MediaError as error:
            raise type(error)(f"Frame {number} of the folder: {error.message}", error.hint) from None
        height, width = pixels.shape[:2]
        if first_size is None:
            first_size = width, height
            job.limits.check_total(len(picks.index), width, height)
        elif first_size != (width, height):
            raise BadMedia(
                f"The frames of folder {job.path!r} differ in size: {paths[wanted[0]]!r} is "
                f"{first_size[0]}x{first_size[1]}, {paths[number]!r} is {width}x{height}.",
                "Make them the same size, or read them one by one with read_image.",
            )
        sink(float(int(number) * frame_s), pixels, len(wanted))
    order, repeats = _order([int(n) for n in picks.index], {int(n): i for i, n in enumerate(wanted)}, job.sampling)
    return Outcome(
        order=order, duration_s=float(len(paths) * frame_s), partial=bool(picks.notes), notes=picks.notes + repeats
    )


def _still_outcome() -> Outcome:
    return Outcome(order=[0], duration_s=0.0, partial=False, notes=())
