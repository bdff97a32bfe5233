"""Still and animated images with Pillow, and folders of frames.

Every image becomes 8-bit RGB: EXIF rotation applied, transparency laid over white, 16-bit grey scaled
to 8 bits, palettes and CMYK converted.
"""

from __future__ import annotations

import os
import re
import warnings
from contextlib import contextmanager

import numpy as np

from tokensieve.datasets.limits import Limits, fit_side
from tokensieve.datasets.sources import Source, check_inside, open_source
from tokensieve.errors import BadMedia, MediaError, MediaNotAllowed, MediaNotFound, MediaTooLarge

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
DEFAULT_MS = 100  # of an animation's frame that states no duration, as browsers do


@contextmanager
def open_image(source: Source, limits: Limits):
    """A Pillow image, opened by the one reader that its first bytes call for."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own check follows
            formats = ["JPEG", "MPO"] if source.reader == "JPEG" else [source.reader]
            image = Image.open(source.path, formats=formats)
    except Image.DecompressionBombError:
        raise MediaTooLarge(f"{source.name!r} has more pixels than the image reader ever allows.") from None
    except MemoryError:
        raise
    except Exception:
        raise BadMedia(f"{source.name!r} starts like a {source.reader} image but cannot be read.") from None
    with image:
        limits.check_picture(*image.size, still=not is_animated(image))
        yield image


def is_animated(image) -> bool:
    return image.format in ("WEBP", "PNG", "AVIF") and getattr(image, "n_frames", 1) > 1


def rgb_of(image, source: Source, max_side: int | None) -> np.ndarray:
    """Pixels of the image's current frame, uint8 [H, W, 3]."""
    from PIL import Image

    try:
        if max_side is not None:
            image.draft("RGB", fit_side(*image.size, max_side))  # lets JPEG scale down while decoding
        image.load()
        image = _to_rgb_mode(_upright(image), source)
        size = fit_side(*image.size, max_side)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
        return np.array(image, dtype=np.uint8)
    except (MediaError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise MediaTooLarge(f"{source.name!r} has more pixels than the image reader ever allows.") from None
    except Exception:
        raise BadMedia(f"{source.name!r} is a damaged {source.reader} image.") from None


def _upright(image):
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:
        return image  # a broken EXIF block says nothing about the pixels


def _to_rgb_mode(image, source: Source):
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadMedia(
            f"{source.name!r} has 32-bit pixels, whose range is not defined.", "Convert it to 8 or 16 bits first."
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def durations_ms(image, source: Source, limits: Limits) -> list[int]:
    """How long each frame of an animation is shown. Decodes all of them: readers tell only then."""
    if image.n_frames > limits.max_packets:
        raise MediaTooLarge(f"{source.name!r} has more frames than limits.max_packets={limits.max_packets} allows.")
    found = []
    for number in range(image.n_frames):
        try:
            image.seek(number)
            image.load()
        except MemoryError:
            raise
        except Exception:
            break
        found.append(max(1, round(image.info.get("duration") or DEFAULT_MS)))
    if not found:
        raise BadMedia(f"{source.name!r} is a damaged {source.reader} image.")
    return found


def list_folder(path: str, *, root: str | None, limits: Limits) -> list[str]:
    """Image files of a folder in natural order (frame2 before frame10); hidden and other files are left out."""
    if not os.path.exists(path):
        raise MediaNotFound(f"No folder {path!r}.")
    if not os.path.isdir(path):
        raise MediaNotAllowed(f"{path!r} is not a folder.", "Use read_video or read_image for a file.")
    check_inside(os.path.realpath(path), root, path)
    names = []
    try:
        with os.scandir(path) as entries:
            for number, entry in enumerate(entries):
                if number >= limits.max_packets:
                    raise MediaTooLarge(f"{path!r} has more files than limits.max_packets={limits.max_packets} allows.")
                if not entry.name.startswith(".") and entry.name.lower().endswith(SUFFIXES):
                    names.append(entry.name)
    except PermissionError:
        raise MediaNotFound(f"Folder {path!r} may not be read by this user.") from None
    if not names:
        raise BadMedia(f"Folder {path!r} holds no image.", f"Image names end in {', '.join(SUFFIXES)}.")
    return [os.path.join(path, name) for name in sorted(names, key=natural_key)]


def natural_key(name: str) -> list:
    """Sort key under which numbers inside names count as numbers."""
    parts = re.split(r"([0-9]+)", name)  # texts and numbers take turns
    return [(0, int(part), part) if at % 2 else (1, 0, part) for at, part in enumerate(parts)]


def read_still(path: str, *, root: str | None, limits: Limits, max_side: int | None) -> np.ndarray:
    """First picture of an image file, uint8 [H, W, 3]."""
    with open_source(path, root=root, limits=limits) as source:
        if source.kind != "image":
            raise BadMedia(f"{path!r} is a video, not a still image.", "Use read_video.")
        with open_image(source, limits) as image:
            return rgb_of(image, source, max_side)
