"""What goes in: video, images, frame folders and generated clips.

Names below are resolved on first use, so importing this package costs nothing and loads no decoder.
"""

from __future__ import annotations

import importlib

_HOME_OF = {
    "Clip": "clips",
    "Frames": "frames",
    "Limits": "limits",
    "Record": "manifest",
    "clip_frames": "clip_files",
    "generated_records": "manifest",
    "make_clip": "clips",
    "open_results": "results",
    "read_folder": "video",
    "read_image": "video",
    "read_media": "video",
    "read_records": "manifest",
    "read_video": "video",
    "write_clips": "clip_files",
    "write_video": "write",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
