"""Vision towers and text encoders of CLIP and SigLIP models as a folder of ONNX graphs.

DIR/tokensieve.json
DIR/onnx/vision_model.onnx   see tower_graphs.py
DIR/onnx/text_model.onnx
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tokensieve.compression.budget import check_keep
from tokensieve.compression.tca import TCAStage
from tokensieve.compression.tower_stage import TowerStage
from tokensieve.errors import BadOption, TokensieveError, UnsupportedModel
from tokensieve.export.graph_file import OPSET, versions_used
from tokensieve.export.manifest import Manifest
from tokensieve.export.new_folder import check_new, new_folder
from tokensieve.export.precision import check_precision
from tokensieve.export.tower_graphs import new_stage, write_tower_graphs
from tokensieve.export.tower_runtime import OnnxTower
from tokensieve.export.tower_verify import verify_tower
from tokensieve.pipeline.adaptation.tca_stream import image_features
from tokensieve.pipeline.towers import compress_tower
from tokensieve.pipeline.towers.compress import find_tower
from tokensieve.pipeline.towers.load import LIBRARIES

OF_TRANSFORMERS = (
    "CLIPModel",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "SiglipModel",
    "SiglipVisionModel",
)


def export_tower(
    model: nn.Module,
    out: str | Path,
    *,
    method: str | None = None,
    keep: float | int = 1.0,
    image_size: int | tuple[int, int] | None = None,
    precision: str = "fp32",
    verify: bool = True,
    **options,
) -> Manifest:
    """Writes the folder `out` with the graphs of `model`, or nothing at all.

    Args:
        model: of open_clip, timm or transformers, whole (with its text encoder) or a vision tower, in eval mode. It
            stays as it is.
        out: a folder that does not exist yet, or is empty.
        method: "tome", "evit" or "tca", or None for the plain tower.
        keep: patch tokens left at the end, a share in (0, 1] or a number; a constant of the graph.
        image_size: side, or (height, width) in pixels; by default the model's own.
        precision: "fp32", "fp16" (weights and products; inputs and outputs stay float32) or "int8" (weights).
        verify: compare the graphs with PyTorch, on random pixels and on pictures of digits.
        options: of the method.

    Raises:
        BadOption: bad method, budget, option, size or precision; `out` exists; the model is in training mode, is
            compressed, has several towers, or is not in float32.
        UnsupportedModel: the model or the method cannot be exported, or the graphs differ from PyTorch by more than
            `TOLERANCES`.
    """
    out = Path(out)
    check_new(out)
    check_precision(precision)
    check_keep(keep)
    stage = new_stage(method, options)
    if method is None and keep != 1:
        raise BadOption(f"keep={keep} needs a method, and none was given.")
    family = _family(model)
    _check_state(model)
    facts = _facts(model, stage, keep, _image_size(model, image_size))
    with new_folder(out) as folder, torch.no_grad():
        parts = write_tower_graphs(model, folder, facts, precision, method, keep, options)
        if hasattr(getattr(model, "config", None), "save_pretrained"):
            model.config.save_pretrained(folder)
        manifest = Manifest(
            kind="tower",
            family=family,
            method=method,
            keep=keep,
            options={name: list(value) if isinstance(value, tuple) else value for name, value in options.items()},
            dynamic_keep=False,
            precision=precision,
            opset=OPSET,
            graphs={name: f"onnx/{name}.onnx" for name in parts},
            inputs={name: part.shapes for name, part in parts.items()},
            model=facts,
            versions=versions_used({"open_clip": "open_clip_torch"}.get(family, family)),
        )
        manifest.save(folder)
        if verify:
            manifest = replace(manifest, verified=verify_tower(model, OnnxTower.from_pretrained(folder, "cpu"), parts))
            manifest.save(folder)
    return manifest


def _family(model: nn.Module) -> str:
    """The library that the model is of.

    Raises:
        BadOption: it has several towers.
        UnsupportedModel: it has no supported tower, or is something else around one.
    """
    tower = find_tower(model).module
    classes = type(model).__mro__
    family = next((c.__module__.split(".")[0] for c in classes if c.__module__.split(".")[0] in LIBRARIES), "")
    is_whole = {
        "open_clip": model is tower or hasattr(model, "encode_image") or getattr(model, "trunk", None) is tower,
        "timm": model is tower,
        "transformers": any(c.__name__ in OF_TRANSFORMERS for c in classes),
    }
    if not is_whole.get(family, False):
        raise UnsupportedModel(
            f"{type(model).__name__} is no CLIP or SigLIP model and no bare vision tower.",
            hint=f"Of transformers {', '.join(OF_TRANSFORMERS)} can be exported; of other models export the tower.",
        )
    return family


def _check_state(model: nn.Module) -> None:
    if model.training:
        raise BadOption("The model is in training mode.", hint="Call model.eval() first.")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes != {torch.float32}:
        raise BadOption(
            f"The model's weights must be float32, got {', '.join(sorted(map(str, dtypes)))}.",
            hint="Call model.float(); precision='fp16' makes a graph with half precision.",
        )


def _image_size(model: nn.Module, given: int | tuple[int, int] | None) -> tuple[int, int]:
    tower = find_tower(model).module
    if given is None:
        holder = getattr(tower, "config", None) or getattr(tower, "patch_embed", tower)
        given = getattr(holder, "image_size", None) or getattr(holder, "img_size", None)
    pair = tuple(given) if isinstance(given, tuple | list) else (given, given)
    if len(pair) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in pair):
        raise BadOption(f"image_size must be a number of pixels or (height, width), got {given!r}.")
    return pair


def _facts(model: nn.Module, stage: TowerStage, keep: float | int, size: tuple[int, int]) -> dict[str, object]:
    """What the runtime and a reader want to know, from a run on one grey image."""
    pixels = torch.zeros(1, 3, *size, device=next(model.parameters()).device)
    try:
        with compress_tower(model, stage, keep) as handle, torch.no_grad():
            embeds = image_features(model, pixels)
    except TokensieveError:
        raise
    except (ValueError, RuntimeError, AssertionError) as error:
        raise BadOption(f"{type(model).__name__} does not take images of {size[0]} x {size[1]} pixels.") from error
    if not isinstance(embeds, Tensor):
        raise UnsupportedModel(f"{type(model).__name__} gives no pooled embedding of an image.")
    tokens = handle.trace.tokens_per_block
    facts: dict[str, object] = {
        "image_size": list(size),
        "embedding": list(embeds.shape[1:]),
        "num_blocks": len(tokens) - 1,
        "num_prefix": handle.trace.num_prefix,
        "tokens_per_block": list(tokens),
    }
    for name, of in (("logit_scale", torch.exp), ("logit_bias", torch.clone)):
        if isinstance(value := getattr(model, name, None), Tensor):
            facts[name] = float(of(value.detach()))
    if isinstance(stage, TCAStage):
        facts["width"] = stage.path[0].shape[-1]
        facts["anchor_blocks"] = [block for block in stage.acting if block > 0 and stage.acts_in(block)]
    return facts
