"""Runs a method inside the language model of a transformers model: tokens leave between two decoder layers.

Forward hooks on the base model, the language model and its layers; nothing is patched and SDPA or Flash stay on. With
the hooks installed `model.generate(**inputs)` and `model(**inputs)` work as before. In the forward of a prompt, at
the entry of a layer with a step:

1. the few attention rows that the method asks for are computed from that layer's queries and keys;
2. the method makes a plan for the visual tokens of every prompt; rows with equal inputs (beams) share one;
3. hidden states are merged and gathered, and from then on what runs along the prompt (rotary embedding, positions,
   both axes of the mask) is gathered for every layer, so that tokens keep their positions.

Layers then hold caches of unequal length. Which keys of a layer are real is written into the cache object, so that
every later forward with this cache builds the mask of each layer from it. The language model's output is put back to
the full length, zeros where a token left.

Two limits. After the prompt a sliding window counts the keys that are there, so where a prompt is longer than the
window, dropping lets older tokens back in. Assisted decoding puts its first guesses behind the prompt, and the last of
them is taken for the prompt's last token.
"""

# Shape legend: B prompts, S tokens of the full prompt

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tokensieve.compression import check_keep
from tokensieve.compression.decoder_stage import DecoderStage
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.attention_rows import check_layer
from tokensieve.pipeline.decode_choice import DecodeChoice
from tokensieve.pipeline.decoder_cache import check_cache, notes_of
from tokensieve.pipeline.decoder_layout import is_flash
from tokensieve.pipeline.decoder_pass import PromptPass
from tokensieve.pipeline.decoder_prompt import read_prompts

_ATTENTION = ("eager", "sdpa")
_VISUAL_INPUTS = ("pixel_values", "pixel_values_videos")


