"""Under Lightning: the rows of the command, from one process or two, without a second row of a padded sampler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning as L
import pytest
from torch.utils.data import DistributedSampler

from tokensieve.datasets import open_results
from tokensieve.pipeline.batch.answer_step import AnswerStep
from tokensieve.pipeline.batch.folder import Folder
from tokensieve.pipeline.batch.identity import torch_options
from tokensieve.pipeline.batch.inputs import find_inputs
from tokensieve.pipeline.batch.predict import InputDataset, PredictModule, RowWriter, input_loader
from tokensieve.pipeline.batch.tasks import with_questions

QUESTION = "Which digit is red?"
READ = {"num_frames": 1}
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def predict(clips, out, vlm, *, limit=None, sampler=None, **trainer) -> Folder:
    inputs = with_questions(find_inputs(clips, limit=limit).inputs, "answer", [QUESTION])
    folder, step = Folder(out), AnswerStep(vlm, max_new_tokens=2)
    dataset = InputDataset(folder.undone(inputs), read_options=READ)
    loader = input_loader(dataset, batch=2, **({"sampler": sampler(dataset)} if sampler else {}))
    writer = RowWriter(folder, inputs, step, torch_options(vlm, task="answer"))
    L.Trainer(callbacks=[writer], **QUIET, **trainer).predict(PredictModule(step), loader, return_predictions=False)
    return folder


def rows(out):
    found = open_results(out).to_table().drop_columns("options").to_pylist()
    return sorted(found, key=lambda row: row["key"])


def test_one_process_and_on(clips, tmp_path, plain_vlm, capsys):
    from tokensieve.cli import main

    folder = predict(clips, tmp_path / "out", plain_vlm, limit=4)
    assert len(rows(tmp_path / "out")) == 4 and not folder.undone(find_inputs(clips, questions=[QUESTION]).inputs[:4])
    predict(clips, tmp_path / "out", plain_vlm)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["rows"]["ok"] == 6 and record["finished"] and record["inputs"] == 6
    arguments = ["process", str(clips), "--out", str(tmp_path / "own"), "--question", QUESTION, "--num_frames", "1"]
    assert main([*arguments, "--max_new_tokens", "2", "--device", "cpu", "--json"]) == 0
    assert rows(tmp_path / "out") == rows(tmp_path / "own")


def test_a_sampler_that_repeats_inputs(clips, tmp_path, plain_vlm):
    """With 4 replicas, 6 inputs become 8; here one process plays two of them in turn."""

    def padded(dataset):
        class Both(DistributedSampler):
            def __iter__(self):
                every = []
                for rank in range(4):
                    self.rank = rank
                    every += list(super().__iter__())
                assert len(every) == 8
                return iter(every)

            def __len__(self):
                return 8

        return Both(dataset, num_replicas=4, rank=0, shuffle=False)

    predict(clips, tmp_path / "out", plain_vlm, sampler=padded, use_distributed_sampler=False)
    found = rows(tmp_path / "out")
    assert len(found) == len({row["key"] for row in found}) == 6


def test_decoding_in_workers_of_the_loader(clips):
    inputs = with_questions(find_inputs(clips, limit=3).inputs, "answer", [QUESTION])
    dataset = InputDataset(inputs, read_options=READ)
    batches = list(input_loader(dataset, batch=2, workers=1))
    assert [[given.path for given, _ in batch] for batch in batches] == [
        ["clip-000.mp4", "clip-001.mp4"],
        ["clip-002.mp4"],
    ]
    assert all(frames.num_frames == 1 for batch in batches for _, frames in batch)


@pytest.mark.timeout(1200)  # two interpreters are started; on a busy machine that takes its time
def test_two_processes(clips, tmp_path, plain_vlm):
    """A real one: the sampler is Lightning's own."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(f"""
            import torch
            torch.set_num_threads(1)
            import tokensieve as ts
            from tests.pipeline.batch.test_predict import predict

            if __name__ == "__main__":
                vlm = ts.load("tiny", device="cpu")
                predict({str(clips)!r}, {str(tmp_path / "two")!r}, vlm, limit=5, devices=2, strategy="ddp")
        """)
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    predict(clips, tmp_path / "one", plain_vlm, limit=5)
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["processes"] == 2 and record["finished"] and len(list((tmp_path / "two" / "parts").iterdir())) == 2
