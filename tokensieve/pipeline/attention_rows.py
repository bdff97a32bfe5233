"""A few rows of one decoder layer's attention, from its own norm, projections and rotary embedding.

SDPA and Flash return no attention, and a method inside the language model needs only some rows of it. These are
computed beside the layer, in chunks of rows, so that memory is O(rows * S) at most and never S x S. Any layer in the
shape that transformers gives Llama, Qwen2, Qwen2-VL, Qwen3(-VL), Gemma 1 to 3 and the like will do: `input_layernorm`,
`self_attn` with `q_proj`, `k_proj`, `head_dim`, `scaling`, and where it has them `q_norm`, `k_norm`, `sliding_window`
and `attn_logit_softcapping`. M-RoPE needs nothing special: transformers hands its layers cos and sin of one row.
"""

# Shape legend: S tokens of one prompt, K keys (S, or more with a cache), R rows asked for, r rows of a chunk,
#               N columns asked for, H heads, G key-value heads, D width, d head

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokensieve.errors import UnsupportedModel

MAX_CHUNK_BYTES = 2**26  # of one [H, r, K] chunk of logits; a handful of that size live at a time


def check_layer(layer: nn.Module) -> None:
    """Raises UnsupportedModel if the layer does not have the parts that rows are computed from."""
    attention = getattr(layer, "self_attn", None)
    missing = [name for name in ("q_proj", "k_proj", "head_dim", "scaling") if not hasattr(attention, name)]
    if missing or not hasattr(layer, "input_layernorm"):
        raise UnsupportedModel(
            f"{type(layer).__name__} has no {', '.join(missing) or 'input_layernorm'}, so attention rows cannot be "
            "computed beside it."
        )


@torch.no_grad()
def attention_to(
    layer: nn.Module,
    hidden_SD: Tensor,
    cos_Sd: Tensor,
    sin_Sd: Tensor,
    mask: Tensor | None,
    rows_R: Tensor,
    columns_N: Tensor,
    over_rows: str = "mean",
    past_keys_GPd: Tensor | None = None,
) -> Tensor:
    """`[H, N]` float32: attention from some tokens of a prompt to some keys, mean or maximum over these tokens.

    Args:
        layer: the decoder layer.
        hidden_SD: what enters it.
        cos_Sd, sin_Sd: its rotary embedding for these tokens.
        mask: as the layer gets it, for this prompt: `[h, S, K]` bool (True = may look) or additive, h 1 or H; `[K]`
            bool over keys, then causal as well; None for causal.
        rows_R: query tokens, int64.
        columns_N: keys, int64.
        over_rows: "mean" or "max".
        past_keys_GPd: keys in the cache, as the layer stored them; they come before those of `hidden_SD`.

    Returns:
        Probabilities: softmax over all keys, of which the columns are a part.
    """
    attention = layer.self_attn
    with torch.autocast(hidden_SD.device.type, enabled=False):
        normed_SD = layer.input_layernorm(hidden_SD[None])[0]
        weight = getattr(attention.k_proj, "weight", normed_SD)
        if weight.is_floating_point():  # the stream is of another dtype under autocast
            normed_SD = normed_SD.to(weight.dtype)
        key_GKd = _heads(attention, "k", normed_SD, cos_Sd, sin_Sd)
        if past_keys_GPd is not None:
            key_GKd = torch.cat([past_keys_GPd.to(key_GKd.device, torch.float32), key_GKd], dim=1)
        num_heads = attention.config.num_attention_heads
        rows_at_once = max(1, MAX_CHUNK_BYTES // (4 * num_heads * key_GKd.shape[1]))
        first_key = key_GKd.shape[1] - len(hidden_SD)  # of the tokens in `hidden_SD`
        result_HN = None
        for rows_r in rows_R.split(rows_at_once):
            query_Hrd = _heads(attention, "q", normed_SD[rows_r], cos_Sd[rows_r], sin_Sd[rows_r])
            query_Ghrd = query_Hrd.unflatten(0, (len(key_GKd), -1))
            logits_HrK = (query_Ghrd @ key_GKd[:, None].transpose(-1, -2)).flatten(0, 1) * attention.scaling
            cap = getattr(attention, "attn_logit_softcapping", None)
            if cap is not None:
                logits_HrK = torch.tanh(logits_HrK / cap) * cap
            logits_HrK = _masked(logits_HrK, mask, rows_r, first_key, getattr(attention, "sliding_window", None))
            part_HrN = logits_HrK.softmax(-1)[..., columns_N]
            part_HN = part_HrN.amax(1) if over_rows == "max" else part_HrN.sum(1)
            if result_HN is None:
                result_HN = part_HN
            else:
                result_HN = torch.maximum(result_HN, part_HN) if over_rows == "max" else result_HN + part_HN
    return result_HN if over_rows == "max" else result_HN / len(rows_R)


def _heads(attention: nn.Module, which: str, normed_SD: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    """Queries or keys, `[heads, S, d]` float32, normed and rotated as the layer does."""
    projected = getattr(attention, f"{which}_proj")(normed_SD).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)
    heads_hSd = (projected if norm is None else norm(projected)).transpose(0, 1)
    first, second = heads_hSd.chunk(2, dim=-1)
    return (heads_hSd * cos_Sd + torch.cat([-second, first], dim=-1) * sin_Sd).float()


def _masked(logits_HrK: Tensor, mask: Tensor | None, rows_r: Tensor, first_key: int, window: int | None) -> Tensor:
    if mask is not None and mask.ndim == 3:
        mask_hrK = mask.index_select(1, rows_r)
        if mask_hrK.dtype == torch.bool:
            return logits_HrK.masked_fill(~mask_hrK, -torch.inf)
        return logits_HrK + mask_hrK.float()
    key_K = torch.arange(logits_HrK.shape[-1], device=logits_HrK.device)
    hidden_rK = key_K > rows_r[:, None] + first_key
    if window is not None:
        hidden_rK = hidden_rK | (key_K <= rows_r[:, None] + first_key - window)
    if mask is not None:
        hidden_rK = hidden_rK | ~mask.bool()
    return logits_HrK.masked_fill(hidden_rK, -torch.inf)
