"""Behaviour tokens in a language model's vocabulary (OmniJARVIS, arXiv 2407.00114, section 4.1).

A code of d digits becomes d tokens. Digit i has a block of L_i tokens of its own, so the vocabulary grows by the *sum*
of the levels: 35 tokens for [8, 8, 8, 6, 5], which has 15,360 codes.

    id(i, k) = first_id + L_0 + ... + L_(i-1) + k     blocks one after the other (INFERRED; the paper has no layout)
    "[BEHAVIOR-12372]"                                how people read a code: its index (the paper's transcripts)

The blocks can be read back from a tokenizer's token names, so a saved tokenizer needs no further file. How new rows of
the embedding begin is INFERRED too: as random tokens with the mean and spread of the old ones.
"""

# Shape legend: ... any leading axes, d digits of a code, V rows of the embedding, D width

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.vla.fsq import FSQ, check_levels

NAME = "<|behaviour_{}_{}|>"
_NAME = re.compile(r"<\|behaviour_(0|[1-9]\d{0,3})_(0|[1-9]\d{0,8})\|>")
_DISPLAY = re.compile(r"\[BEHAVIOR-(0|[1-9]\d{0,9})\]")


@dataclass(frozen=True)
class BehaviourVocabulary:
    """Which token ids are behaviour: digits to ids, ids to digits, and both to what people read.

    Attributes:
        levels: `L_i` of the code.
        first_id: id of digit 0 of dimension 0.
    """

    levels: tuple[int, ...]
    first_id: int

    def __post_init__(self):
        object.__setattr__(self, "levels", check_levels(self.levels))
        if isinstance(self.first_id, bool) or not isinstance(self.first_id, int) or self.first_id < 0:
            raise BadOption(f"first_id must be a whole number from 0, got {self.first_id!r}.")

    @classmethod
    def of(cls, tokenizer) -> BehaviourVocabulary:
        """The behaviour tokens that a tokenizer has.

        Raises:
            BadOption: it has none, or some of them are missing or not in a row.
        """
        found = _behaviour_names(tokenizer)
        if not found:
            raise BadOption("The tokenizer has no behaviour tokens.", hint="Call add_behaviour_tokens first.")
        places = sorted(found)
        num_dims = places[-1][0] + 1
        levels = tuple(sum(i == dim for i, _ in places) for dim in range(num_dims))
        if places != [(i, k) for i, level in enumerate(levels) for k in range(level)] or min(levels) < 2:
            raise BadOption("Some behaviour tokens of the tokenizer are missing.")
        vocabulary = cls(levels, found[0, 0])
        if [found[place] for place in places] != list(vocabulary.all_ids):
            raise BadOption("The ids of the tokenizer's behaviour tokens are not in a row.")
        return vocabulary

    @property
    def num_digits(self) -> int:
        """d, tokens of one code."""
        return len(self.levels)

    @property
    def num_tokens(self) -> int:
        """The sum of the levels."""
        return sum(self.levels)

    @property
    def all_ids(self) -> range:
        """Ids of all behaviour tokens."""
        return range(self.first_id, self.first_id + self.num_tokens)

    def block(self, dim: int) -> range:
        """Ids of the digits of dimension `dim`.

        Raises:
            BadOption: there is no such dimension.
        """
        if not 0 <= dim < self.num_digits:
            raise BadOption(f"Dimensions are 0 to {self.num_digits - 1}, got {dim}.")
        first = self.first_id + sum(self.levels[:dim])
        return range(first, first + self.levels[dim])

    def digits_to_ids(self, digits: Tensor) -> Tensor:
        """Token ids `[..., d]` int64 of digits `[..., d]`; BadOption if a digit is not in its 0 .. L_i - 1."""
        FSQ(self.levels).digits_to_index(digits)  # checks them
        return digits.long() + self._firsts(digits)

    def ids_to_digits(self, ids: Tensor) -> Tensor:
        """Digits `[..., d]` int64 of token ids `[..., d]`.

        Raises:
            BadOption: they are not one token of every block in order.
        """
        if ids.ndim == 0 or ids.shape[-1] != self.num_digits:
            raise BadOption(f"A code has {self.num_digits} tokens, got shape {list(ids.shape)}.")
        digits = ids.long() - self._firsts(ids)
        if not ((digits >= 0) & (digits < digits.new_tensor(self.levels))).all():
            raise BadOption("Token i of a code must be of block i; some are not.", hint="Use BehaviourConstraint.")
        return digits

    def display(self, digits: Tensor) -> str:
        """`[BEHAVIOR-12372]` for one code's digits `[d]`."""
        return f"[BEHAVIOR-{int(FSQ(self.levels).digits_to_index(digits.view(self.num_digits)))}]"

    def parse(self, text: str) -> Tensor:
        """Digits `[d]` of `[BEHAVIOR-12372]`.

        Raises:
            BadOption: the text is not of that form, or there is no such code.
        """
        match = _DISPLAY.fullmatch(text)
        if not match:
            raise BadOption(f"A behaviour is written like [BEHAVIOR-12372], got {text!r}.")
        return FSQ(self.levels).index_to_digits(torch.tensor(int(match[1])))

    def _firsts(self, like: Tensor) -> Tensor:
        return like.new_tensor([self.block(i).start for i in range(self.num_digits)], dtype=torch.int64)


