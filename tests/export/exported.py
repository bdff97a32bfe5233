"""Folders that several tests look at, exported once a process, and their graphs."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from tests.pipeline.tiny_processors import make_vlm
from tokensieve.export.language import text_model
from tokensieve.export.vlm import export_vlm
from tokensieve.pipeline.vlm import VLM

_FOLDERS = tempfile.TemporaryDirectory(prefix="tokensieve-exported-")  # goes when the process ends


def short_vlm(family: str) -> VLM:
    """The tiny random model of the family with one layer in its language model, because exporting takes time."""
    vlm = make_vlm(family)
    shorten(vlm.model, 1)
    return vlm


def shorten(model: torch.nn.Module, num_layers: int) -> None:
    """Takes the last layers of the language model away."""
    text = text_model(model)
    text.layers = text.layers[:num_layers]
    for config in (text.config, model.config.get_text_config()):
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]


def exported(family: str, method: str | None = None, precision: str = "fp32") -> tuple[VLM, Path]:
    """A `short_vlm`, compressed with `keep=0.5`, and the folder that it was exported to."""
    return _exported(family, method, precision)  # a cache tells given defaults from those left out


@cache
def _exported(family: str, method: str | None, precision: str) -> tuple[VLM, Path]:
    vlm = short_vlm(family).compress(method, keep=0.5)
    folder = Path(_FOLDERS.name) / f"{family}-{method}-{precision}"
    export_vlm(vlm, folder, precision=precision)
    return vlm, folder


@cache
def session(path: Path) -> onnxruntime.InferenceSession:
    """A graph on one thread of the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Outputs by name."""
    opened = session(path)
    feed = {each.name: inputs[each.name].numpy() for each in opened.get_inputs()}
    return dict(zip((each.name for each in opened.get_outputs()), opened.run(None, feed), strict=True))
