"""The benchmark of all methods runs at tiny sizes, and its table has every method."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from tokensieve.compression import Method, list_methods
from tokensieve.errors import BadOption

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "selection.py"


@pytest.fixture
def bench():
    return runpy.run_path(str(SCRIPT))


def test_every_method_is_measured(monkeypatch, capsys, tmp_path):
    out = tmp_path / "selection.md"
    out.write_text("# A title\n\nWhat was written by hand.\n\nMachine: another one.\n")
    arguments = ["--smoke", "--repeats", "1", "--threads", "1", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    written = out.read_text()
    assert written.startswith("# A title\n\nWhat was written by hand.\n\nMachine: ") and "another one" not in written
    assert capsys.readouterr().out.strip() in written
    for table in written.split("\n## ")[1:]:
        for method in list_methods():
            assert f"| `{method.name}` | {method.place} |" in table
        assert "one tiny layer" in table
    assert written.count("\n## ") == 3


def test_sizes_are_those_of_the_models(bench):
    assert [item.num_tokens for item in bench["ITEMS"]] == [576, 2880, 6272]
    assert [language.width for language in bench["LANGUAGES"]] == [4096, 3584]
    for item in bench["ITEMS"]:
        assert sum(t * h * w for t, h, w in item.grids) == item.num_tokens


def test_tokens_carry_everything(bench):
    make = bench["Bench"]("cpu", torch.float32)
    for item in map(bench["smaller"], bench["ITEMS"]):
        tokens = make.tokens(item, bench["SMOKE"])
        for layer in tokens.tower.layers.values():
            assert layer.salience().shape == layer.received_attention().shape == (len(tokens),)
            assert len(layer.mean_keys()) == len(tokens)
        assert tokens.projector.to_tokens(tokens.projector.inputs[:, 0]).shape == (len(tokens),)
        assert tokens.question is not None and tokens.crop.shape == (len(tokens),)


def test_tiles_become_one_raster(bench):
    item = bench["smaller"](bench["ITEMS"][1])
    raster = bench["crops"](item)[36:].view(12, 12)
    assert raster[0].tolist() == [1] * 6 + [2] * 6 and raster[11].tolist() == [3] * 6 + [4] * 6


def test_a_method_that_cannot_work_on_an_item_says_so(bench):
    def fn(tokens, num_keep, *, generator=None):
        raise BadOption("It needs a video.")

    method = Method(name="picky", fn=fn, title="A test")
    make = bench["Bench"]("cpu", torch.float32)
    table = bench["measure"](make, bench["smaller"](bench["ITEMS"][0]), bench["SMOKE"], [method], 0.25, 1)
    assert "| `picky` | projector | It needs a video. |" in table and "one tiny layer" in table


def test_peak_memory_is_seen(bench):
    torch.ones(2**26).sum()  # an earlier peak does not count
    result, extra = bench["extra_bytes"](lambda: len(torch.ones(2**24)), "cpu")
    assert result == 2**24
    if extra is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 0.9 * 2**26 < extra < 1.5 * 2**26
