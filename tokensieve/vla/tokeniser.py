"""Behaviour tokenisation of OmniJARVIS (Wang et al., NeurIPS 2024, arXiv 2407.00114): a trunk of play in a few digits.

    code = FSQ(encoder(o_1 .. o_T))            the encoder sees the whole trunk
    loss = mean over steps of -log pi(a_t | o_1 .. o_t, code)                     (equation 1)

Behaviour cloning alone teaches both: no KL, no commitment, no codebook loss, no reconstruction of pixels. Gradients
pass the rounding straight through.

No official code exists: this is an independent implementation from the paper. INFERRED: the mean over valid steps of
the batch (the equation has a sum), and what encoder.py and decoder.py say.
"""

# Shape legend: R trunks, T steps, B environments, A parts of an action, d digits, n choices of a part, H height,
#               W width

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from tokensieve.policies.checkpoint import SavedPolicy, register_policy, seeded_init
from tokensieve.vla.config import BehaviourConfig
from tokensieve.vla.decoder import History, PolicyDecoder
from tokensieve.vla.encoder import BehaviourEncoder
from tokensieve.vla.layers import check_actions, draw
from tokensieve.vla.trunks import NO_ACTION, Trunks


@register_policy("behaviour-tokeniser")
class BehaviourTokeniser(SavedPolicy):
    """Trunks to digits, and digits to actions in an environment. `save_pretrained` and `from_pretrained` as policies.

    Args:
        config: the options, or a mapping of them.
        seed: of the first weights.

    Raises:
        BadOption: an option is not allowed, see `BehaviourConfig`.
    """

    def __init__(self, config: BehaviourConfig | Mapping[str, object] | None = None, *, seed: int = 0):
        super().__init__()
        self.config = config if isinstance(config, BehaviourConfig) else BehaviourConfig(**(config or {}))
        with seeded_init(seed):
            self.encoder = BehaviourEncoder(self.config)
            self.decoder = PolicyDecoder(self.config)

    def options(self) -> dict[str, object]:
        return {"config": asdict(self.config)}

    def encode(self, trunks: Trunks) -> Tensor:
        """Codes `[R, d]` float32, each a value of its level; gradients pass straight through the rounding.

        Raises:
            BadOption: the trunks do not fit the options.
        """
        check_actions(trunks.actions, self.config.num_actions)
        return self.config.fsq.quantise(self.encoder(trunks))

    @torch.no_grad()
    def digits(self, trunks: Trunks) -> Tensor:
        """Digits `[R, d]` int64. Errors as in `encode`."""
        return self.config.fsq.codes_to_digits(self.encode(trunks))

    def decode(self, trunks: Trunks, codes: Tensor) -> list[Tensor]:
        """Logits `[R, T, n]` float32 of every part of the action at every step.

        Args:
            trunks: what is seen; actions are read for `decoder_sees_previous_action` alone, one step late.
            codes: `[R, d]`, see `encode`.

        Raises:
            BadOption: trunks or codes do not fit the options.
        """
        return self.decoder(trunks.frames, codes, mask=trunks.mask, previous=trunks.previous)[0]

    def forward(self, trunks: Trunks) -> tuple[list[Tensor], Tensor]:
        """`decode` under the trunks' own codes, and the codes."""
        codes = self.encode(trunks)
        return self.decode(trunks, codes), codes

    @torch.no_grad()
    def act(
        self,
        frames: Tensor,
        codes: Tensor,
        *,
        previous: Tensor | None = None,
        history: History | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, History]:
        """One action `[B, A]` int64 for each of B environments, and the history to pass with the next frame.

        Args:
            frames: `[B, H, W, 3]` uint8, what is seen now.
            codes: `[B, d]`, of `fsq.digits_to_codes`.
            previous: `[B, A]` int64, the last actions, -1 where there is none; None if there is none anywhere.
            history: of the steps before. Without it the decoder starts afresh, as after a new plan; the paper does not
                say whether a plan ends the memory, GROOT keeps it.
            generator: draws from the policy, on its device; None takes the likeliest action.

        Raises:
            BadOption: shapes do not fit the options.
        """
        if previous is None:
            previous = torch.full((len(frames), len(self.config.num_actions)), NO_ACTION, device=frames.device)
        logits, history = self.decoder(frames[:, None], codes, previous=previous[:, None], history=history)
        return torch.stack([draw(part[:, 0], generator) for part in logits], -1), history


def cloning_loss(logits: list[Tensor], actions: Tensor, mask: Tensor) -> Tensor:
    """Mean of `-log pi(a)` in nats over the steps under the mask, 0-d float32; 0 if there are none.

    Args:
        logits: `[R, T, n]` of every part of the action; parts are independent given the frames.
        actions: `[R, T, A]` int64.
        mask: `[R, T]` bool.
    """
    loss_RT = torch.zeros(mask.shape, device=mask.device)
    for i, part in enumerate(logits):
        loss_RT = loss_RT - part.log_softmax(-1).gather(-1, actions[..., i : i + 1])[..., 0]
    return loss_RT.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def action_accuracy(logits: list[Tensor], actions: Tensor, mask: Tensor) -> Tensor:
    """Share of the steps under the mask at which every part of the likeliest action is right, 0-d float32."""
    right_RT = torch.stack([part.argmax(-1) for part in logits], -1).eq(actions).all(-1)
    return (right_RT & mask).sum() / mask.sum().clamp(min=1)
