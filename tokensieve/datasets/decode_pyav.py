"""Decoding chosen pictures with PyAV: the default backend.

The packet list says where decoding may start, so for every picture the loop either goes on decoding or,
when a key packet lies between, throws the decoder's state away and skips to that packet. Skipping means
reading packets without decoding them (about 3 us each), or a container seek when the gap is long; a seek
must land on the key packet it was meant for, else the file is read from the start again.

Packets that fail to decode are skipped and counted. A picture that does not come out is tried once more
from one key packet earlier (streams with gradual refresh need that); then the picture shown before it
stands in, which is what a player would show.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile

import numpy as np

from tokensieve.datasets.demux import PacketTable, open_container, read_packets, video_stream
from tokensieve.datasets.limits import Limits, fit_side
from tokensieve.datasets.sources import Source

SEEK_GAP = 1024  # packets; below it, skipping is cheaper than a seek that also has to be verified
MIN_SKIP = 4  # packets; below it, decoding on is cheaper than refilling an emptied decoder
PATIENCE = 20  # packets; the deepest reordering of H.264 and HEVC is 16
MAX_THREADS = 4

Take = Callable[[int, np.ndarray], None]


@dataclass(kw_only=True)
class Report:
    """What happened while decoding."""

    num_failed: int = 0
    """Packets that the decoder rejected."""
    num_corrupt: int = 0
    """Decoded pictures that the decoder marked as damaged."""
    corrupt_pts: set[int] = field(default_factory=set)
    """Those of them that are returned."""
    stand_in: dict[int, int] = field(default_factory=dict)
    """Time of a lost picture -> time of the picture returned in its place."""
    resized: bool = False
    """Whether the picture size changed within the file."""


@dataclass(kw_only=True)
class Request:
    """What to decode, for any backend."""

    source: Source
    """The open file."""
    table: PacketTable
    """Its packets."""
    wanted: list[int]
    """Times (pts) of the pictures to return, ascending and distinct, all in table.shown_pts."""
    limits: Limits
    """Budget."""
    max_side: int | None
    """Scale down to this many pixels on the longer side."""
    drop_corrupt: bool
    """Treat pictures marked as damaged as lost."""


def decode_pyav(request: Request, take: Take) -> Report:
    """Hand each wanted picture to `take(pts, rgb)`, in no particular order."""
    report = Report()
    converter = _Converter(request, report)
    done: set[int] = set()

    def deliver(pts: int, frame) -> None:
        if pts not in done:
            done.add(pts)
            take(pts, converter(frame))
            if frame.is_corrupt:
                report.corrupt_pts.add(pts)

    _Pass(request, report, deliver, last_try=request.table.by_count).run(request.wanted)
    missing = [pts for pts in request.wanted if pts not in done and pts not in report.stand_in]
    if missing:
        _Pass(request, report, deliver, last_try=True).run(missing)
    return report


class _Pass:
    """One run through the file for a set of pictures."""

    def __init__(self, request: Request, report: Report, deliver, *, last_try: bool):
        self.request, self.report, self.deliver, self.last_try = request, report, deliver, last_try
        self.table = request.table
        self._by_time = np.argsort(self.table.pts, kind="stable")
        self._sorted_pts = self.table.pts[self._by_time]
        self._keys = np.flatnonzero(self.table.is_key)
        self.pending: dict[int, tuple[int, int]] = {}  # pts -> (packet to start from, own packet)
        self.held = None  # latest picture of a time that several packets share
        self.previous = None  # (pts, picture) that came out last
        self.shown_before: dict[int, tuple] = {}  # pts that was passed over -> picture a player shows instead, or None
        self.overdue_since: dict[int, int] = {}  # the same pts -> number of packets read then
        self.num_read = 0
        self.num_out = 0

    def run(self, wanted: list[int]) -> None:
        spans = {pts: self._span(pts) for pts in wanted}
        self.pending = dict(sorted(spans.items(), key=lambda item: (item[1], item[0])))
        with _PacketReader(self.request, careful=self.last_try) as reader:
            start = self._next_start()
            while self.pending:
                if start > reader.number:
                    self._end_of_run(whole_file=False)
                    reader.skip_to(start)
                packet = reader.read()
                self.num_read += 1
                for frame in self._decode(reader.context, packet):
                    self._handle(frame)
                if packet is None:
                    self._end_of_run(whole_file=True)
                    return
                start = self._next_start()
                if start <= reader.number + MIN_SKIP:
                    start = 0

    def _span(self, pts: int) -> tuple[int, int]:
        own = self._packet_of(pts)
        if self.table.by_count:
            return 0, own
        # Pictures shown before a key packet but stored after it belong to the key packet before
        at = np.searchsorted(self._keys, own, side="right") - 1
        while at >= 0 and self.table.pts[self._keys[at]] > pts:
            at -= 1
        if self.last_try:
            at -= 1
        return (int(self._keys[at]) if at >= 0 else 0), own

    def _packet_of(self, pts: int) -> int:
        at = np.searchsorted(self._sorted_pts, pts, side="right") - 1
        return int(self._by_time[max(at, 0)])

    def _is_shared(self, pts: int) -> bool:
        left, right = np.searchsorted(self._sorted_pts, [pts, pts + 1])
        return right - left > 1

    def _next_start(self) -> int:
        return next(iter(self.pending.values()), (0, 0))[0]  # in order of start, see run()

    def _decode(self, context, packet) -> list:
        try:
            return context.decode(packet)
        except MemoryError:
            raise
        except Exception:
            self.report.num_failed += 1
            return []

    def _handle(self, frame) -> None:
        pts = self._time_of(frame)
        if pts is None:
            return
        self.report.num_corrupt += frame.is_corrupt
        if frame.is_corrupt and self.request.drop_corrupt:
            return
        if self.held is not None and self.held[0] != pts:
            self._release_held()
        if pts in self.pending:
            if self._is_shared(pts):
                self.held = (pts, frame)
            else:
                self._settle(pts, frame)
        # A later picture that is also shown later: what should have come before is overdue. Damage can upset the
        # order, so it gets a few packets more before it is given up.
        own = self._packet_of(pts)
        started = takewhile(lambda item: item[1][0] <= own, self.pending.items())
        passed = [(p, packet) for p, (_, packet) in started if p < pts]
        for p, packet in passed:
            self.shown_before.setdefault(p, self.previous)
            if packet < own:
                self.overdue_since.setdefault(p, self.num_read)
        self._give_up([p for p, _ in passed if self.overdue_since.get(p, self.num_read) + PATIENCE < self.num_read])
        self.previous = (pts, frame)

    def _time_of(self, frame) -> int | None:
        if not self.table.by_count:
            return frame.pts
        self.num_out += 1
        return int(self.table.shown_pts[self.num_out - 1]) if self.num_out <= len(self.table.shown_pts) else None

    def _release_held(self) -> None:
        held, self.held = self.held, None
        self._settle(*held)

    def _settle(self, pts: int, frame) -> None:
        self.pending.pop(pts, None)
        self.shown_before.pop(pts, None)
        self.deliver(pts, frame)

    def _end_of_run(self, *, whole_file: bool) -> None:
        if self.held is not None:
            self._release_held()
        if whole_file:
            for pts in self.pending:
                self.shown_before.setdefault(pts, self.previous)
            self._give_up(list(self.pending))
        self.previous = None

    def _give_up(self, lost: list[int]) -> None:
        for pts in lost:
            del self.pending[pts]
            shown = self.shown_before.pop(pts)
            if self.last_try and shown is not None and shown[0] < pts:
                self.deliver(*shown)
                self.report.stand_in[pts] = shown[0]


class _PacketReader:
    """Packets by number, with skips."""

    def __init__(self, request: Request, *, careful: bool):
        self._request, self._careful = request, careful
        self._stack = ExitStack()

    def __enter__(self):
        self._open()
        return self

    def __exit__(self, *_):
        self._stack.close()

    def _open(self) -> None:
        self._stack.close()
        self._container = self._stack.enter_context(open_container(self._request.source))
        self._stream = video_stream(self._container, self._request.source, self._request.limits)
        self.context = self._stream.codec_context
        # Frame threads lose the pictures in flight when a packet fails near the end of the file
        self.context.thread_type = "SLICE" if self._careful else "AUTO"
        self.context.thread_count = min(MAX_THREADS, _num_processors())
        self.context.options = {"max_pixels": str(self._request.limits.max_pixels)}  # also after a change of size
        self._packets = read_packets(self._container, self._stream)
        self.number = 0  # of the packet that read() returns next

    def read(self):
        """The next packet, or None at the end of what was listed (which also drains the decoder)."""
        if self.number >= self._request.table.num_packets:
            return None
        self.number += 1
        return next(self._packets, None)

    def skip_to(self, number: int) -> None:
        if self.number:
            self.context.flush_buffers()
        if number - self.number > SEEK_GAP and self._seek(number):
            return
        while self.number < number and self.read() is not None:
            pass

    def _seek(self, number: int) -> bool:
        target_pts = int(self._request.table.pts[number])
        try:
            self._container.seek(target_pts, stream=self._stream, backward=True)
            self._packets = read_packets(self._container, self._stream)
            for _, packet in zip(range(SEEK_GAP), self._packets, strict=False):
                if packet.is_keyframe and packet.pts == target_pts:
                    self._packets = _chain(packet, self._packets)
                    self.number = number
                    return True
        except MemoryError:
            raise
        except Exception:
            pass
        self._open()
        return False


def _num_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chain(first, rest):
    yield first
    yield from rest


class _Converter:
    """Decoder picture -> RGB array, scaled and turned."""

    def __init__(self, request: Request, report: Report):
        self._request, self._report = request, report
        self._reformatter = None
        self._stored_size: tuple[int, int] | None = None  # of the first picture, before turning

    def __call__(self, frame) -> np.ndarray:
        self._request.limits.check_picture(frame.width, frame.height)
        if self._stored_size is None:
            from av.video.reformatter import VideoReformatter

            self._reformatter = VideoReformatter()
            self._stored_size = fit_side(frame.width, frame.height, self._request.max_side)
            self._first_size = (frame.width, frame.height)
        elif (frame.width, frame.height) != self._first_size:
            self._report.resized = True
        return to_rgb(frame, self._stored_size, self._reformatter)


def to_rgb(frame, size: tuple[int, int], reformatter=None) -> np.ndarray:
    """RGB [H, W, 3] of a PyAV frame at `size` (width, height), turned as its rotation tag says."""
    width, height = size
    # A reformatter that is kept saves setting up, and one thread saves starting some for every picture
    reformat = frame.reformat if reformatter is None else partial(reformatter.reformat, frame, threads=1)
    if (frame.width, frame.height) == size:
        converted = reformat(format="rgb24")
    else:
        converted = reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC")
    pixels = converted.to_ndarray()
    return np.rot90(pixels, round(frame.rotation / 90) % 4) if frame.rotation else pixels
