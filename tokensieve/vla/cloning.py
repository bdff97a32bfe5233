"""The baseline that behaviour tokens must be held against: plain behaviour cloning, asked at every step.

    pi(a_t | o_1 .. o_t, instruction)

The network is the policy decoder with another input in the place of the code: not digits that a planner chose some
steps ago, but numbers computed from the words of the instruction, so that whatever differs lies in what is said to the
policy and not in how it sees. By default it is deeper, to be no smaller than planner and decoder are at a step.
"""

# Shape legend: B rows (windows or environments), T steps, A parts of an action, H height, W width in pixels,
#               d numbers made of an instruction, D width

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import lightning as L
import torch
from torch import Tensor, nn

from tokensieve.errors import BadOption
from tokensieve.policies.checkpoint import SavedPolicy, register_policy, seeded_init
from tokensieve.vla.config import BehaviourConfig
from tokensieve.vla.decoder import History, PolicyDecoder
from tokensieve.vla.layers import draw
from tokensieve.vla.optim import adamw_with_linear_decay, check_rates
from tokensieve.vla.tokeniser import action_accuracy, cloning_loss
from tokensieve.vla.trunks import Trunks
from tokensieve.vla.words import WordReader, check_words


@dataclass(frozen=True, kw_only=True)
class CloningConfig:
    """Options of `CloningPolicy`; see `BehaviourConfig` for those they share.

    Attributes:
        words: that instructions consist of, see `words_of`.
        num_numbers: d, from 1 to 30, by which the instruction reaches the decoder.
        num_actions, frame_size, patch_size, width, num_channels, num_heads: as there.
        window: most steps that it looks back, itself included.
        num_layers: of the transformer.

    Raises:
        BadOption: an option is not as above.
    """

    words: tuple[str, ...]
    num_numbers: int = 16
    num_actions: tuple[int, ...] = (7,)
    frame_size: tuple[int, int] = (56, 56)
    patch_size: int = 8
    width: int = 128
    num_channels: int = 48
    window: int = 8
    num_layers: int = 4
    num_heads: int = 4

    def __post_init__(self):
        object.__setattr__(self, "words", check_words(self.words))
        if isinstance(self.num_numbers, bool) or not isinstance(self.num_numbers, int):
            raise BadOption(f"num_numbers must be a whole number, got {self.num_numbers!r}.")
        if not 1 <= self.num_numbers <= 30:
            raise BadOption(f"num_numbers must be from 1 to 30, got {self.num_numbers}.")
        for name in ("num_actions", "frame_size"):
            object.__setattr__(self, name, getattr(self.decoder, name))

    @property
    def decoder(self) -> BehaviourConfig:
        """Of the decoder inside; its levels only count the numbers that it reads."""
        return BehaviourConfig(
            num_actions=self.num_actions,
            frame_size=self.frame_size,
            patch_size=self.patch_size,
            levels=(2,) * self.num_numbers,
            trunk_length=self.window,
            width=self.width,
            num_channels=self.num_channels,
            num_decoder_layers=self.num_layers,
            num_heads=self.num_heads,
        )


@register_policy("behaviour-cloning")
class CloningPolicy(SavedPolicy):
    """See the module. `save_pretrained` and `from_pretrained` as policies.

    Args:
        config: the options, or a mapping of them.
        seed: of the first weights.

    Raises:
        BadOption: an option is not allowed, see `CloningConfig`.
    """

    def __init__(self, config: CloningConfig | Mapping[str, object], *, seed: int = 0):
        super().__init__()
        self.config = config = config if isinstance(config, CloningConfig) else CloningConfig(**config)
        with seeded_init(seed):
            self.words = WordReader(config.words, config.width)
            self.numbers = nn.Linear(config.width, config.num_numbers)
            self.decoder = PolicyDecoder(config.decoder)

    def options(self) -> dict[str, object]:
        return {"config": asdict(self.config)}

    def instruct(self, instructions: Sequence[str]) -> Tensor:
        """What the decoder reads of the instructions, `[B, d]`; BadOption for an unknown word."""
        return self.numbers(self.words(self.words.ids(instructions)))

    def forward(self, trunks: Trunks, instructions: Sequence[str]) -> list[Tensor]:
        """Logits `[B, T, n]` float32 of every part of the action; one instruction a window."""
        return self.decoder(trunks.frames, self.instruct(instructions), mask=trunks.mask)[0]

    @torch.no_grad()
    def act(
        self,
        frames: Tensor,
        numbers: Tensor,
        *,
        history: History | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, History]:
        """One action `[B, A]` int64 for each environment, and the history to pass with the next frame.

        Args:
            frames: `[B, H, W, 3]` uint8, what is seen now.
            numbers: `[B, d]`, of `instruct`.
            history: of the steps before; None at the beginning.
            generator: draws from the policy; None takes the likeliest action.
        """
        logits, history = self.decoder(frames[:, None], numbers, history=history)
        return torch.stack([draw(part[:, 0], generator) for part in logits], -1), history


class CloningModule(L.LightningModule):
    """A cloning policy in training; batches are `(Trunks, instructions)`. Validation logs `val_accuracy` of actions.

    Args:
        policy: what learns.
        lr, weight_decay, warmup_steps: as in `PlannerModule`.

    Raises:
        BadOption: a rate is none.
    """

    def __init__(self, policy: CloningPolicy, lr: float = 1e-3, weight_decay: float = 0.0, warmup_steps: int = 100):
        super().__init__()
        check_rates(lr, weight_decay, warmup_steps)
        self.policy, self.lr, self.weight_decay, self.warmup_steps = policy, lr, weight_decay, warmup_steps

    def training_step(self, batch: tuple[Trunks, list[str]], _) -> Tensor:
        trunks, instructions = batch
        loss = cloning_loss(self.policy(trunks, instructions), trunks.actions, trunks.mask)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(trunks))
        return loss

    def validation_step(self, batch: tuple[Trunks, list[str]], _) -> None:
        trunks, instructions = batch
        accuracy = action_accuracy(self.policy(trunks, instructions), trunks.actions, trunks.mask)
        self.log("val_accuracy", accuracy, prog_bar=True, batch_size=int(trunks.mask.sum()), sync_dist=True)

    def configure_optimizers(self):
        return adamw_with_linear_decay(self, self.policy, self.lr, self.weight_decay, self.warmup_steps)
