"""Attention over blocks in a graph is PyTorch's over everything, whatever the size of a block."""

# Shape legend: B batch, S all places

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from tokensieve.export.block_attention import DOMAIN, QUERIES, block_attention
from tokensieve.export.generation import QUERIES_PER_BLOCK
from tokensieve.export.graph_file import write_graph

NAMES = ("query", "key", "value", "seen")


class Attention(torch.nn.Module):
    def forward(self, query, key, value, seen):
        return block_attention(query, key, value, seen.bool())


def inputs(batch, length, past, heads, key_heads, width=8, dtype=torch.float32, padding=None, seed=0):
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, length, width, generator=draw).to(dtype)
    key, value = torch.randn(2, batch, key_heads, past + length, width, generator=draw).to(dtype).unbind()
    seen_BS = torch.ones(batch, past + length, dtype=torch.long)
    for row, count in enumerate(padding or ()):
        seen_BS[row, :count] = 0
    return dict(zip(NAMES, (query, key, value, seen_BS), strict=True))


def expected(query, key, value, seen):
    """Softmax of all scores, each with a loop over nothing."""
    shared, length, total = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = (x.double().repeat_interleave(shared, 1) for x in (key, value))
    score = query.double() @ key.transpose(-1, -2)
    allowed = torch.arange(total) <= torch.arange(total - length, total)[:, None]
    score = score.masked_fill(~(allowed & seen[:, None, None].bool()), -torch.inf)
    return (score.softmax(-1) @ value).transpose(1, 2).flatten(2)


@pytest.fixture(scope="module", params=[(4, 2), (3, 3)], ids=["shared", "own"])
def written(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("attention"), *request.param, torch.float32), *request.param


def write(folder, heads, key_heads, dtype):
    path = folder / "attention.onnx"
    shapes = {
        "query": ["batch", heads, "length", 8],
        "key": ["batch", key_heads, "total", 8],
        "value": ["batch", key_heads, "total", 8],
        "seen": ["batch", "total"],
    }
    write_graph(Attention(), path, inputs(2, 3, 4, heads, key_heads, dtype=dtype), shapes, ["mixed"])
    return path


def run(path, given, queries=None):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {name: x.numpy() for name, x in given.items()}
    if queries is not None:
        feed[QUERIES_PER_BLOCK] = np.array([queries])
    return session.run(None, feed)[0]


@pytest.mark.parametrize(("length", "past"), [(1, 0), (1, 130), (2, 0), (63, 5), (64, 0), (65, 0), (65, 3), (200, 7)])
@pytest.mark.parametrize("queries", [None, 1, 7, 1000])
def test_any_length_and_block(written, length, past, queries):
    path, heads, key_heads = written
    given = inputs(2, length, past, heads, key_heads)
    np.testing.assert_allclose(run(path, given, queries), expected(**given), atol=2e-6)


def test_pytorchs_own_outside_a_graph():
    given = inputs(2, 9, 3, 4, 2, padding=(0, 2))
    np.testing.assert_allclose(Attention()(**given), expected(**given), atol=2e-6)


def test_padding_is_not_seen(written):
    path, heads, key_heads = written
    given = inputs(3, 70, 4, heads, key_heads, padding=(0, 1, 4))
    np.testing.assert_allclose(run(path, given), expected(**given), atol=2e-6)


def test_rows_of_padding_are_finite(written):
    path, heads, key_heads = written
    given = inputs(2, 70, 0, heads, key_heads, padding=(0, 66))
    got = run(path, given)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[1, 66:], expected(**given)[1, 66:], atol=2e-6)


def test_half_precision_has_its_softmax_in_float32(tmp_path):
    path = write(tmp_path, 4, 2, torch.float16)
    given = inputs(1, 300, 0, 4, 2, dtype=torch.float16)
    given["query"] *= 8**-0.5
    got = run(path, given)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, expected(**given), atol=3e-3)
    # 300 equal scores in float16 would sum to another number than 1.
    same = given | {"query": torch.zeros_like(given["query"]), "value": torch.ones_like(given["value"])}
    np.testing.assert_allclose(run(path, same), np.ones_like(got), atol=1e-3)


def test_the_graph_has_plain_operators_and_a_default(written):
    path, *_ = written
    model = onnx.load(path)
    assert [function.name for function in model.functions] == []
    assert {entry.domain for entry in model.opset_import} == {""} and DOMAIN not in str(path.read_bytes())
    loops = [node for node in model.graph.node if node.op_type == "Loop"]
    assert len(loops) == 1
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == list(NAMES)
    assert [each.name for each in session.get_overridable_initializers()] == [QUERIES_PER_BLOCK]
    [default] = [each for each in model.graph.initializer if each.name == QUERIES_PER_BLOCK]
    assert onnx.numpy_helper.to_array(default).tolist() == [QUERIES]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux")
def test_memory_does_not_grow_with_the_square(written):
    """All scores of 6,000 places would take more than 400 MB; those of a block take 6."""
    path, heads, key_heads = written
    kilobytes = [
        int(subprocess.check_output([sys.executable, "-c", PEAK, path, str(heads), str(key_heads), n]))
        for n in ("64", "6000")
    ]
    assert kilobytes[1] - kilobytes[0] > 300_000


PEAK = f"""
import sys
import numpy as np
import onnxruntime as ort
path, heads, key_heads, queries = sys.argv[1], *map(int, sys.argv[2:])
session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
query, key = (np.zeros((1, count, 6000, 8), np.float32) for count in (heads, key_heads))
feed = {{"query": query, "key": key, "value": key, "seen": np.ones((1, 6000), np.int64)}}
session.run(None, feed | {{"{QUERIES_PER_BLOCK}": np.array([queries])}})
[peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]  # getrusage inherits the parent's
print(peak.split()[1])
"""
