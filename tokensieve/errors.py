"""Every error a user can meet, in one place.

Each class says three things beside its message: `hint` (what to do about it), `retryable` (would the
same call succeed later?) and `exit_code` (what the command line returns). Messages name what was given
and what is allowed; they never repeat text from inside a media file or a native decoder, because such
text has leaked memory addresses in other systems (CVE-2026-22778).
"""

from __future__ import annotations


class TokensieveError(Exception):
    """Base of all errors raised on purpose by tokensieve."""

    hint = ""
    retryable = False
    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        if hint is not None:
            self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def __reduce__(self):  # keeps the hint when an error crosses a process border
        return type(self), (self.message, self.hint)


class BadOption(TokensieveError, ValueError):
    """An argument or option has a value that is not allowed."""

    exit_code = 2


class MediaError(TokensieveError):
    """A video, image or folder of frames could not be used."""

    exit_code = 3


class MediaNotFound(MediaError, FileNotFoundError):
    """The path does not exist, or is not a readable regular file."""

    hint = "Check the path and its permissions."

    def __str__(self) -> str:  # OSError would print its own format
        return TokensieveError.__str__(self)


class MediaNotAllowed(MediaError):
    """The source is of a kind that is refused: URL, device, playlist, link out of the allowed folder."""


class BadMedia(MediaError):
    """The bytes are not a media file we can decode."""

    hint = "Check that the file plays in a video player; re-encode it if it does not."


class NoVideoStream(BadMedia):
    """The file is readable but has no picture stream (audio only, say)."""

    hint = "Give a file that has a video stream."


class MediaTooLarge(MediaError):
    """Decoding would exceed a limit on pixels, frames or memory."""

    hint = "Raise the limit if you trust the file."


class MediaTimeout(MediaError):
    """The decoder did not finish in time and was killed."""

    retryable = True
    hint = "Try again on a quieter machine or raise the time limit."


class DecoderCrash(MediaError):
    """The decoder process died (a crash in native code, or its memory limit)."""

    hint = "The file is probably damaged or hostile; re-encode it in a sandbox if you need it."


class MissingBackend(MediaError):
    """The chosen decoder library is not installed or cannot start."""

    exit_code = 2


class UnsupportedModel(TokensieveError):
    """The checkpoint is of a family, or in a file format, that tokensieve does not handle."""

    exit_code = 4
