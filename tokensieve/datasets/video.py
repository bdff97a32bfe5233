"""Reading videos, images and folders of frames: the public functions.

Everything comes back as `Frames` (pixels and their real times). By default a file is decoded in a
separate process that is killed when it hangs and replaced when it crashes; see docs/video.md for what
that does and does not protect from.

The default backend is PyAV: it alone recovers what can be had from damaged files, and it took no more
CPU time than decord in docs/benchmarks/video_backends.md (torchcodec took less on a long clip).
"""

from __future__ import annotations

import os

import numpy as np

from tokensieve.datasets.collector import Collector
from tokensieve.datasets.frames import Frames
from tokensieve.datasets.jobs import BACKENDS, Job, run
from tokensieve.datasets.limits import Limits
from tokensieve.datasets.sampling import Sampling, whole
from tokensieve.datasets.sources import check_path
from tokensieve.errors import BadOption

PathLike = str | bytes | os.PathLike


def read_video(
    path: PathLike,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    short: str = "repeat",
    max_side: int | None = None,
    drop_corrupt: bool = False,
    backend: str = "pyav",
    isolate: bool = True,
    limits: Limits | None = None,
    root: PathLike | None = None,
) -> Frames:
    """Read frames of a video, or of a still or animated image.

    The frame shown at time t is the last one with a timestamp <= t; times are seconds since the first
    frame of the file. A still image gives one frame at 0.0, whatever was asked.

    Args:
        path: Local file. URLs, playlists, devices, pipes and folders are refused.
        num_frames: This many frames spread evenly in time, the first and the last of the range exactly
            among them; one frame is the middle. 8 when neither this nor `fps` is given.
        fps: One frame every 1/fps seconds from the start of the range, its end left out.
        start_s: Start of the range; None is the first frame.
        end_s: End of the range; None is the end of the file. Beyond the end: cut there, result partial.
        short: What to do when a frame would be returned twice: "repeat" it, return "fewer", or "error".
        max_side: Scale down while decoding so that no side is longer. Never scales up.
        drop_corrupt: Treat frames that the decoder marks as damaged as lost.
        backend: "pyav", "decord" or "torchcodec".
        isolate: Decode in a separate process that can be killed.
        limits: Budget for pixels, frames, bytes, memory and time.
        root: Refuse a path that leads out of this folder, links followed.

    Raises:
        BadOption: An argument has a value that is not allowed, or start_s lies after the end.
        MediaNotFound, MediaNotAllowed: Nothing to open there, or something that is refused.
        BadMedia, NoVideoStream: Not a file that can be decoded.
        MediaTooLarge, MediaTimeout, DecoderCrash: Beyond the limits, hung, or died.
        MissingBackend: The backend is not installed.
    """
    if backend not in BACKENDS:
        raise BadOption(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    job = _job(
        "video",
        path,
        root,
        limits,
        max_side,
        sampling=Sampling(num_frames=num_frames, fps=fps, start_s=start_s, end_s=end_s, short=short),
        backend=backend,
        drop_corrupt=bool(drop_corrupt),
    )
    return _read(job, isolate)


def read_folder(
    path: PathLike,
    *,
    folder_fps: float = 1.0,
    num_frames: int | None = None,
    fps: float | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    short: str = "repeat",
    max_side: int | None = None,
    isolate: bool = True,
    limits: Limits | None = None,
    root: PathLike | None = None,
) -> Frames:
    """Read frames from a folder of images in natural order (frame2 before frame10).

    Image k is shown at k / `folder_fps` seconds. Only the chosen images are opened; they must be of one
    size, and a broken one among them is an error. The other arguments are those of `read_video`.
    """
    sampling = Sampling(num_frames=num_frames, fps=fps, start_s=start_s, end_s=end_s, short=short)
    # the same rules as for fps, said of the right argument
    try:
        folder_fps = Sampling(fps=folder_fps).fps
    except BadOption as error:
        raise BadOption(f"folder_{error.message}") from None
    if folder_fps is None:
        raise BadOption("folder_fps must be a finite number, got None.")
    return _read(_job("folder", path, root, limits, max_side, sampling=sampling, folder_fps=folder_fps), isolate)


def read_image(
    path: PathLike,
    *,
    max_side: int | None = None,
    isolate: bool = True,
    limits: Limits | None = None,
    root: PathLike | None = None,
) -> np.ndarray:
    """Read a still image as RGB, uint8 [H, W, 3]: EXIF rotation applied, transparency over white, 16-bit grey
    scaled to 8 bits, CMYK and palettes converted. Of an animated WebP or PNG, the first frame."""
    return _read(_job("image", path, root, limits, max_side), isolate).data[0]


def read_media(path: PathLike, **options) -> Frames:
    """`read_folder` for a folder, `read_video` for a file; options are passed on."""
    return (read_folder if os.path.isdir(check_path(path)) else read_video)(path, **options)


def _job(kind: str, path, root, limits: Limits | None, max_side, **more) -> Job:
    return Job(
        kind=kind,
        path=os.path.abspath(check_path(path)),  # the isolated process has a working directory of its own
        root=None if root is None else os.path.realpath(check_path(root)),
        limits=limits or Limits(),
        max_side=None if max_side is None else whole("max_side", max_side, least=1),
        **more,
    )


def _read(job: Job, isolate: bool) -> Frames:
    collector = Collector(job.limits)
    if isolate:
        from tokensieve.datasets.decode_client import run_isolated  # starts nothing, but registers exit handlers

        outcome = run_isolated(job, collector)
    else:
        outcome = run(job, collector.add)
    data, times_s = collector.result(outcome.order)
    return Frames(
        data=data,
        times_s=times_s,
        duration_s=outcome.duration_s,
        source=job.path,
        partial=outcome.partial,
        notes=outcome.notes,
    )
