"""tokensieve: vision-language models that look at fewer visual tokens and keep their answers.

    >>> import tokensieve as ts
    >>> vlm = ts.load("tiny").compress("zoprune", keep=0.25)
    >>> print(vlm.answer("clip.mp4", "Which digit is red?"))

Names are imported on first use: `import tokensieve` alone loads neither torch nor a decoder.
"""

from __future__ import annotations

import importlib

from tokensieve.lazy_names import lazy_names

__version__ = "0.1.0"

_HOMES = {
    "load": "tokensieve.pipeline.loader",
    "VLM": "tokensieve.pipeline.vlm",
    "Answer": "tokensieve.pipeline.results",
    "Compression": "tokensieve.pipeline.stages",
    "Stage": "tokensieve.pipeline.stages",
    "Prepared": "tokensieve.pipeline.results",
    "Chat": "tokensieve.pipeline.chat",
    "compress_tower": "tokensieve.pipeline.towers",
    "TowerHandle": "tokensieve.pipeline.towers",
    "TowerTrace": "tokensieve.pipeline.towers",
    "TCAStream": "tokensieve.pipeline.adaptation",
    "ClipText": "tokensieve.compression.clip_relevance",
    "VLMAdapter": "tokensieve.pipeline.adapter",
    "VisualItem": "tokensieve.pipeline.adapter",
    "kept_masks": "tokensieve.pipeline.picture",
    "draw_kept": "tokensieve.pipeline.picture",
    "captioned_frames": "tokensieve.pipeline.picture",
    "contact_sheet": "tokensieve.pipeline.picture",
    "read_video": "tokensieve.datasets",
    "read_image": "tokensieve.datasets",
    "read_folder": "tokensieve.datasets",
    "read_media": "tokensieve.datasets",
    "write_video": "tokensieve.datasets",
    "Frames": "tokensieve.datasets",
    "Limits": "tokensieve.datasets",
    "get_method": "tokensieve.compression",
    "list_methods": "tokensieve.compression",
    "register_method": "tokensieve.compression",
    "Method": "tokensieve.compression",
    "Plan": "tokensieve.compression",
    "VisualTokens": "tokensieve.compression",
    "TokensieveError": "tokensieve.errors",
}

_ROOMS = ("decoding",)

__all__ = ["__version__", *sorted([*_HOMES, *_ROOMS])]


_find, __dir__ = lazy_names(__name__, _HOMES)


def __getattr__(name: str):
    return importlib.import_module(f"tokensieve.{name}") if name in _ROOMS else _find(name)
