"""What goes in: video, images, frame folders and generated clips.

Names below are resolved on first use, so importing this package costs nothing and loads no decoder.
"""

from __future__ import annotations

from tokensieve.lazy_names import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, {name: f"{__name__}.{home}" for name, home in _HOME_OF.items()})
