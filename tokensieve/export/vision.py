"""The vision graph: pixels of one image or video through encoder, projector and selector to the tokens that stay.

Dropped tokens never leave the graph.
"""

# Shape legend: T tiles or frames, N candidate tokens, K kept, D width of the language model

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokensieve.errors import UnsupportedModel
from tokensieve.export.vision_qwen import QwenEncoder
from tokensieve.export.vision_tiles import TAPS, llava_encoder, smolvlm_encoder
from tokensieve.pipeline.vlm import VLM

ENCODERS: dict[str, Callable[[nn.Module, bool], nn.Module]] = {
    "llava": llava_encoder,
    "llava_onevision": llava_encoder,
    "qwen2_5_vl": QwenEncoder,
    "smolvlm": smolvlm_encoder,
}


def check_family(model: nn.Module) -> None:
    """Raises UnsupportedModel unless models of this family can be exported."""
    family = model.config.model_type
    if family not in ENCODERS:
        raise UnsupportedModel(
            f"Models of type {family!r} cannot be exported; {', '.join(ENCODERS)} can.",
            hint="They can still be run with PyTorch.",
        )


def make_encoder(vlm: VLM, record: bool = False) -> nn.Module:
    """The encoder of a model's family: a module from a dict of graph inputs to `Encoded`.

    Its `pixel_inputs` are the names of the inputs it reads, in order; `newline` is its structural token or None.

    Args:
        vlm: its modules are used, not copied.
        record: whether `Encoded.salience` and `.keys` are wanted.

    Raises:
        UnsupportedModel: another family, or a tower that cannot be exported.
    """
    check_family(vlm.model)
    return ENCODERS[vlm.model.config.model_type](vlm.model, record)


class VisionGraph(nn.Module):
    """Takes the tensors named by `inputs`, returns those named by `outputs`.

    `features` `[K, D]` float32, what the language model gets, and `kept` `[K]` int64, rising places among the N
    candidates; LLaVA-OneVision has `newline` `[D]` as well. Without a selector all N stay.

    Attributes:
        inputs: names of the inputs, in order: pixels first, then what the selector needs.
        outputs: names of the outputs.
    """

    def __init__(self, encoder: nn.Module, selector: nn.Module | None = None):
        super().__init__()
        self.encoder, self.selector = encoder, selector
        self.inputs: tuple[str, ...] = (*encoder.pixel_inputs, *(selector.needs if selector is not None else ()))
        self.outputs = ("features", "kept", *(() if encoder.newline is None else ("newline",)))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(self.inputs, tensors, strict=True))
        encoded = self.encoder(inputs)
        if self.selector is None:
            features, kept = encoded.features, torch.arange(encoded.features.shape[0])
        else:
            features, kept = self.selector(encoded, inputs)
        newline = self.encoder.newline
        return (features, kept) if newline is None else (features, kept, newline.float().clone())


# What an export is made with: sizes that differ from each other and from 0 and 1, which would be taken for fixed.
_FRAMES, _TILES_IN, _TILES, _VIEWS, _KEPT, _WORDS = 3, 6, 2, 4, 5, 7


def vision_inputs(vlm: VLM, graph: VisionGraph) -> tuple[dict[str, Tensor], dict[str, list[str | int]]]:
    """An example of every input of the graph, and their shapes with names for what is dynamic.

    Their values say nothing; only the shapes count.
    """
    config = vlm.model.config.vision_config
    width = vlm.model.config.get_text_config().hidden_size
    shapes: dict[str, list[str | int]] = {
        "frames": ["frames"],
        "tile": ["tokens"],
        "tiles": ["tiles"],
        "place": ["tokens", 3],
        "neighbours": ["tokens", 6],
        "view_index": ["tokens"],
        "views": ["views", 2],
        "budget": ["kept"],
        "quota": [3],
        "num_before": [1],
        "question": ["words", width],
        "rows": ["tokens", TAPS],
        "weights": ["tokens", TAPS],
        "patch_place": ["frame_patches", 2],
        "patch_window": ["frame_patches"],
    }
    sizes = {"frames": _FRAMES, "tiles": _TILES, "views": _VIEWS, "kept": _KEPT, "words": _WORDS}
    if vlm.model.config.model_type == "qwen2_5_vl":
        per_patch = config.in_channels * config.temporal_patch_size * config.patch_size**2
        shapes["pixel_values"] = ["patches", per_patch]
        sizes["frame_patches"] = 6 * config.spatial_merge_size**2
        sizes["patches"] = _FRAMES * sizes["frame_patches"]
        sizes["tokens"] = _FRAMES * 6
    else:
        side = config.image_size
        shapes["pixel_values"] = ["tiles_in", config.num_channels, side, side]
        sizes["tiles_in"] = _TILES_IN
        sizes["tokens"] = _TILES_IN * graph.encoder.rows_per_tile
        if "rows" in graph.inputs:
            sizes["tokens"] = sizes["tokens"] // 4 * _FRAMES  # any number will do: tokens are mixed of rows
    floats = ("pixel_values", "weights", "frames", "tiles", "place", "question")
    inputs = {}
    for name in graph.inputs:
        shape = [sizes.get(size, size) for size in shapes[name]]
        count = math.prod(shape)
        values = torch.linspace(0, 1, count) if name in floats else torch.arange(count) % 2
        inputs[name] = values.reshape(shape)
    return inputs, {name: shapes[name] for name in graph.inputs}
