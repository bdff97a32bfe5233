"""Visual keys chosen anew for every generated token: a layer looks, the layers after it see only the chosen ones.

The others are masked, not removed: they may be chosen again. So attention over fewer keys is what the model computes,
but no memory is freed, and no time won in SDPA.
"""

# Shape legend: B rows, N visual tokens that may be hidden, K keys, H heads, D width

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokensieve.compression import num_to_keep
from tokensieve.compression.decoder_stage import Chosen, DecoderStage
from tokensieve.errors import BadOption
from tokensieve.pipeline.attention_rows import attention_to
from tokensieve.pipeline.decoder_cache import CacheNotes
from tokensieve.pipeline.decoder_layout import decode_mask


@dataclass(frozen=True, eq=False)
class DecodeChoice:
    """Runs `DecoderStage.select_at_decode`.

    Attributes:
        stage: the method.
        keep: budget of visual keys for each generated token.
        layer: the first layer that sees only the chosen keys.
    """

    stage: DecoderStage
    keep: float | int
    layer: int

    @classmethod
    def of(cls, stage: DecoderStage, num_layers: int, keep: float | int) -> DecodeChoice | None:
        """For a stage that chooses at decode; None for others."""
        layer = stage.decode_layer(num_layers)
        return None if layer is None else cls(stage, keep, layer)

    def num_keep(self, num_tokens: int) -> int:
        """Visual keys to choose of `num_tokens`."""
        return num_to_keep(self.keep, num_tokens) if num_tokens else 0

    def at_decode(
        self, index: int, layer: nn.Module, hidden: Tensor, kwargs: Mapping, cache, notes: CacheNotes, attention: str
    ) -> dict:
        """The layer's arguments for new tokens: chooses before layer `self.layer`, hides keys from there on."""
        if index == self.layer - 1:
            notes.chosen = self._choose(layer, hidden, kwargs, cache.layers[index], notes)
        if index < self.layer:
            return dict(kwargs)
        if index == self.layer:  # the layer before has stored the new keys by now: they tell rows apart
            notes.tag = cache.layers[index - 1].keys[:, :, -1].clone()
        num_new = hidden.shape[1]
        seen_BK = notes.real_keys(cache.layers[index], index, len(hidden), num_new).to(hidden.device).clone()
        for row, chosen in enumerate(notes.chosen):
            seen_BK[row, self._columns(notes, row, len(hidden))[~chosen.kept]] = False
        window = getattr(layer.self_attn, "sliding_window", None)
        return dict(kwargs) | {"attention_mask": decode_mask(seen_BK, num_new, attention, hidden.dtype, window)}

    def _columns(self, notes: CacheNotes, row: int, num_rows: int) -> Tensor:
        return notes.candidates[row // notes.repeats(num_rows)]

    def _choose(self, layer: nn.Module, hidden: Tensor, kwargs: Mapping, stored, notes: CacheNotes) -> list[Chosen]:
        num_new = hidden.shape[1]
        if stored.keys.shape[-2] != stored.get_seq_length():
            raise BadOption(
                "A sliding window shorter than the prompt has lost visual keys.", hint="Use another method."
            )
        real_BK = notes.real_keys(stored, self.layer - 1, len(hidden), num_new).to(hidden.device)
        cos, sin = (values.expand(len(hidden), -1, -1) for values in kwargs["position_embeddings"])
        before = _same_rows(notes, stored.keys[:, :, -1])
        chosen = []
        for row in range(len(hidden)):
            columns = self._columns(notes, row, len(hidden)).to(hidden.device)
            last = torch.tensor([num_new - 1], device=hidden.device)
            attention_N = attention_to(
                layer, hidden[row], cos[row], sin[row], real_BK[row], last, columns, past_keys_GPd=stored.keys[row]
            ).mean(0)
            num_keep = self.num_keep(len(columns))
            if num_keep >= len(columns):
                chosen.append(Chosen(kept=torch.ones_like(columns, dtype=torch.bool), attention=attention_N))
            else:
                chosen.append(self.stage.select_at_decode(attention_N, num_keep, before[row]))
        return chosen


def _same_rows(notes: CacheNotes, last_key_BGd: Tensor) -> Sequence[Chosen | None]:
    """What each row chose for the token before. Beam search may have reordered the rows since: the key that the token
    before left in the cache, which is reordered too, tells where each came from."""
    if notes.tag is None or notes.tag.shape[1:] != last_key_BGd.shape[1:]:
        return [None] * len(last_key_BGd)
    same_BB = (last_key_BGd[:, None] == notes.tag[None].to(last_key_BGd.device)).flatten(2).all(-1)
    return [notes.chosen[int(row.int().argmax())] if row.any() else None for row in same_BB]
