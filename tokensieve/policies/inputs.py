"""What a scorer network reads off `VisualTokens`, and rows of unequal length as one batch."""

# Shape legend: B rows of a batch, M tokens of a row, D width

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokensieve.compression import VisualTokens
from tokensieve.errors import BadOption


def count_frames(tokens: VisualTokens) -> int:
    """T: how many frames a video has; an image, with all its views, is one."""
    return tokens.grids[0][0] if len(tokens.grids) == 1 else 1


def check_tokens(tokens: VisualTokens, width: int, with_question: bool) -> None:
    """Raises BadOption unless features, and the question where it is read, are there and `width` wide."""
    if tokens.features.shape[1] != width:
        raise BadOption(
            f"This policy reads features of width {width}, got {tokens.features.shape[1]}.",
            hint="A policy works with the language model it was trained for.",
        )
    if not with_question:
        return
    if tokens.question is None:
        raise BadOption(
            "This policy reads the question, and these tokens come without.",
            hint='It is recorded for those who need it: prepare with needs=("question",).',
        )
    if tokens.question.embeds.ndim != 2 or tokens.question.embeds.shape[1] != width:
        raise BadOption(
            f"The question's embeddings must be [tokens, {width}], got {tuple(tokens.question.embeds.shape)}."
        )


def pad_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows `[M, D]` as `[B, M, D]`, zeros to the right of shorter ones, and `[B, M]` bool, True where a row is."""
    lengths_B1 = torch.tensor([[len(row)] for row in rows], device=rows[0].device)
    padded_BMD = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return padded_BMD, torch.arange(padded_BMD.shape[1], device=rows[0].device) < lengths_B1
