"""The reader of the isolated decoder's answers trusts nothing."""

import json

import numpy as np
import pytest

from tokensieve import errors
from tokensieve.datasets import wire
from tokensieve.datasets.collector import Collector
from tokensieve.datasets.limits import Limits

LIMITS = Limits(max_frames=10, max_total_bytes=1000)


def test_headers_survive():
    packed = wire.pack({"kind": "job", "path": "a\udcff\n\u20ac"})
    assert wire.unpack_length(packed[:4]) == len(packed) - 4
    assert wire.unpack(packed[4:]) == {"kind": "job", "path": "a\udcff\n\u20ac"}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b"{}", b'{"kind": 3}', b"\xff\xfe", b"[" * 100_000, b"9" * 9999]
)
def test_what_is_no_header(body):
    with pytest.raises(wire.BrokenMessage):
        wire.unpack(body)


def test_lengths_are_bounded():
    with pytest.raises(wire.BrokenMessage):
        wire.unpack_length(b"\xff\xff\xff\xff")


GOOD = {"kind": "picture", "time_s": 0.5, "height": 4, "width": 5, "most": 2}


def test_picture_header():
    assert wire.picture_from(GOOD, LIMITS) == (0.5, 4, 5, 2)
    assert wire.picture_from(wire.picture_header(0.5, np.zeros((4, 5, 3), np.uint8), 2), LIMITS) == (0.5, 4, 5, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"time_s": float("nan")},
        {"time_s": None},
        {"time_s": "1"},
        {"height": 0},
        {"height": -4},
        {"height": 2.0},
        {"width": True},
        {"width": 10**30},
        {"most": 11},
        {"most": 0},
        {"height": 10, "width": 10, "most": 4},
    ],
)
def test_bad_picture_headers(change):
    header = json.loads(json.dumps({**GOOD, **change}))
    with pytest.raises(wire.BrokenMessage):
        wire.picture_from(header, LIMITS)


DONE = {"kind": "done", "order": [0, 1, 1], "duration_s": 2.0, "partial": True, "notes": ["a\nb\x1b[31m"]}


def test_outcome():
    outcome = wire.outcome_from(DONE, 2, LIMITS)
    assert outcome == {"order": [0, 1, 1], "duration_s": 2.0, "partial": True, "notes": ("a?b?[31m",)}


@pytest.mark.parametrize(
    "change",
    [
        {"order": []},
        {"order": [2]},
        {"order": [-1]},
        {"order": [0] * 11},
        {"order": ["0"]},
        {"order": None},
        {"duration_s": float("inf")},
        {"notes": "text"},
        {"notes": [1]},
        {"notes": ["x"] * 101},
    ],
)
def test_bad_outcomes(change):
    with pytest.raises(wire.BrokenMessage):
        wire.outcome_from({**DONE, **change}, 2, LIMITS)


def test_errors_cross_by_name_with_their_hint():
    for kind in (errors.BadMedia, errors.MediaNotFound, errors.MediaTooLarge, errors.BadOption):
        error = wire.error_from(wire.error_header(kind("what", "do this")))
        assert type(error) is kind and error.message == "what" and error.hint == "do this"


@pytest.mark.parametrize("name", ["SystemExit", "OSError", "MediaTimeout", "", None, 3])
def test_other_classes_do_not_cross(name):
    with pytest.raises(wire.BrokenMessage):
        wire.error_from({"kind": "error", "type": name, "message": "x", "hint": ""})


def test_collector_refuses_what_does_not_fit():
    collector = Collector(LIMITS)
    collector.add(0.0, np.zeros((4, 5, 3), np.uint8), 2)
    with pytest.raises(errors.BadMedia):
        collector.room(1.0, 5, 4, 2)
    collector.add(1.0, np.ones((4, 5, 3), np.uint8), 2)
    with pytest.raises(errors.BadMedia):
        collector.room(2.0, 4, 5, 2)
    data, times_s = collector.result([1, 0, 1])
    assert data[:, 0, 0, 0].tolist() == [1, 0, 1] and times_s.tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(errors.MediaTooLarge):
        Collector(LIMITS).room(0.0, 100, 100, 2)
