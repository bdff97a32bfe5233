"""How much one media file may cost. One budget object for every path that yields pictures."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from tokensieve.errors import BadOption, MediaTooLarge


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper bounds, checked against the header before decoding and against every picture after it."""

    max_pixels: int = 2**25
    """Pixels of one video frame as stored; the default lets 8K UHD (7680x4320) through."""
    max_image_pixels: int = 89_478_485
    """Pixels of one still image as stored; Pillow's own default."""
    max_frames: int = 16_384
    """Frames in the result."""
    max_total_bytes: int = 2 * 2**30
    """Bytes of the result, T * H * W * 3."""
    max_packets: int = 5_000_000
    """Compressed frames in the file, or files in a folder; 24 h at 50 frames/s fit."""
    max_file_bytes: int = 16 * 2**30
    """Bytes of the file."""
    timeout_s: float = 120.0
    """Wall-clock time for one call; the isolated decoder is killed after it."""
    memory_bytes: int = 3 * 2**30
    """Address space the isolated decoder may take on top of its libraries."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise BadOption(f"limits.{field.name} must be a positive number, got {value!r}.")
            if field.name != "timeout_s" and not isinstance(value, int):
                raise BadOption(f"limits.{field.name} must be a whole number, got {value!r}.")
        if self.timeout_s > 1e6:  # timers of the system cannot take more than some weeks
            raise BadOption(f"limits.timeout_s must be at most 1e6 seconds, got {self.timeout_s!r}.")

    def check_picture(self, width: int, height: int, *, still: bool = False) -> None:
        """Raise MediaTooLarge when one picture has too many pixels."""
        name = "max_image_pixels" if still else "max_pixels"
        allowed = getattr(self, name)
        if width * height > allowed:
            raise MediaTooLarge(
                f"A picture of {width}x{height} has {width * height} pixels; limits.{name} allows {allowed}."
            )

    def check_total(self, num_frames: int, width: int, height: int) -> None:
        """Raise MediaTooLarge when the result would be too big."""
        self.check_count(num_frames)
        size_bytes = num_frames * width * height * 3
        if size_bytes > self.max_total_bytes:
            raise MediaTooLarge(
                f"{num_frames} frames of {width}x{height} take {size_bytes} bytes; "
                f"limits.max_total_bytes allows {self.max_total_bytes}.",
                "Ask for fewer frames, scale while decoding with max_side, or raise the limit if you trust the file.",
            )

    def check_count(self, num_frames: int) -> None:
        """Raise MediaTooLarge when the result would have too many frames."""
        if num_frames > self.max_frames:
            raise MediaTooLarge(
                f"The call asks for {num_frames} frames; limits.max_frames allows {self.max_frames}.",
                "Ask for fewer frames, or raise the limit.",
            )


def fit_side(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    """Width and height scaled down (never up) so that the longer side is at most `max_side`."""
    longer = max(width, height)
    if max_side is None or longer <= max_side:
        return width, height
    return max(1, round(width * max_side / longer)), max(1, round(height * max_side / longer))
