"""What an answer is worth: correctness of generated text, from 0 to 1, by the kind of question.

The kinds and rules of CaCoVID (https://arxiv.org/abs/2602.01649), and two of our own:

    multiple-choice  1 if the answer's first letter is the right option
    numeric          1 if equal when rounded to 2 decimals, and both or neither are written with a decimal point
    ocr              1 - word error rate, not below 0
    free-form        mean F of ROUGE-1, ROUGE-2 and ROUGE-L
    regression       1 - min(1, |answer - gold| / |gold|)
    exact            1 if the same text (ours)

and `loglik_gain` (ours, not CaCoVID's): how much likelier a subset of tokens makes the right answer. It needs one
forward pass per subset and no generation.

Where a text has `<answer>...</answer>`, the last such part is the answer. INFERRED, where the description is silent:
tags count for all kinds; letter case counts for ocr and not for multiple-choice; ROUGE is without stemming. ROUGE sees
Latin letters and digits only, and one word has no pair of words: a right one-word answer is worth 2/3.

What differs from CaCoVID's rules (written from the description):
- An option must be a letter on its own: "Answer: B" is not option A.
- A regression answer of 0 to a gold of 0 is worth 1 (there: 0).
- Thousands may be separated by commas, and a full stop at the end is no decimal point.
- A gold answer that cannot be right by the rules of its kind is an error, not 0 for every answer.
"""

# Shape legend: B rows, M tokens of the answer, V vocabulary

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from tokensieve.errors import BadOption
from tokensieve.policies.lookup import look_up
from tokensieve.policies.ratio import widened

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_OPTION = re.compile(r"[\W_]*([A-Za-z])(?!\w)")
_NUMBER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)?(\.\d+)?([eE][+-]?\d{1,3})?", re.ASCII)
_ROUGE_WORD = re.compile(r"[A-Za-z0-9]")


def multiple_choice(answer: str, gold: str) -> float:
    """1.0 if `answer` begins with the option letter of `gold`: "(b) the cat" and "B" agree, in either case.

    Raises:
        BadOption: `gold` begins with no option letter.
    """
    right = _OPTION.match(answer_part(gold))
    if not right:
        raise BadOption(f"The right option must begin with a letter on its own, got {gold!r}.")
    given = _OPTION.match(answer_part(answer))
    return float(given is not None and given[1].upper() == right[1].upper())


def numeric(answer: str, gold: str) -> float:
    """1.0 if the two numbers are equal when rounded to 2 decimals and both or neither have a decimal point.

    An answer that is no number, or has anything beside it, is worth 0.

    Raises:
        BadOption: `gold` is no number.
    """
    right, given = _gold_number(gold), _number(answer)
    if given is None:
        return 0.0
    return float(round(given[0], 2) == round(right[0], 2) and given[1] == right[1])


def ocr(answer: str, gold: str) -> float:
    """1 minus the word error rate (edits per word of `gold`), not below 0. Words are what white space separates.

    Raises:
        BadOption: `gold` has no word, or jiwer is not installed.
    """
    jiwer = optional_library("jiwer", "The reward 'ocr'")
    if not _words(gold):
        raise BadOption("The right answer is empty, so it has no word error rate.")
    return max(0.0, 1.0 - jiwer.wer(_words(gold), _words(answer)))


