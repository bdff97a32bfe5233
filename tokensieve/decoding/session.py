"""One batch of prompts in a model's cache, which can be continued, branched, cut back and rearranged.

Every decoding method is written on this class alone, so that it works for any decoder-only transformers model, with
text, pixels, `mm_encoder_outputs` or embeddings in the prompt. What differs between families goes through the
model's own `prepare_inputs_for_generation`. Three things are kept along the sequence and move with the cache: the mask,
the positions and the token types. A new token stands one position after its predecessor on every axis: that is what
`generate` does, and it hides both the rope delta of the Qwen-VL family and the gaps that dropped visual tokens left.
"""

# Shape legend: B rows, L tokens so far (padding included), T new tokens, K tokens kept, V vocabulary, D width, H heads

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokensieve.decoding.ledger import Ledger, counted, prompt_ledger
from tokensieve.errors import BadOption, UnsupportedModel

_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_ALONG_SEQUENCE = ("attention_mask", "position_ids", *_TOKEN_TYPES)


class DecodeSession:
    """A model and the cache of one batch of prompts.

    Args:
        model: a decoder-only model that can `generate`: a language model or a vision-language model.
        ledger: counts forward passes and tokens; a new one if left out.

    Attributes:
        cache: the `DynamicCache`, changed in place by all methods.
        mask_BL: bool, which tokens are real; the others are padding.

    Raises:
        UnsupportedModel: an encoder-decoder model.

    Example:
        >>> session = DecodeSession(model)
        >>> logits_BV = session.prefill(input_ids)
        >>> logits_BTV = session.step(logits_BV.argmax(-1, keepdim=True))
    """

    def __init__(self, model: nn.Module, ledger: Ledger | None = None):
        if model.config.is_encoder_decoder:
            raise UnsupportedModel(
                f"{type(model).__name__} is an encoder-decoder model; decoding needs a decoder only."
            )
        self.model = model
        self.ledger = ledger if ledger is not None else Ledger()
        self.cache = None
        self.mask_BL: Tensor | None = None
        self._positions: Tensor | None = None  # [B, L] or [axes, B, L]
        self._types: dict[str, Tensor] = {}  # [B, L] each
        self._always: dict[str, object] = {}  # what every forward is given

    @property
    def batch(self) -> int:
        """B."""
        return self._started().shape[0]

    @property
    def length(self) -> int:
        """L: tokens so far, prompt and padding included."""
        return self._started().shape[1]

    @torch.no_grad()
    def prefill(self, input_ids: Tensor | None = None, *, generation_config=None, **inputs) -> Tensor:
        """Runs the prompts.

        Args:
            input_ids: `[B, L]`, shorter prompts padded on the left.
            generation_config: the model's own if left out; its `prefill_chunk_size` counts.
            **inputs: whatever the model takes: `attention_mask [B, L]` (all ones if left out), `position_ids` (made as
                `generate` makes them), pixels and grids, `mm_encoder_outputs`, `inputs_embeds`, token types, or a
                `cache` that holds the prompts' beginning.

        Returns:
            `[B, V]` float32, raw logits of the next token.

        Raises:
            BadOption: neither ids nor embeddings, a second prefill, or a cache that is not dynamic.
        """
        from transformers import DynamicCache

        if self.cache is not None:
            raise BadOption("This session has its prompts already.", hint="Make a new DecodeSession.")
        embeds = inputs.get("inputs_embeds")
        if input_ids is None and embeds is None:
            raise BadOption("prefill needs input_ids or inputs_embeds.")
        given = input_ids if embeds is None else embeds
        if input_ids is None:
            input_ids = torch.empty(len(embeds), 0, dtype=torch.long, device=embeds.device)
        config = self.model.generation_config if generation_config is None else generation_config
        inputs.setdefault("use_cache", True)
        if inputs.get("cache") is None:
            inputs["cache"] = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        if not isinstance(inputs["cache"], DynamicCache):
            raise BadOption(
                f"Decoding methods branch and cut the cache, and {type(inputs['cache']).__name__} cannot be.",
                hint="Leave cache_implementation out: the default is a dynamic cache.",
            )
        if inputs.get("position_ids") is None:
            inputs["position_ids"] = self.model._prepare_position_ids_for_generation(given, {**inputs})
        if self.model._supports_logits_to_keep():
            inputs["logits_to_keep"] = 1
        mask = inputs.get("attention_mask")
        if mask is None:  # then positions, which generate and the line above always make, tell the length
            mask = torch.ones(len(given), inputs["position_ids"].shape[-1], dtype=torch.long, device=given.device)
        with counted(self.model, self.ledger):
            out = self.model._prefill(input_ids, config, inputs)
        self.cache = out.cache
        self.cache.activate_past_recording()  # lets layers with a window or a state be cut back
        self.mask_BL = mask.bool()
        positions = inputs["position_ids"]
        self._positions = positions.expand(*positions.shape[:-2], *self.mask_BL.shape)
        self._types = {name: inputs[name] for name in _TOKEN_TYPES if inputs.get(name) is not None}
        known = {*_ALONG_SEQUENCE, "cache", "inputs_embeds", "logits_to_keep"}
        self._always = {name: value for name, value in inputs.items() if name not in known}
        prompts = prompt_ledger(self.model, input_ids, mask)
        self.ledger.prompt_tokens += prompts.prompt_tokens
        self.ledger.visual_tokens += prompts.visual_tokens
        return out.logits[:, -1].float()

    @torch.no_grad()
    def step(
        self,
        ids_BT: Tensor | None = None,
        *,
        embeds_BTD: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Runs T new tokens in every row.

        Args:
            ids_BT: their ids; or
            embeds_BTD: their input embeddings.
            positions: from `positions(offsets)`; the T places after the last token if left out.
            mask: additive float `[B or 1, H or 1, T, L + T]`, used as given in every layer; causal if left out. See
                `tree_mask`, and ask `tree_ok` or `bias_ok` first.

        Returns:
            `[B, T, V]` float32, raw logits after each of them.

        Raises:
            BadOption: both or neither of ids and embeddings, or another number of rows.
        """
        if (ids_BT is None) == (embeds_BTD is None):
            raise BadOption("step needs either ids or embeddings.")
        new = ids_BT if embeds_BTD is None else embeds_BTD
        num_rows, num_new = new.shape[:2]
        if num_rows != self.batch:
            raise BadOption(f"The session has {self.batch} rows, but {num_rows} were given.")
        if positions is None:
            positions = self.positions(torch.arange(num_new, device=new.device))
        mask_BL = torch.cat([self.mask_BL, self.mask_BL.new_ones(num_rows, num_new)], dim=1)
        types = {n: torch.cat([t, self._next_type(n, t, num_new)], dim=1) for n, t in self._types.items()}
        given_mask = mask
        if given_mask is None and not mask_BL.all():
            given_mask = mask_BL.long()
        inputs = self.model.prepare_inputs_for_generation(
            torch.zeros_like(new[..., 0], dtype=torch.long) if ids_BT is None else ids_BT,
            cache=self.cache,
            attention_mask=given_mask,
            position_ids=positions,
            is_first_iteration=False,
            **types,
            **self._always,
        )
        if embeds_BTD is not None:
            inputs |= {"input_ids": None, "inputs_embeds": embeds_BTD}
        with counted(self.model, self.ledger):
            out = self.model(**inputs, return_dict=True)
        self.mask_BL, self._types = mask_BL, types
        self._positions = torch.cat([self._positions, positions.expand(*self._positions.shape[:-1], -1)], dim=-1)
        return out.logits[:, -num_new:].float()

    def positions(self, offsets_T: Tensor) -> Tensor:
        """`position_ids` for new tokens that stand `offsets_T` places after the next one (0 is the next one).

        `[B, T]`, or `[axes, B, T]` for models with several rotary axes.
        """
        self._started()
        return self._positions[..., -1:] + 1 + offsets_T.to(self._positions.device)

    def tree_mask(self, sees_TT: Tensor) -> Tensor:
        """An additive mask under which new token i sees every real token so far and those new ones that row i marks.

        Args:
            sees_TT: bool, itself included.

        Returns:
            `[B, 1, T, L + T]` in the model's dtype, 0 or its lowest number.
        """
        num_new = len(sees_TT)
        sees_TT = sees_TT.to(self.mask_BL.device)
        before = self.mask_BL[:, None].expand(-1, num_new, -1)
        sees = torch.cat([before, sees_TT.expand(self.batch, -1, -1)], dim=-1)
        mask = torch.zeros(sees.shape, dtype=self.model.dtype, device=sees.device)
        return mask.masked_fill(~sees, torch.finfo(self.model.dtype).min)[:, None]

    def fork(self, num: int) -> None:
        """Repeats every row `num` times: row i becomes rows `num * i` to `num * i + num - 1`."""
        self._started()
        self.cache.batch_repeat_interleave(num)
        self._map_rows(lambda rows, dim: rows.repeat_interleave(num, dim=dim))

    def select(self, rows: Sequence[int] | Tensor) -> None:
        """Keeps the rows with these numbers, in this order; a row may come several times."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self._started().device)
        self.cache.batch_select_indices(index)
        self._map_rows(lambda values, dim: values.index_select(dim, index))

    def truncate(self, num: int) -> None:
        """Takes the last `num` tokens off.

        Raises:
            BadOption: fewer tokens are there.
        """
        if not 0 <= num < self.length:
            raise BadOption(f"Cannot take {num} tokens off {self.length}.")
        self.cache.crop(-num)
        self._keep(slice(0, self.length - num))

    def gather(self, places: Sequence[int] | Tensor) -> None:
        """Keeps the tokens at these places of the sequence (0 to L - 1), in this order, in every row.

        Rotary positions stay in the keys, so a kept token still stands where it stood.

        Raises:
            UnsupportedModel: a layer of the cache holds something else than all keys of the sequence.
        """
        if reason := self.gather_trouble():
            raise UnsupportedModel(f"The cache cannot be rearranged: {reason}.")
        index_K = torch.as_tensor(places, dtype=torch.long, device=self.mask_BL.device)
        moved = index_K != torch.arange(len(index_K), device=index_K.device)
        first = int(moved.nonzero()[0]) if moved.any() else len(index_K)
        for layer in self.cache.layers:
            # Only what moves is copied, into the places that it leaves: the prompt's keys may be long.
            index = index_K[first:].to(layer.keys.device)
            for name in ("keys", "values"):
                stored = getattr(layer, name)
                stored[:, :, first : len(index_K)] = stored[:, :, index]
                setattr(layer, name, stored[:, :, : len(index_K)])
        self._keep(index_K)

    def gather_trouble(self) -> str | None:
        """Why `gather` cannot work here, or None: every layer must be a plain `DynamicLayer` with all L tokens."""
        from transformers.cache_utils import DynamicLayer

        self._started()
        for number, layer in enumerate(self.cache.layers):
            if type(layer) is not DynamicLayer:
                return f"layer {number} is a {type(layer).__name__}, not a plain DynamicLayer"
            if layer.get_seq_length() != self.length:
                return f"layer {number} holds {layer.get_seq_length()} of {self.length} tokens"
        return None

    def copy(self) -> DecodeSession:
        """A second session in the same state, with a cache and a ledger of its own."""
        twin = copy.copy(self)
        twin.cache, twin.ledger = copy.deepcopy(self.cache), copy.copy(self.ledger)
        return twin

    @property
    def crop_ok(self) -> bool:
        """Whether `truncate` leaves the cache as it was before. Tested on this model, once for each kind of cache."""
        return self._capable("crop")

    @property
    def tree_ok(self) -> bool:
        """Whether a tree of new tokens can be run at once, by `tree_mask`, and `gather`ed. Tested like `crop_ok`."""
        return self._capable("tree")

    @property
    def bias_ok(self) -> bool:
        """Whether `step` honours an additive mask of its own in every head. Tested like `crop_ok`."""
        return self._capable("bias")

    def require(self, *needs: str) -> None:
        """Raises UnsupportedModel unless the session can do all of "crop", "tree", "bias"."""
        for need in needs:
            if not self._capable(need):
                attention = self.model.config._attn_implementation
                raise UnsupportedModel(
                    f"{type(self.model).__name__} failed the test of {need!r}: {_NEEDS[need]}. Its attention is "
                    f"{attention!r}; its cache: {self.gather_trouble() or 'plain'}.",
                    hint="Load the model with attn_implementation='sdpa', and take compression inside the language "
                    "model off; or decode greedily.",
                )

    def _capable(self, need: str) -> bool:
        from tokensieve.decoding.capabilities import capable

        self._started()
        return capable(self, need)

    def _started(self) -> Tensor:
        if self.mask_BL is None:
            raise BadOption("The session is empty.", hint="Call prefill first.")
        return self.mask_BL

    def _keep(self, places: slice | Tensor) -> None:
        self.mask_BL = self.mask_BL[:, places]
        self._positions = self._positions[..., places]
        self._types = {name: types[:, places] for name, types in self._types.items()}

    def _map_rows(self, change) -> None:
        self.mask_BL = change(self.mask_BL, 0)
        self._positions = change(self._positions, -2)
        self._types = {name: change(types, 0) for name, types in self._types.items()}

    @staticmethod
    def _next_type(name: str, types_BL: Tensor, num_new: int) -> Tensor:
        """As `generate` continues them: a prompt's last type, except that new tokens are never visual."""
        if name == "token_type_ids":
            return types_BL[:, -1:].expand(-1, num_new)
        return types_BL.new_zeros(len(types_BL), num_new)


_NEEDS = {
    "crop": "taking tokens off the cache must leave it as it was before them",
    "tree": "attention must take a mask of its own, and the cache must be a plain one",
    "bias": "attention must take an additive mask for every head",
}
