"""Decoding chosen pictures with decord 0.6, mainly to reproduce papers that used it.

The file has been opened, checked and listed by PyAV before decord sees it. decord gives nothing from a
damaged file, knows no AV1, and can hang (dmlc/decord #373): keep `isolate=True`.
"""

from __future__ import annotations

import numpy as np

from tokensieve.datasets.decode_pyav import Report, Request, Take, to_rgb
from tokensieve.datasets.limits import fit_side
from tokensieve.errors import BadMedia, MediaError, MissingBackend


def decode_decord(request: Request, take: Take) -> Report:
    """Hand each wanted picture to `take(pts, rgb)`."""
    try:
        import decord
    except Exception:  # a broken shared library raises other things than ImportError
        raise MissingBackend("The decord backend is not installed.", "pip install decord") from None
    try:
        reader = decord.VideoReader(request.source.path, ctx=decord.cpu(0), num_threads=1)
        first_s = float(reader.get_frame_timestamp(0)[0])
        for pts, number in zip(request.wanted, display_numbers(request), strict=True):
            check_time(request, pts, float(reader.get_frame_timestamp(number)[0]) - first_s, "decord")
            take(pts, scale(request, reader[number].asnumpy()))
    except (MediaError, MemoryError):
        raise
    except Exception:
        raise cannot_read("decord", request) from None
    return Report()


def cannot_read(backend: str, request: Request) -> BadMedia:
    """The error for a file that PyAV listed but another backend refuses, with what the list tells about it."""
    notes = f" ({'; '.join(request.table.notes)})" if request.table.notes else ""
    return BadMedia(
        f"{backend} cannot read {request.source.name!r}{notes}.", "Use backend='pyav', which recovers what it can."
    )


def display_numbers(request: Request) -> list[int]:
    """Position in display order of each wanted picture, counting every shown packet; the last of equals."""
    table = request.table
    every_pts = np.sort(table.pts[table.is_shown])
    return [int(np.searchsorted(every_pts, pts, side="right")) - 1 for pts in request.wanted]


def check_time(request: Request, pts: int, time_s: float, backend: str) -> None:
    """Raise BadMedia when the backend counts the file's pictures differently than the packet list does."""
    table = request.table
    expected_s = float((pts - int(table.shown_pts[0])) * table.time_base)
    frame_s = float((table.end_pts - int(table.shown_pts[0])) * table.time_base) / len(table.shown_pts)
    if abs(time_s - expected_s) > max(0.002, frame_s / 2):
        raise BadMedia(
            f"{backend} and the packet list disagree about the frames of {request.source.name!r}.",
            "Use backend='pyav'.",
        )


def scale(request: Request, pixels: np.ndarray) -> np.ndarray:
    """Check the size of a decoded picture and scale it down if asked."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:  # decord does so for quarter turns
        raise BadMedia(
            f"The backend gave no RGB picture of {request.source.name!r}, which may have a rotation tag.",
            "Use backend='pyav'.",
        )
    height, width = pixels.shape[:2]
    request.limits.check_picture(width, height)
    size = fit_side(width, height, request.max_side)
    if size == (width, height):
        return pixels
    import av

    return to_rgb(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"), size)
