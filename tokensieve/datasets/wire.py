"""What crosses the border between the reading process and the isolated decoder: JSON headers and raw bytes.

A message is a 4-byte big-endian length, a JSON object of that many bytes, and for pictures the pixels.
Nothing is unpickled, and the length of the pixels follows from a shape that the reader checks against
its own limits, never from a number the other side chose freely.
"""

from __future__ import annotations

import json
import math
import os

import numpy as np

from tokensieve import errors
from tokensieve.datasets.limits import Limits

PROTOCOL = 1
MAX_HEADER_BYTES = 1 << 20
_MAX_TEXT = 2000
_ERRORS = {
    kind.__name__: kind
    for kind in (
        errors.BadOption,
        errors.MediaNotFound,
        errors.MediaNotAllowed,
        errors.BadMedia,
        errors.NoVideoStream,
        errors.MediaTooLarge,
        errors.MissingBackend,
        errors.DecoderCrash,
    )
}


class BrokenMessage(Exception):
    """The other side sent something that is no message."""


def pack(header: dict) -> bytes:
    """Bytes of a header."""
    body = json.dumps(header).encode()
    if len(body) > MAX_HEADER_BYTES:
        raise BrokenMessage("header too long")
    return len(body).to_bytes(4, "big") + body


def unpack_length(four: bytes) -> int:
    """Length of the JSON that follows."""
    length = int.from_bytes(four, "big")
    if length > MAX_HEADER_BYTES:
        raise BrokenMessage("header too long")
    return length


def unpack(body: bytes) -> dict:
    """The header itself."""
    try:
        header = json.loads(body)
    except (ValueError, RecursionError):
        raise BrokenMessage("no JSON") from None
    if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
        raise BrokenMessage("no header")
    return header


def error_header(error: errors.TokensieveError) -> dict:
    """How an error travels: by the name of its class."""
    return {"kind": "error", "type": type(error).__name__, "message": error.message, "hint": error.hint}


def error_from(header: dict) -> errors.TokensieveError:
    """The error again; only classes of ours, only text."""
    kind = _ERRORS.get(header.get("type"))
    message, hint = header.get("message"), header.get("hint")
    if kind is None or not isinstance(message, str) or not isinstance(hint, str):
        raise BrokenMessage("unknown error")
    return kind(_clean(message), _clean(hint))


def picture_header(time_s: float, pixels: np.ndarray, most: int) -> dict:
    """Header of one picture; its bytes follow."""
    return {"kind": "picture", "time_s": time_s, "height": pixels.shape[0], "width": pixels.shape[1], "most": most}


def picture_from(header: dict, limits: Limits) -> tuple[float, int, int, int]:
    """time_s, height, width and the most pictures that will come, all within the limits."""
    time_s = header.get("time_s")
    height, width, most = (_count(header.get(name)) for name in ("height", "width", "most"))
    if not isinstance(time_s, int | float) or not math.isfinite(time_s) or min(height, width, most) < 1:
        raise BrokenMessage("bad picture")
    if most > limits.max_frames or most * height * width * 3 > limits.max_total_bytes:
        raise BrokenMessage("picture beyond the limits")
    return float(time_s), height, width, most


def outcome_from(header: dict, num_pictures: int, limits: Limits) -> dict:
    """Fields of jobs.Outcome, checked."""
    order, duration_s, notes = header.get("order"), header.get("duration_s"), header.get("notes")
    if not isinstance(order, list) or not 1 <= len(order) <= limits.max_frames:
        raise BrokenMessage("bad order")
    if any(_count(at) >= num_pictures for at in order):
        raise BrokenMessage("bad order")
    if not isinstance(duration_s, int | float) or not math.isfinite(duration_s):
        raise BrokenMessage("bad duration")
    if not isinstance(notes, list) or len(notes) > 100 or not all(isinstance(note, str) for note in notes):
        raise BrokenMessage("bad notes")
    return {
        "order": order,
        "duration_s": float(duration_s),
        "partial": header.get("partial") is True,
        "notes": tuple(_clean(note) for note in notes),
    }


def read_exactly(fd: int, size_bytes: int) -> bytes:
    """Blocking read; EOFError when the other side is gone."""
    parts = []
    while size_bytes:
        part = os.read(fd, min(size_bytes, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size_bytes -= len(part)
    return b"".join(parts)


def write_all(fd: int, data) -> None:
    """Blocking write of all bytes."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def _count(value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BrokenMessage("bad number")
    return value


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:_MAX_TEXT])
