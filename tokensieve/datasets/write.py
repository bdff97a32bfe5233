"""Writing frames to an MP4 that plays everywhere: H.264, 8-bit 4:2:0, index first.

Shape legend: T frames, H height, W width, 3 RGB
"""

from __future__ import annotations

import math
import os
import tempfile
from fractions import Fraction

import numpy as np

from tokensieve.datasets.sources import check_path
from tokensieve.errors import BadOption, MissingBackend


def write_video(path, frames: np.ndarray, fps: float, *, crf: int = 18) -> None:
    """Write `frames`, uint8 [T, H, W, 3], at `fps` frames per second.

    The file appears whole or not at all: it is written beside `path` and renamed. 4:2:0 needs even
    sizes, so an odd row or column is doubled at the edge. `crf` is x264's quality, 0 best to 51 worst.
    """
    path = os.path.abspath(check_path(path))
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise BadOption(f"frames must be uint8 [T, H, W, 3], none of them 0, got {frames.dtype} {list(frames.shape)}.")
    if isinstance(fps, bool) or not math.isfinite(float(fps)) or not 0.001 <= float(fps) <= 1000:
        raise BadOption(f"fps must lie between 0.001 and 1000, got {fps!r}.")
    if not isinstance(crf, int) or not 0 <= crf <= 51:
        raise BadOption(f"crf must be a whole number from 0 to 51, got {crf!r}.")
    handle, temporary = tempfile.mkstemp(suffix=".mp4", prefix=".", dir=os.path.dirname(path))
    os.close(handle)
    try:
        _encode(temporary, frames, Fraction(fps).limit_denominator(1001), crf)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _encode(path: str, frames: np.ndarray, rate: Fraction, crf: int) -> None:
    import av

    height, width = frames.shape[1:3]
    pad = ((0, height % 2), (0, width % 2), (0, 0))
    with av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as container:
        try:
            stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "preset": "veryfast"})
        except ValueError:
            raise MissingBackend("This build of PyAV has no H.264 encoder.", "pip install av from a wheel.") from None
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = 1 / rate
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(
                np.pad(frame, pad, mode="edge") if height % 2 or width % 2 else np.ascontiguousarray(frame),
                format="rgb24",
            )
            picture.pts, picture.time_base = number, 1 / rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
