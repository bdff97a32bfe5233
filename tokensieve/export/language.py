"""The language model as two graphs: token embedding, and the decoder with its cache, prefill and steps in one."""

# Shape legend: B batch, L new places, P cached places, S = P + L, D width, A heads of queries, H heads of keys,
#               d width of a head, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokensieve.errors import UnsupportedModel
from tokensieve.export.block_attention import block_attention

TEXT_MODELS = ("llama", "qwen2", "qwen2_5_vl_text")
# Rotary embeddings whose frequencies follow the longest position seen: a graph has them fixed.
CHANGING_ROPE = ("dynamic", "longrope")


def check_text(model: nn.Module) -> None:
    """Raises UnsupportedModel unless the decoder of this vision-language model can be exported."""
    config = model.config.get_text_config()
    if config.model_type not in TEXT_MODELS:
        raise UnsupportedModel(
            f"Language models of type {config.model_type!r} cannot be exported; {', '.join(TEXT_MODELS)} can."
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise UnsupportedModel(
            f"The language model has layers of kind {', '.join(sorted(kinds))}; only full attention can be exported."
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in CHANGING_ROPE:
        raise UnsupportedModel(
            f"Rotary embeddings of kind {rope!r} change with the prompt, so they cannot be exported."
        )


def text_model(model: nn.Module) -> nn.Module:
    """The language model without its head."""
    base = model.model
    return base.text_model if hasattr(base, "text_model") else base.language_model


class Embedding(nn.Module):
    """`input_ids` `[B, L]` int64 to `inputs_embeds` `[B, L, D]` float32."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.table = model.get_input_embeddings()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids).float()


class Decoder(nn.Module):
    """Embeddings, masks and positions to the logits of the last place, and the cache with the new places.

    Takes `inputs_embeds` `[B, L, D]` float32, `attention_mask` `[B, S]` int64 (0 where padded), `position_ids` `[B, L]`
    int64 (`[3, B, L]` for Qwen2.5-VL) and, layer by layer, cached keys and values `[B, H, P, d]`. Returns logits
    `[B, 1, V]` float32 and keys and values `[B, H, S, d]`. Prompts are padded on the left; positions may have gaps.

    The layers are those of `TEXT_MODELS`, which differ in the positions alone. Their attention is `block_attention`:
    transformers' repeats the whole cache for the queries that share a key, and in half precision scales too late.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        text = text_model(model)
        self.layers, self.norm, self.rotary, self.head = text.layers, text.norm, text.rotary_emb, model.lm_head

    def forward(self, embeds_BLD: Tensor, mask_BS: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        hidden_BLD = embeds_BLD.to(self.head.weight.dtype)
        seen_BS = mask_BS.bool()
        cos_BLd, sin_BLd = self.rotary(hidden_BLD, position_ids)
        rotation = cos_BLd[:, None], sin_BLd[:, None]
        scaling = self.layers[0].self_attn.scaling
        query_rotation = rotation[0] * scaling, rotation[1] * scaling
        present = []
        for layer, key, value in zip(self.layers, past[::2], past[1::2], strict=True):
            attention, normed_BLD = layer.self_attn, _normed(layer.input_layernorm, hidden_BLD)
            query_BALd, new_key, new_value = (
                part(normed_BLD).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            key_BHSd = torch.cat([key, _rotated(new_key, rotation)], dim=2)
            value_BHSd = torch.cat([value, new_value], dim=2)
            mixed_BLD = block_attention(_rotated(query_BALd, query_rotation), key_BHSd, value_BHSd, seen_BS)
            hidden_BLD = hidden_BLD + attention.o_proj(mixed_BLD)
            hidden_BLD = hidden_BLD + layer.mlp(_normed(layer.post_attention_layernorm, hidden_BLD))
            present += [key_BHSd, value_BHSd]
        last_B1D = _normed(self.norm, hidden_BLD[:, -1:])
        return self.head(last_B1D).float(), *present


def _normed(norm: nn.Module, x_BLD: Tensor) -> Tensor:
    """RMS norm as a quotient, which onnxruntime knows as one; transformers' product with a reciprocal it does not."""
    float_BLD = x_BLD.float()
    rms_BL1 = (float_BLD.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    return norm.weight * (float_BLD / rms_BL1).to(x_BLD.dtype)


def _rotated(x_BALd: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding, halves paired."""
    cos, sin = rotation
    first, second = x_BALd.chunk(2, dim=-1)
    return x_BALd * cos + torch.cat([-second, first], dim=-1) * sin


def cache_facts(model: nn.Module) -> dict[str, int]:
    """Sizes of the cache and of the logits, as the manifest records them."""
    config = model.config.get_text_config()
    text = text_model(model)
    return {
        "num_layers": len(text.layers),
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": text.layers[0].self_attn.head_dim,
        "width": config.hidden_size,
        "vocab": model.lm_head.out_features,
    }


def decoder_inputs(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, list[str | int]]]:
    """An example of every input of `Decoder`, and their shapes with names for what is dynamic."""
    facts = cache_facts(model)
    batch, new, past = 2, 3, 5
    rows = 3 if model.config.model_type == "qwen2_5_vl" else 0
    positions = torch.arange(past, past + new).expand(*([rows] if rows else []), batch, new).contiguous()
    inputs = {
        "inputs_embeds": torch.randn(batch, new, facts["width"], generator=torch.Generator().manual_seed(0)),
        "attention_mask": torch.ones(batch, past + new, dtype=torch.long),
        "position_ids": positions,
    }
    shapes: dict[str, list[str | int]] = {
        "inputs_embeds": ["batch", "length", facts["width"]],
        "attention_mask": ["batch", "total"],
        "position_ids": [*([rows] if rows else []), "batch", "length"],
    }
    for name in cache_names("past_key_values", facts["num_layers"]):
        inputs[name] = torch.zeros(batch, facts["num_kv_heads"], past, facts["head_dim"], dtype=dtype)
        shapes[name] = ["batch", facts["num_kv_heads"], "past", facts["head_dim"]]
    return inputs, shapes


def decoder_outputs(model: nn.Module) -> dict[str, list[str | int]]:
    """Names and shapes of what `Decoder` returns."""
    facts = cache_facts(model)
    present = ["batch", facts["num_kv_heads"], "total", facts["head_dim"]]
    names = cache_names("present", facts["num_layers"])
    return {"logits": ["batch", 1, facts["vocab"]], **dict.fromkeys(names, present)}


def cache_names(prefix: str, num_layers: int) -> list[str]:
    """`prefix.0.key`, `prefix.0.value`, `prefix.1.key` ..."""
    return [f"{prefix}.{layer}.{part}" for layer in range(num_layers) for part in ("key", "value")]
