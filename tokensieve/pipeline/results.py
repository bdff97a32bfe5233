"""What the calls of a `VLM` return: the arguments for the model, and the answer with what it cost."""

# Shape legend: B batch

from __future__ import annotations

from dataclasses import asdict, dataclass

from tokensieve.compression import Plan
from tokensieve.datasets.frames import Frames
from tokensieve.pipeline.adapter import VisualItem


class Prepared(dict):
    """Keyword arguments for `model.generate` or `model(...)`, and how they came about.

    Good for one call: beam search changes what is inside.

    Attributes:
        inputs: what the processor made.
        items: the visual items, as they were encoded.
        plans: which of their tokens stay, one plan an item.
        clips: the frames that were shown, if `prepare` read them.
        seconds: time spent on "read", "encode" and "select", for the whole batch.
    """

    inputs: dict[str, object]
    items: list[VisualItem]
    plans: list[Plan]
    clips: list[Frames]
    seconds: dict[str, float]

    @property
    def prompt_tokens(self) -> list[int]:
        """`[B]` prompt length that the language model sees, text and visual tokens."""
        return self["attention_mask"].sum(-1).tolist()

    @property
    def full_prompt_tokens(self) -> list[int]:
        """`[B]` prompt length before anything was dropped."""
        mask = self.inputs.get("attention_mask")
        ids = self.inputs["input_ids"]
        return [ids.shape[1]] * len(ids) if mask is None else mask.sum(-1).tolist()

    def visual_tokens(self, row: int) -> dict[str, int]:
        """Visual tokens of one prompt, structural tokens included: `{"full": ..., "kept": ...}`."""
        mine = [(i, p) for i, p in zip(self.items, self.plans, strict=True) if i.row == row]
        return {"full": sum(len(i.slots) for i, _ in mine), "kept": sum(len(i.kept(p)) for i, p in mine)}


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
