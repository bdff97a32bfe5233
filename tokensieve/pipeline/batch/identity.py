"""All that the rows of a job follow from beside its inputs: two jobs with the same options may share a folder.

The size of a batch, the number of workers and when parts are written are not among it: they change no row.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tokensieve import __version__

if TYPE_CHECKING:
    from tokensieve.export.runtime import OnnxVLM
    from tokensieve.pipeline.vlm import VLM

_ENDS_BYTES = 1 << 16


def torch_options(vlm: VLM, **task: object) -> dict[str, object]:
    """Of a model in PyTorch.

    Args:
        vlm: with its compression set.
        **task: what else the rows follow from.
    """
    import torch
    import transformers

    from tokensieve.pipeline.evaluation.identity import plain, weights_hash

    compression = vlm.compression
    stages = [
        {"method": s.method.name, "keep": s.keep, "options": {name: plain(value) for name, value in s.options.items()}}
        for s in (compression.stages if compression else ())
    ]
    return {
        "model": vlm.name,
        "model_sha256": weights_hash(vlm.model),
        "device": vlm.model.device.type,
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "stages": stages,
        "positions": compression.positions if compression else "preserve",
        "seed": compression.seed if compression else 0,
        **task,
        "versions": {
            "tokensieve": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def onnx_options(vlm: OnnxVLM, folder: str | os.PathLike, budget: Mapping[str, object], **task: object) -> dict:
    """Of an exported model; arguments as of `torch_options`."""
    import onnxruntime

    return {
        "model": vlm.name,
        "model_sha256": folder_hash(Path(folder)),
        "device": vlm.provider,
        "keep": budget.get("keep", vlm.manifest.keep),
        "stages": [{"method": vlm.manifest.method, "options": vlm.manifest.options}] if vlm.manifest.method else [],
        **task,
        "versions": {"tokensieve": __version__, "onnxruntime": onnxruntime.__version__},
    }


def folder_hash(folder: Path) -> str:
    """SHA-256 over name, size and both ends of every file in the folder: quick, and another export changes it."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode(errors="surrogateescape"))
        with open(path, "rb") as file:
            digest.update(file.read(_ENDS_BYTES))
            file.seek(max(0, size - _ENDS_BYTES))
            digest.update(file.read(_ENDS_BYTES))
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """What a run ran with; for the record, as PyAV and Python may change from run to run."""
    import av
    import pyarrow

    return {
        "tokensieve": __version__,
        "python": platform.python_version(),
        "pyarrow": pyarrow.__version__,
        "av": av.__version__,
    }
