"""A batch job under Lightning: `Trainer(devices=8, strategy="ddp").predict(...)` writes what `tokensieve process` does.

>>> folder = Folder("out")
>>> step = FeatureStep(load("tiny").compress("zoprune"))
>>> inputs = with_questions(find_inputs("clips").inputs, "features")
>>> writer = RowWriter(folder, inputs, step, torch_options(step.vlm, task="features"))
>>> loader = input_loader(InputDataset(folder.undone(inputs)), workers=2)
>>> Trainer(callbacks=[writer], logger=False).predict(PredictModule(step), loader, return_predictions=False)

Every process writes parts of its own; they meet in the folder only. Samplers that even out the processes repeat inputs
(torch's DistributedSampler does, the one that Lightning puts in for prediction does not): such second rows are taken
out when all processes are through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import DataLoader, Dataset

from tokensieve.datasets.frames import Frames
from tokensieve.datasets.limits import Limits
from tokensieve.pipeline.batch.ahead import Decoded, decode
from tokensieve.pipeline.batch.folder import Folder
from tokensieve.pipeline.batch.inputs import Failure, Input
from tokensieve.pipeline.batch.parts import PartWriter
from tokensieve.pipeline.batch.rows import Row
from tokensieve.pipeline.batch.tasks import Step, feed


class InputDataset(Dataset):
    """Inputs with their frames, decoded where they are asked for: in the workers of a DataLoader.

    Args:
        inputs: those without a row, as `Folder.undone` gives them.
        limits: budget of every file.
        read_options: of `read_media`.
    """

    def __init__(
        self, inputs: Sequence[Input], *, limits: Limits | None = None, read_options: Mapping[str, object] | None = None
    ):
        self.inputs, self.limits, self.read_options = list(inputs), limits or Limits(), dict(read_options or {})

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, place: int) -> Decoded:
        given = self.inputs[place]
        return given, decode(given, self.limits, self.read_options)


def input_loader(dataset: InputDataset, batch: int = 8, workers: int = 0, **options) -> DataLoader:
    """A DataLoader that leaves clips as they are: `batch` of them in a list.

    Args:
        dataset: what to load.
        batch: clips at once.
        workers: processes that decode ahead, for every process of the trainer.
        **options: of DataLoader.
    """
    return DataLoader(dataset, batch_size=batch, num_workers=workers, collate_fn=list, **options)


class PredictModule(L.LightningModule):
    """Rows of a batch of clips.

    The model is no submodule: Lightning moves and wraps nothing, and no checkpoint holds it. Under several devices it
    must be on the device of its process already: `load(device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}")`.

    Args:
        step: what turns clips into rows.
    """

    def __init__(self, step: Step):
        super().__init__()
        self._steps = (step,)  # in a tuple, so that a module in it is not registered

    def predict_step(self, batch: Sequence[tuple[Input, Frames | Failure]], batch_idx: int = 0) -> list[Row]:
        """The rows of the batch, all of them: no clip waits for the next batch."""
        (step,) = self._steps
        rows = [row for given, frames in batch for row in feed(step, given, frames)]
        return rows + step.finish()

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Frames stay in main memory: the step moves what it needs."""
        return batch


class RowWriter(BasePredictionWriter):
    """Writes the rows of every batch as parts, and the record and failures at the end.

    The first process has the folder's lock; the number of a process is in the names of its temporary files only.

    Args:
        folder: the job's.
        inputs: all of the job.
        step: for the columns.
        options: all that rows follow from (see `identity.torch_options`).
        mix: as in `Folder.admit`.
        **limits: of `PartWriter`: `max_rows`, `max_s`.
    """

    def __init__(
        self,
        folder: Folder,
        inputs: Sequence[Input],
        step: Step,
        options: Mapping[str, object],
        *,
        mix: bool = False,
        **limits,
    ):
        super().__init__(write_interval="batch")
        self.folder, self.inputs, self.options, self.mix = folder, list(inputs), dict(options), mix
        self._schema, self._limits = step.schema, limits
        self._writer: PartWriter | None = None
        self._stack = ExitStack()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes the lock, checks the options and cleans up in the first process, before any other one writes."""
        fingerprint = None
        if trainer.is_global_zero:
            self._stack.enter_context(self.folder.locked())
            fingerprint = self.folder.admit(self.options, self._schema, mix=self.mix)
            self.folder.resume(self.inputs)
        fingerprint = trainer.strategy.broadcast(fingerprint)
        tag = f"-{trainer.global_rank}"
        self._writer = self.folder.writer(self._schema, fingerprint, tag=tag, **self._limits)

    def write_on_batch_end(
        self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx
    ) -> None:
        """Takes the rows of one batch."""
        self._writer.add(prediction)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Flushes; once all processes have, the first one makes the record."""
        self._writer.flush()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self.folder.drop_repeated()
            finished = not self.folder.undone(self.inputs)
            facts = {"format": 1, "inputs": len(self.inputs), "finished": finished}
            self.folder.finish({**facts, "engine": "lightning", "processes": trainer.world_size})
        trainer.strategy.barrier()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keeps finished rows."""
        if self._writer is not None and isinstance(exception, Exception | KeyboardInterrupt):
            self._writer.flush()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives the lock back."""
        self._stack.close()