def free_form(answer: str, gold: str) -> float:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L, in [0, 1].

    Raises:
        BadOption: `gold` has no Latin letter or digit, or rouge-score is not installed.
    """
    if not _ROUGE_WORD.search(answer_part(gold)):
        raise BadOption(f"ROUGE sees Latin letters and digits only, and the right answer has none: {gold!r}.")
    scores = _rouge().score(_words(gold), _words(answer))
    return sum(score.fmeasure for score in scores.values()) / len(scores)


def regression(answer: str, gold: str) -> float:
    """1 minus the relative error of a number, not below 0. An answer that is no number is worth 0.

    Raises:
        BadOption: `gold` is no number.
    """
    right, given = _gold_number(gold), _number(answer)
    if given is None:
        return 0.0
    return 1.0 - min(1.0, abs(given[0] - right[0]) / (abs(right[0]) + 1e-9))


def exact(answer: str, gold: str) -> float:
    """1.0 if the two are the same text, leaving aside letter case, white space and a full stop at the end."""
    return float(_plain(answer) == _plain(gold))


REWARDS: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "free-form": free_form,
    "multiple-choice": multiple_choice,
    "numeric": numeric,
    "ocr": ocr,
    "regression": regression,
}


def get_reward(name: str) -> Callable[[str, str], float]:
    """The reward `(answer, gold) -> float in [0, 1]` of that name; BadOption if there is none."""
    return look_up("reward", name, REWARDS)


def loglik_gain(
    logits_BMV: Tensor, empty_logits_BMV: Tensor, answer_BM: Tensor, mask_BM: Tensor | None = None
) -> Tensor:
    """`log p(answer | subset) - log p(answer | no visual token)`, `[B]` nats in float32 or wider: above 0 where the
    subset helps.

    Teacher forcing: position m of the logits must be the model's prediction of answer token m. Relative advantages
    in one video do not see the second term; it makes rewards comparable between videos.

    Args:
        logits_BMV: with the tokens of each subset.
        empty_logits_BMV: without any; B may be 1 for rows of one question.
        answer_BM: token ids of the right answer; B may be 1.
        mask_BM: 0/1, for answers of different lengths; B may be 1. What is padded may hold any id.

    Raises:
        BadOption: the shapes do not fit.
    """
    shape = logits_BMV.shape
    for name, given, rank in (("empty_logits", empty_logits_BMV, 3), ("answer", answer_BM, 2), ("mask", mask_BM, 2)):
        if given is not None and (
            given.ndim != rank or given.shape[1:] != shape[1:rank] or len(given) not in (1, shape[0])
        ):
            raise BadOption(
                f"{name} does not fit logits of shape [B, M, V] = {tuple(shape)}: got {tuple(given.shape)}."
            )
    if mask_BM is None:
        mask_BM = torch.ones_like(answer_BM)
    return _loglik(logits_BMV, answer_BM, mask_BM) - _loglik(empty_logits_BMV, answer_BM, mask_BM)


def _loglik(logits_BMV: Tensor, answer_BM: Tensor, mask_BM: Tensor) -> Tensor:
    """`[B]`: sum over the tokens that count."""
    logits_BMV = widened(logits_BMV)
    id_BM1 = answer_BM.masked_fill(mask_BM == 0, 0)[..., None].expand(len(logits_BMV), -1, -1)
    logprob_BM = logits_BMV.gather(2, id_BM1)[..., 0] - logits_BMV.logsumexp(2)
    return logprob_BM.masked_fill(mask_BM == 0, 0.0).sum(1)


def answer_part(text: str) -> str:
    """What is inside the last `<answer>...</answer>`, or all of a text without; stripped."""
    tagged = _ANSWER.findall(text)
    return (tagged[-1] if tagged else text).strip()


def _plain(text: str) -> str:
    return _words(text).removesuffix(".").casefold().strip()


def _words(text: str) -> str:
    return " ".join(answer_part(text).split())


def _number(text: str) -> tuple[float, bool] | None:
    """The number, and whether it has a decimal point; None if the text is none."""
    text = answer_part(text).removesuffix(".")
    match = _NUMBER.fullmatch(text)
    if not match or not (match[1] or match[3]):
        return None
    return float(text.replace(",", "")), match[3] is not None


def _gold_number(gold: str) -> tuple[float, bool]:
    number = _number(gold)
    if number is None:
        raise BadOption(f"The right answer must be a number, got {gold!r}.")
    return number


@cache
def _rouge():
    scorer = optional_library("rouge_score.rouge_scorer", "The reward 'free-form'")
    return scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])


def optional_library(module: str, what: str):
    """A module imported on first use; BadOption says that `what` needs it if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise BadOption(
            f"{what} needs a package that is not installed ({module.partition('.')[0]}).",
            hint="pip install 'tokensieve[rewards]'",
        ) from None
