"""The options of `tokensieve train tiny`, in a module of their own so that `--help` imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tokensieve.errors import BadOption

STAGES = ("tower", "clips")


@dataclass(frozen=True, kw_only=True)
class TinyRecipe:
    """Everything that decides what the shipped model becomes.

    Attributes:
        seed: seeds weights, data and order.
        tower_steps: optimizer steps of stage 1.
        tower_batch: mosaics a step.
        tower_lr: peak learning rate of stage 1.
        clips: training clips that are encoded once and kept in memory (110 kB each).
        clip_steps: optimizer steps of stage 2.
        clip_batch: clips a step, each with four questions.
        clip_lr: peak learning rate of stage 2.
        val_clips: validation clips, for the progress bar and the log.
        compile: use torch.compile, twice as fast here; needs a C++ compiler.
    """

    seed: int = 0
    tower_steps: int = 3500
    tower_batch: int = 128
    tower_lr: float = 2e-3
    clips: int = 20_000
    clip_steps: int = 5000
    clip_batch: int = 32
    clip_lr: float = 2e-3
    val_clips: int = 400
    compile: bool = True

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name not in ("seed", "compile") and value <= 0:
                raise BadOption(f"{name} must be positive, got {value}.")
        if self.clips < self.clip_batch:
            raise BadOption(f"clips ({self.clips}) must be at least clip_batch ({self.clip_batch}).")
