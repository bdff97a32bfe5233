"""Graphs of a loaded folder are looked at before onnxruntime gets them; providers are what was asked for."""

from __future__ import annotations

import os

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.export import graphs
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export import folder as folder_module
from tokensieve.export import sessions
from tokensieve.export.sessions import open_session

FILE = "onnx/a.onnx"


@pytest.fixture
def folder(tmp_path):
    graphs.save(graphs.linear(), tmp_path)
    return tmp_path


def refused(folder, match: str | None = None):
    """A clear error, which repeats nothing of protobuf's or onnxruntime's."""
    with pytest.raises(UnsupportedModel, match=match) as caught:
        open_session(folder, FILE)
    assert caught.value.hint and "\n" not in str(caught.value)
    assert "ONNXRuntimeError" not in str(caught.value)


def rewritten(folder, change):
    """The saved graph with its external data, changed."""
    path = folder / FILE
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def located(**entries):
    def change(model):
        tensor = model.graph.initializer[0]
        found = {entry.key: entry.value for entry in tensor.external_data} | entries
        del tensor.external_data[:]
        for key, value in found.items():
            if value is not None:
                tensor.external_data.add(key=key, value=str(value))

    return change


def test_it_runs(folder):
    session = open_session(folder, FILE, threads=1)
    assert session.get_providers() == ["CPUExecutionProvider"]
    (y,) = session.run(None, {"x": np.ones((2, 3), np.float32)})
    np.testing.assert_array_equal(y, [[12, 15, 18, 21]] * 2)


def test_a_graph_at_the_top_of_the_folder(folder):
    for name in ("a.onnx", "a.onnx_data"):
        (folder / "onnx" / name).rename(folder / name)
    open_session(folder, "a.onnx")


def test_it_runs_from_anywhere(folder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(folder.parent)
    open_session(folder.name, FILE)
    link = tmp_path_factory.mktemp("elsewhere") / "link"
    link.symlink_to(folder)  # the way to the folder is the user's own business
    open_session(link, FILE)


@pytest.mark.parametrize("provider", ["cpu", "CPU", "CPUExecutionProvider"])
def test_the_cpu_by_name(folder, provider):
    assert open_session(folder, FILE, provider).get_providers() == ["CPUExecutionProvider"]


@pytest.mark.skipif(sessions._has_cuda_device(), reason="there is a GPU")
@pytest.mark.parametrize("listed", [True, False])
def test_cuda_is_an_error_where_it_cannot_be_had(folder, monkeypatch, listed, capfd):
    """Whether this build of onnxruntime lists it or not."""
    if not listed:
        monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    elif "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this build of onnxruntime has no CUDA")
    with pytest.raises(BadOption) as caught:
        open_session(folder, FILE, "cuda")
    assert "provider='cpu'" in caught.value.hint
    assert open_session(folder, FILE).get_providers() == ["CPUExecutionProvider"]


def test_what_the_session_says_counts(folder, monkeypatch):
    """Not what was listed, and not what was asked for."""

    class Session:
        def __init__(self, data, options, providers, **more):
            self.asked = providers

        def get_providers(self):
            return self.asked[1:] if broken else self.asked

    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    for device in (True, False):
        monkeypatch.setattr(sessions, "_has_cuda_device", lambda device=device: device)
        broken = False
        assert open_session(folder, FILE, "cuda").asked == ["CUDAExecutionProvider", "CPUExecutionProvider"]
        assert open_session(folder, FILE).asked[0] == ("CUDAExecutionProvider" if device else "CPUExecutionProvider")
        assert open_session(folder, FILE, "cpu").asked == ["CPUExecutionProvider"]
        broken = True
        with pytest.raises(BadOption, match="runs on 'CPUExecutionProvider'"):
            open_session(folder, FILE, "cuda")


@pytest.mark.parametrize("provider", ["gpu", "", 3, "tpu"])
def test_unknown_providers(folder, provider):
    with pytest.raises(BadOption, match="cuda"):
        open_session(folder, FILE, provider)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_threads_must_be_a_count(folder, threads):
    with pytest.raises(BadOption, match="threads"):
        open_session(folder, FILE, threads=threads)


@pytest.mark.parametrize("size", [0, 1, 20, 60, -1])
def test_cut_off_graphs(folder, size):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:size])
    refused(folder)


