"""Exact byte-level probabilities from a model of tokens, arXiv 2410.09303, ICLR 2025.

A text that ends within a token is not what the model was trained on, and two models with different tokens cannot be
compared token by token. Their bytes can.

x        the bytes so far
cover    a valid sequence of tokens whose bytes start with x, and whose last token reaches the end of x; what it has
         beyond is its overhang
stem     a sequence of tokens with exactly the bytes of x that can go on to a valid one: the encoding of x, and where
         the tokenizer's words depend on what follows, others

    P(x) = sum over covers t of P(t)        P(b | x) = P(x b) / P(x)

All tokens of a cover but the last are a stem of what they spell, so there is mostly one way to begin for each byte at
which the last token can start. When a byte is added, covers whose overhang starts with it stay, and stems go on with
every token that starts with it and is valid there: one forward pass a byte, on the cache that all stems share.

Differs from the official code: byte-level tokenizers too; no split into words, since a token cannot start farther back
than the longest is long; end tokens count as one outcome, and other tokens without bytes as none.
"""

# Shape legend: T new tokens, M covers of one beginning, V tokens of the vocabulary

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokensieve.decoding.byte_vocabulary import ByteVocabulary, is_whole
from tokensieve.decoding.ledger import Ledger
from tokensieve.decoding.session import DecodeSession
from tokensieve.errors import BadOption

END = 256  # the outcome after the 256 bytes
_CHUNK = 64  # tokens whose distributions are held at once


@dataclass(frozen=True, eq=False)
class _Covers:
    """Covers with one beginning: their last tokens `[M]`, how many bytes of these lie in x, log-probabilities `[M]`."""

    last_M: Tensor
    depth: int
    logp_M: Tensor


@dataclass(frozen=True, eq=False)
class _Stem:
    """A stem of x, its log-probability, and those of the tokens after it: of all, and of those valid there."""

    logp: float
    next_V: Tensor
    valid_V: Tensor
    is_encoding: bool


