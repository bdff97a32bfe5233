"""Texts byte by byte: from one model, or from several with different tokenizers; and prompts to fill a gap."""

# Shape legend: M members of an ensemble

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.decoding.byte_session import END, ByteSession
from tokensieve.errors import BadOption

FILL_TOKENS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")


@dataclass(frozen=True)
class ByteOutput:
    """What `sample_bytes` wrote.

    Attributes:
        data: the new bytes.
        ended: whether the text ended by an end token or a stop text, not by the limit.
    """

    data: bytes
    ended: bool

    @property
    def text(self) -> str:
        """The whole characters among the bytes: the limit may have cut the last one."""
        return self.data.decode(errors="ignore")


def sample_bytes(
    sessions: ByteSession | Sequence[ByteSession],
    max_bytes: int = 500,
    *,
    temperature: float = 0.6,
    top_p: float = 1.0,
    weights: Sequence[float] | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> ByteOutput:
    """Draws bytes and feeds them to all sessions, which are changed; one forward pass a byte and session.

    Args:
        sessions: one, or the members of an ensemble: models, tokenizers and prompts may all differ. Their laws are
            averaged; a byte that a member cannot write is not drawn.
        max_bytes: longest text.
        temperature: probabilities are raised to 1 / temperature; 0 takes the likeliest byte.
        top_p: the likeliest bytes that reach this probability together are drawn from.
        weights: of the members; equal ones if left out.
        stop: texts that end the output, which then ends with one.
        seed: of the draws.

    Raises:
        BadOption: no session, or a value that is not allowed.

    Example:
        >>> vocabulary = ByteVocabulary(tokenizer)
        >>> sample_bytes(ByteSession(model, vocabulary, ids, text="def fibo"), 200, stop=["\\n\\n"]).text
    """
    members = [sessions] if isinstance(sessions, ByteSession) else list(sessions)
    _check(members, max_bytes, temperature, top_p, weights)
    ends = [text.encode() for text in stop]
    generator = torch.Generator().manual_seed(seed)
    data = b""
    while len(data) < max_bytes:
        outcome = _draw(average_law([m.law() for m in members], weights), temperature, top_p, generator)
        if outcome == END:
            return ByteOutput(data, ended=True)
        data += bytes([outcome])
        stopped = any(data.endswith(end) for end in ends)
        if stopped or len(data) == max_bytes:
            return ByteOutput(data, ended=stopped)
        for member in members:
            member.extend(outcome)
    return ByteOutput(data, ended=False)


def average_law(laws: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The mean of `[257]` laws, over those outcomes that have a probability in all of them.

    Raises:
        BadOption: there is no such outcome.
    """
    law_M257 = torch.stack(list(laws))
    weight_M = torch.ones(len(law_M257)) if weights is None else torch.tensor(weights)
    mean = (weight_M.double()[:, None] * law_M257).sum(0) * (law_M257 > 0).all(0)
    if not mean.sum() > 0:
        raise BadOption("The members of this ensemble have no next byte in common.")
    return mean / mean.sum()


def middle_prompt(tokenizer, prefix: str, suffix: str, tokens: Sequence[str] = FILL_TOKENS) -> dict[str, object]:
    """Arguments of `ByteSession` for what stands between two texts, in the order suffix, prefix, middle.

    The prefix comes last and as bytes, so it may end within a token. The model must know this order: those of StarCoder
    do, and others trained on both orders.

    Args:
        tokenizer: with the three tokens.
        prefix, suffix: what stands before and after the gap.
        tokens: names of those for prefix, suffix and middle.

    Raises:
        BadOption: the tokenizer lacks one of them.

    Example:
        >>> session = ByteSession(model, vocabulary, **middle_prompt(tokenizer, "def ad", "    return a + b"))
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    known = tokenizer.get_vocab()
    if missing := [token for token in tokens if token not in known]:
        raise BadOption(f"The tokenizer has no token {missing[0]!r}.", hint="Name its own with tokens=(...).")
    before, after, middle = (known[token] for token in tokens)
    ids = [before, after, *tokenizer.encode(suffix, add_special_tokens=False), middle]
    return {"input_ids": torch.tensor([ids]), "text": prefix}


def _draw(law: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(law.argmax())
    law = (law / law.max()) ** (1 / temperature)
    law = law / law.sum()
    ranked, order = law.sort(descending=True)
    ranked = ranked * (ranked.cumsum(0) - ranked < top_p)  # those before an outcome have not reached it yet
    return int(order[torch.multinomial(ranked, 1, generator=generator)])


def _check(members, max_bytes, temperature, top_p, weights) -> None:
    if not members:
        raise BadOption("sample_bytes needs a session.")
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
        raise BadOption(f"max_bytes must be a whole number above 0, got {max_bytes!r}.")
    if not temperature >= 0:
        raise BadOption(f"temperature must be 0 or above, got {temperature!r}.")
    if not 0 < top_p <= 1:
        raise BadOption(f"top_p must be above 0 and at most 1, got {top_p!r}.")
    if weights is not None and (len(weights) != len(members) or not all(w > 0 for w in weights)):
        raise BadOption(f"weights must be {len(members)} numbers above 0, got {weights!r}.")
