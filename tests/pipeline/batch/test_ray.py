"""Under Ray: the rows of the local engine, also when actors die, and a file that kills its actor costs its own row."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from tests.pipeline.batch.conftest import many_clips
from tokensieve.cli import main
from tokensieve.datasets import open_results
from tokensieve.datasets.limits import Limits
from tokensieve.errors import BadOption, TokensieveError
from tokensieve.pipeline.batch import engine
from tokensieve.pipeline.batch.folder import Folder
from tokensieve.pipeline.batch.inputs import find_inputs
from tokensieve.pipeline.batch.ray_engine import Pool, RayEngine, connected, in_rounds, pool_of
from tokensieve.pipeline.batch.ray_worker import Job, Worker
from tokensieve.pipeline.batch.rows import answer_schema, frames_row, input_row

NUM_CLIPS = 200
KINDS = (b"", b"just some text", bytes(5000), b"\0\0\0\x18ftypmp42", b"#EXTM3U\n/etc/passwd\n")
BROKEN = {f"clip-{20 * k + 3:03d}.mp4": KINDS[k % len(KINDS)] for k in range(10)}
ASK = ["--question", "Which digit is red?", "--num_frames", "1", "--max_new_tokens", "2", "--device", "cpu", "--json"]
READ = {"limits": Limits(), "read_options": {"num_frames": 1}, "ahead_bytes": 1 << 20}


class MeanStep:
    """Answers with the mean of the pixels, two clips at a time; it dies of some clips.

    Args:
        once: clip that kills the process at its first try.
        always: clip that kills it at every try.
        pause: seconds for a clip.
        notes: folder for what has been tried.
    """

    def __init__(self, notes: Path, once: str = "", always: str = "", pause: float = 0.0):
        self.schema, self.notes, self.once, self.always, self.pause = answer_schema(), notes, once, always, pause
        self.waiting = []

    def add(self, given, frames):
        time.sleep(self.pause)
        with open(self.notes / given.path, "ab") as file:
            tries = file.tell()
            file.write(b".")
        if given.path == self.always or (given.path == self.once and not tries):
            os.kill(os.getpid(), signal.SIGKILL)
        self.waiting.append({**input_row(given), **frames_row(frames), "answers": [f"{frames.data.mean():.6f}"]})
        return self.finish() if len(self.waiting) == 2 else []

    def finish(self):
        rows, self.waiting = self.waiting, []
        return rows


def make_mean(notes: Path, **options):
    return MeanStep(notes, **options), {"step": "mean"}


def make_nothing(notes: Path):
    """Dies of loading, but for the first time."""
    with open(notes / "loads", "ab") as file:
        if file.tell():
            os.kill(os.getpid(), signal.SIGKILL)
        file.write(b".")
    return make_mean(notes)


def make_failing(notes: Path):
    raise BadOption("No such model.", hint="Take another.")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = many_clips(tmp_path_factory.mktemp("source"), NUM_CLIPS)
    for name, content in BROKEN.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def inputs(source):
    return find_inputs(source, questions=["?"]).inputs


@pytest.fixture(scope="module")
def expected(inputs, tmp_path_factory):
    """Rows of the local engine."""
    folder = Folder(tmp_path_factory.mktemp("local") / "out")
    step, made_with = make_mean(tmp_path_factory.mktemp("notes"))
    with folder.locked():
        writer = folder.writer(step.schema, folder.admit(made_with, step.schema))
        engine.run(inputs, step, writer, workers=1, **READ)
    return rows(folder.folder)


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, started once."""
    pytest.importorskip("ray")
    with connected(None):
        yield


@pytest.fixture
def notes(tmp_path) -> Path:
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


def rows(out):
    return {row["path"]: row for row in open_results(out).to_table().to_pylist()}


def run_ray(make, inputs, out, **options):
    """A job with one actor a processor, as the command does it."""
    ray_engine, folder = RayEngine(make, 1), Folder(out)
    with folder.locked():
        fingerprint = folder.admit(ray_engine.made_with, ray_engine.schema)
        to_do, _ = folder.resume(inputs)
        return ray_engine.run(to_do, folder, fingerprint, **READ, **options)


