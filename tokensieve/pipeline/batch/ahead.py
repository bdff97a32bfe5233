"""Decoding ahead of the model: threads that each drive an isolated decoder, and a bound on what waits.

The decoders are processes with a limit on time and memory, killed when they hang and replaced when they die (see
`decode_client`). Clips come in the order in which they get ready, so that one hung file does not hold up the others.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tokensieve.datasets.frames import Frames
from tokensieve.datasets.limits import Limits
from tokensieve.errors import DecoderCrash, MediaTooLarge, MissingBackend
from tokensieve.pipeline.batch.inputs import Failure, Input

Decoded = tuple[Input, Frames | Failure]


def decode(given: Input, limits: Limits, options: Mapping[str, object]) -> Frames | Failure:
    """The frames of an input, or why there are none; a file that kills its decoder gets one more, and no third.

    Args:
        given: times of its own go before those in `options`.
        limits: budget of a file.
        options: of `read_media`.

    Raises:
        MissingBackend: the decoder's library is not installed.
    """
    if given.failure is not None:
        return given.failure
    for last in (False, True):
        try:
            return _read(given, limits, options)
        except DecoderCrash as error:
            if last:
                message = f"{error.message} It was the second one, so the file is left alone."
                failure = Failure(stage="decode", error_type="Quarantined", message=message)
        except MemoryError:
            failure = Failure.of("decode", MediaTooLarge(f"There is no memory for the frames of {given.path!r}."))
            break
        except MissingBackend:  # no file can be read
            raise
        except Exception as error:
            failure = Failure.of("decode", error)
            break
    # As the source names it, so that a row does not depend on where the source lies.
    whole = repr(os.path.abspath(given.file))
    return replace(failure, message=failure.message.replace(whole, repr(given.path)))


def _read(given: Input, limits: Limits, options: Mapping[str, object]) -> Frames:
    from tokensieve.datasets.video import read_media

    part = {"start_s": given.start_s, "end_s": given.end_s, "root": given.root}
    own = {name: value for name, value in part.items() if value is not None}
    return read_media(given.file, limits=limits, **{**options, **own})


class Ahead:
    """Inputs with their frames, as they get ready; `close` at the end.

    Args:
        inputs: what to decode.
        read: of `decode`, with everything but the input set.
        workers: how many decode at once.
        max_bytes: no decoding starts while more bytes of frames than this wait or are in the consumer's hands, so that
            at most this and one clip a worker are in memory.
    """

    def __init__(
        self, inputs: Sequence[Input], read: Callable[[Input], Frames | Failure], workers: int, max_bytes: int
    ):
        self._inputs = iter(inputs)
        self._read = read
        self._max_bytes = max_bytes
        self._ready: deque[Decoded] = deque()
        self._held = 0
        self._num_at_work = 0
        self._exhausted, self._closed = not inputs, False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(workers, len(inputs)))]
        for thread in self._threads:
            thread.start()

    def next(self, stop: Callable[[], bool], wait_s: float) -> Decoded | None:
        """The next one that is ready; None when there will be no more, or `stop()` became true while waiting.

        Args:
            stop: asked ten times a second.
            wait_s: raises TimeoutError after so many seconds without one.
        """
        deadline_s = time.monotonic() + wait_s
        with self._changed:
            while not self._ready:
                if self._error is not None:
                    raise self._error
                if (self._exhausted and not self._num_at_work) or stop():
                    return None
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError
                self._changed.wait(min(0.1, left_s))
            return self._ready.popleft()

    def release(self, frames: Frames | Failure) -> None:
        """Tells that the frames are in no one's hands any more."""
        with self._changed:
            self._held -= _size(frames)
            self._changed.notify_all()

    def close(self) -> None:
        """No more decoding starts; what is under way ends by itself."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()

    def _work(self) -> None:
        while (given := self._take()) is not None:
            try:
                frames = self._read(given)
            except BaseException as error:  # a gap in our own handling: the consumer must not wait for ever
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._num_at_work -= 1
                self._held += _size(frames)
                if not self._closed:
                    self._ready.append((given, frames))
                self._changed.notify_all()

    def _take(self) -> Input | None:
        with self._changed:
            while self._held > self._max_bytes and not self._closed:
                self._changed.wait()
            given = None if self._closed else next(self._inputs, None)
            if given is None:
                self._exhausted = True
                self._changed.notify_all()
            else:
                self._num_at_work += 1
            return given


def _size(frames: Frames | Failure) -> int:
    return frames.data.nbytes if isinstance(frames, Frames) else 0
