"""Tiny random models and prompts for decoding: language models, and families from `tiny_families`, full or compressed.

The output layer is enlarged, so that distributions differ from uniform and a wrong context changes the tokens.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from tests.pipeline.tiny_families import FAMILIES, PAD, TEXT, make_inputs, make_model
from tokensieve.pipeline.vlm import VLM

TEXT_MODELS = ("llama", "qwen2")
# Model and the share of visual tokens that stays; None: no compression, pixels go into the model.
CASES = [
    ("llama", None),
    ("qwen2", None),
    ("llava", None),
    ("llava", 0.4),
    ("llava_onevision-video", 0.4),
    ("qwen2_5_vl", None),
    ("qwen2_5_vl", 0.4),
]


def text_model(name: str):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEXT)) if name == "llama" else Qwen2ForCausalLM(Qwen2Config(**TEXT))
    for parameter_name, parameter in model.named_parameters():
        if any(f"{p}_proj.weight" in parameter_name for p in "qkvo"):
            parameter.data *= 12
    model.generation_config.pad_token_id = PAD
    return model.eval()


def new_model(name: str):
    model = text_model(name) if name in TEXT_MODELS else make_model(name)
    model.get_output_embeddings().weight.data *= 20
    return model


@lru_cache
def shared_model(name: str):
    """For tests that leave the model as it is."""
    return new_model(name)


def prompts(name: str, keep: float | None = None, batch: int = 1, model=None) -> dict:
    """Fresh arguments for `model.generate`, rows of different lengths."""
    if name in FAMILIES:
        inputs = make_inputs(name, batch)
        if keep is None:
            return inputs
        vlm = VLM(model or shared_model(name)).compress("uniform", keep)
        return dict(vlm.compress_inputs(inputs))
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(2, 80, (9 + 2 * i,), generator=generator).tolist() for i in range(batch)]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}
