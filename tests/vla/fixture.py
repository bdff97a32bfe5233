"""Tiny models, tokenizers and trunks of the tests in this folder; everything is drawn from a seed."""

import copy
from functools import cache

import torch

from tokensieve.pipeline.tiny_model import build_tokenizer
from tokensieve.vla import BehaviourConfig, BehaviourVocabulary, add_behaviour_tokens, cut_trunks

LEVELS = (8, 8, 8, 6, 5)
SMALL = {"frame_size": (16, 16), "trunk_length": 4, "levels": (5, 3), "width": 16, "num_channels": 4, "num_heads": 2}


@cache
def _tokenizer():
    return build_tokenizer()


def tokenizer():
    """The shipped model's, without behaviour tokens; a copy."""
    return copy.deepcopy(_tokenizer())


@cache
def _with_behaviour():
    tok = tokenizer()
    model = language_model(len(tok))
    add_behaviour_tokens(model, tok, LEVELS)
    return model.eval(), tok


def with_behaviour():
    """A random language model and its tokenizer (a copy), both with behaviour tokens, and their vocabulary."""
    model, tok = _with_behaviour()
    return model, copy.deepcopy(tok), BehaviourVocabulary.of(tok)


def language_model(num_rows: int, tied: bool = False):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=num_rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def config(**changes) -> BehaviourConfig:
    """Of a small tokeniser: frames of 16 x 16, trunks of 4 steps, 15 codes."""
    return BehaviourConfig(**SMALL | changes)


def episode(num_steps: int, seed: int = 0, side: int = 16, num_actions: tuple[int, ...] = (7,)):
    """Noise for frames, and random actions `[S, A]`."""
    draw = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (num_steps, side, side, 3), generator=draw, dtype=torch.uint8)
    parts = [torch.randint(0, count, (num_steps,), generator=draw) for count in num_actions]
    return frames, torch.stack(parts, -1)


def trunks(num_steps: int = 10, length: int = 4, **options):
    """An episode of noise, cut: 4, 4 and 2 steps."""
    return cut_trunks(*episode(num_steps, **options), length)
