"""The whole thing under fire: 200 clips, ten of them broken in ten ways, killed at five random moments."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pipeline.batch.conftest import many_clips
from tokensieve.cli import main
from tokensieve.datasets import open_results

NUM_CLIPS, NUM_BROKEN, KILLS = 200, 10, 5
OPTIONS = ["--question", "Which digit is red?", "--method", "zoprune", "--num_frames", "1", "--max_new_tokens", "2"]
OPTIONS += ["--rows", "4", "--seconds", "2", "--batch", "4", "--device", "cpu", "--json", "--timeout_s", "20"]


def break_some(folder: Path) -> None:
    """Ten of the files, each in another way."""
    names = sorted(folder.iterdir())[:: NUM_CLIPS // NUM_BROKEN]
    whole = names[0].read_bytes()
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    contents = [
        b"",
        b"just some text, nothing to see\n" * 50,
        np.random.default_rng(1).bytes(20_000),
        whole[:406],
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"#EXTM3U\nhttp://127.0.0.1/x.ts\n",
        whole[: len(whole) // 2],  # its index is in front, so some of it can be seen
        bomb.getvalue(),
    ]
    for name, content in zip(names, contents, strict=False):
        name.write_bytes(content)
    for name in names[len(contents) :]:
        name.unlink()
    os.mkfifo(names[-2])
    names[-1].symlink_to("/etc/passwd")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = many_clips(tmp_path_factory.mktemp("source"), NUM_CLIPS)
    break_some(folder)
    return folder


def start(source: Path, out: Path):
    """The command in a process of its own; forked, so that it need not import everything again."""
    arguments = ["process", str(source), "--out", str(out), *OPTIONS]
    process = multiprocessing.get_context("fork").Process(target=_run, args=(arguments,))
    process.start()
    return process


def _run(arguments) -> None:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # what pytest put there is not ours
    os._exit(main(arguments))


def children_of(pid: int) -> list[str]:
    """Process ids; nothing where there is no /proc."""
    stats = Path("/proc").glob("[0-9]*/stat")
    found = [(stat.parent.name, _text(stat).rpartition(")")[2].split()) for stat in stats]
    return [name for name, fields in found if fields[1:2] == [str(pid)]]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # ended meanwhile
        return ""


def rows_of(out: Path) -> list[dict]:
    rows = open_results(out).to_table().to_pylist()
    return sorted(rows, key=lambda row: row["key"])


@pytest.mark.timeout(1200)
def test_killed_five_times_and_as_if_nothing_had_been(source, tmp_path):
    warm_up = ["process", str(source), "--out", str(tmp_path / "warm"), *OPTIONS, "--limit", "2"]
    assert main(warm_up) == 3  # what the forked processes need is imported here already
    began = time.monotonic()
    undisturbed = start(source, tmp_path / "whole")
    undisturbed.join()
    seconds = time.monotonic() - began
    assert undisturbed.exitcode == 3  # finished with failed rows
    expected = rows_of(tmp_path / "whole")
    assert len(expected) == NUM_CLIPS and len({row["key"] for row in expected}) == NUM_CLIPS
    failed = [row for row in expected if row["status"] == "failed"]
    assert len(failed) == len({row["message"] for row in failed}) == NUM_BROKEN - 1
    assert [row["num_frames"] for row in expected if row["status"] == "partial"] == [1]
    assert all(row["answers"] for row in expected if row["status"] == "ok")

    moments, cut, num_killed, num_rows = random.Random(7), tmp_path / "cut", 0, [0]
    for _ in range(KILLS):
        process = start(source, cut)
        process.join(moments.uniform(0.15, 0.4) * seconds)
        num_killed += process.exitcode is None
        decoders = children_of(process.pid)
        process.kill()
        process.join()
        deadline_s = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in decoders):
            assert time.monotonic() < deadline_s, "a decoder outlives its parent"
            time.sleep(0.1)
        num_rows.append(len(rows_of(cut)) if list(cut.glob("parts/part-*")) else 0)
    assert num_killed >= 3 and num_rows == sorted(num_rows) and 0 < num_rows[-1]
    last = start(source, cut)
    last.join()
    assert last.exitcode == 3
    assert rows_of(cut) == expected
