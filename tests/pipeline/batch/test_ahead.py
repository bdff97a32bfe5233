"""Decoding ahead: bounded memory, no hung file in front of the others, and a killer gets two decoders at most."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from tokensieve.datasets import decode_client
from tokensieve.datasets.frames import Frames
from tokensieve.datasets.limits import Limits
from tokensieve.errors import MediaTimeout, MissingBackend
from tokensieve.pipeline.batch import ahead as ahead_module
from tokensieve.pipeline.batch.ahead import Ahead, decode
from tokensieve.pipeline.batch.inputs import Failure, Input, find_inputs


def frames(num_bytes: int) -> Frames:
    data = np.zeros((1, 1, num_bytes // 3, 3), np.uint8)
    return Frames(data=data, times_s=np.zeros(1), duration_s=0.0, source="x")


def inputs(count):
    return [Input(id=str(number), path=str(number), file=None) for number in range(count)]


def never():
    return False


def drain(ahead, wait_s=10.0):
    found = []
    while (one := ahead.next(never, wait_s)) is not None:
        ahead.release(one[1])
        found.append(one[0].id)
    return found


def test_everything_comes_once():
    ahead = Ahead(inputs(50), lambda given: frames(3), workers=4, max_bytes=9)
    assert sorted(drain(ahead), key=int) == [str(number) for number in range(50)]
    assert ahead.next(never, 1) is None
    assert Ahead([], decode, workers=4, max_bytes=9).next(never, 1) is None


def test_no_more_frames_in_memory_than_allowed():
    made = []
    ahead = Ahead(inputs(50), lambda given: made.append(1) or frames(300), workers=2, max_bytes=900)
    held = []
    for _ in range(3):
        held.append(ahead.next(never, 10))
    time.sleep(0.3)  # the threads could go on now, but for the bound
    assert len(made) <= 900 // 300 + 1 + 2
    before = len(made)
    ahead.release(held[0][1])
    ahead.release(held[1][1])
    time.sleep(0.3)
    assert before < len(made) <= before + 3
    ahead.close()


def test_a_hung_file_does_not_hold_up_the_others():
    gate = threading.Event()
    ahead = Ahead(inputs(10), lambda given: (given.id == "0" and gate.wait(20)) or frames(3), 2, 10**6)
    found = []
    for _ in range(9):
        found.append(ahead.next(never, 10)[0].id)
    assert sorted(found, key=int) == [str(number) for number in range(1, 10)]
    with pytest.raises(TimeoutError):
        ahead.next(never, 0.2)
    assert ahead.next(lambda: True, 10) is None  # asked to stop while waiting
    gate.set()
    assert drain(ahead) == ["0"]


def test_nothing_starts_after_close():
    made = []
    ahead = Ahead(inputs(50), lambda given: made.append(1) or frames(300), workers=1, max_bytes=300)
    ahead.next(never, 10)
    ahead.close()
    time.sleep(0.2)
    count = len(made)
    time.sleep(0.2)
    assert len(made) == count < 5 and not any(thread.is_alive() for thread in ahead._threads)


def test_a_gap_in_our_own_code_is_no_deadlock():
    def broken(given):
        raise AssertionError("gap")

    with pytest.raises(AssertionError, match="gap"):
        Ahead(inputs(3), broken, workers=2, max_bytes=9).next(never, 10)


@pytest.mark.parametrize(("crashes", "kind"), [(1, None), (2, "Quarantined"), (9, "Quarantined")])
def test_a_file_that_kills_its_decoder(crashes, kind, clips, monkeypatch):
    given = find_inputs(clips).inputs[0]
    runs = []
    real = decode_client.Decoder.run

    def dying(self, job, collector):
        runs.append(job.path)
        if len(runs) <= crashes:
            self.process.kill()
            self.process.wait()
        return real(self, job, collector)

    monkeypatch.setattr(decode_client.Decoder, "run", dying)
    found = decode(given, Limits(), {"num_frames": 2})
    assert len(runs) == 2
    if kind is None:
        assert found.num_frames == 2
    else:
        assert (found.stage, found.error_type, found.retryable) == ("decode", kind, False)
        assert repr(given.path) in found.message and str(clips) not in found.message


def test_a_timeout_is_not_tried_again(clips, monkeypatch):
    tried = []

    def slow(given, limits, options):
        tried.append(given)
        raise MediaTimeout("too slow")

    monkeypatch.setattr(ahead_module, "_read", slow)
    found = decode(find_inputs(clips).inputs[0], Limits(), {})
    assert len(tried) == 1 and (found.error_type, found.retryable) == ("MediaTimeout", True)


@pytest.mark.parametrize(
    ("error", "kind"), [(MemoryError(), "MediaTooLarge"), (ValueError("0xdead"), "ValueError")], ids=str
)
def test_whatever_happens_is_a_failure(error, kind, clips, monkeypatch):
    def broken(*_):
        raise error

    monkeypatch.setattr(ahead_module, "_read", broken)
    found = decode(find_inputs(clips).inputs[0], Limits(), {})
    assert found.error_type == kind and "0xdead" not in found.message


def test_times_of_an_input_go_before_those_of_the_job(clips):
    given = find_inputs(clips).inputs[0]
    own = Input(id="x", path="x", file=given.file, start_s=1.0, end_s=1.5)
    assert decode(own, Limits(), {"num_frames": 2, "start_s": 0.0}).times_s.min() >= 0.5
    assert decode(given, Limits(), {"num_frames": 2, "start_s": 0.0}).times_s.min() == 0.0
    assert isinstance(decode(Input(id="x", path="x", file=given.file / "no"), Limits(), {}), Failure)


def test_a_library_that_is_missing_ends_the_run(clips, monkeypatch):
    """Else every clip would get a row that says so."""

    def missing(*_):
        raise MissingBackend("no torchcodec")

    monkeypatch.setattr(ahead_module, "_read", missing)
    given = find_inputs(clips).inputs
    with pytest.raises(MissingBackend):
        Ahead(given, lambda one: decode(one, Limits(), {}), 2, 10).next(never, 10)
