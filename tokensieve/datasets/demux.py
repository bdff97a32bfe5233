"""Opening a container and listing its packets with PyAV, without decoding a picture.

The list is the ground truth for sampling: which pictures exist, when they are shown, and from which
packet decoding must start to get one. Header counts and rates are used only to notice that something
is missing.

Shape legend: P packets in file order, N distinct pictures in display order
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tokensieve.datasets.limits import Limits
from tokensieve.datasets.sources import Source
from tokensieve.datasets.truncation import index_is_missing, is_truncated
from tokensieve.errors import BadMedia, MediaTooLarge, NoVideoStream

# FFmpeg knows hundreds of decoders, many of them old and seldom checked; these are the ones that are opened.
CODECS = (
    "h264 hevc vp8 vp9 av1 libdav1d libvpx libvpx-vp9 mpeg4 mpeg2video mpeg1video mjpeg theora prores dnxhd gif "
    "h263 flv msmpeg4 msmpeg4v2 wmv1 wmv2 wmv3 vc1 rawvideo ffv1 huffyuv ffvhuff utvideo qtrle png"
).split()
# Only named so that a file with sound is not refused; sound is never decoded.
_AUDIO_CODECS = "aac mp3 mp3float ac3 eac3 opus libopus vorbis flac pcm_s16le pcm_s16be pcm_u8 alac amrnb wmav2".split()
_NO_VALUE = -(2**63)


@dataclass(frozen=True, kw_only=True)
class PacketTable:
    """What one pass over the packets of the video stream found."""

    pts: np.ndarray
    """Presentation time of each packet in ticks of `time_base`, int64 [P]."""
    is_key: np.ndarray
    """Whether decoding can start here, bool [P]."""
    is_shown: np.ndarray
    """False for packets that an edit list hides, bool [P]."""
    shown_pts: np.ndarray
    """Times of the pictures in display order, ascending and distinct, int64 [N]."""
    end_pts: int
    """When the last picture disappears."""
    time_base: Fraction
    """Seconds per tick."""
    by_count: bool
    """True when packets carry no presentation times: pictures are then matched by counting them."""
    notes: tuple[str, ...]
    """What the list shows to be missing."""

    @property
    def num_packets(self) -> int:
        return len(self.pts)


@contextmanager
def open_container(source: Source) -> Iterator:
    """A PyAV container for `source`, restricted to one demuxer, local files and known decoders."""
    import av

    # PyAV 19 no longer decodes metadata strictly, and no longer takes the argument.
    lenient = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        container = av.open(
            source.path,
            format=source.reader,
            **lenient,
            options={
                "protocol_whitelist": "file",
                "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,ogg,asf,mpeg,mpegts,gif",
                "codec_whitelist": ",".join([*CODECS, *_AUDIO_CODECS]),
            },
        )
    except MemoryError:
        raise
    except Exception:  # FFmpeg's own words are not passed on: see errors.py
        if source.reader == "mov" and index_is_missing(source.path):
            raise BadMedia(
                f"{source.name!r}: index missing, file truncated.",
                "Get the whole file again; a tool such as untrunc may save a recording.",
            ) from None
        raise BadMedia(f"{source.name!r} starts like a {source.reader} file but cannot be read.") from None
    with container:
        yield container


def video_stream(container, source: Source, limits: Limits):
    """The picture stream, its header checked against the limits."""
    from av.stream import Discard

    cover_art = 0x400  # AV_DISPOSITION_ATTACHED_PIC: a still beside music is no video
    streams = [s for s in container.streams.video if not int(s.disposition) & cover_art]
    if not streams:
        raise NoVideoStream(f"{source.name!r} has no video stream.")
    stream = streams[0]
    for other in container.streams:
        if other is not stream:
            other.discard = Discard.all
    context = stream.codec_context
    if context is None:
        raise BadMedia(f"{source.name!r}: there is no decoder for its video stream.")
    if context.codec.name not in CODECS:
        raise BadMedia(f"{source.name!r}: no decoder for {context.codec.name} is used here.", "Re-encode it to H.264.")
    if context.width <= 0 or context.height <= 0:
        raise BadMedia(f"{source.name!r} does not say how big its pictures are.")
    limits.check_picture(context.width, context.height)
    return stream


def list_packets(container, stream, source: Source, limits: Limits) -> PacketTable:
    """One pass over the file."""
    pts, dts, durations = array("q"), array("q"), array("q")
    is_key, is_shown = bytearray(), bytearray()
    num_corrupt = 0
    notes = []
    packets = read_packets(container, stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            break
        except MemoryError:
            raise
        except Exception:
            notes.append("the container breaks off with an error")
            break
        pts.append(_NO_VALUE if packet.pts is None else packet.pts)
        dts.append(_NO_VALUE if packet.dts is None else packet.dts)
        durations.append(packet.duration or 0)
        is_key.append(packet.is_keyframe)
        is_shown.append(not packet.is_discard)
        num_corrupt += packet.is_corrupt
        if len(pts) > limits.max_packets:
            raise MediaTooLarge(f"{source.name!r} has more than limits.max_packets={limits.max_packets} packets.")
    if not any(is_shown):
        raise BadMedia(f"{source.name!r} has a video stream without a single picture.")

    announced = len(stream.index_entries) if source.reader == "mov" else stream.frames
    if source.reader in ("mov", "avi") and announced > len(pts):
        notes.append(f"the file announces {announced} frames, {len(pts)} are there")
    if is_truncated(source.path, source.reader):
        notes.append("the file is shorter than its own header says: truncated")
    if num_corrupt:
        notes.append(f"{num_corrupt} packets are marked as damaged by the container")
    return _table(
        np.array(pts, dtype=np.int64),
        np.array(dts, dtype=np.int64),
        np.array(durations, dtype=np.int64),
        # GIF pictures build on the one before, whatever the flags say
        np.arange(len(pts)) == 0 if source.reader == "gif" else np.frombuffer(bytes(is_key), dtype=bool),
        np.frombuffer(bytes(is_shown), dtype=bool),
        stream,
        tuple(notes),
    )


def read_packets(container, stream) -> Iterator:
    """Packets of one stream without the empty one that PyAV appends."""
    for packet in container.demux(stream):
        if packet.size:
            yield packet


def _table(pts, dts, durations, is_key, is_shown, stream, notes) -> PacketTable:
    # AVI stores no display order; FFmpeg then makes up times in file order
    reordered = stream.codec_context.has_b_frames and stream.container.format.name == "avi"
    by_count = bool(reordered or (pts[is_shown] == _NO_VALUE).any())
    time_base = Fraction(stream.time_base)
    if by_count:
        pts, time_base = _times_by_count(dts, is_shown, time_base, stream)
    shown_pts = np.unique(pts[is_shown])
    last = int(shown_pts[-1])
    last_duration = int(durations[is_shown & (pts == last)].max())
    if last_duration <= 0 or by_count:
        last_duration = int(np.median(np.diff(shown_pts))) if len(shown_pts) > 1 else 1
    return PacketTable(
        pts=pts,
        is_key=is_key,
        is_shown=is_shown,
        shown_pts=shown_pts,
        end_pts=last + last_duration,
        time_base=time_base,
        by_count=by_count,
        notes=notes,
    )


def _times_by_count(dts, is_shown, time_base, stream):
    """Times for packets without pts (AVI with B-frames): the k-th picture shown gets the k-th decoding time, or
    k / rate when those are missing or repeat, too. Returned per packet in display order, for counting only."""
    ordered = np.sort(dts[is_shown])
    if ordered[0] == _NO_VALUE or (np.diff(ordered) <= 0).any():
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        time_base = 1 / (rate if rate > 0 else Fraction(25))
        ordered = np.arange(len(ordered), dtype=np.int64)
    pts = np.full(len(dts), _NO_VALUE, dtype=np.int64)
    pts[is_shown] = ordered
    return pts, time_base
