"""What ships: ONNX graphs of compressed models, their runtime without torch, and the checks that both agree.

Names are imported on first use, so that the runtime loads no torch.
"""

from __future__ import annotations

from tokensieve.lazy_names import lazy_names

_HOMES = {
    "export_vlm": "tokensieve.export.vlm",
    "export_tower": "tokensieve.export.towers",
    "Example": "tokensieve.export.verify",
    "Manifest": "tokensieve.export.manifest",
    "OnnxVLM": "tokensieve.export.runtime",
    "OnnxPrompts": "tokensieve.export.runtime",
    "GenerateOptions": "tokensieve.export.generation",
    "OnnxTower": "tokensieve.export.tower_runtime",
    "OnnxTCAStream": "tokensieve.export.tower_stream",
    "open_session": "tokensieve.export.sessions",
}

__all__ = sorted(_HOMES)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
