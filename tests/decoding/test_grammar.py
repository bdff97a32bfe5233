"""Whatever a random model is made to write parses: greedy, sampled, with beams, with drafts, in trees."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from tests.pipeline.tiny_processors import make_tokenizer, shared_vlm
from tokensieve.decoding import best_of, cautious, recycling_chain, token_recycling
from tokensieve.errors import BadOption

xgrammar = pytest.importorskip("xgrammar")
from tokensieve.decoding import grammar  # noqa: E402

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "seen": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["colour", "count", "seen"],
}
BOX = r"\[[0-9]{1,3}(, [0-9]{1,3}){3}\]"
TOYS = 'root ::= step (", " step){0,3}\nstep ::= "left" | "right" | "up"'
LONG = dict(max_new_tokens=80, pad_token_id=0)
PROMPT = torch.tensor([[1, 165, 166, 167, 165, 166, 167]])


@pytest.fixture(scope="module")
def vlm():
    return shared_vlm("llava")


@pytest.fixture(scope="module")
def tokenizer(vlm):
    return vlm.processor.tokenizer


def written(vlm, out, prompt=PROMPT) -> list[str]:
    return vlm.processor.batch_decode(out[:, prompt.shape[1] :], skip_special_tokens=True)


def fits_schema(text: str) -> bool:
    made = json.loads(text)
    return (
        list(made) == ["colour", "count", "seen"]
        and made["colour"] in ("red", "green")
        and isinstance(made["count"], int)
        and 0 <= made["count"] <= 99
        and 1 <= len(made["seen"]) <= 2
        and all(isinstance(s, bool) for s in made["seen"])
    )


SPECS = {
    "schema": (lambda t: grammar.json_schema(t, SCHEMA), fits_schema),
    "regex": (lambda t: grammar.regex(t, BOX), lambda text: re.fullmatch(BOX, text)),
    "ebnf": (
        lambda t: grammar.ebnf(t, TOYS),
        lambda text: re.fullmatch("(left|right|up)(, (left|right|up)){0,3}", text),
    ),
    "choice": (lambda t: grammar.choice(t, ["A", 'B "', "\n"]), lambda text: text in ("A", 'B "', "\n")),
}
WAYS = {
    "greedy": {},
    "sampled": dict(do_sample=True, num_return_sequences=3, temperature=3.0),
    "beams": dict(num_beams=3),
    "lookup": dict(prompt_lookup_num_tokens=3),
    "sampled lookup": dict(prompt_lookup_num_tokens=3, do_sample=True),
    "tree": dict(custom_generate=token_recycling()),
    "chain": dict(custom_generate=recycling_chain()),
    "samples": dict(custom_generate=best_of(3), do_sample=True),
    "trials": dict(custom_generate=cautious([144, 158], max_trials=3), do_sample=True),
}


@pytest.fixture(params=SPECS)
def spec(request, tokenizer):
    make, fits = SPECS[request.param]
    return make(tokenizer), fits


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_parses(vlm, spec, way):
    keep, fits = spec
    torch.manual_seed(0)
    out = vlm.model.generate(PROMPT, logits_processor=[keep], **LONG, **WAYS[way])
    for row, text in zip(out, written(vlm, out), strict=True):
        assert keep.finished(row[PROMPT.shape[1] :])
        assert fits(text), text


def test_without_it_the_model_writes_something_else(vlm, spec):
    out = vlm.model.generate(PROMPT, max_new_tokens=20, pad_token_id=0)
    assert not spec[0].finished(out[0, PROMPT.shape[1] :])


@pytest.mark.parametrize("way", ["lookup", "tree", "chain"])
def test_drafting_changes_nothing(vlm, spec, way):
    keep, _ = spec
    greedy = vlm.model.generate(PROMPT, logits_processor=[keep], **LONG)
    drafted = vlm.model.generate(PROMPT, logits_processor=[keep], **LONG, **WAYS[way])
    assert torch.equal(greedy, drafted)


def test_a_draft_of_its_own_answer_is_taken_in_few_passes(vlm, tokenizer):
    """With a matrix that has seen the answer, guesses are right under the grammar, and masks go down the tree."""
    keep = grammar.regex(tokenizer, "(ab){30}c")
    decode = token_recycling()
    options = dict(logits_processor=[keep], return_dict_in_generate=True, **LONG)
    first = vlm.model.generate(PROMPT, custom_generate=decode, **options)
    matrix = first.details["matrix"]
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    matrix.successors_Vk[:, 0] = (
        matrix.successors_Vk[:, 0].index_fill(0, torch.tensor([a]), b).index_fill(0, torch.tensor([b]), a)
    )

    def keeps_the_matrix(*_):
        pass

    matrix.update = keeps_the_matrix
    second = vlm.model.generate(PROMPT, custom_generate=decode, **options)
    assert torch.equal(first.sequences, second.sequences)
    assert second.ledger.forward_passes < first.ledger.forward_passes / 2


def test_every_allowed_token_is_accepted_and_no_other(tokenizer, vlm):
    keep = grammar.json_schema(tokenizer, SCHEMA)
    size = 400  # a vocabulary that is padded beyond the tokenizer
    text = '{"colour": "red", "count": 7'
    ids = tokenizer.encode(text, add_special_tokens=False)
    for length in range(len(ids) + 1):
        row = torch.cat([PROMPT, torch.tensor([ids[:length]], dtype=torch.long)], dim=1)
        allowed = keep(row, torch.zeros(1, size))[0] == 0
        for token in range(size):
            fresh = xgrammar.GrammarMatcher(keep._compiled)
            assert all(fresh.accept_token(i) for i in ids[:length])
            wanted = token < len(tokenizer) and fresh.accept_token(token)
            assert bool(allowed[token]) == wanted, (length, token)


def test_special_tokens_are_no_text(tokenizer):
    """`<image>` spells seven allowed letters, but is a picture."""
    keep = grammar.json_schema(tokenizer, {"type": "string"})
    quote = tokenizer.convert_tokens_to_ids('"')
    keep(PROMPT, torch.zeros(1, len(tokenizer)))
    row = torch.cat([PROMPT, torch.tensor([[quote]])], dim=1)
    allowed = keep(row, torch.zeros(1, len(tokenizer)))[0] == 0
    assert allowed[tokenizer.convert_tokens_to_ids("<")]
    assert not allowed[tokenizer.all_special_ids].any() and not allowed[95]
    ended = torch.cat([PROMPT, torch.tensor([[quote, quote, tokenizer.eos_token_id, 0, 0]])], dim=1)
    for length in range(PROMPT.shape[1], ended.shape[1] + 1):
        last = keep(ended[:, :length], torch.zeros(1, len(tokenizer)))[0]
    assert (last == 0).nonzero()[:, 0].tolist() == [tokenizer.eos_token_id]


def test_rows_may_change_places_and_prompts_may_follow_each_other(tokenizer):
    make = lambda: grammar.choice(tokenizer, ["ab", "ac", "bc"])  # noqa: E731
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])

    def open_after(keep, *rows, prompt=PROMPT):
        ids = torch.cat([prompt.repeat(len(rows), 1), torch.tensor(rows, dtype=torch.long)], dim=1)
        return [(r == 0).nonzero()[:, 0].tolist() for r in keep(ids, torch.zeros(len(rows), len(tokenizer)))]

    keep, end = make(), tokenizer.eos_token_id
    assert open_after(keep, [], []) == [[a, b]] * 2
    assert open_after(keep, [a], [b]) == [[b, c], [c]]
    assert open_after(keep, [b, c], [a, b]) == [[end], [end]]  # swapped
    assert len(open_after(keep, [b, b])[0]) == len(tokenizer)  # a guess that is refused
    assert open_after(keep, [a]) == [[b, c]]  # taken back
    longer = torch.cat([PROMPT, torch.tensor([[a, b, end, a]])], dim=1)  # the next turn of the same chat
    assert open_after(keep, [], prompt=longer) == [[a, b]]
    assert open_after(keep, [a], prompt=longer) == [[b, c]]
    assert open_after(keep, [], prompt=PROMPT[:, 1:]) == [[a, b]]  # another prompt
    assert open_after(keep, [], prompt=PROMPT.flip(1)) == [[a, b]]  # and one more, longer by the length of a token


def test_batches_and_cut_answers(vlm, tokenizer):
    keep = grammar.json_schema(tokenizer, SCHEMA)
    prompts = torch.tensor([[0, 0, 1, 170, 171], [1, 180, 181, 182, 183]])
    mask = (prompts != 0).long()
    out = vlm.model.generate(prompts, attention_mask=mask, logits_processor=[keep], **LONG)
    assert all(fits_schema(t) for t in written(vlm, out, prompts))
    out = vlm.model.generate(prompts, attention_mask=mask, logits_processor=[keep], max_new_tokens=9, pad_token_id=0)
    assert not any(keep.finished(row) for row in out[:, 5:])


def test_with_pictures_and_several_clips(vlm):
    from tests.pipeline.tiny_processors import noise

    keep = grammar.json_schema(vlm.processor, SCHEMA)
    answers = vlm.answer([noise(1), noise(1, seed=1)], "What?", max_new_tokens=80, logits_processor=[keep])
    again = vlm.answer(noise(1), "What else?", max_new_tokens=80, logits_processor=[keep])
    assert all(fits_schema(a.answer) for a in [*answers, again])


def test_the_shipped_tokenizer_with_its_merges():
    import tokensieve as ts

    tiny = ts.load("tiny")
    keep = grammar.json_schema(tiny.processor, SCHEMA)
    ids = tiny.processor.tokenizer("Which digit is red?", return_tensors="pt").input_ids
    out = tiny.model.generate(ids, logits_processor=[keep], max_new_tokens=80)
    assert fits_schema(tiny.processor.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)[0])


def test_other_processors_that_leave_nothing_are_told(vlm, tokenizer):
    keep = grammar.choice(tokenizer, ["a"])
    with pytest.raises(BadOption, match="No token is left"):
        vlm.model.generate(PROMPT, logits_processor=[keep], min_new_tokens=4, **LONG)
    with pytest.raises(BadOption, match="No token is left"):  # a grammar without a finite sentence
        vlm.model.generate(PROMPT, logits_processor=[grammar.ebnf(tokenizer, "root ::= root")], **LONG)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: grammar.regex(t, "(a"), "cannot be compiled: .*not closed"),
        (lambda t: grammar.regex(t, "(?=a)b"), "Lookahead"),
        (lambda t: grammar.regex(t, ""), "pattern must be"),
        (lambda t: grammar.ebnf(t, "root ::= foo"), '"foo" is not defined'),
        (lambda t: grammar.ebnf(t, "x" * 70_000), "grammar must be"),
        (lambda t: grammar.json_schema(t, {"type": "integer", "minimum": 5, "maximum": 3}), "Invalid range"),
        (lambda t: grammar.choice(t, "ab"), "list of texts"),
        (lambda t: grammar.json_schema(t, {"type": "string"}, end_ids=[]), "no end token"),
    ],
)
def test_what_cannot_be_compiled_is_told(tokenizer, make, message, capfd):
    with pytest.raises(BadOption, match=message) as caught:
        make(tokenizer)
    assert "/project/" not in str(caught.value)


def test_a_tokenizer_of_another_kind():
    with pytest.raises(BadOption, match="fast tokenizer"):
        grammar.regex(type("Slow", (), {"eos_token_id": 1})(), "a")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(BadOption, match=r"tokensieve\[grammar\]"):
        grammar.regex(make_tokenizer("llava"), "a")


def test_compiled_once(tokenizer):
    first, second = (grammar.json_schema(tokenizer, SCHEMA) for _ in range(2))
    assert first is not second
    assert len(grammar._compilers[tokenizer]) == 1
