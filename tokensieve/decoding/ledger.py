"""What an answer cost: tokens and forward passes. Needs no torch."""

# Shape legend: B prompts, L prompt length, N new tokens

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass


@dataclass(kw_only=True)
class Ledger:
    """What was read, written and computed for one call of `generate`; sums over the batch.

    Attributes:
        prompt_tokens: text and visual tokens of the prompts, without padding.
        visual_tokens: the visual ones among them, as many as the language model sees.
        generated_tokens: tokens of the answers, up to and including the end token.
        drafted_tokens: tokens that were guessed or tried before it was known whether they stay.
        accepted_tokens: those of the drafted tokens that stayed.
        forward_passes: calls of the model, the one of the prompt and any test of what the model can do included.
        computed_tokens: rows times tokens of all those calls, padding included: what the language model had to compute.
    """

    prompt_tokens: int = 0
    visual_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    forward_passes: int = 0
    computed_tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        """Plain types, ready for JSON."""
        return asdict(self)


def prompt_ledger(model, input_ids, attention_mask=None) -> Ledger:
    """A ledger with the prompts entered.

    Args:
        model: its config tells which ids are visual placeholders.
        input_ids: `[B, L]`; empty for prompts of embeddings.
        attention_mask: `[B, L]`, 0 at padding; all ones if left out.
    """
    visual = [getattr(model.config, f"{m}_token_id", None) for m in ("image", "video")]
    return Ledger(
        prompt_tokens=input_ids.numel() if attention_mask is None else int(attention_mask.sum()),
        visual_tokens=sum(int((input_ids == i).sum()) for i in visual if i is not None),
    )


def num_generated(new_BN, end_ids=None) -> int:
    """Tokens up to and including the first end token, of all rows of `[B, N]` new ids; all of them without end ids."""
    ends = set() if end_ids is None else set(end_ids.flatten().tolist())
    total = 0
    for row in new_BN.tolist():
        total += next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
    return total


@contextmanager
def counted(model, ledger: Ledger) -> Iterator[Ledger]:
    """Adds the forward passes that `model` runs inside the block, and their tokens, to the ledger."""

    def count(module, args, kwargs) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        ledger.forward_passes += 1
        ledger.computed_tokens += given.shape[0] * given.shape[1]

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield ledger
    finally:
        hook.remove()
