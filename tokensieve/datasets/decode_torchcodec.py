"""Decoding chosen pictures with torchcodec, an optional extra that needs torch and FFmpeg libraries.

`import torchcodec` succeeds without FFmpeg; only opening a file tells, so that is where it is probed.
"""

from __future__ import annotations

from tokensieve.datasets.decode_decord import cannot_read, check_time, display_numbers, scale
from tokensieve.datasets.decode_pyav import Report, Request, Take
from tokensieve.errors import MediaError, MissingBackend

_CHUNK = 8  # pictures decoded per call, to bound memory


def decode_torchcodec(request: Request, take: Take) -> Report:
    """Hand each wanted picture to `take(pts, rgb)`."""
    numbers = display_numbers(request)
    try:
        from torchcodec.decoders import VideoDecoder

        decoder = VideoDecoder(request.source.path, dimension_order="NHWC", seek_mode="exact", num_ffmpeg_threads=1)
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, ImportError) or "libtorchcodec" in str(error):
            raise MissingBackend(
                "The torchcodec backend is not installed, or finds no FFmpeg libraries.",
                "pip install 'tokensieve[torchcodec]' and install FFmpeg 4 or newer as shared libraries.",
            ) from None
        raise cannot_read("torchcodec", request) from None
    try:
        first_s = decoder.get_frame_at(0).pts_seconds
        for at in range(0, len(numbers), _CHUNK):
            batch = decoder.get_frames_at(numbers[at : at + _CHUNK])
            for pts, time_s, pixels in zip(
                request.wanted[at : at + _CHUNK], batch.pts_seconds.tolist(), batch.data.numpy(), strict=True
            ):
                check_time(request, pts, time_s - first_s, "torchcodec")
                take(pts, scale(request, pixels))
    except (MediaError, MemoryError):
        raise
    except Exception:
        raise cannot_read("torchcodec", request) from None
    return Report()
