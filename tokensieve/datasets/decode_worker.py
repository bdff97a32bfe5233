"""The isolated decoder: reads jobs from stdin, writes pictures to stdout, one after the other.

Runs as `python -m tokensieve.datasets.decode_worker`, started by decode_client. It limits itself before
it opens a file: address space, processor time, open files, no writing to files, no core dump. It never
imports torch unless the torchcodec backend is asked for, in which case it serves that backend only.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys

from tokensieve.datasets import wire

MAX_OPEN_FILES = 64
GRACE_S = 5  # the parent kills first; these limits catch a decoder whose parent is gone


def main() -> None:
    channel_in, channel_out = _take_over_pipes()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    from tokensieve.datasets import jobs  # loads av and numpy

    if sys.argv[-1] == "torchcodec":
        try:
            import torchcodec.decoders  # noqa: F401  before the limits, so that they come on top of torch
        except Exception:
            pass  # decode_torchcodec says what is missing
    base_bytes = _address_space_bytes()
    _limit_once()
    wire.write_all(channel_out, wire.pack({"kind": "ready", "protocol": wire.PROTOCOL}))
    while True:
        try:
            header = wire.unpack(wire.read_exactly(channel_in, wire.unpack_length(wire.read_exactly(channel_in, 4))))
        except EOFError:
            return
        _serve(jobs, jobs.Job.from_json(header["job"]), channel_out, base_bytes)


def _serve(jobs, job, channel_out: int, base_bytes: int) -> None:
    import numpy as np

    from tokensieve.errors import DecoderCrash, TokensieveError

    def sink(time_s, pixels, most):
        pixels = np.ascontiguousarray(pixels)  # before the header: nothing may fail between it and the pixels
        try:
            wire.write_all(channel_out, wire.pack(wire.picture_header(time_s, pixels, most)))
            wire.write_all(channel_out, pixels)
        except OSError:
            os._exit(1)  # the parent is gone

    _limit_job(job.limits, base_bytes)
    try:
        outcome = jobs.run(job, sink)
        header = {"kind": "done", "order": outcome.order, "duration_s": outcome.duration_s}
        header |= {"partial": outcome.partial, "notes": list(outcome.notes)}
    except TokensieveError as error:
        header = wire.error_header(error)
    except Exception as error:  # a gap in our own handling: name the class, never the text
        header = wire.error_header(DecoderCrash(f"Reading {job.path!r} failed with {type(error).__name__}."))
    signal.setitimer(signal.ITIMER_REAL, 0)
    wire.write_all(channel_out, wire.pack(header))


def _take_over_pipes() -> tuple[int, int]:
    """Keep the pipes for ourselves, so that a library that prints cannot break the protocol."""
    channel_in, channel_out = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.close(nowhere)
    return channel_in, channel_out


def _limit_once() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _limit_job(limits, base_bytes: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = used.ru_utime + used.ru_stime + limits.timeout_s * (os.cpu_count() or 1) + GRACE_S
    _lower(resource.RLIMIT_CPU, math.ceil(cpu_s))
    _lower(resource.RLIMIT_AS, base_bytes + limits.memory_bytes)
    signal.setitimer(signal.ITIMER_REAL, limits.timeout_s + GRACE_S)


def _lower(what: int, soft: int) -> None:
    """Set a soft limit within the hard one."""
    hard = resource.getrlimit(what)[1]
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    try:
        resource.setrlimit(what, (soft, hard))
    except (ValueError, OSError, OverflowError):
        pass  # macOS refuses RLIMIT_AS; a number beyond the system's range is no limit


def _address_space_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 30


if __name__ == "__main__":
    main()
