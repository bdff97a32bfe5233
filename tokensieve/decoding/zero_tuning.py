"""ZeroTuning, arXiv 2505.11739, ICLR 2026: steering a frozen model by how much its heads attend to the sink.

The first token draws much attention and means nothing, so its share sets how sharply a head looks at all others.

a_i    attention weight of key i for one query and head, after softmax; key 0 is the sink
gamma  factor of a head, above 0; 1 leaves the head as it is, more than 1 makes it look at the others more evenly

    a_0' = gamma a_0 / D     a_i' = a_i / D     D = 1 + (gamma - 1) a_0

which is what adding log gamma to the sink's logit before softmax gives. So it goes through SDPA as an additive mask of
every head, and no kernel is replaced.

Differs from the official code, which scales after softmax with eager attention: the sink is the first real token of
each row, not column 0, which is padding in a row padded on the left; a sink elsewhere can be named, and found by
measured attention, as in a vision-language model; layers have factors of their own.
"""

# Shape legend: B rows, R prompts, T new tokens, K keys, N layers, H query heads, S tokens of a prompt

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tokensieve.errors import BadOption, UnsupportedModel


class ZeroTuning:
    """Scales the attention that heads pay to the sink, in every forward until it is taken off; a context manager.

    For prompts and single tokens alike, with or without a cache, `generate`, all of `tokensieve.decoding` and
    compression. Needs sdpa or eager attention and a dynamic cache. A layer with gamma 1 in all heads is not touched;
    in each of the others the mask takes batch * heads * new tokens * keys numbers of the model's type, so give
    `prefill_chunk_size` to `generate` for long prompts. In half precision log gamma is rounded like any logit.

    Methods that rank visual tokens by attention inside the language model read it without the factors.

    Args:
        model: a language model, or a vision-language model.
        gamma: above 0: one factor, `[H]` one for every query head, or `[N, H]`.
        sink: how many real tokens stand before the sink in the prompt; or a list with one number for every prompt, in
            the batch's order (rows of one prompt, such as beams, must stay together). 0 is the first token; see
            `find_sinks`.

    Raises:
        BadOption: gamma not above 0 or of another shape, or a negative sink. In a forward: another number of prompts
            than sinks, a prompt that is too short for its sink, a static cache, another attention, or a sink that is
            not the first token together with compression inside the language model, which moves tokens.
        UnsupportedModel: layers without attention modules, or that see a window only and have a gamma other than 1.

    Example:
        >>> with ZeroTuning(model, 1.5):
        ...     model.generate(**inputs)
    """

    def __init__(self, model: nn.Module, gamma: float | Sequence[float] | Tensor, sink: int | Sequence[int] = 0):
        self.model = model
        self._decoder = model.get_decoder()
        modules = attention_modules(self._decoder)
        num_heads = self._decoder.config.num_attention_heads
        gamma_NH = expand_gamma(gamma, len(modules), num_heads)
        sinks = list(sink) if isinstance(sink, Sequence) else [sink]
        if not sinks or not all(isinstance(s, int) and s >= 0 for s in sinks):
            raise BadOption(f"sink must be a whole number from 0 on, or a list of them; got {sink!r}.")
        self.gamma_NH = gamma_NH
        self.sinks = sinks
        self._tuned = {i: m for i, m in enumerate(modules) if bool((gamma_NH[i] != 1).any())}
        windows = [i for i, module in self._tuned.items() if getattr(module, "sliding_window", None)]
        if windows:
            raise UnsupportedModel(
                f"Layers {windows[:3]} see a window only, and the sink leaves it.", hint="Give them gamma 1."
            )
        self._handles: list = []

    @property
    def installed(self) -> bool:
        return bool(self._handles)

    def install(self) -> ZeroTuning:
        """Puts the factors on; a second call does nothing."""
        if not self._handles:
            self._handles = [
                module.register_forward_pre_hook(partial(self._bias, index), with_kwargs=True)
                for index, module in self._tuned.items()
            ]
        return self

    def remove(self) -> None:
        """Takes the factors off; the model is as it was. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> ZeroTuning:
        return self.install()

    def __exit__(self, *error) -> None:
        self.remove()

    def _bias(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        mask = self._mask(kwargs.get("attention_mask"), hidden, kwargs.get("cache"), index)
        place_B1 = self._places(mask, hidden.shape[0], kwargs.get("cache"))
        log_gamma_H = self.gamma_NH[index].log().to(hidden.device)
        bias_BHK = torch.zeros(len(place_B1), len(log_gamma_H), mask.shape[-1], device=hidden.device)
        bias_BHK.scatter_(
            2, place_B1[:, None].expand(-1, len(log_gamma_H), 1), log_gamma_H[:, None].expand_as(bias_BHK[..., :1])
        )
        return args, kwargs | {"attention_mask": with_bias(mask, bias_BHK, hidden.dtype)}

    def _mask(self, mask: Tensor | None, hidden: Tensor, cache, index: int) -> Tensor:
        """`[B or 1, 1 or H, T, K]`, bool or additive: what the layer's attention would use."""
        from transformers import DynamicCache

        attention = self._decoder.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise BadOption(
                f"ZeroTuning adds to the mask, and {attention!r} attention takes none.",
                hint="Load the model with sdpa.",
            )
        if cache is not None and not isinstance(cache, DynamicCache):
            raise BadOption(
                f"ZeroTuning needs a dynamic cache, got {type(cache).__name__}.", hint="Leave cache_implementation out."
            )
        if mask is not None:
            return mask
        past, num_new = 0 if cache is None else cache.get_seq_length(index), hidden.shape[1]
        every = torch.ones(1, 1, num_new, past + num_new, dtype=torch.bool, device=hidden.device)
        return every.tril(past)

    def _places(self, mask: Tensor, num_rows: int, cache) -> Tensor:
        """`[B, 1]` int64: the column of the sink, counted among the keys that the last query sees."""
        from tokensieve.pipeline.decoder_cache import notes_of

        last_BK = mask[:, 0, -1]
        sees_BK = last_BK if last_BK.dtype == torch.bool else last_BK > torch.finfo(last_BK.dtype).min / 2
        if not any(self.sinks):
            return sees_BK.int().argmax(-1, keepdim=True)
        if notes_of(cache) is not None:
            raise BadOption(
                "Compression inside the language model moves tokens, and the sink would be lost.",
                hint="Take sink=0, or a method that works before the language model.",
            )
        if num_rows % len(self.sinks):
            raise BadOption(f"{len(self.sinks)} sinks were given for a batch of {num_rows} rows.")
        sees_BK = sees_BK.expand(num_rows, -1)
        sink_R = torch.tensor(self.sinks, device=mask.device)
        rank_B1 = sink_R.repeat_interleave(num_rows // len(sink_R))[:, None] + 1
        if (sees_BK.sum(-1, keepdim=True) < rank_B1).any():
            raise BadOption(f"A prompt has fewer tokens than stand before its sink ({max(self.sinks)}).")
        return (sees_BK.int().cumsum(-1) == rank_B1).int().argmax(-1, keepdim=True)


def expand_gamma(gamma: float | Sequence[float] | Tensor, num_layers: int, num_heads: int) -> Tensor:
    """`[N, H]` float32 from one factor, one for every head, or one for every layer and head.

    Raises:
        BadOption: another shape, or a factor that is not a finite number above 0.
    """
    given = torch.as_tensor(gamma, dtype=torch.float32, device="cpu")
    if given.shape not in ((), (num_heads,), (num_layers, num_heads)):
        raise BadOption(
            f"gamma must be one number, {num_heads} (heads) or {num_layers} x {num_heads} (layers and heads); "
            f"got shape {tuple(given.shape)}."
        )
    if not bool((given.isfinite() & (given > 0)).all()):
        raise BadOption("gamma must be above 0 and finite.", hint="A small one, such as 1e-4, hides the sink.")
    return given.expand(num_layers, num_heads).clone()


def with_bias(mask: Tensor, bias_BHK: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, H, T, K]` additive mask: the bias where the mask lets a query look, the type's lowest number elsewhere.

    Args:
        mask: `[B or 1, 1 or H, T, K]`, bool (True = may look) or additive.
        bias_BHK: added to the logits, of every query alike.
        dtype: of the queries.
    """
    bias = bias_BHK[:, :, None].to(dtype)
    if mask.dtype != torch.bool:
        return mask.to(dtype) + bias
    return torch.where(mask, bias, torch.finfo(dtype).min)


def attention_modules(decoder: nn.Module) -> list[nn.Module]:
    """The attention modules of a decoder's layers, in order.

    Raises:
        UnsupportedModel: it has none where the families of transformers have them.
    """
    layers = getattr(decoder, "layers", None)
    if not layers or not all(hasattr(layer, "self_attn") for layer in layers):
        raise UnsupportedModel(f"{type(decoder).__name__} has no layers with self_attn.")
    return [layer.self_attn for layer in layers]


@torch.no_grad()
def find_sinks(model: nn.Module, **inputs) -> list[int]:
    """Where each prompt's sink stands, by measured attention: how many real tokens stand before it.

    The last quarter of a prompt's tokens is asked, and of the tokens before them the one that draws most attention
    counts, as the mean over layers and heads (INFERRED: the paper takes the first token). Runs the prompts once.

    Args:
        model: as in `ZeroTuning`.
        **inputs: a batch for `generate`: `input_ids`, `attention_mask`, pixels or what `VLM.prepare` returned.

    Raises:
        BadOption: a prompt of fewer than 2 tokens, or compression inside the language model.
        UnsupportedModel: attention cannot be computed beside the layers of this model.

    Example:
        >>> tuned = ZeroTuning(model, 1.5, sink=find_sinks(model, **inputs))
    """
    from tokensieve.decoding.session import DecodeSession
    from tokensieve.pipeline.attention_rows import attention_to, check_layer

    layers = model.get_decoder().layers
    attention_modules(model.get_decoder())
    for layer in layers:
        check_layer(layer)
    mask_BS = inputs.get("attention_mask")
    given = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    real_BS = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device) if mask_BS is None else mask_BS.bool()
    places = [row.nonzero()[:, 0] for row in real_BS]
    if min(map(len, places)) < 2:
        raise BadOption("A prompt of one token is its own sink.")
    totals = [0.0] * len(places)

    def look(layer, args, kwargs) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] != real_BS.shape[1]:
            raise BadOption(
                "Compression inside the language model moves tokens, so its sinks cannot be found.",
                hint="Take it off: compress(None).",
            )
        mask = kwargs.get("attention_mask")
        for row, place_S in enumerate(places):
            asked = max(1, len(place_S) // 4)
            cos, sin = (part[min(row, len(part) - 1)] for part in kwargs["position_embeddings"])
            seen = None if mask is None else mask[min(row, len(mask) - 1)]
            mass_HS = attention_to(layer, hidden[row], cos, sin, seen, place_S[-asked:], place_S[:-asked])
            totals[row] = totals[row] + mass_HS.mean(0).cpu()

    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        DecodeSession(model).prefill(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [int(total.argmax()) for total in totals]
