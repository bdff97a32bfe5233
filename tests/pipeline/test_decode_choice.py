"""Visual keys chosen anew for every generated token equal keys hidden in the mask."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.pipeline.decoder_reference import GREEDY, Hidden, Recorded, assert_same, emitted, stage_of
from tests.pipeline.tiny_families import make_inputs, make_model
from tokensieve.compression.decoder_stage import Chosen
from tokensieve.pipeline.adapter import VLMAdapter
from tokensieve.pipeline.decode_choice import _same_rows
from tokensieve.pipeline.decoder_cache import CacheNotes
from tokensieve.pipeline.decoder_hooks import DecoderHooks


@pytest.fixture(scope="module")
def llava():
    return VLMAdapter(make_model("llava"))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("reuse", [2, 0.9, -1])
def test_choosing_keys_at_decode_equals_hiding(batch, reuse):
    """DyCoke: the choice of every generated token, in the last layer of three, looking at the second."""
    adapter, inputs = VLMAdapter(make_model("llava_onevision-video")), make_inputs("llava_onevision-video", batch)
    model, stage = adapter.model, Recorded(stage_of("dycoke-decoder", reuse=reuse))
    items = adapter.encode(inputs)
    options = GREEDY | dict(return_dict_in_generate=True, output_logits=True)
    with DecoderHooks(model, stage, 0.4):
        got = model.generate(**emitted(adapter, inputs, items), **options)
    columns = [item.slots[item.candidates] for item in items]
    valid = inputs["attention_mask"].bool()

    class PerStep(Hidden):
        def hide(self, index, args, kwargs):
            step = kwargs["attention_mask"].shape[3] - valid.shape[1] - 1
            if step < 0 or index < 2:
                return args, kwargs
            stays = valid.clone()
            for row in range(batch):
                stays[row, columns[row][~stage.chosen[step * batch + row].kept]] = False
            self.later = [stays] * 3
            return super().hide(index, args, kwargs)

    with PerStep(model, [valid] * 3, None):
        want = model.generate(**emitted(adapter, inputs, items), **options, output_attentions=True)
    assert_same(got, want)
    assert len(stage.chosen) == 4 * batch and all(chosen.kept.sum() == 6 for chosen in stage.chosen)
    for step, maps in enumerate(want.attentions[1:]):
        for row in range(batch):
            seen = maps[1][row, :, 0, columns[row]].mean(0)
            torch.testing.assert_close(stage.chosen[step * batch + row].attention, seen, atol=1e-6, rtol=0)
    kept = [torch.stack([c.kept for c in stage.chosen[row::batch]]) for row in range(batch)]
    assert all((k == k[0]).all() for k in kept) == (reuse == -1)


def test_choices_follow_beams():
    """Rows of the cache move; the keys of the last token tell where each came from."""
    keys = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    chosen = [Chosen(kept=torch.tensor([i]), attention=torch.zeros(1)) for i in range(3)]
    notes = CacheNotes(full_length=5, candidates=[torch.arange(2)], chosen=chosen, tag=keys)
    assert [c.kept.item() for c in _same_rows(notes, keys[[2, 0, 0]])] == [2, 0, 0]
    assert _same_rows(notes, keys[[1]] + 1) == [None]
    assert _same_rows(CacheNotes(full_length=5, candidates=[]), keys) == [None] * 3


def test_choosing_at_decode_for_several_tokens_looks_from_the_last(llava):
    inputs, stage = make_inputs("llava", 1), Recorded(stage_of("dycoke-decoder", reuse=2))
    ids, places = torch.tensor([[5, 6, 7]]), torch.arange(43, 46)[None]
    with DecoderHooks(llava.model, stage, 0.4):
        cache = llava.model(**emitted(llava, inputs)).cache
        for first, stop in ((0, 1), (1, 3)):
            more = dict(input_ids=ids[:, first:stop], position_ids=places[:, first:stop])
            before = copy.deepcopy(cache)
            llava.model(**more, cache=cache, attention_mask=torch.ones(1, 43 + stop, dtype=torch.long))
        for i in (1, 2):
            more = dict(input_ids=ids[:, i : i + 1], position_ids=places[:, i : i + 1])
            llava.model(**more, cache=before, attention_mask=torch.ones(1, 44 + i, dtype=torch.long))
    assert len(stage.chosen) == 4
    torch.testing.assert_close(stage.chosen[1].attention, stage.chosen[3].attention)
    assert not torch.allclose(stage.chosen[1].attention, stage.chosen[2].attention)


def test_choosing_at_decode_runs_with_beams(llava):
    inputs = make_inputs("llava", 2)
    with DecoderHooks(llava.model, stage_of("dycoke-decoder"), 0.4):
        ids = llava.model.generate(**emitted(llava, inputs), **GREEDY, num_beams=3)
    assert ids.shape == (2, inputs["input_ids"].shape[1] + 5)
