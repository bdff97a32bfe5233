"""`tokensieve bench` as a person and as a script use it, on the shipped model and on configs without weights."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from tests.pipeline.test_bench import SMALL
from tokensieve.cli import main
from tokensieve.pipeline.bench.report import tables_of


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "new" / "folder"
    assert main(["bench", "--methods", "zoprune,fastv", "--keep", "1,0.25", "--frames", "2,4", "--new_tokens", "1,2",
                 "--repeats", "2", "--threads", "1", "--out", str(out)]) == 0  # fmt: skip
    return out


def test_files(measured):
    rows = [json.loads(line) for line in (measured / "bench.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in rows} == {"read", "encode", "select", "prefill", "decode"}
    assert {row["frames"] for row in rows} == {2, 4} and {row["repeat"] for row in rows} == {0, 1}
    summary = json.loads((measured / "bench.json").read_text())
    assert (summary["model"], summary["weights"], summary["dtype"]) == ("tiny", "stored", "float32")
    assert {"device", "threads", "torch", "transformers", "python"} <= set(summary["machine"])
    assert summary["weight_bytes"] == 4 * 2_551_744
    asked = [(p["frames"], p["method"], p["new_tokens"]) for p in summary["points"]]
    assert asked == [(t, m, n) for t in (2, 4) for m in (None, "zoprune", "fastv") for n in (1, 2)]
    assert summary["points"][0]["tokens"]["visual_full"] == 2 * 36 + 1
    assert len(summary["memory_growth"]) == 3


def test_tables_show_the_numbers_of_the_summary(measured):
    text = (measured / "bench.md").read_text()
    summary = json.loads((measured / "bench.json").read_text())
    for table in tables_of(summary["points"], summary["memory_growth"]):
        assert table.markdown() in text
    last = summary["points"][-1]
    assert f"| {last['seconds']['prefill']['median']:.3f} (" in text
    gain = last["gain"]["prefill"]
    assert f"| {gain['speedup']:.2f} / {gain['ideal']:.2f} / {gain['eta']:.2f} |" in text
    assert "tiny, stored weights, float32, on " in text and "Medians of 2 repeats" in text and "1 thread(s)" in text
    assert "| fastv | 0.25 | 145 → 37 of 145 | 209 of 209 |" in text


def test_json_gives_a_point_a_line(tmp_path, capsys):
    capsys.readouterr()
    config = AutoConfig.for_model("llava_onevision", **SMALL["llava_onevision"])
    config.save_pretrained(tmp_path)
    assert main(["bench", "--model", str(tmp_path), "--methods", "uniform", "--frames", "2", "--repeats", "1",
                 "--new_tokens", "1", "--out", str(tmp_path / "out"), "--json"]) == 0  # fmt: skip
    full, fewer = lines(capsys)
    assert full["method"] is None and fewer["method"] == "uniform" and fewer["tokens"]["visual"] == 9
    assert set(fewer["gain"]) == {"encode", "prefill", "total", "select_share_of_full_prefill"}
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["weights"] == "random"


def test_a_method_that_cannot_run_is_listed(tmp_path, capsys):
    AutoConfig.for_model("qwen2_5_vl", **SMALL["qwen2_5_vl"]).save_pretrained(tmp_path)
    assert main(["bench", "--model", str(tmp_path), "--methods", "tome,uniform", "--frames", "2", "--repeats", "1",
                 "--new_tokens", "1", "--out", str(tmp_path / "out")]) == 0  # fmt: skip
    shown, written = capsys.readouterr().out, (tmp_path / "out" / "bench.md").read_text()
    for text in (shown, written):
        assert "Cannot run here" in text and "`tome`: " in text and "uniform" in text


def test_the_ideal_is_counted_without_a_run(capsys):
    capsys.readouterr()
    arguments = ["bench", "--dry_run", "--model", "llava-onevision-7b", "--keep", "0.25,0.1", "--dtype", "bfloat16"]
    assert main([*arguments, "--json"]) == 0
    full, quarter, tenth = lines(capsys)
    assert full["visual tokens"] == "6273" and full["ideal prefill"] == "1.00"
    assert quarter["ideal prefill"] == "4.16" and quarter["ideal end to end"] == "2.60"
    assert tenth["ideal prefill"] == "9.96" and tenth["ideal end to end"] == "3.68"
    assert main(arguments) == 0
    assert "9.96" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--methods", "zoprun"], 2, "Did you mean 'zoprune'?"),
        (["--keep", "0"], 2, "fraction in (0, 1]"),
        (["--keep", "many"], 2, "keep"),
        (["--batch", "0"], 2, "--batch must be"),
        (["--frames", "8,-1"], 2, "--frames must be"),
        (["--new_tokens", "1,0"], 2, "--new_tokens must be"),
        (["--repeats", "0"], 2, "--repeats"),
        (["--frames", "100000"], 2, "Give fewer --frames"),
        (["--model", "no/such-model"], 2, "qwen2.5-vl-3b"),
        (["--model", "./nowhere"], 2, "nowhere"),
        (["--dtype", "int7"], 2, "dtype"),
        (["--device", "gpu"], 2, "device"),
        ([], 2, "--out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_use_is_answered_with_a_code_and_a_sentence(arguments, code, words, tmp_path, capsys):
    out = ["--out", str(tmp_path)] if arguments else []
    assert main(["bench", *arguments, *out]) == code
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err


def test_out_must_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["bench", "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err
