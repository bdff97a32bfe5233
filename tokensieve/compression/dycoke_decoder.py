"""DyCoke, stage 2: Dynamic Compression of Tokens for Fast Video Large Language Models, in the key-value cache.

Tao, Qin, You, Sui, Wang (CVPR 2025). https://arxiv.org/abs/2411.15024

    a_t      attention of decoder layer L - 1 from generated token t to every visual key, mean over heads
    choose   if cos(a_t, a_{t-1}) < 0.9, or at the first token: the share 1 - P with the highest a_t; else the choice of
             the token before is used again
    L on     layers from L = 3 on see only the chosen visual keys (and all text) for token t

The prompt itself runs with all tokens; what is not chosen may be chosen again. Stage 1, at the projector, is the method
'dycoke'.

What differs from the official code (KD-TAO/DyCoke; written from the equations):
- Where a_t is like a_{t-1}, the choice before is used again, as the paper says. The official code seems to run such
  steps on the full cache.
- Keys are masked, officially gathered. Neither frees memory: all keys stay in the cache.
- One row is computed beside SDPA or Flash. Any batch and beams; equal scores: the first key wins.
"""

# Shape legend: N visual keys of a prompt

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tokensieve.compression.decoder_stage import (
    Chosen,
    DecoderStage,
    check_number,
    check_whole,
    checked_layer,
    keep_best,
)
from tokensieve.compression.registry import register_method


@register_method(
    "dycoke-decoder",
    title="DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models (stage 2)",
    url="https://arxiv.org/abs/2411.15024",
    place="decoder",
    needs=("attention", "question"),
    output_length="All tokens stay in the prompt and the cache; each generated token sees `keep` of them.",
    licence="Apache-2.0",
    differs="Uses the choice before again where the official code runs on the full cache; masks instead of gathering.",
)
def dycoke_decoder(*, layer: int | None = None, reuse: float = 0.9) -> DyCokeDecoder:
    """A stage that chooses visual keys for every generated token.

    Args:
        layer: L, the first layer that sees only the chosen keys, from 1 up; it looks at layer L - 1. None for 3, or
            the last layer of a shallower model.
        reuse: cosine of two attention vectors from which the choice before is used again; above 1 never.

    Raises:
        BadOption: `layer` is not a whole number from 1 up (or, once it meets a model, not one of its layers), or
            `reuse` not a number from -1 to 2.
    """
    layer = layer if layer is None else check_whole(layer, "layer", 1)
    return DyCokeDecoder(layer, check_number(reuse, "reuse", -1, 2))


@dataclass(frozen=True)
class DyCokeDecoder(DecoderStage):
    """See `dycoke_decoder`."""

    layer: int | None
    reuse: float

    def decode_layer(self, num_layers: int) -> int:
        return checked_layer(self.layer, 3, 1, num_layers - 1)

    def select_at_decode(self, attention: Tensor, num_keep: int, before: Chosen | None) -> Chosen:
        if before is not None and F.cosine_similarity(attention, before.attention, dim=0) >= self.reuse:
            return Chosen(kept=before.kept, attention=attention)
        kept = torch.zeros_like(attention, dtype=torch.bool).index_fill(0, keep_best(attention, num_keep).kept, True)
        return Chosen(kept=kept, attention=attention)
