"""Answers in a formal language, by XGrammar (arXiv 2411.15100): JSON of a schema, a regular expression, EBNF.

Before every token the logits of all tokens after which no sentence of the language is left are set to minus infinity.
XGrammar's own processor for transformers follows one growing prefix a row, and so fails with beams, which swap rows,
and with drafting, which asks about guesses. Ours is keyed by the prefix: for each row it takes back what differs from
the last call and accepts the rest. That is enough for the tree of Token Recycling too, which asks node by node.
"""

# Shape legend: B rows, L tokens so far, P prompt tokens, V vocabulary of the tokenizer, W words of 32 bits

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tokensieve.decoding.grammar_schema import check_schema, read_schema
from tokensieve.errors import BadOption

MAX_GRAMMAR_CHARS = 64 * 1024
_CACHE_BYTES = 64 * 2**20
_compilers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class GrammarProcessor(LogitsProcessor):
    """Keeps generated tokens within a grammar, for `generate(logits_processor=[...])`. Made by `json_schema` and such.

    Works with greedy decoding, sampling, beams, prompt lookup and other assisted decoding, and all methods of
    `tokensieve.decoding`; for any number of calls of `generate`, one after the other. Special tokens are never allowed,
    the end token only where a sentence is whole; a row that has ended gets end tokens. A row that has left the grammar
    is not masked: that happens to guesses, which are about to be refused.

    Args:
        compiled: an `xgrammar.CompiledGrammar` for the tokenizer.
        end_ids: tokens that end an answer.
        never_ids: special tokens and others that are no text.
    """

    def __init__(self, compiled, end_ids: Collection[int], never_ids: Collection[int]):
        self._compiled = compiled
        self._end_ids = sorted(end_ids)
        self._never_ids = frozenset(never_ids) - set(end_ids)
        self._size = compiled.tokenizer_info.vocab_size
        self._prompts_BP: Tensor | None = None
        self._longest = 0
        self._rows: list[_Row] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[B, V]` scores with -inf where a token is not allowed.

        Raises:
            BadOption: a row of the grammar in which no token is left: other processors took them all, or no sentence
                goes on with tokens of this vocabulary.
        """
        self._find_prompt(input_ids)
        suffixes = input_ids[:, self._prompts_BP.shape[1] :].tolist()
        while len(self._rows) < len(suffixes):
            self._rows.append(_Row(self._matcher()))
        bits_BW = torch.zeros(len(suffixes), (self._size + 31) // 32, dtype=torch.int32)
        states = [self._fill(row, ids, bits_BW) for row, ids in enumerate(suffixes)]
        allowed_BV = _unpacked(bits_BW.to(scores.device), scores.shape[-1])
        never = [i for i in self._never_ids if i < scores.shape[-1]]
        ends = [i for i in self._end_ids if i < scores.shape[-1]]
        allowed_BV[:, never] = False
        for row, state in enumerate(states):
            if state == "ended":
                allowed_BV[row, ends] = True
        free_B = torch.tensor([state == "left" for state in states], device=scores.device)
        masked_BV = scores.masked_fill(~(allowed_BV | free_B[:, None]), -torch.inf)
        if not (free_B | (masked_BV > -torch.inf).any(-1)).all():
            raise BadOption(
                "No token is left: the grammar goes on with none that the other processors allow.",
                hint="Leave min_new_tokens, suppress_tokens and forced tokens out; or check that the grammar has a "
                "finite sentence.",
            )
        return masked_BV

    def finished(self, new_ids: Sequence[int] | Tensor) -> bool:
        """Whether generated ids (prompt left out) are a whole sentence: False if `max_new_tokens` cut them off."""
        matcher = self._matcher()
        for token in new_ids.tolist() if isinstance(new_ids, Tensor) else new_ids:
            if token in self._end_ids:
                break
            if not self._accept(matcher, token):
                return False
        return matcher.is_completed()

    def _matcher(self):
        from xgrammar import GrammarMatcher

        return GrammarMatcher(self._compiled, override_stop_tokens=self._end_ids)

    def _accept(self, matcher, token: int) -> bool:
        return token < self._size and token not in self._never_ids and matcher.accept_token(token)

    def _find_prompt(self, ids_BL: Tensor) -> None:
        """Tells a new `generate` from the next token of the last: that is one longer than any before, at most."""
        length = ids_BL.shape[1]
        prompts = self._prompts_BP
        if prompts is not None and prompts.shape[1] < length <= self._longest + 1:
            start_BP = ids_BL[:, : prompts.shape[1]]
            if (start_BP[:, None] == prompts.to(ids_BL.device)).all(-1).any(1).all():
                self._longest = max(self._longest, length)
                return
        self._prompts_BP = ids_BL.unique(dim=0) if length else ids_BL[:1]
        self._longest = length
        self._rows = []

    def _fill(self, row: int, ids: list[int], bits_BW: Tensor) -> str:
        """Brings the row's matcher to these ids. "open": its mask is in `bits_BW`; "ended"; or "left" the grammar."""
        matcher, known = self._rows[row].matcher, self._rows[row].ids
        end = next((i for i, token in enumerate(ids) if token in self._end_ids), None)
        body = ids[:end]
        same = 0
        while same < min(len(body), len(known)) and body[same] == known[same]:
            same += 1
        if same < len(known):
            matcher.rollback(len(known) - same)
            del known[same:]
        for token in body[same:]:
            if not self._accept(matcher, token):
                return "left"
            known.append(token)
        if end is not None:
            return "ended" if matcher.is_completed() else "left"
        matcher.fill_next_token_bitmask(bits_BW, row)
        return "open"


class _Row:
    """A matcher and the ids that it has accepted."""

    def __init__(self, matcher):
        self.matcher = matcher
        self.ids: list[int] = []


def json_schema(tokenizer, schema: dict | bool | str | Path, *, end_ids: Collection[int] | None = None):
    """A processor that keeps answers to a JSON schema, on one line, with properties in the schema's order.

    Args:
        tokenizer: a fast tokenizer, or a processor that has one.
        schema: the schema, or the path of a file that holds it; see `grammar_schema.check_schema` for what it may say.
            Properties that are not named are not written, unless `additionalProperties` allows them.
        end_ids: tokens that end an answer; the tokenizer's end token if left out. They must be among those that
            `generate` stops at.

    Returns:
        A `GrammarProcessor`.

    Raises:
        BadOption: a schema that would not be enforced in full, or cannot be compiled; no XGrammar; no fast tokenizer;
            no end token.

    Example:
        >>> keep = json_schema(vlm.processor, "colour.json")
        >>> vlm.answer("clip.mp4", "Which colour?", logits_processor=[keep])
    """
    if isinstance(schema, str | Path):
        schema = read_schema(schema)
    else:
        check_schema(schema)
    text = json.dumps(schema)
    return _processor(tokenizer, end_ids, lambda c: c.compile_json_schema(text, any_whitespace=False), "schema")


def regex(tokenizer, pattern: str, *, end_ids: Collection[int] | None = None):
    """A processor that keeps answers to a regular expression, which must match them whole. Otherwise as `json_schema`.

    Lookarounds, back references and word boundaries are refused.

    Example:
        >>> keep = regex(tokenizer, r"\\[[0-9]{1,4}(, [0-9]{1,4}){3}\\]")  # a box
    """
    _check_text(pattern, "pattern")
    return _processor(tokenizer, end_ids, lambda c: c.compile_regex(pattern), "regular expression")


def ebnf(tokenizer, grammar: str, *, end_ids: Collection[int] | None = None):
    """A processor that keeps answers to a grammar in the EBNF of llama.cpp, with a rule `root`. As `json_schema`.

    Example:
        >>> keep = ebnf(tokenizer, 'root ::= step ("," step)*\\nstep ::= "left" | "right"')
    """
    _check_text(grammar, "grammar")
    return _processor(tokenizer, end_ids, lambda c: c.compile_grammar(grammar), "grammar")


def choice(tokenizer, answers: Sequence[str], *, end_ids: Collection[int] | None = None):
    """A processor that allows these answers and no others. As `json_schema`."""
    if isinstance(answers, str) or not answers or not all(isinstance(a, str) and a for a in answers):
        raise BadOption("answers must be a list of texts, none of them empty.")
    return ebnf(tokenizer, "root ::= " + " | ".join(map(json.dumps, answers)), end_ids=end_ids)


def _check_text(text: str, name: str) -> None:
    if not isinstance(text, str) or not 0 < len(text) <= MAX_GRAMMAR_CHARS:
        raise BadOption(f"{name} must be a text of 1 to {MAX_GRAMMAR_CHARS} characters.")


def _processor(tokenizer, end_ids, compile_with: Callable, what: str) -> GrammarProcessor:
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if end_ids is None:
        end_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not end_ids:
        raise BadOption("This tokenizer has no end token, so an answer could not end.", hint="Give end_ids.")
    compiler = _compiler(tokenizer, tuple(sorted(end_ids)))
    try:
        compiled = compile_with(compiler)
    except (RuntimeError, ValueError) as error:
        # Line and column are ours to tell; the library puts a time and its source file before them.
        reason = str(error).strip().splitlines()[0].split(": ", 1)[-1][:200]
        raise BadOption(f"The {what} cannot be compiled: {reason}") from error
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return GrammarProcessor(compiled, end_ids, special | set(tokenizer.all_special_ids))


def _compiler(tokenizer, end_ids: tuple[int, ...]):
    """One for each tokenizer and its ends; it remembers what it compiled."""
    try:
        from xgrammar import GrammarCompiler, TokenizerInfo
    except ImportError as error:
        raise BadOption(
            "Answers in a formal language need XGrammar.", hint='Install it: pip install "tokensieve[grammar]".'
        ) from error
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BadOption(f"Grammars need a fast tokenizer of transformers, got {type(tokenizer).__name__}.")
    known = _compilers.setdefault(tokenizer, {})
    if end_ids not in known:
        size = max(tokenizer.get_vocab().values()) + 1
        info = TokenizerInfo.from_huggingface(tokenizer, vocab_size=size, stop_token_ids=list(end_ids))
        known[end_ids] = GrammarCompiler(info, max_threads=1, cache_limit_bytes=_CACHE_BYTES)
    return known[end_ids]


def _unpacked(bits_BW: Tensor, size: int) -> Tensor:
    """`[B, size]` bool from words of 32 bits, lowest first; False beyond them."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits_BW.device)
    flags = ((bits_BW[..., None] >> shifts) & 1).bool().flatten(1)[:, :size]
    return torch.nn.functional.pad(flags, (0, size - flags.shape[1]))
