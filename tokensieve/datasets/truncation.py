"""Is the file as long as its own boxes say? Noticed here: MP4/MOV, Matroska/WebM and AVI.

Not noticed: streams without sizes (MPEG-TS, FLV, live WebM), or a cut that falls exactly between two
top-level boxes.
"""

from __future__ import annotations

import os
from typing import BinaryIO

_MAX_BOXES = 100_000


def is_truncated(path: str, reader: str) -> bool:
    """True when a top-level box reaches beyond the end of the file."""
    walk = {"mov": _mov_boxes, "matroska": _matroska_segment, "avi": _riff_chunks}.get(reader)
    if walk is None:
        return False
    with open(path, "rb") as file:
        size_bytes = file.seek(0, os.SEEK_END)
        return any(end > size_bytes for _, end in walk(file, size_bytes))


def index_is_missing(path: str) -> bool:
    """True for an MP4/MOV file without a complete `moov` box, as when a recording or a download was cut."""
    with open(path, "rb") as file:
        size_bytes = file.seek(0, os.SEEK_END)
        return not any(atom == b"moov" and end <= size_bytes for atom, end in _mov_boxes(file, size_bytes))


def _mov_boxes(file: BinaryIO, size_bytes: int):
    """(name, offset of its end) of each top-level box; garbage after a box ends the walk."""
    offset = 0
    for _ in range(_MAX_BOXES):
        file.seek(offset)
        head = file.read(16)
        if len(head) < 8:
            return
        size, atom = int.from_bytes(head[:4], "big"), head[4:8]
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        elif size == 0:  # "to the end of the file"
            size = size_bytes - offset
        if size < 8 or not all(32 <= c < 127 or c == 0xA9 for c in atom):
            return
        offset += size
        yield atom, offset


def _matroska_segment(file: BinaryIO, size_bytes: int):
    """The end of the one segment that follows the EBML header, if its size is stated."""
    file.seek(4)
    header_bytes = _ebml_size(file)
    if header_bytes is None or header_bytes > 4096:
        return
    file.seek(header_bytes, os.SEEK_CUR)
    if file.read(4) == b"\x18\x53\x80\x67":
        segment_bytes = _ebml_size(file)
        if segment_bytes is not None:
            yield b"Segment", file.tell() + segment_bytes


def _ebml_size(file: BinaryIO) -> int | None:
    """A variable-length size; None when it is 'unknown' (all ones) or broken."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0xFF >> length)]) + file.read(length - 1), "big")
    return None if value == (1 << 7 * length) - 1 else value


def _riff_chunks(file: BinaryIO, size_bytes: int):
    """The end of each top-level RIFF chunk; big AVI files have several."""
    offset = 0
    for _ in range(_MAX_BOXES):
        file.seek(offset)
        head = file.read(8)
        if len(head) < 8 or head[:4] != b"RIFF":
            return
        size = int.from_bytes(head[4:], "little")
        if size in (0, 0xFFFFFFFF):  # never filled in by the writer
            return
        offset += 8 + size + size % 2
        yield b"RIFF", offset - size % 2
