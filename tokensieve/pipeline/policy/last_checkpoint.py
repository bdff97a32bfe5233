"""The checkpoint that an interrupted training goes on from."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Checkpoint


class LastCheckpoint(Checkpoint):
    """Writes one file again and again: every so many optimizer steps and at the end.

    Lightning's `ModelCheckpoint` waits for a multiple of its interval, which a module that takes several steps a batch
    may never meet. The file is replaced in one move, so a crash while it is written leaves the old one.

    Args:
        path: of the file.
        every: steps after which the end of a batch is worth a checkpoint.
    """

    def __init__(self, path: Path, every: int):
        self.path, self.every = path, every
        self.saved_at = 0

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        if trainer.global_step - self.saved_at >= self.every:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)
        self.saved_at = trainer.global_step
