"""Opens the graphs of an exported folder with onnxruntime.

A graph is untrusted. Its bytes are read once and looked at before onnxruntime gets the same bytes: only operators
that our exporter writes, weights only from plain files of the same folder and only from inside their bounds. Messages
name the kind of an error, never its text.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, TensorProto

from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export.folder import AGAIN, own_file

MAX_GRAPH_BYTES = 1 << 28  # weights lie beside the graph, which has a few MB
MAX_DATA_BYTES = 1 << 38
MAX_NODES = 1 << 20
OLDEST_OPSET = 13
DOMAINS = ("", "ai.onnx")
# Operators of onnxruntime itself that its quantiser writes. Others of that domain can read files (EPContext, say).
CONTRIB = ("DequantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "QuantizeLinear")
_DATA_KEYS = {"location", "offset", "length", "checksum"}
_FOLDER_KEY = "session.model_external_initializers_file_folder_path"
_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
# With it onnxruntime 1.31 ends the process on a float16 sum with a constant before a layer norm (open_clip's texts).
_CRASHING = ["FuseFp16InitializerToFp32NodeTransformer"]


def open_session(
    folder: str | Path, file: str, provider: str | None = None, threads: int | None = None
) -> ort.InferenceSession:
    """Checks a graph and its weights and opens them.

    Args:
        folder: the exported folder.
        file: the graph, relative to the folder, with "/".
        provider: "cuda", "cpu", or the name of another provider of onnxruntime; left out, CUDA where it works and the
            CPU elsewhere.
        threads: of the CPU, for one operator; as many as onnxruntime likes when left out.

    Raises:
        BadOption: an unknown provider, or one that this machine or this build of onnxruntime cannot run.
        UnsupportedModel: a file is missing, damaged, of absurd size or leads out of the folder, or the graph has
            operators or an opset that are not allowed.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise BadOption(f"threads must be a whole number above 0, got {threads!r}.")
    wanted = provider_name(provider)
    folder = Path(folder)
    path = own_file(folder, file)
    data = _checked(folder, file, path)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised; the log would repeat text from inside the file
    options.add_session_config_entry(_FOLDER_KEY, str(path.parent.resolve()))
    options.enable_mem_pattern = False  # prompts differ in length, and onnxruntime would keep a block for each length
    if threads is not None:
        options.intra_op_num_threads = threads
    providers = [wanted, _CPU] if wanted != _CPU else [_CPU]
    if wanted == _CUDA:
        ort.preload_dlls()  # finds the CUDA libraries that pip installed
    try:
        session = ort.InferenceSession(data, options, providers=providers, disabled_optimizers=_CRASHING)
    except MemoryError:
        raise
    except Exception as error:  # each of onnxruntime's own classes
        raise UnsupportedModel(
            f"onnxruntime {ort.__version__} cannot run {path} ({type(error).__name__}).", hint=AGAIN
        ) from None
    got = session.get_providers()
    if provider is not None and got[0] != wanted:
        raise BadOption(
            f"provider {provider!r} was asked for, but onnxruntime runs on {got[0]!r}.",
            hint="Install a driver and the CUDA and cuDNN that this onnxruntime-gpu needs, or say provider='cpu'."
            if wanted == _CUDA
            else "Install what this provider needs, or say provider='cpu'.",
        )
    return session


@contextmanager
def running(graph: str) -> Iterator[None]:
    """Turns what onnxruntime raises while a graph runs into UnsupportedModel."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # each of onnxruntime's own classes; the cause stays attached
        raise UnsupportedModel(
            f"The graph {graph!r} failed to run ({type(error).__name__}).",
            hint="Its inputs do not fit it, or memory ran out: try fewer frames or prompts, or export the model again.",
        ) from error


def provider_name(provider: str | None) -> str:
    """onnxruntime's name of a provider: its own, or one without the ending, in any case; None chooses.

    Raises:
        BadOption: there is none of that name, or this build of onnxruntime lacks it.
    """
    available = ort.get_available_providers()
    if provider is None:
        return _CUDA if _CUDA in available and _has_cuda_device() else _CPU
    names = {name.removesuffix("ExecutionProvider").lower(): name for name in ort.get_all_providers()}
    asked = str(provider).lower().removesuffix("executionprovider")
    if not isinstance(provider, str) or asked not in names:
        raise BadOption(f"provider must be one of {', '.join(sorted(names))}, got {provider!r}.")
    if names[asked] not in available:
        build = "onnxruntime-gpu" if names[asked] == _CUDA else "a build that has it"
        raise BadOption(
            f"This build of onnxruntime has no provider {provider!r}.", hint=f"Install {build}, or say provider='cpu'."
        )
    return names[asked]


def _has_cuda_device() -> bool:
    """Whether a driver answers and sees a GPU; onnxruntime lists CUDA even where none is."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False


