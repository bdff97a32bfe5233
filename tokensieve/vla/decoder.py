"""The policy decoder of OmniJARVIS (arXiv 2407.00114, section 3.1): what to do next, given frames so far and a code.

    pi(a_t | o_1 .. o_t, code): a causal transformer over frame vectors; the code reaches every frame

As in GROOT, whose decoder it modifies, the code meets the picture at every frame, and the look back is bounded: step t
sees steps t - T + 1 .. t. INFERRED: the way in for the code (it scales and shifts channels of the convolutions, and is
added to the frame's vector), positions (a learned bias per head and distance, so that a bounded look back needs no
positions of its own) and all sizes.
"""

# Shape legend: B rows (trunks or environments), Q steps now, S steps of history, K = S + Q, T longest look back,
#               H height, W width in pixels, A parts of an action, d numbers of a code, D width, C channels, G heads

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokensieve.errors import BadOption
from tokensieve.vla.config import BehaviourConfig
from tokensieve.vla.encoder import frame_vectors
from tokensieve.vla.layers import ActionEmbedding, FrameEncoder, KeysValues, Layer, check_actions
from tokensieve.vla.trunks import NO_ACTION


@dataclass(frozen=True, eq=False)
class History:
    """What the decoder remembers of at most T - 1 steps.

    Attributes:
        layers: keys and values `[B, G, S, D / G]` of every layer.
        mask: `[B, S]` bool, False at steps that a row must not see.
    """

    layers: tuple[KeysValues, ...]
    mask: Tensor

    def forget(self, rows: Tensor) -> History:
        """A history in which `rows` `[B]` bool, say environments that began anew, remember nothing."""
        return History(self.layers, self.mask & ~rows[:, None])


class PolicyDecoder(nn.Module):
    """Logits of the next action, for whole trunks or step by step with a history: the same numbers.

    Args:
        config: the options.
    """

    def __init__(self, config: BehaviourConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.frame = FrameEncoder(config.frame_size, config.patch_size, config.num_channels, width)
        self.code = nn.Sequential(nn.Linear(len(config.levels), width), nn.GELU(), nn.Linear(width, width))
        self.film = nn.Linear(width, 2 * config.num_channels)
        self.previous = ActionEmbedding(config.num_actions, width) if config.decoder_sees_previous_action else None
        self.distance = nn.Parameter(torch.zeros(config.num_heads, config.trunk_length))
        self.layers = nn.ModuleList(Layer(width, config.num_heads) for _ in range(config.num_decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in config.num_actions)

    def forward(
        self,
        frames: Tensor,
        codes: Tensor,
        *,
        mask: Tensor | None = None,
        previous: Tensor | None = None,
        history: History | None = None,
    ) -> tuple[list[Tensor], History]:
        """Logits `[B, Q, num_actions[i]]` float32 of every part of the action, and the history for the step after.

        Args:
            frames: `[B, Q, H, W, 3]` uint8.
            codes: `[B, d]`.
            mask: `[B, Q]` bool, False at padding; None where there is none.
            previous: `[B, Q, A]` int64, actions one step earlier, -1 for none; read with
                `decoder_sees_previous_action` only.
            history: of the steps before; None at the beginning.

        Raises:
            BadOption: shapes do not fit, or a previous action is needed but missing or not one.
        """
        mask_BQ = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device) if mask is None else mask
        if codes.shape != (len(frames), len(self.config.levels)):
            raise BadOption(f"Need codes of shape {[len(frames), len(self.config.levels)]}, got {list(codes.shape)}.")
        code_BD = self.code(codes.to(self.film.weight.dtype))
        x_BQD = frame_vectors(self.frame, frames, mask_BQ, self.film(code_BD)) + code_BD[:, None]
        if self.previous is not None:
            if previous is None:
                raise BadOption("This decoder reads the previous action; give `previous`, -1 where there is none.")
            check_actions(previous, self.config.num_actions, lowest=NO_ACTION)
            x_BQD = x_BQD + self.previous(previous)
        mask_BK = mask_BQ if history is None else torch.cat([history.mask, mask_BQ], 1)
        bias_BGQK = self._bias(mask_BK, frames.shape[1])
        memory = []
        for i, layer in enumerate(self.layers):
            x_BQD, keys_values = layer(x_BQD, bias_BGQK, None if history is None else history.layers[i])
            memory.append(keys_values)
        x_BQD = self.norm(x_BQD)
        first = max(0, mask_BK.shape[1] - self.config.trunk_length + 1)
        kept = tuple((key[:, :, first:], value[:, :, first:]) for key, value in memory)
        return [head(x_BQD).float() for head in self.heads], History(kept, mask_BK[:, first:])

    def _bias(self, mask_BK: Tensor, num_now: int) -> Tensor:
        """`[B, G, Q, K]`: minus infinity at the future, at padding and beyond the look back."""
        num_keys, look_back = mask_BK.shape[1], self.config.trunk_length
        place_K = torch.arange(num_keys, device=mask_BK.device)
        distance_QK = place_K[num_keys - num_now :, None] - place_K
        bias_GQK = self.distance[:, distance_QK.clamp(0, look_back - 1)]
        near_QK = (distance_QK >= 0) & (distance_QK < look_back)
        # A step sees itself in any case: a softmax over nothing would be NaN.
        allowed_BQK = near_QK & mask_BK[:, None] | (distance_QK == 0)
        return bias_GQK.masked_fill(~allowed_BQK[:, None], -torch.inf)
