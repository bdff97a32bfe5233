"""Answers with PyTorch: every clip is encoded alone, prompts of several clips go through the language model together.

What a clip gets does not depend on the others: `evaluation.answers` says how batches are kept from changing an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tokensieve.compression import Plan
from tokensieve.datasets.frames import Frames
from tokensieve.errors import BadOption, TokensieveError
from tokensieve.pipeline.batch.inputs import Failure, Input
from tokensieve.pipeline.batch.rows import Row, answer_schema, failed_row
from tokensieve.pipeline.batch.tasks import Answered, answered_row
from tokensieve.pipeline.evaluation.answers import Said, answer_all
from tokensieve.pipeline.evaluation.prompts import encode_clip
from tokensieve.pipeline.evaluation.settings import Setting
from tokensieve.pipeline.results import Prepared
from tokensieve.pipeline.vlm import VLM


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """A clip without its pixels; `prompts` holds a failure for a question that cannot be asked."""

    given: Input
    frames: Frames
    prompts: list[Prepared | Failure]


class AnswerStep:
    """Asks every clip its questions.

    Args:
        vlm: with its compression set; while clips wait for their batch, only its tower stage is at work.
        batch: prompts that go through the language model together; changes no answer.
        max_new_tokens: longest answer.

    Raises:
        BadOption: `batch` or `max_new_tokens` is not above 0, or a method lacks its policy.
    """

    def __init__(self, vlm: VLM, *, batch: int = 8, max_new_tokens: int = 64):
        for name, value in (("batch", batch), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise BadOption(f"{name} must be above 0, got {value}.")
        self.schema = answer_schema()
        self.vlm, self.batch, self.max_new_tokens = vlm, batch, max_new_tokens
        self._setting = Setting(compression=vlm.compression).apply(vlm)
        self._waiting: list[_Encoded] = []
        vlm.model.eval()

    def add(self, given: Input, frames: Frames) -> list[Row]:
        """As `Step.add`."""
        if not self._waiting:
            self.vlm.compress(self._setting.tower)
        try:
            prompts = encode_clip(self.vlm, frames, given.questions, self._setting.needs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return [failed_row(given, Failure.of("encode", error), frames)]
        told = [_without_pixels(one) if isinstance(one, Prepared) else Failure.of("encode", one) for one in prompts]
        self._waiting.append(_Encoded(given=given, frames=_summary(frames), prompts=told))
        full = sum(len(clip.prompts) for clip in self._waiting) >= self.batch
        return self.finish() if full else []

    def finish(self) -> list[Row]:
        """As `Step.finish`."""
        clips, self._waiting = self._waiting, []
        self._setting.apply(self.vlm)
        results: list[list[Answered | Failure]] = [list(clip.prompts) for clip in clips]
        asked, plans, places = [], [], []
        for number, clip in enumerate(clips):
            known: list[Plan] | None = None
            for place, prompt in enumerate(clip.prompts):
                if isinstance(prompt, Failure):
                    continue
                try:
                    if known is None or "question" in self._setting.needs:
                        known = self.vlm.reselect(prompt).plans
                except TokensieveError as error:
                    results[number][place] = Failure.of("encode", error)
                    continue
                asked.append(prompt)
                plans.append(known)
                places.append((number, place))
        for (number, place), prompt, said in zip(places, asked, self._answers(asked, plans), strict=True):
            results[number][place] = _answered(prompt, said)
        return [answered_row(clip.given, clip.frames, own) for clip, own in zip(clips, results, strict=True)]

    def _answers(self, prompts: Sequence[Prepared], plans: Sequence[list[Plan]]) -> list[Said | Exception]:
        """A prompt that breaks the batch that it is in costs its own answer only."""
        options = {"batch": self.batch, "max_new_tokens": self.max_new_tokens}
        try:
            return answer_all(self.vlm, prompts, plans, **options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if len(prompts) == 1:
                return [error]
            pairs = zip(prompts, plans, strict=True)
            return [said for prompt, own in pairs for said in self._answers([prompt], [own])]


def _answered(prompt: Prepared, said: Said | Exception) -> Answered | Failure:
    if isinstance(said, Exception):
        return Failure.of("answer", said)
    return Answered(
        text=said.text,
        visual_tokens_full=sum(len(item.slots) for item in prompt.items),
        visual_tokens=said.visual_tokens,
        prompt_tokens=said.prompt_tokens,
        generated_tokens=said.generated_tokens,
    )


def _without_pixels(prompt: Prepared) -> Prepared:
    """What waits for its batch must not hold the frames."""
    prompt.clips = []
    return prompt


def _summary(frames: Frames) -> Frames:
    """All that a row says of the frames, in no memory: a picture repeated has no bytes of its own."""
    return replace(frames, data=np.broadcast_to(np.zeros(1, np.uint8), frames.data.shape))