def only_parts(out) -> bool:
    return all(path.name.startswith("part-") for path in (Path(out) / "parts").iterdir())


@pytest.mark.timeout(900)
def test_the_command_gives_the_rows_of_the_local_engine(cluster, source, tmp_path, capsys):
    arguments = ["process", str(source), *ASK, "--method", "zoprune", "--workers", str(os.cpu_count())]
    assert main([*arguments, "--out", str(tmp_path / "local")]) == 3
    out = tmp_path / "ray"
    assert main([*arguments, "--out", str(out), "--limit", "5"]) == 3  # one engine goes on where another one ended
    before = {path.name for path in (out / "parts").iterdir()}
    capsys.readouterr()
    assert main([*arguments, "--out", str(out), "--engine", "ray"]) == 3
    record = json.loads(capsys.readouterr().out)  # and nothing of Ray's on standard output
    assert rows(out) == rows(tmp_path / "local")
    assert open_results(out).count_rows() == NUM_CLIPS and only_parts(out)
    assert before < {path.name for path in (out / "parts").iterdir()}
    assert record["rows"] == {"total": NUM_CLIPS, "ok": NUM_CLIPS - len(BROKEN), "partial": 0, "failed": len(BROKEN)}
    assert [(run["engine"], run["rows"]) for run in record["runs"]] == [("local", 5), ("ray", NUM_CLIPS - 5)]
    assert {"actors": 1, "num_cpus": os.cpu_count()}.items() < record["runs"][-1].items() and record["finished"]


@pytest.mark.timeout(900)
def test_killed_actors_change_no_row_and_a_file_that_kills_each_is_quarantined(
    cluster, inputs, expected, notes, tmp_path
):
    make = partial(make_mean, notes, once="clip-007.mp4", always="clip-113.mp4")
    progress = run_ray(make, inputs, tmp_path / "out")
    tries = {path.name: path.stat().st_size for path in notes.iterdir()}
    assert tries["clip-007.mp4"] == 2 and tries["clip-113.mp4"] == 3  # with others, then twice alone
    found = rows(tmp_path / "out")
    assert open_results(tmp_path / "out").count_rows() == len(found) == NUM_CLIPS and only_parts(tmp_path / "out")
    poison = found.pop("clip-113.mp4")
    assert (poison["status"], poison["stage"], poison["error_type"]) == ("failed", "answer", "Quarantined")
    assert found == {path: row for path, row in expected.items() if path != "clip-113.mp4"}
    failed = len(BROKEN) + 1
    assert progress.counts == {"ok": NUM_CLIPS - failed, "partial": 0, "failed": failed} and not progress.stopped


@pytest.mark.timeout(900)
def test_stopped_and_on(cluster, inputs, expected, notes, tmp_path):
    seen = []
    make = partial(make_mean, notes)
    stop = {"stop": lambda: bool(seen), "report": seen.append}
    slow = partial(make_mean, notes, pause=0.3)  # else all may be done before the first report is heard
    assert run_ray(slow, inputs[:12], tmp_path / "out", max_rows=1, **stop).stopped
    assert 0 < len(rows(tmp_path / "out")) < 12 and only_parts(tmp_path / "out")
    assert not run_ray(make, inputs, tmp_path / "out").stopped and rows(tmp_path / "out") == expected
    tried = [path for path in notes.iterdir() if path.stat().st_size > 1]
    assert not tried, "finished work was done again"


@pytest.mark.timeout(900)
def test_a_model_that_cannot_be_loaded_ends_the_job(cluster, inputs, notes, tmp_path):
    with pytest.raises(BadOption, match="No such model") as caught:
        run_ray(partial(make_failing, notes), inputs[:2], tmp_path / "out")
    assert caught.value.hint == "Take another."
    with pytest.raises(TokensieveError, match="has died 2 times"):  # else Ray would start it for ever
        run_ray(partial(make_nothing, notes), inputs[:2], tmp_path / "out")
    assert not list((tmp_path / "out" / "parts").iterdir())


def worker_of(make, out, **changed) -> Worker:
    """Without Ray."""
    step, made_with = make_mean(Path())
    folder = Folder(out)
    facts = {"id": "job", "cwd": os.getcwd(), "make": make, "made_with": made_with, "folder": str(out)}
    facts |= {"options": folder.admit(made_with, step.schema), "max_rows": 256, "max_s": 30.0, "workers": 1, **READ}
    return Worker(Job(**facts | changed), "one")


