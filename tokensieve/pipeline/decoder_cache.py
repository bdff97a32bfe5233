"""What a cache object remembers of the tokens that left: which keys of each layer are real, and which are visual.

Kept as one attribute of the cache, so that it lives, is copied and dies with it. Beam search reorders rows of the
cache only among beams of one prompt, and these share one selection, so the notes need not follow.
"""

# Shape legend: B rows, S tokens of the full prompt, T keys of the prompt in one layer, K keys with those generated,
#               N visual tokens that may be dropped, D width

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tokensieve.compression.decoder_stage import Chosen
from tokensieve.errors import BadOption
from tokensieve.pipeline.decoder_layout import Layout, decode_mask, take

_ATTRIBUTE = "_tokensieve_notes"


@dataclass(eq=False)
class CacheNotes:
    """Notes on the cache of one batch of prompts.

    Attributes:
        full_length: S.
        layouts: of every layer that notes were taken of.
        candidates: `[N]` int64 for every row, full columns of the visual tokens that a method may drop.
        num_forwards: how many forwards there were after the prompt's.
        chosen: what each row chose for the last token, for methods that choose at decode.
        may_choose: whether visual keys are chosen at decode.
        tag: what tells the rows apart since then, see `decode_choice`.
    """

    full_length: int
    candidates: list[Tensor]
    layouts: dict[int, Layout] = field(default_factory=dict)
    num_forwards: int = 0
    may_choose: bool = False
    chosen: list[Chosen] = field(default_factory=list)
    tag: Tensor | None = None

    @classmethod
    def write(cls, cache, layout: Layout, layer: int, candidates: list[Tensor]) -> CacheNotes:
        """Notes that a layer ran the prompt in this layout."""
        notes = notes_of(cache)
        if notes is None:
            notes = cls(layout.stays.shape[1], candidates)
            setattr(cache, _ATTRIBUTE, notes)
        notes.layouts[layer] = layout
        return notes

    @classmethod
    def cut(cls, cache, layer: int, earlier: Layout, later: Layout, candidates: list[Tensor]) -> None:
        """Takes tokens out of the cache of a layer that has run.

        Raises:
            BadOption: the layer's cache does not hold the whole prompt (a sliding window shorter than it).
        """
        stored = cache.layers[layer]
        if stored.keys.shape[-2] != earlier.real.shape[1]:
            raise BadOption(
                f"Layer {layer} has a sliding window shorter than the prompt, so its cache cannot be cut.",
                hint="Use a method that leaves the layers before it alone, such as 'fastv'.",
            )
        order_BT = earlier.order_to(later)
        stored.keys = take(stored.keys, order_BT.to(stored.keys.device), 2)
        stored.values = take(stored.values, order_BT.to(stored.values.device), 2)
        if hasattr(stored, "cumulative_length"):
            stored.cumulative_length = order_BT.shape[1]
        cls.write(cache, later, layer, candidates)

    def check_continuation(self, kwargs: Mapping[str, object], new: Tensor) -> None:
        """Counts a forward after the prompt's, and refuses what would go wrong.

        Raises:
            BadOption: another batch; the rest of a prompt that is prefilled in chunks; or layer 0 has lost keys, so
                that the model miscounts, and several tokens come at once or without positions.
        """
        self.repeats(len(new))
        self.num_forwards += 1
        if self.num_forwards == 1 and new.shape[1] > 1:
            raise BadOption(
                f"{new.shape[1]} tokens follow right after the prompt, as when it is prefilled in chunks: the first "
                "chunk was judged without its end.",
                hint="Leave prefill_chunk_size out, and generate before a next turn.",
            )
        first = self.layouts.get(0)
        shortened = first is not None and first.index is not None and first.index.shape[1] < self.full_length
        if shortened and (new.shape[1] > 1 or kwargs.get("position_ids") is None):
            raise BadOption(
                "This method also shortens the cache of layer 0, by which transformers counts what it has seen.",
                hint="Give one new token at a time with position_ids, as generate does, or the whole conversation.",
            )

    def real_keys(self, stored, layer: int, num_rows: int, num_new: int) -> Tensor | None:
        """`[B, K]` bool, the keys of a layer that `num_new` new tokens may see, their own included.

        Args:
            stored: the layer's cache before the new tokens; one with a sliding window holds only the last keys.
            layer: its number.
            num_rows: B.
            num_new: new tokens.

        Returns:
            None if there are no notes on this layer.
        """
        layout = self.layouts.get(layer)
        if layout is None:
            return None
        real_BT = layout.real.repeat_interleave(self.repeats(num_rows), dim=0)
        num_seen = stored.get_seq_length() + num_new
        new = real_BT.new_ones(num_rows, max(0, num_seen - real_BT.shape[1]))
        real = torch.cat([real_BT, new], dim=1)[:, :num_seen]
        return real[:, -(stored.keys.shape[-2] + num_new) :]

    def repeats(self, num_rows: int) -> int:
        """How often each prompt is repeated in a batch of `num_rows`.

        Raises:
            BadOption: the batch is not that of the prompts, nor each of them repeated.
        """
        known = len(self.candidates)
        if num_rows % known:
            raise BadOption(
                f"The cache was made for {known} prompts, but {num_rows} rows follow.",
                hint="Leave the batch as it is; repeat its rows with cache.batch_repeat_interleave.",
            )
        return num_rows // known

    def mask_at_decode(self, index: int, layer: nn.Module, hidden: Tensor, kwargs: Mapping, cache, attention: str):
        """The mask for new tokens in one layer; the model's own where the layer kept all."""
        num_new = hidden.shape[1]
        real_BK = self.real_keys(cache.layers[index], index, len(hidden), num_new)
        if real_BK is None:
            return kwargs.get("attention_mask")
        window = getattr(layer.self_attn, "sliding_window", None)
        return decode_mask(real_BK.to(hidden.device), num_new, attention, hidden.dtype, window)


def notes_of(cache) -> CacheNotes | None:
    """The notes on a cache, or None."""
    return getattr(cache, _ATTRIBUTE, None)


def check_cache(cache) -> None:
    """Raises BadOption for any cache but a dynamic one: layers of unequal length do not fit into it."""
    from transformers import DynamicCache

    if cache is not None and not isinstance(cache, DynamicCache):
        raise BadOption(
            f"Methods inside the language model leave layers of unequal length, and {type(cache).__name__} cannot "
            "hold them.",
            hint="Leave cache_implementation out: the default is a dynamic cache.",
        )
