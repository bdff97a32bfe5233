"""Scores by hand: normalisation, spelling, common words, and which choice a model means."""

from __future__ import annotations

import sys
import time

import pytest

from tokensieve.errors import BadOption
from tokensieve.pipeline.evaluation.scores import (
    SCORES,
    _rouge_l,
    anls,
    choice_letter,
    choice_likelihood,
    chosen,
    contains,
    exact,
    get_score,
    likeliest,
    normalised,
    rouge_l,
)

ANIMALS = ["cat", "dog", "bird", "dark red fish"]


@pytest.mark.parametrize(
    "text, want",
    [
        ("The  Red\tCar.", "red car"),
        ("an apple, a pear", "apple pear"),
        ("another theory", "another theory"),
        ("“Yes”, it’s!", "yes its"),
        ("-3.5", "-3.5"),
        ("−3", "-3"),
        ("-.5", "-.5"),
        ("3.", "3"),
        ("1,234,567.50", "1234567.50"),
        ("1,2", "12"),
        ("x-ray", "xray"),
        ("$5", "5"),
        ("ＡＢＣ１", "abc1"),
        ("Straße", "strasse"),
        ("A", "a"),
        ("The", "the"),
        ("?", "?"),
        ("猫。", "猫"),
        ("", ""),
    ],
)
def test_normalisation(text, want):
    assert normalised(text) == want


@pytest.mark.parametrize(
    "said, answers, want",
    [
        ("the Red car.", ["red car"], 1.0),
        ("red", ["blue", "red"], 1.0),
        ("red car", ["red"], 0.0),
        ("35", ["3.5"], 0.0),
        ("5", ["-5"], 0.0),
        ("2", ["two"], 0.0),
        ("A", ["a"], 1.0),
        ("?", ["!"], 0.0),
        ("I think <answer> red </answer>", ["red"], 1.0),
        ("", ["red"], 0.0),
        ("red", [], None),
    ],
)
def test_exact(said, answers, want):
    assert exact(said, answers) == want


@pytest.mark.parametrize(
    "said, answers, want",
    [
        ("It is a red car, I think.", ["the red car"], 1.0),
        ("none", ["one"], 0.0),
        ("one by one", ["two", "one"], 1.0),
        ("red and blue car", ["red car"], 0.0),
        ("3.55", ["3.5"], 0.0),
        ("", ["red"], 0.0),
        ("red", [], None),
    ],
)
def test_contains(said, answers, want):
    assert contains(said, answers) == want


@pytest.mark.parametrize(
    "said, answers, want",
    [
        ("Hello  World", ["hello world"], 1.0),
        ("helo", ["hello"], 1 - 1 / 5),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("kitten", ["sitting", "kitte"], 1 - 1 / 6),
        ("abcd", ["abxy"], 0.5),  # two edits of four: the script's side of the border
        ("abcde", ["abxyz"], 0.0),  # three of five
        ("hello!", ["hello"], 1 - 1 / 6),  # punctuation counts
        ("", ["hello"], 0.0),
        ("hello", [], None),
    ],
)
def test_anls(said, answers, want):
    assert anls(said, answers) == (want if want is None else pytest.approx(want))


@pytest.mark.parametrize(
    "said, answers, want",
    [
        ("the cat sat", ["the cat sat"], 1.0),
        ("the cat on the mat", ["the cat sat on a mat"], 2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6)),
        ("mat the on", ["on the mat"], 1 / 3),  # order counts
        ("a dog", ["the cat", "a dog"], 1.0),
        ("cats", ["cat"], 0.0),  # no stemming
        ("", ["cat"], 0.0),
        ("猫", ["猫"], None),
        ("cat", ["猫", "cat"], 1.0),
        ("cat", [], None),
    ],
)
def test_rouge_l(said, answers, want):
    assert rouge_l(said, answers) == (want if want is None else pytest.approx(want))


