"""What an answer is worth."""

import importlib

import pytest
import torch

from tests.compression.helpers import random_inputs
from tests.policies.fixture import close
from tokensieve.errors import BadOption
from tokensieve.policies import REWARDS, get_reward, loglik_gain, rewards


@pytest.mark.parametrize(
    "answer, gold, worth",
    [
        ("B", "B", 1),
        ("b", "B", 1),
        ("(B) the cat", "B", 1),
        ("**B**.", "B. the cat", 1),
        (" \nB", "B", 1),
        ("A", "B", 0),
        ("", "B", 0),
        ("The answer is B", "B", 0),
        ("Answer: B", "A", 0),  # not the option A
        ("Banana", "B", 0),
        ("3", "B", 0),
        ("I think so <answer> B </answer> A", "<answer>B</answer>", 1),
        ("B <answer>A</answer>", "B", 0),
        ("<answer>A</answer><answer>B</answer>", "B", 1),
        ("<ANSWER>\nB\n</ANSWER>", "B", 1),
    ],
)
def test_multiple_choice(answer, gold, worth):
    assert get_reward("multiple-choice")(answer, gold) == worth


@pytest.mark.parametrize(
    "answer, gold, worth",
    [
        ("3", "3", 1),
        ("-3", "-3", 1),
        ("3.0", "3", 0),  # one has a decimal point
        ("3", "3.0", 0),
        ("3.", "3", 1),
        ("3.14159", "3.14", 1),
        ("3.146", "3.14", 0),
        ("1,234", "1234", 1),
        ("1234.50", "1,234.5", 1),
        ("1e3", "1000", 1),
        (".5", "0.5", 1),
        ("1,5", "15", 0),  # no thousands
        ("3 apples", "3", 0),
        ("three", "3", 0),
        ("nan", "3", 0),
        ("1_0", "10", 0),
        ("e5", "5", 0),
        ("", "3", 0),
        (".", "3", 0),
        ("so <answer>7</answer>", "7", 1),
    ],
)
def test_numeric(answer, gold, worth):
    assert get_reward("numeric")(answer, gold) == worth


@pytest.mark.parametrize(
    "answer, gold, worth",
    [
        ("10", "10", 1),
        ("9", "10", 0.9),
        ("11.5", "10", 0.85),
        ("25", "10", 0),
        ("-10", "-10.0", 1),
        ("-9", "-10", 0.9),
        ("0", "0", 1),
        ("0.1", "0", 0),
        ("about 10", "10", 0),
        ("9" * 400, "10", 0),
    ],
)
def test_regression(answer, gold, worth):
    assert get_reward("regression")(answer, gold) == pytest.approx(worth, abs=1e-9)


@pytest.mark.parametrize(
    "answer, gold, worth",
    [
        ("stop at the sign", "stop at the sign", 1),
        ("stop  at\nthe sign ", "stop at the sign", 1),
        ("stop at a sign", "stop at the sign", 0.75),
        ("stop the sign", "stop at the sign", 0.75),
        ("Stop at the sign", "stop at the sign", 0.75),  # letter case counts
        ("a b c d e f g h i", "stop", 0),  # 9 edits for one word
        ("", "stop", 0),
        ("<answer>stop</answer>", "stop", 1),
    ],
)
def test_ocr(answer, gold, worth):
    pytest.importorskip("jiwer")
    assert get_reward("ocr")(answer, gold) == pytest.approx(worth)


@pytest.mark.parametrize(
    "answer, gold, worth",
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1),
        ("The cat, sat on the mat!", "the cat sat on the mat", 1),
        ("the cat sat down", "the cat sat", (6 / 7 + 4 / 5 + 6 / 7) / 3),
        ("sat cat the", "the cat sat", (1 + 0 + 1 / 3) / 3),
        ("cats", "cat", 0),  # no stemming
        ("cat", "cat", 2 / 3),  # no pair of words
        ("", "cat", 0),
        ("<answer>the cat</answer>", "the cat", 1),
    ],
)
def test_free_form(answer, gold, worth):
    pytest.importorskip("rouge_score")
    assert get_reward("free-form")(answer, gold) == pytest.approx(worth)


@pytest.mark.parametrize(
    "answer, gold, worth",
    [("left", "left", 1), (" Left.\n", "left", 1), ("left  or right", "left or right", 1), ("right", "left", 0)],
)
def test_exact(answer, gold, worth):
    assert get_reward("exact")(answer, gold) == worth


