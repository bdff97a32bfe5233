"""Training of a behaviour tokeniser with Lightning: behaviour cloning, nothing else."""

from __future__ import annotations

import lightning as L
from torch import Tensor

from tokensieve.errors import BadOption
from tokensieve.vla.config import BehaviourConfig
from tokensieve.vla.optim import adamw_with_linear_decay, check_rates
from tokensieve.vla.tokeniser import BehaviourTokeniser, action_accuracy, cloning_loss
from tokensieve.vla.trunks import Trunks


class BehaviourModule(L.LightningModule):
    """A behaviour tokeniser in training; batches are `Trunks`.

    Validation logs the accuracy of actions under the trunks' own codes (`val_accuracy`) and under those of the next
    trunk in the batch (`val_accuracy_shuffled`): their difference is what the codes say; and how many codes occurred
    (`val_codes`).

    Args:
        config: of the tokeniser.
        lr: peak learning rate. The paper trains GROOT's large networks at 4e-5.
        weight_decay: the paper's.
        warmup_steps: over which the rate rises; after them it falls linearly to 0 at the trainer's `max_steps`.
        seed: of the first weights.

    Raises:
        BadOption: a rate or number is not one.
    """

    def __init__(
        self,
        config: BehaviourConfig | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-3,
        warmup_steps: int = 100,
        seed: int = 0,
    ):
        super().__init__()
        check_rates(lr, weight_decay, warmup_steps)
        if seed < 0:
            raise BadOption(f"seed must be at least 0, got {seed}.")
        self.tokeniser = BehaviourTokeniser(config, seed=seed)
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps
        self._codes_seen: set[int] = set()

    def training_step(self, trunks: Trunks, _) -> Tensor:
        logits, _ = self.tokeniser(trunks)
        loss = cloning_loss(logits, trunks.actions, trunks.mask)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(trunks))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._codes_seen.clear()

    def validation_step(self, trunks: Trunks, _) -> None:
        logits, codes = self.tokeniser(trunks)
        other_logits = self.tokeniser.decode(trunks, codes.roll(1, 0))
        steps = int(trunks.mask.sum())
        for name, value in {
            "val_loss": cloning_loss(logits, trunks.actions, trunks.mask),
            "val_accuracy": action_accuracy(logits, trunks.actions, trunks.mask),
            "val_accuracy_shuffled": action_accuracy(other_logits, trunks.actions, trunks.mask),
        }.items():
            self.log(name, value, prog_bar=True, batch_size=steps, sync_dist=True)
        fsq = self.tokeniser.config.fsq
        self._codes_seen |= set(fsq.digits_to_index(fsq.codes_to_digits(codes)).tolist())

    def on_validation_epoch_end(self) -> None:
        self.log("val_codes", float(len(self._codes_seen)))

    def configure_optimizers(self):
        return adamw_with_linear_decay(self, self.tokeniser, self.lr, self.weight_decay, self.warmup_steps)