@pytest.mark.parametrize("data", [b"\x80\x04\x95pickle", b"not a graph at all", bytes(5000), b"\xff" * 300])
def test_other_bytes(folder, data):
    (folder / FILE).write_bytes(data)
    refused(folder)


@pytest.mark.parametrize("seed", range(30))
def test_flipped_bytes_never_end_otherwise(folder, seed):
    """Either it is refused in our words, or the graph still opens."""
    rng = np.random.default_rng(seed)
    data = bytearray((folder / FILE).read_bytes())
    for place in rng.integers(0, len(data), 4):
        data[place] = rng.integers(0, 256)
    (folder / FILE).write_bytes(data)
    try:
        open_session(folder, FILE)
    except UnsupportedModel as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "file", ["../a.onnx", "/etc/passwd", "onnx/../../a.onnx", "onnx//a.onnx", "C:\\a.onnx", "", "."]
)
def test_names_that_lead_out_of_the_folder(folder, file):
    with pytest.raises(UnsupportedModel, match="no name of a file"):
        open_session(folder, file)


@pytest.mark.parametrize("name", ["a.onnx", "a.onnx_data"])
@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("missing", "lacks the file"),
        ("symbolic", "is a link"),
        ("hard", "a second name"),
        ("folder", "no regular file"),
        ("pipe", "no regular file"),
        ("device", "is a link"),
    ],
)
def test_files_that_are_no_plain_files(folder, tmp_path_factory, name, kind, match):
    path = folder / "onnx" / name
    moved = tmp_path_factory.mktemp("outside") / "it"
    path.rename(moved)
    if kind == "symbolic":
        path.symlink_to(moved)
    elif kind == "hard":
        os.link(moved, path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    refused(folder, match)


def test_a_link_in_the_middle_of_the_path(folder):
    (folder / "onnx").rename(folder / "other")
    (folder / "onnx").symlink_to(folder / "other")
    refused(folder, "is a link")


@pytest.mark.parametrize(
    "location",
    ["../a.onnx_data", "/etc/passwd", "x/../a.onnx_data", "..", ".", "", "sub/a.onnx_data", "*/_ORT_MEM_ADDR_/*"],
)
def test_weights_that_lie_elsewhere(folder, location):
    (folder / "a.onnx_data").write_bytes(bytes(48))
    rewritten(folder, located(location=location))
    refused(folder)


OUTSIDE = "does not lie inside"


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"offset": -4}, OUTSIDE),
        ({"offset": 4}, OUTSIDE),
        ({"offset": 1 << 60}, OUTSIDE),
        ({"offset": "0x0"}, "ValueError"),
        ({"length": 12}, OUTSIDE),
        ({"length": -1}, OUTSIDE),
        ({"length": 1 << 62}, OUTSIDE),
        ({"length": "all"}, "ValueError"),
        ({"location": None}, "no name of a file"),
        ({"basepath": "/"}, "does not say properly"),
    ],
)
def test_weights_out_of_bounds(folder, entries, match):
    rewritten(folder, located(**entries))
    refused(folder, match)


def test_cut_off_weights(folder):
    path = folder / "onnx/a.onnx_data"
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, "damaged or cut off")


def test_weights_of_absurd_size(folder):
    """A million tensors that share their bytes, one that claims more than there is, one of a negative size."""

    def huge(model):
        model.graph.initializer[0].dims[:] = [1 << 40, 1 << 40]

    def negative(model):
        model.graph.initializer[0].dims[:] = [-3, -4]

    def shared(model):
        copy = onnx.TensorProto()
        copy.CopyFrom(model.graph.initializer[0])
        copy.name = "again"
        model.graph.initializer.append(copy)

    original = (folder / FILE).read_bytes()
    for change in (huge, negative, shared):
        (folder / FILE).write_bytes(original)
        rewritten(folder, change)
        refused(folder)


def test_graphs_of_absurd_size(folder, monkeypatch):
    for name, module in (("MAX_GRAPH_BYTES", sessions), ("MAX_DATA_BYTES", sessions), ("MAX_NODES", sessions)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 0)
            refused(folder)
    open_session(folder, FILE)


