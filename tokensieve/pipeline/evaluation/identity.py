"""What a run is told apart by: everything that its answers follow from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
import transformers
from torch import nn

from tokensieve import __version__
from tokensieve.datasets.manifest import Record
from tokensieve.pipeline.evaluation.protocol import Protocol
from tokensieve.pipeline.evaluation.settings import Setting
from tokensieve.pipeline.vlm import VLM


def run_options(
    vlm: VLM, records: Sequence[Record], protocol: Protocol, scores: Sequence[str], data: str
) -> dict[str, object]:
    """All that the answers follow from. The size of a batch is not among it."""
    compressions = [setting.compression for setting in protocol.settings if setting.compression]
    return {
        "model": vlm.name,
        "model_sha256": weights_hash(vlm.model),
        "device": vlm.model.device.type,
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "data": data,
        "data_sha256": records_hash(records),
        "questions": len(records),
        "settings": [_described(setting) for setting in protocol.settings],
        "positions": compressions[0].positions if compressions else "preserve",
        "seed": compressions[0].seed if compressions else 0,
        "scores": list(scores),
        "choices": protocol.choices,
        "max_new_tokens": protocol.max_new_tokens,
        "read_options": dict(protocol.read_options),
        "versions": {
            "tokensieve": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _described(setting: Setting) -> str:
    if setting.compression is None:
        return "all tokens"
    text = f"{setting.method}, keep {setting.keep:g}"
    for stage in setting.compression.stages:
        if stage.options:
            text += f", {stage.method.name} { ({name: plain(value) for name, value in stage.options.items()}) }"
    return text


def plain(value: object) -> object:
    """The value of a method's option as JSON can hold it; a module by its weights."""
    if isinstance(value, nn.Module):
        return weights_hash(value)[:16]
    return getattr(value, "__qualname__", type(value).__name__) if callable(value) else value


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, shapes and 64 numbers of every tensor: quick, and another training changes them all."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().flatten()
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        digest.update(flat[:: max(1, len(flat) // 64)][:64].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def records_hash(records: Sequence[Record]) -> str:
    """SHA-256 over all that is asked and what counts as right; of a file its name counts, not what is in it."""
    digest = hashlib.sha256()
    for r in records:
        source = hashlib.sha256(r.source).hexdigest() if isinstance(r.source, bytes) else r.clip
        asked = [r.id, source, r.question, r.answers, r.choices, r.start_s, r.end_s, r.kind]
        digest.update(json.dumps(asked).encode() + b"\n")
    return digest.hexdigest()
