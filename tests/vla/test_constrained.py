"""Whatever a model would like to say, what comes is a code."""

import pytest
import torch
from transformers import LogitsProcessorList

from tests.vla.fixture import with_behaviour
from tokensieve.errors import BadOption
from tokensieve.vla import BehaviourConstraint, BehaviourVocabulary, Packer, SubTask

END = 1
VOCABULARY = BehaviourVocabulary((3, 2), 10)  # blocks 10-12 and 13-14
DECODING = [{}, {"do_sample": True, "temperature": 3.0}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}]


def prompts(thought):
    """Ids and mask of two prompts of different lengths, padded on the left."""
    packer = Packer(with_behaviour()[1])
    now = SubTask(observation=[4, 4])
    ids = [packer.prompt(text, now, thought=thought) for text in ("go", "open the red door")]
    length = max(map(len, ids))
    rows = [[0] * (length - len(row)) + row for row in ids]
    masks = [[0] * (length - len(row)) + [1] * len(row) for row in ids]
    return packer, {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def generate(inputs, max_new_tokens, rule=None, **options):
    """New tokens of every row."""
    model, _, vocabulary = with_behaviour()
    length = inputs["input_ids"].shape[1]
    rule = BehaviourConstraint(vocabulary, length, END, **rule or {})
    torch.manual_seed(0)
    out = model.generate(
        **inputs, logits_processor=LogitsProcessorList([rule]), max_new_tokens=max_new_tokens, **options
    )
    return out[:, length:]


@pytest.mark.parametrize("options", DECODING)
def test_five_tokens_one_of_each_block_then_the_end(options):
    packer, inputs = prompts(thought=False)
    new = generate(inputs, 12, **options)
    digits = packer.vocabulary.ids_to_digits(new[:, :5])  # raises unless they are codes
    assert digits.shape == (2, 5) and new.shape[1] == 6 and new[:, 5].eq(END).all()


@pytest.mark.parametrize("options", DECODING)
def test_a_thought_then_the_marker_then_a_code(options):
    packer, inputs = prompts(thought=True)
    rule = {"control_ids": packer.control_ids, "max_thought_tokens": 7}
    new = generate(inputs, 40, rule, **options)
    behaviours = set(packer.vocabulary.all_ids)
    for row in new.tolist():
        first = next(i for i, token in enumerate(row) if token in behaviours)
        assert tuple(row[first - len(packer.control_ids) : first]) == packer.control_ids
        assert first <= 7 + len(packer.control_ids) and END not in row[:first]
        packer.vocabulary.ids_to_digits(torch.tensor(row[first : first + 5]))
        assert row[first + 5] == END and not behaviours & set(row[first + 5 :])


def test_without_the_rule_it_would_not_be_a_code():
    packer, inputs = prompts(thought=False)
    model, _, vocabulary = with_behaviour()
    new = model.generate(**inputs, max_new_tokens=5)[:, inputs["input_ids"].shape[1] :]
    with pytest.raises(BadOption):
        vocabulary.ids_to_digits(new)


def test_scores_of_allowed_tokens_stay_as_they_are():
    rule = BehaviourConstraint(VOCABULARY, 2, END)
    scores = torch.randn(3, 20)
    ids = torch.tensor([[11, 12, 10], [0, 0, 12], [10, 13, 11]])
    after = rule(ids, scores)
    assert torch.equal(after[:, 13:15], scores[:, 13:15]) and after[:, :13].eq(-torch.inf).all()
    assert after[:, 15:].eq(-torch.inf).all() and scores.isfinite().all()


@pytest.mark.parametrize(
    ("emitted", "allowed"),
    [
        ([], None),
        ([5, 6], None),
        ([7], None),
        ([7, 8], range(10, 13)),
        ([5, 7, 7, 8], range(10, 13)),
        ([7, 8, 5], None),
        ([7, 8, 11], range(13, 15)),
        ([7, 8, 11, 13], range(1, 2)),
        ([7, 8, 11, 13, 1, 0, 0], range(1, 2)),
        ([5, 5, 5, 5], range(7, 8)),
        ([5, 5, 5, 5, 7], range(8, 9)),
        ([5, 5, 5, 7], range(8, 9)),
        ([5, 5, 5, 5, 7, 8], range(10, 13)),
    ],
)
def test_what_may_follow(emitted, allowed):
    rule = BehaviourConstraint(VOCABULARY, 9, END, control_ids=(7, 8), max_thought_tokens=4)
    assert rule.allowed(emitted) == allowed


def test_a_marker_that_begins_as_it_ends():
    rule = BehaviourConstraint(VOCABULARY, 0, END, control_ids=(7, 8, 7), max_thought_tokens=2)
    assert rule.allowed([5, 7, 8, 7]) == range(10, 13)
    assert rule.allowed([5, 5, 7]) == range(8, 9) and rule.allowed([5, 5, 7, 8]) == range(7, 8)


def test_thinking_forbids_behaviours_and_the_end():
    rule = BehaviourConstraint(VOCABULARY, 0, END, control_ids=(7, 8))
    finite = rule(torch.tensor([[5]]), torch.zeros(1, 20)).isfinite()[0]
    assert finite.nonzero()[:, 0].tolist() == [i for i in range(20) if i not in (1, 10, 11, 12, 13, 14)]
    assert rule.allowed([5] * 1000) is None


@pytest.mark.parametrize(
    ("length", "end", "options"),
    [(-1, 1, {}), (0, 12, {}), (0, 1, {"control_ids": ()}), (0, 1, {"max_thought_tokens": 3})]
    + [(0, 1, {"control_ids": (7,), "max_thought_tokens": -1})],
)
def test_options_that_are_refused(length, end, options):
    with pytest.raises(BadOption):
        BehaviourConstraint(VOCABULARY, length, end, **options)


def test_a_thought_of_no_tokens():
    packer, inputs = prompts(thought=True)
    new = generate(inputs, 40, {"control_ids": packer.control_ids, "max_thought_tokens": 0})
    assert new[0, : len(packer.control_ids)].tolist() == list(packer.control_ids)
    assert new.shape[1] == len(packer.control_ids) + 6
