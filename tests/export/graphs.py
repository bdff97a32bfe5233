"""Small ONNX graphs made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 18


def linear(domain: str = "", op: str = "MatMul", opset: int = OPSET, **model) -> onnx.ModelProto:
    """`y = x @ w` of `[n, 3]` and `[3, 4]`."""
    weight = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(3, 4), "w")
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], domain=domain)],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [weight],
    )
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=imports, ir_version=10, **model)


def save(model: onnx.ModelProto, folder: Path, name: str = "a.onnx", size_threshold: int = 0) -> Path:
    """Under `folder/onnx`, weights of that many bytes and more beside the graph."""
    path = folder / "onnx" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=f"{name}_data", size_threshold=size_threshold)
    return path


def toy_decoder(table_XD: np.ndarray, axes: int) -> onnx.ModelProto:
    """A "language model" with a cache, whose logits depend on every embedding, position and mask there ever was.

    Args:
        table_XD: vocabulary times width, what the state is compared with.
        axes: 1 for positions `[B, L]`, 3 for `[3, B, L]`.
    """
    width, vocab = table_XD.shape[1], len(table_XD)
    position_shape = ["B", "L"] if axes == 1 else [3, "B", "L"]
    nodes = []

    def add(op: str, *inputs: str, **attributes) -> str:
        name = f"v{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    constants = {"w": table_XD.T.astype(np.float32), "two": np.float32(2), "sharp": np.float32(5)}
    constants |= {f"axis{i}": np.asarray([i], np.int64) for i in range(4)}
    place = add("Cast", "position_ids", to=TensorProto.FLOAT)
    if axes == 3:
        place = add("ReduceSum", place, "axis0", keepdims=0)
    new = add("Mul", "inputs_embeds", add("Cos", add("Unsqueeze", place, "axis2")))
    key = add("Unsqueeze", new, "axis1")
    nodes.append(helper.make_node("Concat", ["past_key_values.0.key", key], ["present.0.key"], axis=2))
    nodes.append(
        helper.make_node("Concat", ["past_key_values.0.value", add("Mul", key, "two")], ["present.0.value"], axis=2)
    )
    mask = add("Unsqueeze", add("Cast", "attention_mask", to=TensorProto.FLOAT), "axis1")
    mask = add("Unsqueeze", mask, "axis3")
    both = add("Add", "present.0.key", "present.0.value")
    state = add("ReduceSum", add("Mul", both, mask), "axis2", keepdims=0)
    nodes.append(helper.make_node("Sin", [add("Mul", add("MatMul", state, "w"), "sharp")], ["logits"]))
    past = ["B", 1, "past", width]
    values = {
        "inputs_embeds": (TensorProto.FLOAT, ["B", "L", width]),
        "attention_mask": (TensorProto.INT64, ["B", "total"]),
        "position_ids": (TensorProto.INT64, position_shape),
        "past_key_values.0.key": (TensorProto.FLOAT, past),
        "past_key_values.0.value": (TensorProto.FLOAT, past),
    }
    results = {"logits": ["B", 1, vocab], "present.0.key": ["B", 1, "total", width]}
    results["present.0.value"] = results["present.0.key"]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in values.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in results.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def toy_logits(table_XD: np.ndarray, embeds_LD: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """What `toy_decoder` gives after a whole sequence, without padding and without a cache."""
    place_L = positions.sum(0) if positions.ndim == 2 else positions
    state_D = 3 * (embeds_LD * np.cos(place_L.astype(np.float32))[:, None]).sum(0)
    return np.sin(5 * (state_D @ table_XD.T.astype(np.float32)))


def asking(width: int) -> onnx.ModelProto:
    """A "vision encoder" whose tokens all are what it is asked: the mean of `question` plus `num_before`."""
    nodes = [
        helper.make_node("Shape", ["budget"], ["k"]),
        helper.make_node("Squeeze", ["k"], ["k0"]),
        helper.make_node("Range", ["zero", "k0", "one"], ["kept"]),
        helper.make_node("ReduceMean", ["question", "axis"], ["mean"], keepdims=1),
        helper.make_node("Cast", ["num_before"], ["before"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["mean", "before"], ["token"]),
        helper.make_node("Concat", ["k", "width"], ["shape"], axis=0),
        helper.make_node("Expand", ["token", "shape"], ["features"]),
        helper.make_node("ReduceSum", ["mean"], ["total"], keepdims=0),
        helper.make_node("Expand", ["total", "width"], ["newline"]),
    ]
    constants = {"zero": np.int64(0), "one": np.int64(1), "axis": np.asarray([0]), "width": np.asarray([width])}
    graph = helper.make_graph(
        nodes,
        "asking",
        [
            helper.make_tensor_value_info("question", TensorProto.FLOAT, ["words", width]),
            helper.make_tensor_value_info("num_before", TensorProto.INT64, [1]),
            helper.make_tensor_value_info("budget", TensorProto.INT64, ["kept"]),
        ],
        [
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["kept", width]),
            helper.make_tensor_value_info("kept", TensorProto.INT64, ["kept"]),
            helper.make_tensor_value_info("newline", TensorProto.FLOAT, [width]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
