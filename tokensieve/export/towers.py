"""Vision towers and text encoders of CLIP and SigLIP models as ONNX graphs, with the reduction inside the tower.

    DIR/tokensieve.json
    DIR/onnx/vision_model.onnx   pixel_values [B, 3, H, W] -> image_embeds; tca: anchors [A, S, D], path [B, L, D]
    DIR/onnx/text_model.onnx     input_ids [B, T] (attention_mask [B, T] for CLIP of transformers) -> text_embeds

Only the batch (and A, and T for transformers) is dynamic. How many tokens leave a block follows from the budget and
the size of the image, and both are constants of a graph.

Anchors of TCA are an input that may be empty (A = 0), so that one graph serves both sides of a stream. A row of zeros
stands in front of them, whose similarity (-2) is below any cosine, so it is chosen only when there is no anchor; the
token made of it then gets a logit of -inf and thus no attention: what is computed is the tower without anchors. A
second graph would take the weights twice, and an `If` would hold the tower twice.

Graphs and their verification are in one file, because both make the same calls of the same model.
"""

# Shape legend: B images, H and W of an image, L blocks, S blocks that take an anchor, A anchors, D width of the
#               tower, O width of the embeddings, T tokens of a text

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokensieve.compression.budget import check_keep
from tokensieve.compression.registry import get_method
from tokensieve.compression.tca import TCAStage
from tokensieve.compression.tower_stage import TowerStage
from tokensieve.datasets.digits import glyphs
from tokensieve.errors import BadOption, TokensieveError, UnsupportedModel
from tokensieve.export.graph_file import OPSET, write_graph
from tokensieve.export.manifest import Manifest
from tokensieve.export.new_folder import check_new, new_folder
from tokensieve.export.precision import check_precision, exportable_copy, quantize_weights, weight_dtype
from tokensieve.export.tower_runtime import TEXT, VISION, OnnxTower
from tokensieve.pipeline.adaptation.tca_stream import image_features
from tokensieve.pipeline.towers import compress_tower
from tokensieve.pipeline.towers.compress import find_tower
from tokensieve.pipeline.towers.load import LIBRARIES

METHODS = ("tome", "evit", "tca")
OF_TRANSFORMERS = (
    "CLIPModel",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "SiglipModel",
    "SiglipVisionModel",
)

# Distance of an embedding from PyTorch's, as a share of its length. fp32: other orders of summing. fp16: 10 bits of
# mantissa through a dozen blocks. int8: one scale a column of each weight and one a tensor of activations.
TOLERANCES: Mapping[str, float] = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.25}
# Two tokens whose scores are equal up to rounding may change places, and then a reduced embedding moves by more. Of
# the images that are compared this share may, and no farther than this.
NEAR_TIES, NEAR_TIE_TOLERANCE = 1 / 8, 0.25


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
        parts = _write_graphs(model, folder, facts, precision, method, keep, options)
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
            versions=_versions(family),
        )
        manifest.save(folder)
        if verify:
            manifest = replace(manifest, verified=_verified(model, OnnxTower.from_pretrained(folder, "cpu"), parts))
            manifest.save(folder)
    return manifest


# --- what is exported


@dataclass(frozen=True)
class _Part:
    """A graph to be: examples of its inputs, and shapes of inputs and outputs with names for what is dynamic."""

    module: nn.Module
    inputs: dict[str, Tensor]
    shapes: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]


class _VisionGraph(nn.Module):
    def __init__(self, model: nn.Module, stage: TowerStage, dtype: torch.dtype):
        super().__init__()
        self.model, self.stage, self.dtype = model, stage, dtype

    def forward(self, pixel_values: Tensor, anchors_ASD: Tensor | None = None):
        if isinstance(self.stage, _AnchoredTCA):
            self.stage.anchors_ASD = anchors_ASD
        embeds_BO = image_features(self.model, pixel_values.to(self.dtype)).float()
        if isinstance(self.stage, TCAStage):
            return embeds_BO, torch.stack(self.stage.path, 1).float()
        return embeds_BO