@pytest.mark.parametrize(
    "said, want",
    [
        # the whole text
        *[(said, "B") for said in ("B", "b", "(B)", "(b)", "B.", " [b] ", "**B**", "__B__", '"B"', "'b'")],
        *[(said, "B") for said in ("dog", "Dog.", "The dog", "a DOG!")],
        ("A", "A"),
        ("a.", "A"),
        ("A cat", "A"),
        ("<answer>C</answer>", "C"),
        ("not A <answer>C</answer>", "C"),
        # begins with a letter
        ("B. dog", "B"),
        ("B) it barks", "B"),
        ("(B) it barks", "B"),
        ("B: the dog, not the cat", "B"),
        ("**B** it barks", "B"),
        ("B\nBecause A is wrong", "B"),
        ("B. cat", "B"),  # the letter goes before the text
        ("A, because it purrs", "A"),
        ("(B) it barks unlike A", "B"),
        ("B. The answer is C", "B"),
        ("A or B", None),
        ("A, B", None),
        ("A/B.", None),
        # called the answer
        ("The answer is B", "B"),
        ("The answer is b.", "B"),
        ("the correct answer would be (c)", "C"),
        ("ANSWER: **D**", "D"),
        ("Answer:B", "B"),
        ("The answer to the question is D", "D"),
        ("The best answer is: Option C.", "C"),
        ("The correct option is (A).", "A"),
        ("The answer is A because cats purr", "A"),
        ("the answer is a dog", "B"),
        ("\\boxed{B}", "B"),
        ("so $\\boxed{\\text{D}}$", "D"),
        ("C is wrong; the answer is D", "D"),
        ("The answer is B, because A and C are wrong", "B"),
        ("The answer is not B, it is C", "C"),
        ("The answer is A or B", None),
        ("The answer is A. No, the answer is B.", None),
        # on their own
        ("I would go for B", "B"),
        ("I'd say option C", "C"),
        ("Option A is right", "A"),
        ("B because it barks", "B"),
        ("A dog is in B", "B"),
        ("not A but B", "B"),
        ("It is not B", None),
        ("It isn't option B", None),
        ("neither A nor B", None),
        ("maybe A, maybe (C)", None),
        # their texts
        ("It is a dog", "B"),
        ("I see a dog there", "B"),
        ("a cat and a dog", None),
        ("a dark red fish swims", "D"),
        # none
        *[(said, None) for said in ("", "E", "hotdog", "B-52", "Bob", "I'd", "no idea", "1")],
    ],
)
def test_which_choice_is_meant(said, want):
    index = chosen(said, ANIMALS)
    assert (None if index is None else "ABCD"[index]) == want
    for i, choice in enumerate(ANIMALS):
        assert choice_letter(said, [choice], ANIMALS) == float(index == i)


def test_choices_that_look_like_others():
    assert chosen("A", ["B", "A"]) is None  # the letter says one, the text the other
    assert chosen("red", ["red", "dark red"]) == 0
    assert chosen("it is dark red", ["red", "dark red"]) == 1
    assert chosen("red or dark red", ["red", "dark red"]) is None
    assert chosen("the cat", ["The cat", "cat"]) is None and chosen("I see a cat", ["The cat", "cat"]) is None
    assert chosen("dog long red big", ["dog big", "long red"]) == 1  # what is left when it is taken out was not said
    assert chosen("D", ANIMALS[:3]) is None
    letters = [f"thing {i}" for i in range(10)]
    assert chosen("I", letters) == 8 and chosen("I think it is J", letters) == 9


def test_where_choice_letter_does_not_apply():
    assert choice_letter("B", [], ANIMALS) is None and choice_letter("B", ["dog"], []) is None
    assert choice_letter("B", ["dog", "bird"], ANIMALS) == 1.0


def test_long_nonsense_is_read_quickly():
    start = time.process_time()
    for text in ("(" * 60_000, "A " * 20_000, "A or " * 20_000, "answer is " * 5000, "not " * 20_000, "*B* " * 5000):
        chosen(text, ANIMALS)
    assert time.process_time() - start < 5


def test_the_likeliest_choice_per_token():
    assert likeliest([-4.0, -9.0], [1, 3]) == 1  # -4 and -3 a token
    assert likeliest([-4.0, -9.0], [1, 1]) == 0
    assert likeliest([-2.0, -2.0, -4.0], [1, 1, 2]) == 0  # of equals the first
    assert likeliest([float("-inf"), -1e9], [1, 1]) == 1
    assert choice_likelihood([-4.0, -9.0], [1, 3], ["dog"], ["cat", "dog"]) == 1.0
    assert choice_likelihood([-4.0, -9.0], [1, 3], ["cat"], ["cat", "dog"]) == 0.0
    assert choice_likelihood([], [], ["cat"], []) is None and choice_likelihood([-1.0], [1], [], ["cat"]) is None


@pytest.mark.parametrize(
    "logliks, lengths", [([], []), ([-1.0], [1, 2]), ([-1.0], [0]), ([float("nan"), -1.0], [1, 1]), (-1.0, 1)]
)
def test_likelihoods_that_are_refused(logliks, lengths):
    with pytest.raises(BadOption):
        likeliest(logliks, lengths)


def test_the_table_of_scores():
    for name, score in SCORES.items():
        assert get_score(name) is score
        assert score("dog", ["dog"], ANIMALS) == 1.0 and score("cat", ["dog"], ANIMALS) == 0.0
    with pytest.raises(BadOption, match="no score 'anl'.*anls"):
        get_score("anl")


@pytest.mark.parametrize("name, package", [("anls", "rapidfuzz"), ("rouge-l", "rouge_score")])
def test_a_missing_library(name, package, monkeypatch):
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    _rouge_l.cache_clear()
    with pytest.raises(BadOption, match=rf"score '{name}'.*not installed \({package}\).*pip install"):
        get_score(name)("cat", ["cat"], [])
