"""FAST: Efficient Action Tokenization for Vision-Language-Action Models (Pertsch et al., arXiv 2501.09747).

chunk [H, D], scaled so that its 1st and 99th percentile are -1 and 1 (`QuantileScale`)
   -> cosine transform along time (DCT-II, orthonormal), of every number
   -> times `scale`, rounded
   -> one row, lowest frequencies of all numbers first
   -> each integer, less the smallest, a character; byte-pair encoding merges what is frequent

For smooth, continuous actions; it says nothing about keys that are pressed or not.

Differs from the official code: codes that decode to another number of coefficients are an error, where the official
code prints one and returns a chunk of zeros; pairs are merged over characters, without a detour by bytes; an integer
beyond those of the fitting data becomes the nearest of them.
"""

# Shape legend: N chunks, H steps, D numbers of an action

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.vla.action_tokens import check_chunk, check_codes

FILE = "fast_actions.json"
MAX_BYTES = 1 << 24
MAX_SIZE = 4096  # steps, or numbers of an action, that a file may ask for
FIRST_CHARACTER = 0x100  # no control characters; an alphabet ends long before the surrogates at 0xD800
MAX_ALPHABET = 0xD000


class FastActions:
    """FAST as an `ActionTokeniser` for chunks of one shape; made by `fit`.

    Attributes:
        shape: `(H, D)` of a chunk.
        scale: what coefficients are multiplied by before they are rounded; larger is finer.
        lowest, highest: integers that have a character.
    """

    def __init__(self, bpe, shape: tuple[int, int], scale: float, lowest: int, highest: int):
        self._bpe = bpe
        self.shape, self.scale, self.lowest, self.highest = shape, scale, lowest, highest
        self._dct_HH = dct_matrix(shape[0])

    @classmethod
    def fit(cls, chunks: Tensor, *, scale: float = 10.0, vocab_size: int = 1024) -> FastActions:
        """Learns which integers there are and which pairs are frequent.

        Args:
            chunks: `[N, H, D]` of normalised actions.
            scale: the paper's.
            vocab_size: most codes; the paper's. Fewer are made where nothing is frequent any more.

        Raises:
            BadOption: there are no chunks, they are not finite, or they have more integers than `vocab_size`.
        """
        from tokenizers import Tokenizer, models, trainers

        if chunks.ndim != 3 or not chunks.numel() or not chunks.isfinite().all():
            raise BadOption(f"Need finite chunks [N, H, D], got shape {list(chunks.shape)}.")
        if not 0 < scale < math.inf:
            raise BadOption(f"scale must be a finite number above 0, got {scale}.")
        integers = _transform(chunks.double(), dct_matrix(chunks.shape[1]), scale)
        lowest, highest = int(integers.min()), int(integers.max())
        num_characters = highest - lowest + 1
        if num_characters > min(vocab_size, MAX_ALPHABET):
            raise BadOption(
                f"The chunks have integers from {lowest} to {highest}, more than vocab_size, {vocab_size}.",
                hint="Normalise the actions (QuantileScale), or take a smaller scale.",
            )
        bpe = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=[chr(FIRST_CHARACTER + i) for i in range(num_characters)],
            limit_alphabet=num_characters,
            max_token_length=10_000,
        )
        bpe.train_from_iterator([_text(row, lowest) for row in integers.tolist()], trainer)
        return cls(bpe, (chunks.shape[1], chunks.shape[2]), scale, lowest, highest)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `fast_actions.json`, replaced only once its successor is complete.

        Raises:
            BadOption: `folder` is a file.
        """
        folder = Path(folder).expanduser()
        if folder.exists() and not folder.is_dir():
            raise BadOption(f"{str(folder)!r} is no folder.")
        folder.mkdir(parents=True, exist_ok=True)
        model = json.loads(self._bpe.to_str())["model"]
        facts = {name: getattr(self, name) for name in ("shape", "scale", "lowest", "highest")}
        part = folder / f"{FILE}.part"
        part.write_text(json.dumps(facts | {"merges": model["merges"]}), encoding="utf-8")
        part.replace(folder / FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FastActions:
        """Reads what `save_pretrained` wrote; the file is untrusted.

        Raises:
            BadOption: there is no such file.
            UnsupportedModel: it is damaged, or holds no such tokeniser.
        """
        path = Path(folder).expanduser() / FILE
        if not path.is_file():
            raise BadOption(f"{str(folder)!r} has no {FILE}.", hint="Give a folder that save_pretrained wrote.")
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError("too large")
            return cls._from_facts(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UnsupportedModel(f"{str(path)!r} holds no tokeniser of actions ({type(error).__name__}).") from None

    @classmethod
    def _from_facts(cls, shape, scale, lowest, highest, merges) -> FastActions:
        """Characters and merges say all: code i is character i, or what merge i - num_characters makes."""
        from tokenizers import Tokenizer, models

        whole = [*shape, lowest, highest]
        if len(shape) != 2 or not all(type(number) is int for number in whole) or not isinstance(scale, float):
            raise ValueError("numbers of another kind")
        num_characters = highest - lowest + 1
        if not (
            1 <= min(shape) <= max(shape) <= MAX_SIZE and 1 <= num_characters <= MAX_ALPHABET and 0 < scale < math.inf
        ):
            raise ValueError("numbers out of range")
        codes = {chr(FIRST_CHARACTER + i): i for i in range(num_characters)}
        for first, second in merges:
            if first not in codes or second not in codes or first + second in codes:
                raise ValueError("a merge of what there is not")
            codes[first + second] = len(codes)
        return cls(Tokenizer(models.BPE(codes, [tuple(pair) for pair in merges])), tuple(shape), scale, lowest, highest)

    @property
    def num_codes(self) -> int:
        """Codes are in [0, num_codes)."""
        return self._bpe.get_vocab_size()

    def encode(self, chunk: Tensor) -> list[int]:
        """Codes of `[H, D]`, as many as it takes.

        Raises:
            BadOption: another shape than those of fitting, or numbers that are not finite.
        """
        integers = _transform(check_chunk(chunk, self.shape), self._dct_HH, self.scale)
        return self._bpe.encode(_text(integers.clamp(self.lowest, self.highest).tolist(), self.lowest)).ids

    def decode(self, codes: Sequence[int]) -> Tensor:
        """`[H, D]` float32.

        Raises:
            BadOption: a code is not in [0, num_codes), or they do not make H * D coefficients.
        """
        check_codes(codes, self.num_codes)
        text = "".join(self._bpe.id_to_token(code) for code in codes)
        if len(text) != math.prod(self.shape):
            raise BadOption(f"The codes make {len(text)} coefficients, a chunk has {math.prod(self.shape)}.")
        integers = torch.tensor([ord(c) - FIRST_CHARACTER + self.lowest for c in text], dtype=torch.float64)
        return (self._dct_HH.T @ (integers.view(self.shape) / self.scale)).float()


def dct_matrix(length: int) -> Tensor:
    """`[H, H]` float64, orthonormal: row k is the cosine of frequency k of DCT-II; the inverse is its transpose."""
    place = torch.arange(length, dtype=torch.float64)
    waves = torch.cos(math.pi / length * place[:, None] * (place + 0.5)) * (2 / length) ** 0.5
    waves[0] /= 2**0.5
    return waves


def _transform(chunks: Tensor, dct_HH: Tensor, scale: float) -> Tensor:
    """`[..., H * D]` int64 of `[..., H, D]`."""
    return (dct_HH @ chunks * scale).round().long().flatten(-2)


def _text(integers: Sequence[int], lowest: int) -> str:
    return "".join(chr(FIRST_CHARACTER + i - lowest) for i in integers)
