"""The bytes behind a tokenizer's tokens, and which token may follow which in the encoding of a text.

For BPE tokenizers that work on bytes: byte-level ones (GPT-2, Qwen, Llama 3, SmolLM2) and those with bytes to fall back
on (Llama 1 and 2, Mistral, Gemma). A sequence of tokens is *valid* if it is what the tokenizer makes of its own bytes.
Special tokens and other added ones have no bytes here: a text is always read as ordinary text. Nothing is put before a
text either, such as the space of SentencePiece: texts continue what came before.
"""

# Shape legend: V tokens, W bytes of the longest

from __future__ import annotations

import codecs
import json
from bisect import bisect_left, bisect_right

import torch

from tokensieve.errors import UnsupportedModel

_LETTER, _SIGN = "é", "×"  # stand for a character of which not all bytes are there yet; two bytes each
# What may come next, as far as pre-tokenizers look at it: spaces, digits, signs, letters and those of contractions.
_NEXT = (" ", "\n", "1", "!", "a", *"sdmtlerv")
_SPACE = "\u2581"
_PROBES = ("a b", "it's  2 words\n\n x", "naïve 12345 (e)")
_STABLE_PIECES = 3  # words of the pre-tokenizer at the end of a text that the next bytes may still change, and one more
_MAX_KNOWN = 2**18


class ByteVocabulary:
    """A tokenizer seen from its bytes.

    Args:
        tokenizer: a fast BPE tokenizer, or a processor that has one.

    Attributes:
        token_bytes: of every token, None for those without.
        length_V: int64, how many bytes; 0 for those without.
        byte_VW: int16, the bytes themselves, -1 behind the last.

    Raises:
        UnsupportedModel: another kind of tokenizer, or one that changes texts in a way that is not known here.
    """

    def __init__(self, tokenizer):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        spec = json.loads(backend.to_str()) if backend is not None else {}
        kind = _kind(spec)
        if kind is None:
            raise UnsupportedModel(
                f"Byte-level decoding needs a BPE tokenizer on bytes, and {type(tokenizer).__name__} is another kind."
            )
        self._byte_level = kind == "byte-level"
        self._normalizer = backend.normalizer if self._byte_level else None
        self._pieces_of = backend.pre_tokenizer.pre_tokenize_str if self._byte_level else None
        self._model = backend.model
        added = {token["content"] for token in spec["added_tokens"]} | set(tokenizer.all_special_tokens)
        if any(text.isspace() for text in added):
            raise UnsupportedModel("This tokenizer has added tokens for spaces, which byte-level decoding cannot read.")
        self._byte_of = _alphabet()
        self._letter_of = {byte: letter for letter, byte in self._byte_of.items()}
        vocabulary = tokenizer.get_vocab()
        self.token_bytes: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
        for token, number in vocabulary.items():
            if token not in added:
                self.token_bytes[number] = self._bytes_of_token(token)
        self._sorted = sorted((data, number) for number, data in enumerate(self.token_bytes) if data)
        self.length_V = torch.tensor([len(data or b"") for data in self.token_bytes])
        self.byte_VW = torch.full((len(self.token_bytes), int(self.length_V.max()) + 1), -1, dtype=torch.int16)
        for data, number in self._sorted:
            self.byte_VW[number, : len(data)] = torch.tensor(list(data), dtype=torch.int16)
        self._known: dict[tuple[bytes, int], bool] = {}
        for text in _PROBES:
            own = tokenizer.encode(text, add_special_tokens=False)
            if own not in [self._ids(text.encode()), self._ids(f" {text}".encode())]:
                raise UnsupportedModel(f"{type(tokenizer).__name__} changes texts in a way that is not known.")

    def __len__(self) -> int:
        return len(self.token_bytes)

    @property
    def longest(self) -> int:
        """W."""
        return self.byte_VW.shape[1] - 1

    def encode(self, data: bytes) -> list[int] | None:
        """The tokens of a text, which may end within a character; None if no tokens have exactly these bytes."""
        ids = self._ids(data)
        return ids if ids is not None and self.decode(ids) == data else None

    def decode(self, ids: list[int]) -> bytes | None:
        """The bytes of tokens; None if one of them has none."""
        parts = [self.token_bytes[i] if 0 <= i < len(self) else None for i in ids]
        return None if None in parts else b"".join(parts)

    def starting_with(self, prefix: bytes) -> list[int]:
        """Tokens whose bytes start with these."""
        first = bisect_left(self._sorted, prefix, key=lambda entry: entry[0])
        last = bisect_right(self._sorted, prefix, key=lambda entry: entry[0][: len(prefix)])
        return [number for _, number in self._sorted[first:last]]

    def stems(self, data: bytes) -> list[list[int]]:
        """All token sequences with exactly these bytes that the encoding of some longer text starts with.

        Mostly that is `encode(data)` alone, which comes first. But pre-tokenizers look ahead: two spaces are one token
        at the end of a text, and two before a word.
        """
        whole = self.encode(data)
        found = [] if whole is None else [whole]
        if self._byte_level:
            tail = self._last_words(data)
            head = self.encode(data[: len(data) - len(tail)])
            for behind in (_LETTER, _SIGN) if _split(tail) and _split(tail)[1] else _NEXT:
                ids = self._ids(tail, behind)
                if head is not None and ids is not None and self.decode(ids) == tail and head + ids not in found:
                    found.append(head + ids)
        return found

    def tail(self, data: bytes, stem: list[int]) -> tuple[bytes, tuple[int, ...]]:
        """The end of a text, and of its stem, on which alone it depends what may follow.

        For byte-level tokenizers the last words of the pre-tokenizer, whose rules look a character ahead; for the
        others the last token: a BPE sequence is valid if all pairs of neighbours are.
        """
        enough = len(self._last_words(data)) if self._byte_level else min(1, len(data))
        first, length = len(stem), 0
        while first and (length < enough or data[len(data) - length] & 0xC0 == 0x80):  # and not within a character
            first -= 1
            length += len(self.token_bytes[stem[first]])
        return data[len(data) - length :], tuple(stem[first:])

    def may_follow(self, tail: tuple[bytes, tuple[int, ...]], token: int) -> bool:
        """Whether a text whose `tail` this is becomes a valid sequence with the token behind it."""
        key = (tail, token)
        if key not in self._known:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            data, ids = tail
            self._known[key] = self.encode(data + self.token_bytes[token]) == [*ids, token]
        return self._known[key]

    def _last_words(self, data: bytes) -> bytes:
        num = sum(len(piece) for piece in (self._pieces(data) or [])[-_STABLE_PIECES:])
        return data[len(data) - num :]

    def _ids(self, data: bytes, behind: str = "") -> list[int] | None:
        """As the tokenizer makes them before `behind`; bytes that it has no token for are left out."""
        pieces = self._pieces(data, behind)
        if pieces is None:
            return None
        ids = [token.id for piece in pieces for token in self._model.tokenize(piece)]
        if not self._byte_level:
            ids += [self._model.token_to_id(f"<0x{byte:02X}>") for byte in _split(data)[1]]
        return ids

    def _pieces(self, data: bytes, behind: str = "") -> list[str] | None:
        """The words that BPE runs on, as the vocabulary spells them; None unless `data` can become UTF-8.

        `behind` follows: it decides where words end, and is no part of them. Where a character is not whole it stands
        for that character.
        """
        split = _split(data)
        if split is None:
            return None
        text, partial = split
        if not self._byte_level:
            return [text.replace(" ", _SPACE)] if text else []
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        behind = behind or (_LETTER if partial else "")
        pieces = [piece for piece, _ in self._pieces_of(text + behind)]
        if behind:
            spelled = "".join(self._letter_of[byte] for byte in partial)
            pieces[-1] = pieces[-1][: -len(behind.encode())] + spelled
        return [piece for piece in pieces if piece]

    def _bytes_of_token(self, token: str) -> bytes | None:
        if self._byte_level:
            if not all(letter in self._byte_of for letter in token):
                return None
            return bytes(self._byte_of[letter] for letter in token) or None
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(_SPACE, " ").encode() or None