class _TextGraph(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return text_features(self.model, input_ids, attention_mask).float()


def text_features(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """`[C, O]`: what the model's own call for texts gives."""
    if not hasattr(model, "get_text_features"):
        return model.encode_text(input_ids)
    return model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output


class _AnchoredTCA(TCAStage):
    """TCA whose anchors are an input of the graph, `[A, S, D]`, with a row in front for "none" (see the module)."""

    def __init__(self, plain: TCAStage, anchor_blocks: Sequence[int]):
        super().__init__(
            drop_rate=plain.drop_rate,
            variant=plain.variant,
            blocks=plain.blocks,
            first_center=plain.first_center,
        )
        self.anchor_blocks = list(anchor_blocks)
        self.anchors_ASD: Tensor | None = None

    def extra_tokens(self, block: int, x: Tensor) -> Tensor | None:
        if block not in self.anchor_blocks:
            return None
        anchor_AD = self.anchors_ASD[:, self.anchor_blocks.index(block)]
        anchor_AD = torch.cat([anchor_AD.new_zeros(1, anchor_AD.shape[1]), anchor_AD])
        cosine_BA = F.cosine_similarity(self._summary(x).float()[:, None], anchor_AD, dim=-1)
        is_none_A = torch.arange(anchor_AD.shape[0], device=x.device) == 0
        row_B = torch.where(is_none_A, -2.0, cosine_BA).argmax(1)
        self.is_none_B1 = row_B[:, None] == 0
        return anchor_AD.index_select(0, row_B)[:, None].to(x.dtype)

    def extra_bias(self, block: int) -> Tensor | None:
        return torch.where(self.is_none_B1, -torch.inf, 0.0)


def new_stage(method: str | None, options: Mapping[str, object]) -> TowerStage:
    """A fresh stage of the method; one that does nothing for None.

    Raises:
        BadOption: an unknown option, or a value that cannot be written down.
        UnsupportedModel: a method that cannot be exported.
    """
    if method is None:
        if options:
            raise BadOption(f"Options {sorted(options)} belong to a method, and none was given.")
        return TowerStage()
    if method not in METHODS:
        name = method if isinstance(method, str) else type(method).__name__
        raise UnsupportedModel(
            f"Method {name!r} cannot be exported in a tower; {', '.join(METHODS)} can.",
            hint="Methods at the projector are exported with a vision-language model.",
        )
    if not isinstance(options.get("first_center", 0), int):
        raise BadOption("first_center must be an index: a graph draws no random numbers and calls no functions.")
    registered = get_method(method)
    registered.check_options(options)
    return registered.fn(**options)


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


def _versions(family: str) -> dict[str, str]:
    import onnx
    import onnxruntime

    packages = {"tokensieve", "torch", {"open_clip": "open_clip_torch"}.get(family, family)}
    return {
        **{name: version(name) for name in sorted(packages)},
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


# --- graphs


def _write_graphs(model, folder, facts, precision, method, keep, options) -> dict[str, _Part]:
    dtype = weight_dtype(precision)
    made = exportable_copy(model, dtype)
    stage = new_stage(method, options)
    if facts.get("anchor_blocks"):
        stage = _AnchoredTCA(stage, facts["anchor_blocks"])
    parts = {VISION: _vision_part(made, stage, facts, dtype)}
    if hasattr(made, "encode_text") or hasattr(made, "get_text_features"):
        parts[TEXT] = _text_part(made)
    (folder / "onnx").mkdir()
    _write(parts[VISION], folder / "onnx" / f"{VISION}.onnx", precision, compress_tower(made, stage, keep))
    if TEXT in parts:
        _write(parts[TEXT], folder / "onnx" / f"{TEXT}.onnx", precision, nullcontext())
    return parts


def _write(part: _Part, path: Path, precision: str, reduction: AbstractContextManager) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as aside, reduction:
        try:
            first = path if precision != "int8" else Path(aside) / path.name
            write_graph(part.module, first, part.inputs, part.shapes, part.outputs)
        except (TokensieveError, OSError):
            raise
        except Exception as error:  # whatever the tracer meets in a library's code
            raise UnsupportedModel(
                f"The {path.stem} of this model cannot be traced ({type(error).__name__}).",
                hint="It can still be run with PyTorch.",
            ) from error
        if precision == "int8":
            quantize_weights(first, path)


def _vision_part(made: nn.Module, stage: TowerStage, facts: Mapping[str, object], dtype: torch.dtype) -> _Part:
    size = facts["image_size"]
    inputs, shapes = {"pixel_values": torch.zeros(2, 3, *size)}, {"pixel_values": ["batch", 3, *size]}
    outputs = {"image_embeds": ["batch", *facts["embedding"]]}
    if isinstance(stage, TCAStage):
        outputs["path"] = ["batch", facts["num_blocks"], facts["width"]]
    if isinstance(stage, _AnchoredTCA):
        shape = (len(stage.anchor_blocks), facts["width"])
        inputs["anchors"] = torch.ones(3, *shape)
        shapes["anchors"] = ["anchors", *shape]
    return _Part(_VisionGraph(made, stage, dtype), inputs, shapes, outputs)


def _text_part(made: nn.Module) -> _Part:
    if hasattr(made, "encode_text"):
        length: int | str = made.context_length
        example, takes_mask = length, False
    else:
        length, example = "length", made.config.text_config.max_position_embeddings
        takes_mask = "Siglip" not in type(made).__name__  # trained on padding without a mask
    ids_BT = example_ids(made, 2, example)
    inputs, shapes = {"input_ids": ids_BT}, {"input_ids": ["batch", length]}
    if takes_mask:
        inputs["attention_mask"] = torch.ones_like(ids_BT)
        shapes["attention_mask"] = ["batch", length]
    width = text_features(made, **{"attention_mask": None, **inputs}).shape[1]
    return _Part(_TextGraph(made), inputs, shapes, {"text_embeds": ["batch", width]})


def example_ids(model: nn.Module, batch: int, length: int) -> Tensor:
    """`[batch, length]` random ids, each row with one end of text."""
    generator = torch.Generator().manual_seed(length)
    ids_BT = torch.randint(3, 20, (batch, length), generator=generator)
    end = getattr(getattr(getattr(model, "config", None), "text_config", None), "eos_token_id", None)
    place_B1 = torch.randint(length, (batch, 1), generator=generator)
    return ids_BT.scatter(1, place_B1, 20 if end in (None, 2) else end)  # with 2, CLIP pools at the highest id


# --- verification


def digit_pictures(num: int, size: tuple[int, int]) -> Tensor:
    """`[num, 3, H, W]`: scanned digits on coloured grounds, with numbers as models take them."""
    glyph_B1GG = torch.from_numpy(glyphs()[7 : 7 + num])[:, None]
    generator = torch.Generator().manual_seed(0)
    ink, ground = 3 * torch.rand(2, num, 3, 1, 1, generator=generator) - 1.5
    return F.interpolate(ground + (ink - ground) * glyph_B1GG, size, mode="bilinear", antialias=True)


def _verified(model: nn.Module, tower: OnnxTower, parts: Mapping[str, _Part]) -> dict[str, object]:
    """Differences between the graphs and PyTorch.

    Raises:
        UnsupportedModel: they are too large.
    """
    manifest = tower.manifest
    pictures = {
        "random pixels": torch.randn(4, 3, *tower.image_size, generator=torch.Generator().manual_seed(1)),
        "digits": digit_pictures(4, tower.image_size),
    }
    far = {name: _vision_differences(model, tower, pixels) for name, pixels in pictures.items()}
    if tower.anchor_blocks:
        for name, pixels in pictures.items():
            far[f"{name} with anchors"] = _vision_differences(model, tower, pixels, pictures["digits"])
    found: dict[str, object] = {VISION: _judged(far, manifest, may_tie=manifest.method is not None)}
    if TEXT in parts:
        found[TEXT] = _judged(_text_differences(model, tower, parts[TEXT]), manifest, may_tie=False)
    return {**found, "tolerance": TOLERANCES[manifest.precision], "near_tie_tolerance": NEAR_TIE_TOLERANCE}


def _vision_differences(
    model: nn.Module, tower: OnnxTower, pixels: Tensor, anchor_pixels: Tensor | None = None
) -> np.ndarray:
    """`[B]`, over several sizes of a batch; the paths of `anchor_pixels` are the anchors."""
    manifest, device = tower.manifest, next(model.parameters()).device
    stage, anchors = new_stage(manifest.method, manifest.options), None
    with compress_tower(model, stage, manifest.keep), torch.no_grad():
        if anchor_pixels is not None:
            image_features(model, anchor_pixels.to(device))
            stage.anchors = torch.stack(stage.path, 1)
            anchors = stage.anchors[:, [block - 1 for block in tower.anchor_blocks]].cpu().numpy()
        wanted = [image_features(model, pixels.to(device)).cpu().numpy()]
    if manifest.method == "tca":
        wanted.append(torch.stack(stage.path, 1).cpu().numpy())
    far = []
    for some in (slice(0, 1), slice(1, len(pixels))):
        part = pixels[some].numpy()
        got = tower.encode_with_path(part, anchors) if manifest.method == "tca" else [tower.encode_image(part)]
        far.append(np.max([_distance(g, w[some]) for g, w in zip(got, wanted, strict=True)], axis=0))
    return np.concatenate(far)


def _text_differences(model: nn.Module, tower: OnnxTower, part: _Part) -> dict[str, np.ndarray]:
    device = next(model.parameters()).device
    longest = part.inputs["input_ids"].shape[1]
    is_fixed = part.shapes["input_ids"][1] == longest
    far = {}
    for batch, length in ((1, longest), (3, longest if is_fixed else max(2, longest // 2))):
        ids_BT = example_ids(model, batch, length)
        mask_BT = torch.ones_like(ids_BT) if "attention_mask" in part.inputs else None
        if mask_BT is not None and batch > 1:
            mask_BT[0, -1] = 0
        with torch.no_grad():
            wanted = text_features(model, *(each if each is None else each.to(device) for each in (ids_BT, mask_BT)))
        got = tower.encode_text(ids_BT.numpy(), None if mask_BT is None else mask_BT.numpy())
        far[f"{batch} texts of {length}"] = _distance(got, wanted.cpu().numpy())
    return far


def _distance(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`[B]`: length of the difference, as a share of the wanted length."""
    got, wanted = (x.reshape(len(x), -1).astype(np.float64) for x in (got, wanted))
    return np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)


def _judged(far: Mapping[str, np.ndarray], manifest: Manifest, may_tie: bool) -> dict[str, object]:
    every = np.concatenate(list(far.values()))
    limit = TOLERANCES[manifest.precision]
    num_beyond = int((~(every <= limit)).sum())
    allowed = may_tie and num_beyond <= NEAR_TIES * len(every) and (every <= NEAR_TIE_TOLERANCE).all()
    if num_beyond and not allowed:
        worst = ", ".join(f"{name}: {values.max():.2g}" for name, values in far.items())
        raise UnsupportedModel(
            f"The exported graph differs from PyTorch by more than {limit:g} in {num_beyond} of {len(every)} cases "
            f"({worst}).",
            hint="Nothing was written. Please report the model, or use precision='fp32'.",
        )
    return {"greatest": {name: float(values.max()) for name, values in far.items()}, "beyond": num_beyond}