class DecoderHooks:
    """The hooks of one stage on one model; a context manager.

    Args:
        model: a `*ForConditionalGeneration` of a supported family.
        stage: what a method registered with place "decoder" makes: `get_method("fastv").fn(layer=3)`.
        keep: share in (0, 1] or whole number of the visual tokens of each prompt that are left after the last step.

    Attributes:
        kept_per_layer: after the forward of a batch of prompts, for every row of the batch, how many visual tokens
            (those that always stay included) each layer ran with.

    Raises:
        BadOption: `keep` or a layer of the stage is not allowed. In a forward: `inputs_embeds` alone, a prompt that
            ends with a visual token or comes in chunks, a static cache, raw pixels for a stage that needs frames, flex
            or paged attention.
        UnsupportedModel: layers that attention rows cannot be computed from.

    Example:
        >>> with DecoderHooks(model, get_method("fastv").fn(), 0.5):
        ...     model.generate(**inputs)
    """

    def __init__(self, model: nn.Module, stage: DecoderStage, keep: float | int):
        self.model = model
        self.stage = stage
        self.keep = check_keep(keep)
        base = model.model
        self._base = base
        self._decoder = base.language_model if hasattr(base, "language_model") else base.text_model
        self._layers = list(self._decoder.layers)
        for layer in self._layers:
            check_layer(layer)
        self._steps = {step.layer: step for step in stage.steps(len(self._layers))}
        if self._steps and not 0 <= min(self._steps) <= max(self._steps) < len(self._layers):
            raise BadOption(f"Steps at layers {sorted(self._steps)}, but the model has {len(self._layers)} layers.")
        self._choice = DecodeChoice.of(stage, len(self._layers), self.keep)
        self._handles: list = []
        self._pass: PromptPass | None = None
        self.kept_per_layer: list[list[int]] = []

    @property
    def installed(self) -> bool:
        return bool(self._handles)

    def install(self) -> DecoderHooks:
        """Puts the hooks in place; a second call does nothing.

        Raises:
            BadOption: other decoder hooks are installed on this model.
        """
        if self._handles:
            return self
        if any(isinstance(hook, _Owned) for hook in self._base._forward_pre_hooks.values()):
            raise BadOption("This model has decoder hooks already.", hint="Remove them first: hooks.remove().")
        self._handles = [
            self.model.register_forward_pre_hook(_Owned(self._check_labels), with_kwargs=True),
            self._base.register_forward_pre_hook(_Owned(self._begin), with_kwargs=True),
            self._decoder.register_forward_pre_hook(_Owned(self._take_deepstack), with_kwargs=True),
            self._decoder.register_forward_hook(_Owned(self._end)),
        ]
        for index, layer in enumerate(self._layers):
            hook = _Owned(partial(self._enter_layer, index))
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def remove(self) -> None:
        """Takes the hooks off; the model is as it was. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._pass = None

    def __enter__(self) -> DecoderHooks:
        return self.install()

    def __exit__(self, *error) -> None:
        self.remove()

    def _check_labels(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The token after a visual token is predicted from a state that may have left."""
        labels, input_ids = kwargs.get("labels"), kwargs.get("input_ids")
        if labels is None or input_ids is None:
            return
        ids = [getattr(module.config, f"{m}_token_id", None) for m in ("image", "video")]
        after_visual = sum(input_ids[:, :-1] == i for i in ids if i is not None).bool()
        if (after_visual & (labels[:, 1:] != -100)).any():
            raise BadOption(
                "A label follows a visual token, whose state may have left before the last layer.",
                hint="Set labels to -100 for visual tokens and for the token after each run of them.",
            )

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._pass = None
        attention = self._decoder.config._attn_implementation
        if attention not in _ATTENTION and not is_flash(attention):
            raise BadOption(f"Attention {attention!r} has no masks to cut.", hint="Load the model with sdpa.")
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        check_cache(cache)
        past = 0 if cache is None else cache.get_seq_length()
        encoded = kwargs.get("mm_encoder_outputs") or {}
        visual = any(encoded.values()) or any(kwargs.get(name) is not None for name in _VISUAL_INPUTS)
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if past:
            if visual:
                raise BadOption(
                    "Visual tokens after a cached beginning: a prompt in chunks, or an image in a later turn.",
                    hint="Leave prefill_chunk_size out, or give the whole conversation as one prompt.",
                )
            notes = notes_of(cache)
            if notes is not None:
                notes.check_continuation(kwargs, (input_ids if input_ids is not None else kwargs["inputs_embeds"]))
            return
        if input_ids is None:
            raise BadOption(
                "Methods inside the language model find visual tokens by input_ids, and got inputs_embeds alone.",
                hint="Pass input_ids with mm_encoder_outputs or pixels.",
            )
        mask = kwargs.get("attention_mask")
        padded = isinstance(mask, Tensor) and mask.ndim == 2
        valid_BS = mask.bool() if padded else torch.ones_like(input_ids, dtype=torch.bool)
        prompts = read_prompts(input_ids, valid_BS, self.model.config, encoded)
        if self.stage.needs_frames and any(len(p.candidates) and p.raster is None for p in prompts):
            raise BadOption(
                "This method needs to know frames, and raw pixels do not tell.",
                hint="Encode with VLM.prepare, VLM.compress_inputs or VLMAdapter.emit, and pass what they return.",
            )
        self._pass = PromptPass(
            self.stage, self._steps, self._choice, self.keep, len(self._layers), input_ids, valid_BS, prompts, attention
        )

    def _take_deepstack(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._pass is None or kwargs.get("deepstack_visual_embeds") is None:
            return None
        deepstack = kwargs["deepstack_visual_embeds"]
        if not self._pass.active or min(self._steps) >= len(deepstack):
            return None
        if len(deepstack) >= len(self._layers):
            raise UnsupportedModel("Deepstack features after the last layer cannot follow dropped tokens.")
        self._pass.take_deepstack(deepstack, kwargs["visual_pos_masks"])
        return args, kwargs | {"deepstack_visual_embeds": None, "visual_pos_masks": None}

    def _enter_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        cache = kwargs.get("cache")
        if self._pass is not None:
            hidden, kwargs = self._pass.enter(index, layer, args[0], kwargs)
            return (hidden, *args[1:]), kwargs
        notes = notes_of(cache)
        if notes is None:
            return None
        attention = self._decoder.config._attn_implementation
        mask = notes.mask_at_decode(index, layer, args[0], kwargs, cache, attention)
        kwargs = kwargs | {"attention_mask": mask}
        if self._choice is not None and notes.may_choose:
            kwargs = self._choice.at_decode(index, layer, args[0], kwargs, cache, notes, attention)
        return args, kwargs

    def _end(self, module: nn.Module, args: tuple, output):
        """The output at full length, and the counts of this forward."""
        done, self._pass = self._pass, None
        if done is None:
            return output
        self.kept_per_layer = [list(counts) for counts in done.counts]
        if isinstance(output, tuple):
            return (done.layout.put_back(output[0]), *output[1:])
        output.last_hidden_state = done.layout.put_back(output.last_hidden_state)
        return output


class _Owned:
    """Marks our hooks, so that a second set on one model is noticed."""

    def __init__(self, fn: Callable):
        self.fn = fn

    def __call__(self, *args):
        return self.fn(*args)
