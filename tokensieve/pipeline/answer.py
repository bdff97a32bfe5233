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
        drafted_tokens, accepted_tokens: tokens that a decoding method guessed or tried before it knew whether they
            stay, and those of them that stayed; 0 without one.
        forward_passes: calls of the language model, the prompt's included; one for every generated token unless beams
            or a decoding method make it others, and then of the whole batch.
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
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    forward_passes: int | None = None

    def __post_init__(self) -> None:
        if self.forward_passes is None:
            object.__setattr__(self, "forward_passes", self.generated_tokens)

    def __str__(self) -> str:
        return self.answer

    def to_dict(self) -> dict[str, object]:
        """Plain types, ready for JSON."""
        return asdict(self) | {"notes": list(self.notes)}
