"""Runs with decoder hooks, and the reference: the full prompt in eager attention with keys hidden by a test hook."""

from __future__ import annotations

import torch

from tokensieve.compression import get_method, keep_all, list_methods
from tokensieve.compression.decoder_stage import DecoderStage
from tokensieve.pipeline.decoder_cache import notes_of
from tokensieve.pipeline.decoder_hooks import DecoderHooks

TOLERANCE = 1e-5
GREEDY = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
METHODS = [m.name for m in list_methods("decoder")]
# Methods that only prune, with the options that make them so. DyCoke hides keys at decode: tested by itself.
PRUNING = {"fastv": {}, "pyramiddrop": {}, "prunevid-decoder": {}, "sparsevlm": {"recycle": False}}


def stage_of(method, **options):
    return get_method(method).fn(**options)


def emitted(adapter, inputs, items=None, **options):
    items = items or adapter.encode(inputs)
    return adapter.emit(inputs, items, [keep_all(len(i.tokens)) for i in items], **options)


def layers_of(model):
    base = model.model
    return (base.language_model if hasattr(base, "language_model") else base.text_model).layers


class Hidden:
    """Eager attention with keys hidden: `prompt[layer]` and `later[layer]` are `[B, S]` bool, what may be seen."""

    def __init__(self, model, prompt, later, afterwards="sdpa"):
        self.model, self.prompt, self.later, self.afterwards = model, prompt, later, afterwards

    def __enter__(self):
        self.model.set_attn_implementation("eager")
        self.handles = [
            layer.register_forward_pre_hook(lambda m, a, kw, i=i: self.hide(i, a, kw), with_kwargs=True)
            for i, layer in enumerate(layers_of(self.model))
        ]

    def hide(self, index, args, kwargs):
        mask = kwargs["attention_mask"]
        stays = (self.prompt if mask.shape[2] == self.prompt[0].shape[1] else self.later)[index]
        stays = stays.repeat_interleave(len(mask) // len(stays), 0)
        hidden = torch.zeros(len(mask), mask.shape[3], dtype=torch.bool)
        hidden[:, : stays.shape[1]] = ~stays
        return args, kwargs | {"attention_mask": mask.masked_fill(hidden[:, None, None], torch.finfo(mask.dtype).min)}

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        self.model.set_attn_implementation(self.afterwards)


def what_stayed(cache, valid, steps, num_layers):
    """What each layer saw in the prompt's forward, and what its cache held afterwards."""
    notes = notes_of(cache)
    later = [notes.layouts[i].stays if i in notes.layouts else valid for i in range(num_layers)]
    first = min(step.layer for step in steps)
    return [valid if i < first else stays for i, stays in enumerate(later)], later


def run_and_reference(adapter, inputs, stage, keep, attention="sdpa", **options):
    """Logits of every step and ids with the hooks, and those of the full prompt with the same keys hidden."""
    model, items = adapter.model, adapter.encode(inputs)
    options = GREEDY | dict(return_dict_in_generate=True, output_logits=True) | options
    hooks = DecoderHooks(model, stage, keep)
    with hooks:
        got = model.generate(**emitted(adapter, inputs, items), **options)
    num_layers = len(layers_of(model))
    valid = inputs["attention_mask"].bool()
    prompt, later = what_stayed(got.past_key_values, valid, stage.steps(num_layers), num_layers)
    with Hidden(model, prompt, later, attention):
        want = model.generate(**emitted(adapter, inputs, items), **options)
    return hooks, got, want


def assert_same(got, want):
    assert torch.equal(got.sequences, want.sequences)
    for step, expected in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(step, expected, atol=TOLERANCE, rtol=0)


class Recorded(DecoderStage):
    """A stage that writes down what it is asked and what it answers."""

    def __init__(self, stage):
        self.stage, self.seen, self.attention, self.plans, self.chosen = stage, [], [], [], []
        self.steps, self.decode_layer, self.raters = stage.steps, stage.decode_layer, stage.raters

    def select(self, step, tokens):
        self.seen.append(tokens)
        self.attention.append(tokens.attention())
        self.plans.append(self.stage.select(step, tokens))
        return self.plans[-1]

    def select_at_decode(self, attention, num_keep, before):
        self.chosen.append(self.stage.select_at_decode(attention, num_keep, before))
        return self.chosen[-1]
