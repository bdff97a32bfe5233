"""Decoding in which only valid behaviours can be emitted: position i of a code takes tokens of block i alone.

    thought        any token but behaviour tokens ... until the marker CONTROL
    after CONTROL  block 0, block 1, ..., block d - 1
    after those    the end-of-sequence token

The paper (OmniJARVIS, arXiv 2407.00114) does not say that it constrains decoding. The state is read from what each row
has emitted so far, so batches, sampling and beams, which change rows under way, all work.
"""

# Shape legend: B rows (prompts times beams), L tokens so far, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tokensieve.errors import BadOption
from tokensieve.vla.vocabulary import BehaviourVocabulary


class BehaviourConstraint(LogitsProcessor):
    """A logits processor for one call of `generate` that makes every row end in exactly one valid code.

    Args:
        vocabulary: the behaviour tokens.
        prompt_length: how many tokens `generate` was given per row, padding included; 0 with `inputs_embeds`.
        end_id: the end-of-sequence token, which stops a row after its code.
        control_ids: of the marker (`Packer.control_ids`) where the model thinks first; None where the prompt ends in
            the marker and the first token is of block 0.
        max_thought_tokens: a thought that long is broken off by the marker, so that a code comes in any case within
            `max_thought_tokens + len(control_ids) + d` tokens; None for no bound.

    Raises:
        BadOption: a count is below 0, the end token is a behaviour token, or there is a bound but no marker.
    """

    def __init__(
        self,
        vocabulary: BehaviourVocabulary,
        prompt_length: int,
        end_id: int,
        *,
        control_ids: Sequence[int] | None = None,
        max_thought_tokens: int | None = None,
    ):
        if prompt_length < 0 or (max_thought_tokens is not None and max_thought_tokens < 0):
            raise BadOption(f"Counts start at 0, got {prompt_length} and {max_thought_tokens}.")
        if end_id in vocabulary.all_ids:
            raise BadOption(f"The end-of-sequence token ({end_id}) is a behaviour token.")
        if control_ids is None and max_thought_tokens is not None:
            raise BadOption("max_thought_tokens is for thoughts; give control_ids.")
        if control_ids is not None and not len(control_ids):
            raise BadOption("control_ids are empty.")
        self.vocabulary, self.prompt_length, self.end_id = vocabulary, prompt_length, end_id
        self.control_ids = None if control_ids is None else tuple(control_ids)
        self.max_thought_tokens = max_thought_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[B, V]` with minus infinity at every token that may not come next."""
        forbidden_BV = torch.ones_like(scores, dtype=torch.bool)
        for row, emitted in enumerate(input_ids[:, self.prompt_length :].tolist()):
            allowed = self.allowed(emitted)
            if allowed is None:
                forbidden_BV[row] = False
                allowed_not = self.vocabulary.all_ids
                forbidden_BV[row, allowed_not.start : allowed_not.stop] = True
                forbidden_BV[row, self.end_id] = True  # an answer without a code would be none
            else:
                forbidden_BV[row, allowed.start : allowed.stop] = False
        return scores.masked_fill(forbidden_BV, -torch.inf)

    def allowed(self, emitted: Sequence[int]) -> range | None:
        """Ids that may follow what a row has emitted; None while it thinks: all but behaviour and end tokens."""
        num_done = sum(i in self.vocabulary.all_ids for i in emitted)
        if num_done >= self.vocabulary.num_digits:
            return _only(self.end_id)
        if num_done or self.control_ids is None or self._written(emitted) == len(self.control_ids):
            return self.vocabulary.block(num_done)
        if self.max_thought_tokens is not None and len(emitted) >= self.max_thought_tokens:
            return _only(self.control_ids[self._written(emitted)])
        return None

    def _written(self, emitted: Sequence[int]) -> int:
        """How many of the marker's tokens the row ends in."""
        lengths = range(min(len(self.control_ids), len(emitted)), 0, -1)
        return next((n for n in lengths if tuple(emitted[-n:]) == self.control_ids[:n]), 0)


def _only(token_id: int) -> range:
    return range(token_id, token_id + 1)
