"""What a policy is trained on: one question about one image or video, encoded once."""

# Shape legend: L prompt length, M tokens of the answer

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokensieve.compression import VisualTokens
from tokensieve.datasets.frames import Frames
from tokensieve.errors import BadOption
from tokensieve.pipeline.adapter import VisualItem
from tokensieve.pipeline.prompt import run_processor, shows_video, user_turn
from tokensieve.pipeline.vlm import VLM


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One question about one encoded image or video.

    Attributes:
        inputs: the prompt without pixels: `[1, L]` tensors, and the grids that positions follow from.
        item: the image or video; its `tokens` carry the question.
        question: what is asked.
        answer: the right answer as text; None where there is none (training without labels).
        answer_ids: `[M]` int64, the answer and the end token as the model would generate them; None without answer.
    """

    inputs: dict[str, Tensor]
    item: VisualItem
    question: str
    answer: str | None
    answer_ids: Tensor | None

    @property
    def tokens(self) -> VisualTokens:
        return self.item.tokens

    def inputs_with(self, answer: Tensor) -> dict[str, Tensor]:
        """The prompt with `[M]` answer ids behind it, `[1, L + M]` tensors; the answer is text of type 0."""
        said = {"input_ids": answer[None], "attention_mask": torch.ones_like(answer[None])}
        shape = self.inputs["input_ids"].shape
        return {
            name: torch.cat([value, said.get(name, torch.zeros_like(answer[None]))], 1)
            if value.shape == shape
            else value
            for name, value in self.inputs.items()
        }


@torch.no_grad()
def encode_samples(
    vlm: VLM, frames: Frames, questions: Sequence[str], answers: Sequence[str | None] | None = None
) -> list[Sample]:
    """Samples of several questions about one clip; the vision tower runs once.

    Args:
        vlm: its processor makes the prompts; its compression is not looked at.
        frames: the clip.
        questions: at least one.
        answers: as many right answers, or None.

    Raises:
        BadOption: no question, unequal lengths, or a prompt with several images that cannot be one item.
    """
    answers = [None] * len(questions) if answers is None else answers
    if len(questions) != len(answers) or not questions:
        raise BadOption(f"Need as many questions as answers and at least one, got {len(questions)}, {len(answers)}.")
    adapter, processor = vlm.adapter, vlm.processor
    as_video = shows_video(processor, frames)
    samples: list[Sample] = []
    for question, answer in zip(questions, answers, strict=True):
        inputs = run_processor(processor, [frames], [[user_turn(frames, question, as_video)]])
        inputs = {k: torch.as_tensor(v).to(vlm.model.device) for k, v in inputs.items() if k != "labels"}
        if samples:
            (item,) = adapter.place([samples[0].item], inputs["input_ids"])
        else:
            joined = frames.num_frames > 1 and adapter.family.join_frames
            items = adapter.encode(inputs, frames_as_video=joined)
            if len(items) != 1:
                raise BadOption(f"A policy is trained on one image or video a prompt, this one has {len(items)} items.")
            (item,) = items
        (item,) = adapter.with_questions([item], inputs, [question])
        samples.append(
            Sample(
                inputs={k: v for k, v in inputs.items() if not k.startswith("pixel")},
                item=item,
                question=question,
                answer=answer,
                answer_ids=None if answer is None else answer_ids(processor.tokenizer, answer, vlm.model.device),
            )
        )
    return samples


def with_answer(sample: Sample, answer: Tensor) -> Sample:
    """The sample with `[M]` generated ids as its answer: what the model itself says, where there is no label."""
    return replace(sample, answer_ids=answer)


def answer_ids(tokenizer, answer: str, device) -> Tensor:
    """`[M]` int64: the answer's tokens and the end token."""
    ids = tokenizer.encode(answer, add_special_tokens=False)
    return torch.tensor([*ids, tokenizer.eos_token_id], device=device)
