"""What the calls of a `VLM` return: the arguments for the model, and the answer with what it cost."""

# Shape legend: B batch

from __future__ import annotations

from tokensieve.compression import Plan
from tokensieve.datasets.frames import Frames
from tokensieve.pipeline.adapter import VisualItem
from tokensieve.pipeline.answer import Answer

__all__ = ["Answer", "Prepared"]


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