def add_behaviour_tokens(model: nn.Module, tokenizer, levels: tuple[int, ...], *, seed: int = 0) -> BehaviourVocabulary:
    """Adds `sum(levels)` tokens to a tokenizer and to the embedding and output head of its model.

    Rows of the tokenizer's old tokens keep every bit. A model whose embedding has spare rows beyond its tokenizer
    (Qwen's, say) grows only by what is lacking: ids follow the tokenizer's last one, and spare rows they fall on begin
    anew.

    Args:
        model: any transformers language or vision-language model with an output head; changed.
        tokenizer: of that model; changed.
        levels: of the code.
        seed: of the new rows.

    Raises:
        BadOption: the tokenizer has behaviour tokens already (of whatever levels).
        UnsupportedModel: the model has no embedding or no head of plain weights, its embedding is smaller than its
            tokenizer, it uses one of the new ids as a placeholder, or the tokenizer takes no new tokens in a row. All
            but the last are found before any change.
    """
    from tokenizers import AddedToken

    levels = check_levels(levels)
    if _behaviour_names(tokenizer):
        raise BadOption(
            "The tokenizer has behaviour tokens already.", hint="BehaviourVocabulary.of(tokenizer) finds them."
        )
    first_id = len(tokenizer)
    _check_model(model, first_id, sum(levels))
    names = [NAME.format(i, k) for i, level in enumerate(levels) for k in range(level)]
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    vocabulary = BehaviourVocabulary(levels, first_id)
    if tokenizer.convert_tokens_to_ids(names) != list(vocabulary.all_ids):
        raise UnsupportedModel(f"{type(tokenizer).__name__} gave the new tokens ids that are not in a row.")
    num_rows = model.get_input_embeddings().weight.shape[0]
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # growing draws rows that are overwritten below
        if len(tokenizer) > num_rows:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    _start_rows(model.get_input_embeddings().weight, vocabulary, seed)
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        _start_rows(head.weight, vocabulary, seed + 1)
    if getattr(head, "bias", None) is not None:
        head.bias.data[first_id : first_id + vocabulary.num_tokens] = head.bias.data[:first_id].mean()
    return vocabulary


@torch.no_grad()
def _start_rows(weight_VD: Tensor, vocabulary: BehaviourVocabulary, seed: int) -> None:
    """New rows are normal with the mean and standard deviation of the old ones, column by column."""
    old = weight_VD[: vocabulary.first_id].float()
    noise = torch.randn(
        vocabulary.num_tokens, weight_VD.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    )
    rows = old.mean(0) + old.std(0) * noise.to(old.device)
    weight_VD[vocabulary.first_id : vocabulary.first_id + vocabulary.num_tokens] = rows.to(weight_VD.dtype)


def _check_model(model: nn.Module, num_tokens: int, num_new: int) -> None:
    name = type(model).__name__
    for what, part in (("embedding", model.get_input_embeddings()), ("output head", model.get_output_embeddings())):
        weight = getattr(part, "weight", None)
        if weight is None or not weight.is_floating_point():
            raise UnsupportedModel(f"{name} has no {what} of plain weights.", hint="Load it without quantisation.")
        if weight.shape[0] < num_tokens:
            raise UnsupportedModel(
                f"The {what} of {name} has {weight.shape[0]} rows, its tokenizer {num_tokens} tokens."
            )
    for key, value in model.config.to_dict().items():  # a placeholder may be an id that the tokenizer does not know
        if key.endswith(("_token_id", "_token_index")) and value in range(num_tokens, num_tokens + num_new):
            raise UnsupportedModel(f"{name} uses id {value} as {key}, which the new tokens would take.")


def _behaviour_names(tokenizer) -> dict[tuple[int, int], int]:
    """Ids of the tokenizer's behaviour tokens by (dimension, digit)."""
    matches = ((_NAME.fullmatch(name), token_id) for name, token_id in tokenizer.get_vocab().items())
    return {(int(match[1]), int(match[2])): token_id for match, token_id in matches if match}
