"""Instructions of a grid world as numbers: a closed list of words, and a recurrent reader of them."""

# Shape legend: B instructions, M words of the longest, D width

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tokensieve.errors import BadOption

PAD = 0  # id of no word
MAX_WORDS, MAX_LENGTH = 10_000, 64  # in a list, in an instruction
_WORD = re.compile(r"[a-z0-9]+")


def words_of(instructions: Iterable[str]) -> tuple[str, ...]:
    """All words of some instructions, once each, sorted."""
    return tuple(sorted({word for text in set(instructions) for word in _WORD.findall(text.lower())}))


def check_words(words: object) -> tuple[str, ...]:
    """The list as a tuple; BadOption unless it has 1 to 10,000 different words of small letters and digits."""
    if isinstance(words, str) or not isinstance(words, Sequence) or not 1 <= len(words) <= MAX_WORDS:
        raise BadOption(f"words must be a list of 1 to {MAX_WORDS} words.")
    if len(set(map(str, words))) != len(words) or not all(isinstance(w, str) and _WORD.fullmatch(w) for w in words):
        raise BadOption("words must be different words of small letters and digits.", hint="words_of() makes a list.")
    return tuple(words)


class WordReader(nn.Module):
    """A GRU over the words of an instruction.

    Args:
        words: all that it knows; word i has the id i + 1, as 0 is padding.
        width: D.
        num_ids: rows of the embedding: padding, the words, and whatever tokens its owner adds; None for no more.
    """

    def __init__(self, words: tuple[str, ...], width: int, num_ids: int | None = None):
        super().__init__()
        self._ids = {word: i + 1 for i, word in enumerate(words)}
        self.embedding = nn.Embedding(1 + len(words) if num_ids is None else num_ids, width)
        self.gru = nn.GRU(width, width, batch_first=True)

    def ids(self, instructions: Sequence[str]) -> Tensor:
        """`[B, M]` int64, padded on the right with 0.

        Raises:
            BadOption: there are no instructions, one has no word or too many, or one that is not in the list.
        """
        rows = [_WORD.findall(text.lower()) for text in instructions]
        if not rows or not all(1 <= len(row) <= MAX_LENGTH for row in rows):
            raise BadOption(f"Every instruction needs 1 to {MAX_LENGTH} words, and there must be one.")
        if unknown := sorted({word for row in rows for word in row} - self._ids.keys()):
            raise BadOption(
                f"The model has never read {', '.join(unknown[:5])}.", hint="Train it on levels that use these words."
            )
        known = [torch.tensor([self._ids[word] for word in row]) for row in rows]
        padded_BM = nn.utils.rnn.pad_sequence(known, batch_first=True, padding_value=PAD)
        return padded_BM.to(self.embedding.weight.device)

    def forward(self, ids_BM: Tensor) -> Tensor:
        """`[B, D]`: the state after the last word; padding does not count."""
        with torch.autocast(ids_BM.device.type, enabled=False):
            states_BMD = self.gru(self.embedding(ids_BM))[0]
        last_B = (ids_BM != PAD).sum(1) - 1
        return states_BMD[torch.arange(len(ids_BM), device=ids_BM.device), last_B]
