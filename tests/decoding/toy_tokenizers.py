"""BPE tokenizers of a few tokens, and random models for them, small enough to enumerate all their texts."""

from __future__ import annotations

import torch

from tokensieve.decoding.byte_vocabulary import _alphabet


def spelled(text: str) -> str:
    letter_of = {byte: letter for letter, byte in _alphabet().items()}
    return "".join(letter_of[byte] for byte in text.encode())


def byte_level(characters: str, merges: list[tuple[str, str]], specials=("<s>", "</s>")):
    """GPT-2's kind. Merges are pairs of texts, whole characters or not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set(spelled(characters)))
    merges = [(m if isinstance(m, tuple) else tuple(m)) for m in merges]
    tokens = [*specials, *letters, *(a + b for a, b in merges)]
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_fallback(pieces: list[str], merges: list[tuple[str, str]]):
    """Llama 2's kind: spaces are U+2581, one is put before a text, and unknown characters fall back on bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokens += [a + b for a, b in merges]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def toy_model(tokenizer, seed: int = 0, padded: int = 3):
    """A random Llama; its vocabulary is larger than the tokenizer's, as those of many models are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(tokenizer) + padded,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 12
    return model


ASCII = ("ab1 's", [("a", "b"), ("Ġ", "a"), ("Ġ", "ab"), ("ab", "a"), ("1", "1"), ("Ġ", "Ġ"), ("'", "s"), ("b", "b")])