def batch_of(inputs) -> pa.Table:
    return pa.table({"inputs": [pickle.dumps(inputs)]})


def test_a_batch_that_ray_does_again_makes_no_second_row(inputs, notes, tmp_path):
    worker = worker_of(partial(make_mean, notes), tmp_path / "out")
    first, again = (worker(batch_of(inputs[:5])).to_pylist()[0] for _ in range(2))
    assert (first["ok"], first["failed"], first["error"]) == (4, 1, None)
    assert (again["ok"], again["failed"], again["error"]) == (0, 0, None)
    assert open_results(tmp_path / "out").count_rows() == 5


def test_a_node_that_would_make_other_rows_is_refused(inputs, notes, tmp_path):
    other = {"make": partial(make_mean, notes), "out": tmp_path / "out"}
    for changed, words in (
        ({"made_with": {"step": "median"}}, "step differ"),
        ({"folder": str(tmp_path / "elsewhere")}, "is not on the node"),
        ({"cwd": str(tmp_path / "elsewhere")}, "is not on the node"),
    ):
        (told,) = worker_of(**other, **changed)(batch_of(inputs[:1])).to_pylist()
        error = pickle.loads(told["error"])
        assert isinstance(error, BadOption) and words in str(error) and error.hint
    assert not (tmp_path / "elsewhere").exists()


def test_rounds(inputs, notes, tmp_path):
    """What Ray gives up goes on with the rest, as long as there are new rows."""
    folder, given = Folder(tmp_path / "out"), []
    worker = worker_of(partial(make_mean, notes), tmp_path / "out")

    def one_round(left):
        given.append(len(left))
        if len(given) < 3:
            worker(batch_of(left[:2]))
            return OSError()
        return None

    in_rounds(inputs[:6], folder, one_round, lambda: False)
    assert given == [6, 4, 2]
    with pytest.raises(TokensieveError, match="OSError"):
        in_rounds(inputs[8:], folder, lambda left: OSError(), lambda: False)
    in_rounds(inputs, folder, None, lambda: True)  # stopped before the first


def test_pools():
    cpus, gpus = {"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0}
    assert pool_of([{"CPU": 2.0}], None, True) == Pool(actors=2, num_cpus=1, num_gpus=0)
    assert pool_of([cpus, gpus], None, True) == Pool(actors=2, num_cpus=4, num_gpus=1)
    assert pool_of([cpus, gpus], None, False) == Pool(actors=11, num_cpus=1, num_gpus=0)
    assert pool_of([cpus, gpus, {}], 3, False) == Pool(actors=3, num_cpus=3, num_gpus=0)
    with pytest.raises(BadOption, match="9 processors"):
        pool_of([cpus, gpus], 9, True)


def test_bad_use_is_one_sentence(source, tmp_path, capsys, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{free.getsockname()[1]}"
    for arguments, words in (
        (["--engine", "spark"], "must be one of local, ray"),
        (["--address", "auto"], "Add --engine ray"),
        (["--engine", "ray", "--device", "cuda:1"], "Say cuda"),
        (["--engine", "ray", "--address", "ray://127.0.0.1:1"], "must be HOST:PORT or auto"),
        (["--engine", "ray", "--address", "head"], "must be HOST:PORT or auto"),
        (["--engine", "ray", "--address", closed], "No Ray cluster lets us in"),
    ):
        if "--address" in arguments and "ray" in arguments:
            ray = pytest.importorskip("ray")
            monkeypatch.setattr(ray, "is_initialized", lambda: False)
            monkeypatch.setattr(ray, "shutdown", lambda: None)
        assert main(["process", str(source), "--out", str(tmp_path / "out"), *ASK[:-1], *arguments]) == 2, arguments
        err = capsys.readouterr().err
        assert words in err and "Traceback" not in err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["process", str(source), "--out", str(tmp_path / "out"), *ASK[:-1], "--engine", "ray"]) == 2
    assert 'pip install "tokensieve[ray]"' in capsys.readouterr().err