class ByteSession:
    """What a model says about the next byte. One prompt; a fixed part of tokens, then text.

    Args:
        model: a language model or vision-language model whose cache can be cropped.
        vocabulary: of its tokenizer.
        input_ids: `[1, L]`, the fixed part, which ends at a token boundary: a begin token, or a chat prompt with its
            pictures. The text is read as if nothing stood before it.
        text: what follows. It may end anywhere, within a token or, as bytes, within a character.
        end_ids: tokens that end the text; those of the generation config if left out.
        ignore: tokens that together have less than this probability after a stem are not looked at.
        **inputs: further arguments of `DecodeSession.prefill`: a mask, pixels, `mm_encoder_outputs` and so on.

    Attributes:
        data: x.

    Raises:
        BadOption: no fixed part, several prompts, or a text that the tokenizer cannot spell.
        UnsupportedModel: the cache cannot be cropped.

    Example:
        >>> session = ByteSession(model, ByteVocabulary(tokenizer), begin_ids, text="The capital of Fra")
        >>> session.law().argmax() == ord("n")
    """

    def __init__(
        self,
        model: nn.Module,
        vocabulary: ByteVocabulary,
        input_ids: Tensor | None = None,
        *,
        text: str | bytes = b"",
        end_ids: list[int] | None = None,
        ignore: float = 1e-9,
        **inputs,
    ):
        fixed = input_ids if input_ids is not None else inputs.get("inputs_embeds")
        if fixed is None or fixed.shape[0] != 1 or not fixed.shape[1]:
            raise BadOption(
                "Byte-level decoding takes one prompt with at least one fixed token.",
                hint="Give input_ids [1, L], such as the tokenizer's begin or end token.",
            )
        if not 0 <= ignore < 1:
            raise BadOption(f"ignore must be a probability below 1, got {ignore!r}.")
        if end_ids is None:
            ends = model.generation_config.eos_token_id
            end_ids = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self.vocabulary = vocabulary
        self._end_ids = [i for i in end_ids if i < len(vocabulary)]
        self._ignore = ignore
        self._session = DecodeSession(model)
        self._device = fixed.device
        first_1V = self._session.prefill(input_ids, **inputs)
        self._session.require("crop")
        self._first_V = self._law_of(first_1V)[0]
        self._held: list[int] = []  # the tokens in the cache behind the fixed part
        self._held_logp = [0.0]  # of every number of them
        self._held_V = self._first_V
        self._restart(text.encode() if isinstance(text, str) else bytes(text))

    @property
    def ledger(self) -> Ledger:
        """What it cost so far; one forward pass a byte and one for each beginning of the text."""
        return self._session.ledger

    @property
    def log_prob(self) -> float:
        """log P(x | fixed part), nats."""
        own = [stem.logp for stem in self._stems if stem.is_encoding]
        parts = [*(covers.logp_M for covers in self._covers), torch.tensor(own, dtype=torch.float64)]
        return float(torch.cat(parts).logsumexp(0))

    def law(self) -> Tensor:
        """`[257]` float64: probabilities of the 256 bytes and, last, of the end; they sum to 1.

        An end is possible where x is a whole text. Tokens that have no bytes and end nothing, and sequences that are
        not valid, are left out and the rest is scaled up.

        Raises:
            BadOption: nothing can follow.
        """
        scale = self.log_prob
        mass = torch.zeros(END + 1, dtype=torch.float64)
        for covers in self._covers:
            byte_M = self.vocabulary.byte_VW[covers.last_M, covers.depth].long()
            mass.index_add_(0, byte_M, (covers.logp_M - scale).exp())
        for stem in self._stems:
            valid_M = stem.valid_V.isfinite().nonzero()[:, 0]
            byte_M = self.vocabulary.byte_VW[valid_M, 0].long()
            mass.index_add_(0, byte_M, (stem.logp - scale + stem.valid_V[valid_M]).exp())
            if stem.is_encoding and is_whole(self.data):
                mass[END] = (stem.logp - scale + stem.next_V[self._end_ids]).exp().sum()
        if not mass.sum() > 0:
            raise BadOption(f"Nothing can follow {self.data[-8:]!r} with this tokenizer.")
        return mass / mass.sum()

    def extend(self, data: bytes | int) -> None:
        """Adds bytes, or one byte given as a number.

        Raises:
            BadOption: they cannot follow, as bytes that are not UTF-8 cannot; the session stays as it was.
        """
        data = bytes([data]) if isinstance(data, int) else data
        if len(data) != 1:
            return self._restart(self.data + data) if data else None
        found = [self._going_on(covers, data[0]) for covers in self._covers]
        for stem in self._stems:
            starts_V = self.vocabulary.byte_VW[:, 0] == data[0]
            last_M = (starts_V & stem.valid_V.isfinite()).nonzero()[:, 0]
            found.append(self._shortened(_Covers(last_M, 1, stem.logp + stem.valid_V[last_M])))
        self._move(self.data + data, [covers for covers in found if len(covers.last_M)])

    def _going_on(self, covers: _Covers, byte: int) -> _Covers:
        same_M = self.vocabulary.byte_VW[covers.last_M, covers.depth] == byte
        return self._shortened(_Covers(covers.last_M[same_M], covers.depth + 1, covers.logp_M[same_M]))

    def _shortened(self, covers: _Covers) -> _Covers:
        """Without those that have no overhang left: these are stems, which are held apart."""
        longer_M = self.vocabulary.length_V[covers.last_M] > covers.depth
        return _Covers(covers.last_M[longer_M], covers.depth, covers.logp_M[longer_M])

    def _restart(self, data: bytes) -> None:
        """All covers of a text, from nothing."""
        found, vocabulary = [], self.vocabulary
        for start in range(max(0, len(data) - vocabulary.longest + 1), len(data)):
            rest = data[start:]
            tokens = [t for t in vocabulary.starting_with(rest) if vocabulary.length_V[t] > len(rest)]
            for stem in vocabulary.stems(data[:start]) if tokens else ():
                tail = vocabulary.tail(data[:start], stem)
                last_M = torch.tensor([t for t in tokens if vocabulary.may_follow(tail, t)], dtype=torch.long)
                if len(last_M):
                    logp_V = self._run(stem)
                    found.append(_Covers(last_M, len(rest), self._held_logp[-1] + logp_V[last_M]))
        self._move(data, found)

    def _move(self, data: bytes, covers: list[_Covers]) -> None:
        """Makes x `data`, with these covers, and finds its stems."""
        stems = self.vocabulary.stems(data)
        if not stems and not covers:
            raise BadOption(f"These bytes cannot follow: {data[-8:]!r}.", hint="Texts are UTF-8.")
        encoding = self.vocabulary.encode(data)
        found = []
        for stem in reversed(stems):  # the encoding last, so that the cache is where the next byte goes on
            next_V = self._run(stem)
            valid_V = self._valid(next_V, self.vocabulary.tail(data, stem))
            found.append(_Stem(self._held_logp[-1], next_V, valid_V, is_encoding=stem == encoding))
        self.data, self._covers, self._stems = data, covers, found

    def _valid(self, next_V: Tensor, tail: tuple) -> Tensor:
        """`[V]` log P(token | stem), minus infinity where the sequence is not valid."""
        has_bytes_V = self.vocabulary.length_V > 0
        valid_V = torch.full_like(next_V, -torch.inf)
        order = next_V.masked_fill(~has_bytes_V, -torch.inf).sort(descending=True).indices
        left_over = next_V[order].exp().flip(0).cumsum(0).flip(0)  # of a token and all behind it
        for token in order[(left_over > self._ignore) & has_bytes_V[order]].tolist():
            if self.vocabulary.may_follow(tail, token):
                valid_V[token] = next_V[token]
        return valid_V

    def _run(self, tokens: list[int]) -> Tensor:
        """`[V]` log P(. | fixed part, tokens). Afterwards the cache holds these tokens."""
        same = 0
        while same < min(len(tokens), len(self._held)) and tokens[same] == self._held[same]:
            same += 1
        known = None
        if same < len(self._held):
            if same:  # what comes after the tokens that stay is not held: run the last of them again
                same -= 1
                known = self._held_logp[same + 1]
            self._session.truncate(len(self._held) - same)
            self._held, self._held_logp = self._held[:same], self._held_logp[: same + 1]
            self._held_V = self._first_V
        for start in range(same, len(tokens), _CHUNK):
            chunk = tokens[start : start + _CHUNK]
            logits_1TV = self._session.step(torch.tensor([chunk], device=self._device))
            for token, after_V in zip(chunk, self._law_of(logits_1TV[0]), strict=True):
                logp = self._held_logp[-1] + float(self._held_V[token]) if known is None else known
                self._held.append(token)
                self._held_logp.append(logp)
                self._held_V, known = after_V, None
        return self._held_V

    def _law_of(self, logits_TV: Tensor) -> Tensor:
        """Log-probabilities, float64 on the CPU, as wide as the vocabulary; models are often padded, or lack ids."""
        logp = logits_TV.double().log_softmax(-1).cpu()[:, : len(self.vocabulary)]
        return torch.nn.functional.pad(logp, (0, len(self.vocabulary) - logp.shape[1]), value=-torch.inf)