@pytest.mark.parametrize(
    "name, gold",
    [
        ("multiple-choice", "Banana"),
        ("multiple-choice", ""),
        ("numeric", "three"),
        ("regression", "10 m"),
        ("ocr", "  "),
        ("free-form", "猫"),
    ],
)
def test_a_gold_answer_that_nothing_can_match(name, gold):
    for package in ("jiwer", "rouge_score"):
        pytest.importorskip(package)
    with pytest.raises(BadOption, match="right (answer|option)"):
        get_reward(name)("B", gold)


@pytest.mark.parametrize("name, package", [("ocr", "jiwer"), ("free-form", "rouge_score")])
def test_a_missing_library(name, package, monkeypatch):
    real = importlib.import_module

    def without(module, *args):
        if module.startswith(package):
            raise ModuleNotFoundError(module)
        return real(module, *args)

    monkeypatch.setattr(rewards.importlib, "import_module", without)
    rewards._rouge.cache_clear()
    with pytest.raises(BadOption, match=rf"{name}.*not installed \({package}\).*pip install 'tokensieve\[rewards\]'"):
        get_reward(name)("a", "a")


def test_unknown_name():
    with pytest.raises(BadOption, match="no reward 'bleu'; there are exact, free-form, multiple-choice"):
        get_reward("bleu")


def test_all_rewards_are_floats_from_0_to_1():
    for package in ("jiwer", "rouge_score"):
        pytest.importorskip(package)
    for name, reward in REWARDS.items():
        gold = "A" if name == "multiple-choice" else "7"
        for answer in (gold, "no", ""):
            assert 0 <= reward(answer, gold) <= 1 and isinstance(reward(answer, gold), float)


# --- likelihood of the right answer


def logits(*shape, seed=0):
    return random_inputs(shape[0], shape[1] * shape[2], seed=seed).view(shape)


def test_gain_by_hand():
    # Vocabulary of 2, answer (1, 0): p = 0.8 * 0.6 with the subset, 0.5 * 0.5 without.
    with_subset = torch.tensor([[[0.2, 0.8], [0.6, 0.4]]]).log() + 3
    without = torch.zeros(1, 2, 2)
    gain = loglik_gain(with_subset, without, torch.tensor([[1, 0]]))
    close(gain, torch.tensor([0.48 / 0.25]).log())


def test_gain_of_nothing_is_0_and_rows_may_share_question_and_answer():
    x, empty, answer = logits(3, 4, 9), logits(1, 4, 9, seed=1), torch.tensor([[3, 0, 8, 2]])
    assert loglik_gain(x, x, answer).tolist() == [0, 0, 0]
    gain = loglik_gain(x, empty, answer)
    torch.testing.assert_close(gain, loglik_gain(x, empty.expand(3, 4, 9), answer.expand(3, 4)))
    torch.testing.assert_close(gain[1:2], loglik_gain(x[1:2], empty, answer))


def test_padding_of_answers_does_not_matter():
    x, empty = logits(2, 4, 9), logits(2, 4, 9, seed=1)
    answer, mask = torch.tensor([[3, 0, 8, 2], [5, 1, -100, -100]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    x[1, 2:] = torch.nan
    gain = loglik_gain(x, empty, answer, mask)
    torch.testing.assert_close(gain[1:], loglik_gain(x[1:, :2], empty[1:, :2], answer[1:, :2]))
    torch.testing.assert_close(gain[:1], loglik_gain(x[:1], empty[:1], answer[:1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gain_of_half_precision_logits_is_in_float32(dtype):
    x, empty, answer = logits(2, 4, 9).to(dtype), logits(2, 4, 9, seed=1).to(dtype), torch.tensor([[3, 0, 8, 2]])
    gain = loglik_gain(x, empty, answer)
    torch.testing.assert_close(gain, loglik_gain(x.float(), empty.float(), answer), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"empty_logits_BMV": torch.zeros(2, 4, 9)}, "empty_logits does not fit"),
        ({"empty_logits_BMV": torch.zeros(3, 4, 8)}, "empty_logits does not fit"),
        ({"answer_BM": torch.zeros(3, 5).long()}, r"answer does not fit .*got \(3, 5\)"),
        ({"answer_BM": torch.zeros(4).long()}, "answer does not fit"),
        ({"mask_BM": torch.ones(2, 4)}, "mask does not fit"),
    ],
)
def test_bad_shapes(change, message):
    fine = {"logits_BMV": logits(3, 4, 9), "empty_logits_BMV": logits(1, 4, 9), "answer_BM": torch.zeros(3, 4).long()}
    with pytest.raises(BadOption, match=message):
        loglik_gain(**{**fine, **change})
