"""fp32, fp16 and int8: how a model's weights become those of its graphs, and how far answers may move."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from tokensieve.errors import BadOption
from tokensieve.export.graph_file import save_graph
from tokensieve.export.manifest import PRECISIONS


@dataclass(frozen=True)
class Tolerance:
    """How far a graph may be from PyTorch.

    Attributes:
        features: greatest difference of the visual features, as a share of their greatest magnitude.
        logits: greatest difference of the logits, as a share of their greatest magnitude, but at least of 1. A
            generated token may differ where PyTorch's own first and second choice are closer than twice that.
        kept: least share of equal kept tokens. Of tokens whose scores tie up to rounding either may stay.
        embeddings: greatest difference of the embeddings of text, as a share of their greatest magnitude.
    """

    features: float
    logits: float
    kept: float
    embeddings: float

    def to_dict(self) -> dict[str, float]:
        """Plain numbers for the manifest."""
        return asdict(self)


# fp32: other orders of summing. fp16: 10 bits of mantissa through a few dozen layers. int8: the vision graph stays
# fp32; one scale a column of each weight and one a tensor of activations, as onnxruntime's dynamic quantiser has it.
TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        "fp32": Tolerance(features=1e-4, logits=1e-4, kept=0.95, embeddings=1e-6),
        "fp16": Tolerance(features=2e-2, logits=3e-2, kept=0.9, embeddings=1e-3),
        "int8": Tolerance(features=1e-4, logits=0.25, kept=0.95, embeddings=1e-2),
    }
)


def check_precision(precision: str) -> str:
    """The precision, if it is one of `PRECISIONS`; raises BadOption."""
    if precision not in PRECISIONS:
        raise BadOption(f"precision must be one of {PRECISIONS}, got {precision!r}.")
    return precision


def weight_dtype(precision: str) -> torch.dtype:
    """What the weights are exported as; int8 is made of float32 afterwards, by `quantize_weights`."""
    return torch.float16 if precision == "fp16" else torch.float32


def exportable_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model on the CPU with weights of `dtype` and attention as plain products; the given one stays as it is.

    Weights that are right already are shared with the given model, and tied weights stay tied. Buffers keep their
    dtype: the frequencies of rotary embeddings are float32 in every precision.
    """
    memo: dict[int, object] = {}
    for weight in model.parameters():
        moved = weight.detach().to("cpu", dtype)
        memo[id(weight)] = nn.Parameter(moved, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu")
    made = copy.deepcopy(model, memo).eval()
    for module in made.modules():
        module._forward_hooks.clear()  # recorders of transformers and of others, which a graph has no use for
        module._forward_pre_hooks.clear()
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = "eager"  # fused kernels branch on sizes, which a graph cannot
    return made


def quantize_weights(source: Path, target: Path) -> None:
    """Writes `target`, the graph in `source` with the weights of its products and look-ups as 8-bit numbers.

    Both have their weights in `<file>_data` beside them; `source` loses what it says of their shapes. Activations are
    quantised while the graph runs.
    """
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()  # the quantiser logs to the root logger
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as aside:
            made = Path(aside) / source.name
            _forget_weight_shapes(source)
            quantize_dynamic(
                source,
                made,
                op_types_to_quantize=["MatMul", "Gemm", "Gather"],
                per_channel=True,
                # Signed weights beside unsigned activations overflow 16 bits on x86 processors without VNNI, silently.
                weight_type=QuantType.QUInt8,
                use_external_data_format=True,
            )
            save_graph(onnx_ir.load(made), target)
    finally:
        root.setLevel(level)


def _forget_weight_shapes(path: Path) -> None:
    """The quantiser transposes weights and then trips over the shapes that were written down for them."""
    import onnx

    graph = onnx.load(path, load_external_data=False)
    weights = {each.name for each in graph.graph.initializer}
    shapes = [each for each in graph.graph.value_info if each.name not in weights]
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(shapes)
    path.write_bytes(graph.SerializeToString())
