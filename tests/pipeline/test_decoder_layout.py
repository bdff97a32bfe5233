"""Masks and indices of prompts that lost tokens, as pure functions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.pipeline.tiny_families import make_model
from tokensieve.errors import UnsupportedModel
from tokensieve.pipeline.attention_rows import attention_to, check_layer
from tokensieve.pipeline.decoder_cache import CacheNotes
from tokensieve.pipeline.decoder_layout import Layout, decode_mask, is_flash, prefix_mask, take

VALID = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
STAYS = torch.tensor([[0, 1, 0, 1, 0, 1], [1, 1, 0, 0, 1, 1]]).bool()


def test_tokens_move_to_the_right_end():
    layout = Layout.full(VALID).keeping(STAYS)
    assert layout.index.shape == (2, 4) and layout.index[0, 1:].tolist() == [1, 3, 5]
    assert layout.index[1].tolist() == [0, 1, 4, 5] and layout.real.tolist() == [[False, True, True, True], [True] * 4]
    assert layout.columns(0, torch.tensor([3, 5])).tolist() == [2, 3]
    assert layout.columns(1, torch.tensor([0, 4])).tolist() == [0, 2]


def test_steps_one_after_the_other_equal_one():
    later = STAYS & torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]]).bool()
    x = torch.arange(12.0).view(2, 6, 1)
    first = Layout.full(VALID).keeping(STAYS)
    second = first.keeping(later)
    there = take(first.take(x, 1), first.order_to(second), 1)
    assert torch.equal(there[second.real], x[later])
    assert torch.equal(second.put_back(there), x * later[..., None])


def test_masks_of_the_prompt_follow():
    full = VALID[:, None, None] & torch.ones(6, 6).tril().bool()
    layout = Layout.full(VALID).keeping(STAYS)
    for mask, seen in ((full, lambda m: m), (torch.zeros(full.shape).masked_fill(~full, -1e9), lambda m: m == 0)):
        cut = seen(layout.take_mask(mask, "sdpa"))
        for row, columns in enumerate(([1, 3, 5], [0, 1, 4, 5])):
            k = len(columns)
            assert torch.equal(cut[row, 0, -k:, -k:], full[row, 0][columns][:, columns])
            assert not cut[row, 0, :, :-k].any()
    assert layout.take_mask(None, "sdpa").tolist() == prefix_mask(layout.real, 4).tolist()
    assert torch.equal(layout.take_mask(None, "flash_attention_2"), layout.real)
    assert torch.equal(layout.take_mask(VALID, "flash_attention_2"), layout.real)
    even = Layout.full(VALID).keeping(STAYS & (torch.arange(6) > 0))
    assert even.take_mask(None, "sdpa") is None and Layout.full(VALID).take_mask(full, "sdpa") is full


def test_masks_of_new_tokens():
    real = torch.tensor([[False, True, True, True, True]])
    assert decode_mask(real, 1, "sdpa", torch.float32)[0, 0].tolist() == real.tolist()
    assert decode_mask(real[:, 1:], 1, "sdpa", torch.float32) is None
    two = decode_mask(real, 2, "sdpa", torch.float32)[0, 0]
    assert two.tolist() == [[False, True, True, True, False], [False, True, True, True, True]]
    assert decode_mask(real[:, 1:], 2, "sdpa", torch.float32)[0, 0].tolist() == two[:, 1:].tolist()
    windowed = decode_mask(real, 2, "sdpa", torch.float32, window=2)[0, 0]
    assert windowed.tolist() == [[False, False, True, True, False], [False, False, False, True, True]]
    additive = decode_mask(real, 2, "eager", torch.float16)[0, 0]
    assert additive.dtype == torch.float16 and torch.equal(additive == 0, two) and additive.min() == -65504
    assert decode_mask(real, 1, "flash_attention_2", torch.float16) is real
    assert decode_mask(real[:, 1:], 2, "flash_attention_2", torch.float16) is None
    assert is_flash("flash_attention_3") and not is_flash("sdpa") and not is_flash("paged|flash_attention_2")


def test_real_keys_of_a_layer():
    """After 2 new tokens, after a crop into the prompt, in a sliding layer, and with every prompt twice."""
    layout = Layout.full(VALID).keeping(STAYS)
    notes = CacheNotes(full_length=6, candidates=[torch.arange(2)] * 2, layouts={1: layout})

    def real(seen, held, rows=2):
        stored = SimpleNamespace(get_seq_length=lambda: seen, keys=torch.zeros(rows, 1, held, 4))
        return notes.real_keys(stored, 1, rows, 1).int().tolist()

    assert real(6, 6) == [[0, 1, 1, 1, 1, 1, 1], [1] * 7]
    assert real(2, 2) == [[0, 1, 1], [1, 1, 1]]
    assert real(6, 5) == [[1] * 6, [1] * 6] and real(4, 3)[0] == [1, 1, 1, 1] and real(5, 5)[0] == [0, 1, 1, 1, 1, 1]
    assert real(4, 4, rows=4) == [[0, 1, 1, 1, 1]] * 2 + [[1] * 5] * 2
    assert notes.real_keys(None, 0, 2, 1) is None


@torch.no_grad()
def test_attention_rows_know_causality_padding_and_windows():
    """Where the layer gets no full mask, as with Flash."""
    layer = make_model("gemma3").model.language_model.layers[0]
    generator = torch.Generator().manual_seed(0)
    hidden, cos, sin = (torch.randn(9, n, generator=generator) for n in (32, 8, 8))
    rows, columns = torch.tensor([4, 8]), torch.arange(1, 9)
    place = torch.arange(9)
    for window in (512, 3):
        layer.self_attn.sliding_window = window
        full = (place <= place[:, None]) & (place > place[:, None] - window)
        got = attention_to(layer, hidden, cos, sin, None, rows, columns)
        torch.testing.assert_close(got, attention_to(layer, hidden, cos, sin, full[None], rows, columns))
        real = place != 7
        got = attention_to(layer, hidden, cos, sin, real, rows, columns, "max")
        want = attention_to(layer, hidden, cos, sin, (full & real)[None], rows, columns, "max")
        torch.testing.assert_close(got, want)
        assert (got[:, 6] == 0).all() and (got > 0).any()


def test_layers_that_rows_cannot_be_computed_from():
    with pytest.raises(UnsupportedModel, match="q_proj"):
        check_layer(torch.nn.TransformerEncoderLayer(8, 2))