def _checked(folder: Path, file: str, path: Path) -> bytes:
    """The graph's bytes, once everything in them is allowed."""
    try:
        size = path.stat().st_size
        if size > MAX_GRAPH_BYTES:
            raise UnsupportedModel(
                f"{path} has {size} bytes; a graph without its weights has at most {MAX_GRAPH_BYTES}.", hint=AGAIN
            )
        data = path.read_bytes()
    except OSError:
        raise UnsupportedModel(f"{path} cannot be read.", hint=AGAIN) from None
    try:
        model = ModelProto.FromString(data)
        problem = _problem(model) or _weights_problem(model, folder, file[: file.rfind("/") + 1])
    except UnsupportedModel:
        raise
    except Exception as error:  # what protobuf raises depends on its build; odd text inside raises others
        raise UnsupportedModel(f"{path} is no ONNX graph ({type(error).__name__}).", hint=AGAIN) from None
    if problem:
        raise UnsupportedModel(f"{path}: {problem}", hint=AGAIN)
    return data


def _problem(model: ModelProto) -> str:
    """A sentence on what is not allowed in the graph, or ""."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx", 0))
    if not model.graph.node:
        return "it holds no graph, so it is empty or damaged."
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        return f"it is of opset {opset}, and this runtime knows {OLDEST_OPSET} to {newest}."
    if model.ir_version > onnx.IR_VERSION:
        return f"its format (IR version {model.ir_version}) is newer than {onnx.IR_VERSION}."
    if model.training_info:
        return "it holds a training graph."
    local = {(function.domain, function.name) for function in model.functions}
    count = 0
    for node in (node for scope in _scopes(model) for node in scope.node):
        count += 1
        if count > MAX_NODES:
            return f"it has more than {MAX_NODES} nodes."
        allowed = (
            node.domain in DOMAINS
            or (node.domain, node.op_type) in local
            or (node.domain == "com.microsoft" and node.op_type in CONTRIB)
        )
        if not allowed:
            return f"operator {node.op_type!r} of domain {node.domain!r} is not allowed."
    return ""


def _weights_problem(model: ModelProto, folder: Path, prefix: str) -> str:
    """A sentence on what is wrong with where the weights lie, or ""."""
    room: dict[str, int] = {}
    used: Counter[str] = Counter()
    for tensor in _tensors(model):
        if any(size < 0 for size in tensor.dims):
            return f"tensor {tensor.name!r} has a negative size."
        if tensor.data_location != TensorProto.EXTERNAL and not tensor.external_data:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if set(entries) - _DATA_KEYS or len(entries) != len(tensor.external_data) or "/" in location:
            return f"tensor {tensor.name!r} does not say properly where its data lies."
        if location not in room:
            room[location] = own_file(folder, prefix + location).stat().st_size
            if room[location] > MAX_DATA_BYTES:
                return f"its weights are larger than {MAX_DATA_BYTES} bytes."
        needed = _num_bytes(tensor)
        offset, length = (int(entries.get(key, other)) for key, other in (("offset", 0), ("length", needed)))
        used[location] += needed
        if length != needed or not 0 <= offset <= room[location] - needed or used[location] > room[location]:
            return f"the data of tensor {tensor.name!r} does not lie inside {location!r}, which is damaged or cut off."
    return ""


def _num_bytes(tensor: TensorProto) -> int:
    count = math.prod(tensor.dims)
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1):
        return (count + 1) // 2
    return count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _scopes(model: ModelProto) -> Iterator[GraphProto | FunctionProto]:
    """The graph, the functions, and the graphs inside their nodes."""
    waiting = [model.graph, *model.functions]
    while waiting:
        scope = waiting.pop()
        yield scope
        for attribute in _attributes(scope):
            waiting += [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs


def _attributes(scope: GraphProto | FunctionProto) -> Iterator[AttributeProto]:
    for node in scope.node:
        yield from node.attribute
    if isinstance(scope, FunctionProto):
        yield from scope.attribute_proto


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    for scope in _scopes(model):
        sparse = []
        if isinstance(scope, GraphProto):
            yield from scope.initializer
            sparse += scope.sparse_initializer
        for attribute in _attributes(scope):
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            sparse += [*attribute.sparse_tensors, attribute.sparse_tensor]
        for tensor in sparse:
            yield tensor.values
            yield tensor.indices
