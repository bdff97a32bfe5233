"""The graphs of a tower: its image side with the reduction in it, and its text side.

    vision_model   pixel_values [B, 3, H, W] -> image_embeds; tca: anchors [A, S, D], path [B, L, D]
    text_model     input_ids [B, T] (attention_mask [B, T] for CLIP of transformers) -> text_embeds

Only the batch (and A, and T for transformers) is dynamic. How many tokens leave a block follows from the budget and
the size of the image, and both are constants of a graph.

Anchors of TCA are an input that may be empty (A = 0), so that one graph serves both sides of a stream. A row of zeros
stands in front of them, whose similarity (-2) is below any cosine, so it is chosen only when there is no anchor; the
token made of it then gets a logit of -inf and thus no attention: what is computed is the tower without anchors. A
second graph would take the weights twice, and an `If` would hold the tower twice.
"""

# Shape legend: B images, H and W of an image, L blocks, S blocks that take an anchor, A anchors, D width of the
#               tower, O width of the embeddings, T tokens of a text

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokensieve.compression.registry import get_method
from tokensieve.compression.tca import TCAStage
from tokensieve.compression.tower_stage import TowerStage
from tokensieve.errors import BadOption, TokensieveError, UnsupportedModel
from tokensieve.export.graph_file import write_graph
from tokensieve.export.precision import exportable_copy, quantize_weights, weight_dtype
from tokensieve.export.tower_runtime import TEXT, VISION
from tokensieve.pipeline.adaptation.tca_stream import image_features
from tokensieve.pipeline.towers import compress_tower

METHODS = ("tome", "evit", "tca")


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


def write_tower_graphs(model, folder, facts, precision, method, keep, options) -> dict[str, Part]:
    dtype = weight_dtype(precision)
    made = exportable_copy(model, dtype)
    stage = new_stage(method, options)
    if facts.get("anchor_blocks"):
        stage = AnchoredTCA(stage, facts["anchor_blocks"])
    parts = {VISION: _vision_part(made, stage, facts, dtype)}
    if hasattr(made, "encode_text") or hasattr(made, "get_text_features"):
        parts[TEXT] = _text_part(made)
    (folder / "onnx").mkdir()
    _write(parts[VISION], folder / "onnx" / f"{VISION}.onnx", precision, compress_tower(made, stage, keep))
    if TEXT in parts:
        _write(parts[TEXT], folder / "onnx" / f"{TEXT}.onnx", precision, nullcontext())
    return parts


def _write(part: Part, path: Path, precision: str, reduction: AbstractContextManager) -> None:
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


def _vision_part(made: nn.Module, stage: TowerStage, facts: Mapping[str, object], dtype: torch.dtype) -> Part:
    size = facts["image_size"]
    inputs, shapes = {"pixel_values": torch.zeros(2, 3, *size)}, {"pixel_values": ["batch", 3, *size]}
    outputs = {"image_embeds": ["batch", *facts["embedding"]]}
    if isinstance(stage, TCAStage):
        outputs["path"] = ["batch", facts["num_blocks"], facts["width"]]
    if isinstance(stage, AnchoredTCA):
        shape = (len(stage.anchor_blocks), facts["width"])
        inputs["anchors"] = torch.ones(3, *shape)
        shapes["anchors"] = ["anchors", *shape]
    return Part(_VisionGraph(made, stage, dtype), inputs, shapes, outputs)


def _text_part(made: nn.Module) -> Part:
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
    return Part(_TextGraph(made), inputs, shapes, {"text_embeds": ["batch", width]})


def example_ids(model: nn.Module, batch: int, length: int) -> Tensor:
    """`[batch, length]` random ids, each row with one end of text."""
    generator = torch.Generator().manual_seed(length)
    ids_BT = torch.randint(3, 20, (batch, length), generator=generator)
    end = getattr(getattr(getattr(model, "config", None), "text_config", None), "eos_token_id", None)
    place_B1 = torch.randint(length, (batch, 1), generator=generator)
    return ids_BT.scatter(1, place_B1, 20 if end in (None, 2) else end)  # with 2, CLIP pools at the highest id


@dataclass(frozen=True)
class Part:
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
        if isinstance(self.stage, AnchoredTCA):
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


class AnchoredTCA(TCAStage):
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
