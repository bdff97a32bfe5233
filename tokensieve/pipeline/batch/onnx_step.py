"""Answers of an exported model, clip by clip, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tokensieve.datasets.frames import Frames
from tokensieve.errors import BadOption
from tokensieve.pipeline.batch.inputs import Failure, Input
from tokensieve.pipeline.batch.rows import Row, answer_schema
from tokensieve.pipeline.batch.tasks import Answered, answered_row

if TYPE_CHECKING:
    from tokensieve.export.runtime import OnnxVLM


class OnnxStep:
    """Asks every clip its questions, one at a time: so no clip can change what another one gets.

    Args:
        vlm: the runtime.
        budget: `{"keep": ...}`, or empty for the one it was exported with.
        max_new_tokens: longest answer.

    Raises:
        BadOption: `max_new_tokens` is not above 0, or a budget that the export cannot serve.
    """

    def __init__(self, vlm: OnnxVLM, budget: Mapping[str, object], *, max_new_tokens: int = 64):
        if max_new_tokens < 1:
            raise BadOption(f"max_new_tokens must be above 0, got {max_new_tokens}.")
        self.schema = answer_schema()
        self.vlm, self.budget, self.max_new_tokens = vlm, dict(budget), max_new_tokens

    def add(self, given: Input, frames: Frames) -> list[Row]:
        """As `Step.add`; the row is ready at once."""
        return [answered_row(given, frames, [self._answer(frames, question) for question in given.questions])]

    def finish(self) -> list[Row]:
        """As `Step.finish`: nothing waits."""
        return []

    def _answer(self, frames: Frames, question: str) -> Answered | Failure:
        try:
            answer = self.vlm.answer(frames, question, max_new_tokens=self.max_new_tokens, **self.budget)
        except MemoryError:
            raise
        except Exception as error:
            return Failure.of("answer", error)
        return Answered(
            text=answer.answer,
            visual_tokens_full=answer.visual_tokens["full"],
            visual_tokens=answer.visual_tokens["kept"],
            prompt_tokens=answer.prompt_tokens,
            generated_tokens=answer.generated_tokens,
        )