@pytest.mark.parametrize(
    ("domain", "op"),
    [("my.ops", "Anything"), ("com.microsoft", "EPContext"), ("com.microsoft", "PythonOp"), ("ai.onnx.ml", "Scaler")],
)
def test_unknown_operators(folder, domain, op):
    graphs.save(graphs.linear(domain, op), folder)
    refused(folder, f"operator '{op}' of domain '{domain}'")


def inside_a_branch(inner: onnx.GraphProto) -> onnx.ModelProto:
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    graph = helper.make_graph(
        [node],
        "outer",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_unknown_operators_inside_other_nodes(folder):
    result = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [3])]
    inner = helper.make_graph([helper.make_node("Odd", [], ["z"], domain="my.ops")], "inner", [], result)
    graphs.save(inside_a_branch(inner), folder)
    refused(folder, "'Odd'")


@pytest.mark.parametrize("kind", ["initializer", "attribute"])
def test_weights_inside_other_nodes_lie_in_the_folder_as_well(folder, kind):
    tensor = TensorProto(name="t", dims=[3], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    (folder / "secret").write_bytes(bytes(12))
    result = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [3])]
    if kind == "initializer":
        inner = helper.make_graph([helper.make_node("Neg", ["t"], ["z"])], "inner", [], result, [tensor])
    else:
        inner = helper.make_graph([helper.make_node("Constant", [], ["z"], value=tensor)], "inner", [], result)
    (folder / FILE).write_bytes(inside_a_branch(inner).SerializeToString())
    refused(folder, "'t'")


def with_function(body_domain: str) -> onnx.ModelProto:
    """`y = local(x, w)`, a function of the model itself, as torch's exporter writes some."""
    model = graphs.linear("pkg.onnxscript.torch_lib", "local")
    imports = [helper.make_opsetid("", 18)] + ([helper.make_opsetid(body_domain, 1)] if body_domain else [])
    node = helper.make_node("MatMul", ["a", "b"], ["c"], domain=body_domain)
    model.functions.append(
        helper.make_function("pkg.onnxscript.torch_lib", "local", ["a", "b"], ["c"], [node], imports)
    )
    return model


def test_functions_of_the_model_itself_are_allowed_if_what_they_do_is(folder):
    graphs.save(with_function(""), folder)
    (y,) = open_session(folder, FILE).run(None, {"x": np.ones((1, 3), np.float32)})
    np.testing.assert_array_equal(y, [[12, 15, 18, 21]])
    graphs.save(with_function("my.ops"), folder)
    refused(folder, "'MatMul' of domain 'my.ops'")


@pytest.mark.parametrize("opset", [3, 99, 0])
def test_opsets_that_the_runtime_does_not_know(folder, opset):
    rewritten(folder, lambda model: setattr(model.opset_import[0], "version", opset))
    refused(folder, f"opset {opset}")


def test_a_newer_file_format(folder):
    rewritten(folder, lambda model: setattr(model, "ir_version", 999))
    refused(folder, "IR version 999")


def test_what_onnxruntime_refuses_is_said_in_our_words(folder):
    rewritten(folder, lambda model: setattr(model.graph.node[0], "op_type", "NoSuchOperator"))
    refused(folder, "cannot run")


def test_contrib_operators_that_the_quantiser_writes(tmp_path):
    weight = np.random.default_rng(0).integers(0, 256, (8, 1, 16), dtype=np.uint8)
    initializers = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.ones((8,), np.float32), "s"),
    ]
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=16, N=8, bits=8, block_size=16
    )
    graph = helper.make_graph(
        [node],
        "quantised",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        initializers,
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graphs.save(helper.make_model(graph, opset_imports=imports, ir_version=10), tmp_path)
    (y,) = open_session(tmp_path, FILE).run(None, {"x": np.eye(16, dtype=np.float32)})
    np.testing.assert_allclose(y, weight[:, 0].T.astype(np.float32) - 128, atol=1e-3)


@pytest.mark.parametrize("content", ["{", "[1]", "null", "", '{"a": ' + "[" * 100_000])
def test_json_that_is_no_object(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UnsupportedModel):
        folder_module.read_json(tmp_path, "x.json")


def test_json_of_absurd_size(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text("{}")
    assert folder_module.read_json(tmp_path, "x.json") == {}
    monkeypatch.setattr(folder_module, "MAX_JSON_BYTES", 1)
    with pytest.raises(UnsupportedModel, match="larger"):
        folder_module.read_json(tmp_path, "x.json")
