"""Wall-clock time, CPU time and peak memory of the phases of one answer."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import StoppingCriteria

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measurement: seconds on the wall, seconds of all the process's threads, and its peak memory.

    `peak_bytes` is that of the GPU's allocator, on Linux without a GPU that of the process; None elsewhere.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int | None


class Stopwatch:
    """Measures phases that follow each other: `start`, then `lap` at the end of each."""

    def __init__(self, device: torch.device):
        self.device = device
        self._malloc = ctypes.CDLL(None) if device.type == "cpu" and _can_reset() else None
        self.start()

    def start(self) -> None:
        """Begins a phase: the peak of memory anew, then the clocks."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self._malloc is not None:
            self._malloc.malloc_trim(0)  # else memory that was freed before would be used again unseen
            _CLEAR.write_text("5")
        self._wall_s, self._cpu_s = self._now_s(), time.process_time()

    def elapsed(self) -> Sample:
        """Since the start of the phase, which goes on."""
        return Sample(
            wall_s=self._now_s() - self._wall_s, cpu_s=time.process_time() - self._cpu_s, peak_bytes=self._peak_bytes()
        )

    def lap(self) -> Sample:
        """Ends the phase and begins the next."""
        sample = self.elapsed()
        self.start()
        return sample

    def in_use(self) -> int | None:
        """Memory in use now, counted as `Sample.peak_bytes` is."""
        gc.collect()
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        if self._malloc is None:
            return None
        self._malloc.malloc_trim(0)
        return _status_bytes("VmRSS")

    def _now_s(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _peak_bytes(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return None if self._malloc is None else _status_bytes("VmHWM")


class FirstToken(StoppingCriteria):
    """Splits one `generate` into prefill, up to its first new token, and decode, up to each of `new_tokens`."""

    def __init__(self, watch: Stopwatch, new_tokens: Sequence[int]):
        self.watch = watch
        self.prefill: Sample | None = None
        self.decode: dict[int, Sample] = {}
        self._new_tokens, self._count = new_tokens, 0

    def __call__(self, input_ids, scores, **kwargs):
        self._count += 1
        if self._count == 1:
            self.prefill = self.watch.lap()
        if self._count in self._new_tokens:
            self.decode[self._count] = self.watch.elapsed()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _can_reset() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:  # not Linux, or a container that does not allow it
        return False
    return True


def _status_bytes(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
