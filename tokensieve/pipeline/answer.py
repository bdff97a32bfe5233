"""What every way to run a model answers with; needs neither torch nor onnxruntime."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer and what it cost. `str(answer)` is the text.

    Attributes:
        answer: the generated text.
        visual_tokens: "full" and "kept"; with a method in the decoder also "last_layer".
        prompt_tokens: text and visual tokens the language model saw.
        generated_tokens: tokens up to and including the end token.
        seconds: "read", "encode" (processor and vision encoder), "select", "generate"; of the whole batch.
        model, method, keep: what produced it; method is None without compression.
        notes: what was wrong with the media, if anything.
    """

    answer: str
    visual_tokens: dict[str, int]
    prompt_tokens: int
    generated_tokens: int
    seconds: dict[str, float]
    model: str
    method: str | None
    keep: float | int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.answer

    def to_dict(self) -> dict[str, object]:
        """Plain types, ready for JSON."""
        return asdict(self) | {"notes": list(self.notes)}
