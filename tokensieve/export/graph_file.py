"""From a module to an ONNX file with its weights beside it: one call, quiet, without traces of this machine."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from tokensieve.export.block_attention import add_block_attention

OPSET = 18


def versions_used(*libraries: str) -> dict[str, str]:
    """Versions of what makes a graph: tokensieve, torch, onnx, onnxruntime, and further distributions."""
    import onnxruntime

    found = {name: version(name) for name in ("tokensieve", "torch", "onnx", *libraries)}
    return found | {"onnxruntime": onnxruntime.__version__}  # its distribution has another name on GPUs


def write_graph(
    module: nn.Module,
    path: Path,
    inputs: Mapping[str, Tensor],
    dynamic: Mapping[str, Sequence[str | int]],
    outputs: Mapping[str, Sequence[str | int]] | Sequence[str],
) -> None:
    """Exports `module(*inputs.values())` to `path`, its weights to `<path>_data`.

    Args:
        module: takes tensors by position and returns a tensor or a tuple of them.
        path: `....onnx`.
        inputs: an example of every input; dynamic sizes should be 2 or more and differ from each other, because
            sizes 0 and 1 and equal sizes are taken for fixed.
        dynamic: input -> its shape, with a name for every size that may change.
        outputs: their names, with or without shapes.
    """
    import onnx_ir

    shapes = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(dynamic[name]) if isinstance(size, str)}
        for name in inputs
    )
    with _quiet():
        program = torch.onnx.export(
            _ByPosition(module, tuple(inputs)),
            tuple(inputs.values()),
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            verbose=False,
        )
    add_block_attention(program.model)
    for graph in (program.model.graph, *(function.graph for function in program.model.functions.values())):
        for node in graph.all_nodes():
            node.metadata_props.clear()  # stack traces, with the paths of this machine
            node.doc_string = None
    # The exporter numbers what is dynamic.
    names = {**dynamic, **(outputs if isinstance(outputs, Mapping) else {})}
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        if value.name in names:
            value.shape = onnx_ir.Shape(list(names[value.name]))
    save_graph(program.model, path)


def save_graph(model, path: Path) -> None:
    """Writes a graph of `onnx_ir` to `path` and its weights to `<path>_data`."""
    import onnx_ir

    onnx_ir.save(model, path, external_data=f"{path.name}_data", size_threshold_bytes=1024)


class _ByPosition(nn.Module):
    """The exporter names inputs after parameters; this makes any number of them."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *tensors: Tensor):
        return self.module(*tensors)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress, warnings and logs, which say nothing to a user."""
    disabled = logging.root.manager.disable
    trace = logging.getLogger("torch.__trace")  # heeds its own level alone, and dumps whole graphs where logs are kept
    level = trace.level
    logging.disable(logging.WARNING)
    trace.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        trace.setLevel(level)
        logging.disable(disabled)
