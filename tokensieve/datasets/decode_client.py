"""Starts, uses, kills and reuses isolated decoders.

Idle decoders wait in a pool; a call takes one or starts one (about 0.2 s), and gives it back when the
call ends well. Any other end - time over, crash, broken message, Ctrl-C - kills it, and the next call
starts a fresh one. Threads get decoders of their own. A forked child forgets its parent's decoders.
"""

from __future__ import annotations

import atexit
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path

import tokensieve
from tokensieve.datasets import wire
from tokensieve.datasets.collector import Collector
from tokensieve.datasets.jobs import Job, Outcome
from tokensieve.datasets.limits import Limits
from tokensieve.errors import DecoderCrash, MediaTimeout, MissingBackend

START_TIMEOUT_S = 120.0  # covers importing torch on a slow disk
MAX_IDLE = 4
MAX_JOBS = 500  # then a fresh one: native libraries leak
_PIPE_BYTES = 1 << 20
# The decoder gets no tokens, keys or proxies that the environment may hold
_KEEP_ENV = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LANG", "LC_ALL", "TMPDIR", "HOME")
# Finds the very package that is running here, without putting its folder before the standard library
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); import tokensieve; del sys.path[0]; "
    "from tokensieve.datasets.decode_worker import main; main()"
)


class Decoder:
    """One isolated process."""

    def __init__(self, flavour: str):
        self.flavour = flavour
        self.num_jobs = 0
        environment = {name: os.environ[name] for name in _KEEP_ENV if name in os.environ}
        environment |= {"MALLOC_ARENA_MAX": "2", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        root = str(Path(tokensieve.__file__).resolve().parent.parent)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-B", "-c", _BOOT, root, flavour],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # FFmpeg prints what it finds in files there
            bufsize=0,
            env=environment,
            cwd="/",
        )
        self._out, self._in = self.process.stdin.fileno(), self.process.stdout.fileno()
        _widen(self._in)
        os.set_blocking(self._in, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._in, selectors.EVENT_READ)
        _ALL.add(self)
        try:
            self._deadline = time.monotonic() + START_TIMEOUT_S
            if self._read_header() != {"kind": "ready", "protocol": wire.PROTOCOL}:
                raise wire.BrokenMessage("no greeting")
        except BaseException as error:
            self.kill()
            if isinstance(error, EOFError | wire.BrokenMessage | TimeoutError):
                raise DecoderCrash("The isolated decoder process did not start.", "Try isolate=False.") from None
            raise

    def run(self, job: Job, collector: Collector) -> Outcome:
        """Send one job, hand its pictures to `collector`."""
        limits: Limits = job.limits
        self.num_jobs += 1
        self._deadline = time.monotonic() + limits.timeout_s
        try:
            wire.write_all(self._out, wire.pack({"kind": "job", "job": job.to_json()}))
            while True:
                header = self._read_header()
                if header["kind"] == "picture":
                    time_s, height, width, most = wire.picture_from(header, limits)
                    self._read_into(collector.room(time_s, height, width, most))
                elif header["kind"] == "done":
                    return Outcome(**wire.outcome_from(header, collector.num_pictures, limits))
                elif header["kind"] == "error":
                    error = wire.error_from(header)
                    break
                else:
                    raise wire.BrokenMessage("unknown kind")
        except TimeoutError:
            self.kill()
            raise MediaTimeout(f"Reading {job.path!r} took over limits.timeout_s={limits.timeout_s:g} s.") from None
        except (EOFError, BrokenPipeError, wire.BrokenMessage):
            self.kill()
            raise DecoderCrash(
                f"The decoder process died while reading {job.path!r} "
                f"(limits.memory_bytes={limits.memory_bytes} may have been too little)."
            ) from None
        except BaseException:
            self.kill()
            raise
        raise error  # an orderly answer: the process is fine

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """End the process now and reap it."""
        _ALL.discard(self)
        self.process.kill()
        self.close_pipes()
        self.process.wait()

    def close_pipes(self) -> None:
        self._selector.close()
        self.process.stdin.close()
        self.process.stdout.close()

    def _read_header(self) -> dict:
        length = wire.unpack_length(self._read_into(bytearray(4)))
        return wire.unpack(bytes(self._read_into(bytearray(length))))

    def _read_into(self, buffer):
        view = memoryview(buffer).cast("B")
        while view:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0 or not self._selector.select(left_s):
                raise TimeoutError
            try:
                count = os.readv(self._in, [view])
            except BlockingIOError:
                continue
            if not count:
                raise EOFError
            view = view[count:]
        return buffer


def run_isolated(job: Job, collector: Collector) -> Outcome:
    """Do a job in an isolated process; waits while as many are at work as there are processors."""
    if os.name != "posix":
        raise MissingBackend("isolate=True needs Linux or macOS.", "Pass isolate=False for files you trust.")
    with _slots:
        decoder = _take("torchcodec" if job.backend == "torchcodec" else "plain")
        try:
            return decoder.run(job, collector)
        finally:
            _give_back(decoder)


_lock = threading.Lock()
_slots = threading.Semaphore(os.cpu_count() or 1)
_idle: list[Decoder] = []
_ALL: set[Decoder] = set()


def _take(flavour: str) -> Decoder:
    while True:
        with _lock:
            found = next((d for d in reversed(_idle) if d.flavour == flavour), None)
            if found is not None:
                _idle.remove(found)
        if found is None:
            return Decoder(flavour)
        if found.is_alive:
            return found
        found.kill()  # died while idle: reap it


def _give_back(decoder: Decoder) -> None:
    if decoder not in _ALL:  # killed
        return
    with _lock:
        if decoder.num_jobs < MAX_JOBS and len(_idle) < MAX_IDLE and decoder.is_alive:
            _idle.append(decoder)
            return
    decoder.kill()


def shut_down() -> None:
    """End all decoders; runs at interpreter exit."""
    with _lock:
        _idle.clear()
    for decoder in list(_ALL):
        decoder.kill()


def _forget_after_fork() -> None:
    """In a forked child: the decoders belong to the parent; close our copies of their pipes, touch nothing else."""
    global _lock, _slots
    _lock = threading.Lock()  # another thread may have held it
    _slots = threading.Semaphore(os.cpu_count() or 1)
    _idle.clear()
    for decoder in list(_ALL):
        decoder.close_pipes()
        decoder.process.returncode = 0  # keeps Popen from waiting for a process that is not our child
    _ALL.clear()


def _widen(fd: int) -> None:
    try:
        import fcntl

        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except (ImportError, AttributeError, OSError):
        pass  # only speed


atexit.register(shut_down)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