def _kind(spec: dict) -> str | None:
    """ "byte-level", "fallback", or None, from a tokenizer's description."""
    model, before, normalizer = (spec.get(name) or {} for name in ("model", "pre_tokenizer", "normalizer"))
    if model.get("type") != "BPE" or model.get("dropout"):
        return None
    steps = before.get("pretokenizers", [before])
    if any(step.get("type") == "ByteLevel" for step in steps):
        return None if any(step.get("add_prefix_space") for step in steps) else "byte-level"
    changes = normalizer.get("normalizers", [normalizer])
    known = all(change.get("type") in (None, "Prepend", "Replace") for change in changes)
    whole = all(step.get("type") in (None, "Metaspace", "Split") and not step.get("split") for step in steps)
    bytes_are_there = all(f"<0x{byte:02X}>" in model.get("vocab", ()) for byte in range(256))
    return "fallback" if model.get("byte_fallback") and known and whole and bytes_are_there else None


def _split(data: bytes) -> tuple[str, bytes] | None:
    """The whole characters and the bytes of one that is not whole; None if it can't become UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError:
        return None
    return text, decoder.getstate()[0]


def is_whole(data: bytes) -> bool:
    """Whether bytes are UTF-8 that does not end within a character."""
    split = _split(data)
    return split is not None and not split[1]


def _alphabet() -> dict[str, int]:
    """The byte for every letter of byte-level vocabularies: printable Latin-1 as it is, the others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
