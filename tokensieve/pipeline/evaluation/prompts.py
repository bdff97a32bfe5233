"""Prompts of several questions about one clip from one encoding, and any of them joined into a batch."""

# Shape legend: B prompts, L prompt length

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, cat

from tokensieve.compression import Plan
from tokensieve.datasets.frames import Frames
from tokensieve.errors import TokensieveError
from tokensieve.pipeline.adapter import VisualItem
from tokensieve.pipeline.prompt import run_processor, shows_video, user_turn
from tokensieve.pipeline.results import Prepared
from tokensieve.pipeline.vlm import VLM


def encode_clip(
    vlm: VLM, frames: Frames, questions: Sequence[str], needs: Collection[str]
) -> list[Prepared | TokensieveError]:
    """A prompt for every question about a clip, or why there is none; the tower runs once.

    Args:
        vlm: in force is the tower stage, if any, and nothing else.
        frames: the clip.
        questions: what is asked.
        needs: as in `VLM.prepare`.

    Returns:
        Prompts without pixels, for `VLM.reselect` and `emit`. `seconds["encode"]` of each is that of the clip.
    """
    first: Prepared | None = None
    prompts: list[Prepared | TokensieveError] = []
    for question in questions:
        try:
            if first is None:
                encoded = vlm.prepare(frames, question, needs=needs)
                prompt = first = _prompt(encoded.inputs, encoded.items, encoded)
            else:
                prompt = _ask_again(vlm, first, question, needs)
        except TokensieveError as error:
            prompt = error
        prompts.append(prompt)
    return prompts


def emit(vlm: VLM, prompts: Sequence[Prepared], plans: Sequence[Sequence[Plan]]) -> dict[str, object]:
    """Keyword arguments for `model.generate`: the prompts as one batch, without what the plans drop.

    Args:
        vlm: its `positions` are those of the compression in force.
        prompts: of `encode_clip`, about any clips.
        plans: one for every item of every prompt.
    """
    pad = vlm.model.generation_config.pad_token_id or 0
    inputs, items = join(prompts, pad)
    return vlm.adapter.emit(
        inputs,
        items,
        [plan for own in plans for plan in own],
        positions=vlm.compression.positions if vlm.compression else "preserve",
        pad_token_id=pad,
    )


def join(prompts: Sequence[Prepared], pad_token_id: int) -> tuple[dict[str, object], list[VisualItem]]:
    """Inputs `[B, L]`, padded on the left, and items of several prompts in order."""
    longest = max(prompt.inputs["input_ids"].shape[1] for prompt in prompts)
    padded, items = [], []
    for row, prompt in enumerate(prompts):
        shape = prompt.inputs["input_ids"].shape
        left = longest - shape[1]
        padded.append(
            {
                name: F.pad(value, (left, 0), value=pad_token_id if name == "input_ids" else 0)
                if isinstance(value, Tensor) and value.shape == shape
                else value
                for name, value in prompt.inputs.items()
            }
        )
        items += [replace(item, row=row, slots=item.slots + left) for item in prompt.items]
    names = dict.fromkeys(name for inputs in padded for name in inputs)  # images and videos bring different ones
    parts = {name: [inputs[name] for inputs in padded if name in inputs] for name in names}
    joined = {
        name: cat(values) if isinstance(values[0], Tensor) else [part for value in values for part in value]
        for name, values in parts.items()
    }
    return joined, items


def _ask_again(vlm: VLM, first: Prepared, question: str, needs: Collection[str]) -> Prepared:
    """The prompt of another question about the clip of `first`, with its visual tokens."""
    (clip,) = first.clips
    inputs = run_processor(vlm.processor, [clip], [[user_turn(clip, question, shows_video(vlm.processor, clip))]])
    inputs = {k: v.to(vlm.model.device) if isinstance(v, Tensor) else v for k, v in inputs.items() if k != "labels"}
    items = vlm.adapter.place(first.items, inputs["input_ids"])
    if "question" in needs:
        items = vlm.adapter.with_questions(items, inputs, [question])
    return _prompt(inputs, items, first)


def _prompt(inputs: Mapping[str, object], items: list[VisualItem], source: Prepared) -> Prepared:
    prompt = Prepared()
    prompt.inputs = {name: value for name, value in inputs.items() if not name.startswith("pixel")}
    prompt.items, prompt.clips, prompt.seconds = items, source.clips, source.seconds
    return prompt
