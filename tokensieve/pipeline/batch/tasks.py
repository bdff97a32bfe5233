"""What is done with every clip: `answer`, `caption` or `features`, and the step that turns decoded clips into rows.

An engine feeds a step with clips in any order and grouping and gets every clip's row once; the row does not depend on
either. That is the seam for other engines: decode, step and part writer are the same under all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import pyarrow as pa

from tokensieve.datasets.frames import Frames
from tokensieve.errors import BadOption
from tokensieve.pipeline.batch.inputs import Failure, Input
from tokensieve.pipeline.batch.rows import PARTIAL, Row, failed_row, frames_row, input_row

TASKS = ("answer", "caption", "features")
DESCRIBE = "Describe the video."


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The answer to one question, and the tokens it took; `visual_tokens` are those left in the last layer."""

    text: str
    visual_tokens_full: int
    visual_tokens: int
    prompt_tokens: int
    generated_tokens: int


class Step(Protocol):
    """Decoded clips in, rows out."""

    schema: pa.Schema

    def add(self, given: Input, frames: Frames) -> list[Row]:
        """Takes a clip, and returns the rows that got ready, of any clips."""

    def finish(self) -> list[Row]:
        """The rows of all clips taken so far that have none yet."""


def feed(step: Step, given: Input, frames: Frames | Failure) -> list[Row]:
    """`step.add`, for a clip that may have no frames."""
    return [failed_row(given, frames)] if isinstance(frames, Failure) else step.add(given, frames)


def with_questions(inputs: Sequence[Input], task: str, questions: Sequence[str] = ()) -> list[Input]:
    """The inputs with what the task asks of them; one that cannot be asked has a failure.

    Args:
        inputs: of `find_inputs`.
        task: "answer" asks the questions of the row, else `questions`; "caption" asks every clip to be described,
            whatever its row asks; "features" takes one question at most, for methods that read it.
        questions: of the command.

    Raises:
        BadOption: an unknown task, an empty question, questions for captions, or not one input with a question to
            answer.
    """
    if task not in TASKS:
        raise BadOption(f"The task must be one of {', '.join(TASKS)}, got {task!r}.")
    if any(not question.strip() for question in questions):
        raise BadOption("A question must not be empty.")
    if task == "caption":
        if questions:
            raise BadOption("The task caption asks for a description.", hint="Use the task answer for a question.")
        return [replace(one, questions=(DESCRIBE,)) for one in inputs]
    asked = [one if one.questions or one.failure else replace(one, questions=tuple(questions)) for one in inputs]
    if task == "features":
        asked = [one if one.questions or one.failure else replace(one, questions=(DESCRIBE,)) for one in asked]
        return [_failing(one, "features take one question.") if len(one.questions) > 1 else one for one in asked]
    if not any(one.questions for one in asked):
        raise BadOption("There is nothing to ask.", hint='Give --question "..." or a manifest with a column question.')
    return [one if one.questions or one.failure else _failing(one, "there is no question.") for one in asked]


def _failing(one: Input, why: str) -> Input:
    return replace(one, failure=Failure.of("input", BadOption(f"{one.where}: {why}")))


def answered_row(given: Input, frames: Frames, results: Sequence[Answered | Failure]) -> Row:
    """The row of a clip from the results of its questions; partial if some of them have none, failed if all."""
    failures = [result for result in results if isinstance(result, Failure)]
    if len(failures) == len(results):
        return failed_row(given, failures[0], frames)
    row = {**input_row(given), **frames_row(frames)}
    if failures:
        first = failures[0]
        row |= {"status": PARTIAL, "stage": first.stage, "error_type": first.error_type, "message": first.message}
        row["retryable"] = first.retryable
    done = [None if isinstance(result, Failure) else result for result in results]
    row["answers"] = [one and one.text for one in done]
    row["visual_tokens_full"] = next(one.visual_tokens_full for one in done if one)
    for name in ("visual_tokens", "prompt_tokens", "generated_tokens"):
        row[name] = [one and getattr(one, name) for one in done]
    return row
