"""Opening what the user named, and nothing else: no URL, device, pipe, playlist or link out of a folder.

The file is opened once, checked through its descriptor, and the decoders get that descriptor's path. So
the file that was checked is the file that is decoded, whatever happens to its name meanwhile, and names
such as `-x.mp4` or `concat:a|b` never reach a parser.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tokensieve.datasets.limits import Limits
from tokensieve.errors import BadMedia, BadOption, MediaNotAllowed, MediaNotFound, MediaTooLarge, NoVideoStream

_PROTOCOLS = "concat|subfile|data|crypto|cache|async|pipe|fd|file"  # of FFmpeg's, those that need no slashes
_URL = re.compile(rf"[a-z][a-z0-9+.-]+:[/\\]{{2}}|({_PROTOCOLS}):", re.IGNORECASE)
_HEAD_BYTES = 400  # two MPEG-TS packets
_MOV_ATOMS = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof")
_AVIF_BRANDS = (b"avif", b"avis")
_SCRIPTS = (b"#extm3u", b"ffconcat", b"[playlist]", b"<mpd", b"<smil", b"<asx", b"v=0\r\n", b"v=0\n")

# (bytes at the start) -> (kind, name of the only FFmpeg demuxer or Pillow reader that will be tried)
_MAGIC = (
    (b"\x1a\x45\xdf\xa3", ("video", "matroska")),
    (b"FLV\x01", ("video", "flv")),
    (b"OggS", ("video", "ogg")),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", ("video", "asf")),
    (b"\x00\x00\x01\xba", ("video", "mpeg")),
    (b"GIF87a", ("video", "gif")),
    (b"GIF89a", ("video", "gif")),
    (b"\xff\xd8\xff", ("image", "JPEG")),
    (b"\x89PNG\r\n\x1a\n", ("image", "PNG")),
    (b"BM", ("image", "BMP")),
    (b"II*\x00", ("image", "TIFF")),
    (b"MM\x00*", ("image", "TIFF")),
    (b"P5", ("image", "PPM")),
    (b"P6", ("image", "PPM")),
    (b"ID3", ("audio", "")),
    (b"fLaC", ("audio", "")),
    (b"\xff\xfb", ("audio", "")),
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """An open, checked file."""

    name: str
    """The path as the user wrote it, for messages."""
    path: str
    """The path to hand to a decoder."""
    kind: str
    """'video' or 'image'."""
    reader: str
    """Name of the one FFmpeg demuxer or Pillow reader allowed to open it."""
    size_bytes: int
    """Size of the file."""


def check_path(path) -> str:
    """The path as text, or an error if it is no local path at all."""
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise BadOption(f"path must be a str or a path object, got {type(path).__name__}.") from None
    if not text or "\0" in text:
        raise BadOption(f"path must be a non-empty file name without NUL characters, got {text!r}.")
    if len(text) > 32_768:
        raise MediaNotFound(f"A path of {len(text)} characters is too long to exist.")
    if _URL.match(text):
        raise MediaNotAllowed(
            f"{text[:200]!r} is a URL or protocol string; only local files are read.",
            "Download it first and give the file's path. If it is a file name, put './' before it.",
        )
    return text


@contextmanager
def open_source(path: str, *, root: str | None, limits: Limits) -> Iterator[Source]:
    """Open a regular file, check where and what it is, close it at the end."""
    descriptor = _open(path)
    try:
        info = os.fstat(descriptor)
        if stat.S_ISDIR(info.st_mode):
            raise MediaNotAllowed(f"{path!r} is a folder, not a file.", "Use read_folder for a folder of frames.")
        if not stat.S_ISREG(info.st_mode):
            raise MediaNotAllowed(f"{path!r} is a pipe, socket or device, not a regular file.", "Give a regular file.")
        fd_path = f"/proc/self/fd/{descriptor}"
        real = os.readlink(fd_path) if os.path.islink(fd_path) else os.path.realpath(path)
        check_inside(real, root, path)
        if info.st_size > limits.max_file_bytes:
            raise MediaTooLarge(
                f"{path!r} has {info.st_size} bytes; limits.max_file_bytes allows {limits.max_file_bytes}."
            )
        kind, reader = _sniff(os.pread(descriptor, _HEAD_BYTES, 0), path)
        yield Source(
            name=path,
            path=fd_path if os.path.islink(fd_path) else real,
            kind=kind,
            reader=reader,
            size_bytes=info.st_size,
        )
    finally:
        os.close(descriptor)


def check_inside(real: str, root: str | None, path: str) -> None:
    """Raise MediaNotAllowed when `real` (links already followed) is not below `root`."""
    if root is not None and os.path.commonpath([os.path.realpath(root), real]) != os.path.realpath(root):
        raise MediaNotAllowed(f"{path!r} leads outside the allowed folder {root!r}.", "Give a file inside that folder.")


def _open(path: str) -> int:
    # O_NONBLOCK: opening a pipe that nobody writes to would otherwise wait for ever
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        raise MediaNotFound(f"No file {path!r}.") from None
    except PermissionError:
        raise MediaNotFound(f"{path!r} may not be read by this user.") from None
    except OSError as error:
        raise MediaNotFound(f"{path!r} cannot be opened ({os.strerror(error.errno or 0)}).") from None


def _sniff(head: bytes, path: str) -> tuple[str, str]:
    """Kind and reader from the first bytes; the file's name plays no part."""
    if not head:
        raise BadMedia(f"{path!r} is empty.")
    found = _recognise(head)
    if found is None:
        text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        if text.startswith(_SCRIPTS) or (text.startswith(b"<?xml") and b"<mpd" in text):
            raise MediaNotAllowed(
                f"{path!r} is a playlist or script that points at other files.", "Give the video file itself."
            )
        raise BadMedia(f"{path!r} is not in a video or image format that is read here.")
    if found[0] == "audio":
        raise NoVideoStream(f"{path!r} is an audio file.")
    return found


def _recognise(head: bytes) -> tuple[str, str] | None:
    for magic, found in _MAGIC:
        if head.startswith(magic):
            return found
    if head[4:8] in _MOV_ATOMS:
        return ("image", "AVIF") if head[8:12] in _AVIF_BRANDS else ("video", "mov")
    if head[:4] == b"RIFF":
        return {b"AVI ": ("video", "avi"), b"WEBP": ("image", "WEBP"), b"WAVE": ("audio", "")}.get(head[8:12])
    if len(head) > 376 and head[0] == head[188] == head[376] == 0x47:
        return "video", "mpegts"
    if len(head) > 388 and head[4] == head[196] == head[388] == 0x47:  # .m2ts: 4 bytes of time before each packet
        return "video", "mpegts"
    return None
