"""What an answer is worth when models are compared: the scores of the field, each from 0 to 1.

A score is `(said, answers, choices) -> float | None`: what the model said, all accepted answers (the best of them
counts) and the choices of a multiple-choice question, whose right one stands in `answers` as text. None means that the
score does not apply: no accepted answer, no choices, or for rouge-l no answer in Latin script.

    exact          the same text after normalisation
    contains       an accepted answer is in what was said, as whole words
    anls           how near the spelling is (documents, text in scenes)
    rouge-l        longest common subsequence of words (captions, sentences)
    choice-letter  the letter or text of the right choice was said, and no other

`choice_likelihood` needs log-likelihoods instead of text. Where a text has `<answer>...</answer>`, the last such part
is what was said, as in `tokensieve.policies.rewards`.
"""

# Shape legend: C choices

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from tokensieve.errors import BadOption
from tokensieve.policies.lookup import look_up
from tokensieve.policies.rewards import answer_part, optional_library

Score = Callable[[str, Sequence[str], Sequence[str]], float | None]

ANLS_THRESHOLD = 0.5
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_IN_NUMBER = re.compile(r"(?<=\d)\.(?=\d)|(?<!\S)(?:-\.?|\.)(?=\d)")
_LATIN = re.compile(r"[A-Za-z0-9]")


def normalised(text: str) -> str:
    """Text as `exact` and `contains` compare it: lower case, without punctuation, articles and extra white space.

    The normalisation of SQuAD (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250, its evaluation script), with
    three differences: a number keeps its sign and decimal point, as it keeps the point in VQA's script
    (https://visualqa.org/evaluation.html): "-3.5" is not "35"; all of Unicode's punctuation counts; a text of which
    nothing would be left ("A", "?") is only stripped. Number words stay: "two" is not "2".
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).replace("\u2212", "-").casefold().split())
    kept = {i for match in _IN_NUMBER.finditer(folded) for i in range(*match.span())}
    plain = "".join(c for i, c in enumerate(folded) if i in kept or not _is_punctuation(c))
    return " ".join(_ARTICLE.sub(" ", plain).split()) or folded


def exact(said: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float | None:
    """1.0 if an accepted answer is the same text after `normalised`."""
    if not answers:
        return None
    return float(normalised(answer_part(said)) in {normalised(answer) for answer in answers})


def contains(said: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float | None:
    """1.0 if an accepted answer is in what was said, both `normalised`, as whole words: "one" is not in "none".

    Words are what white space separates, so in Chinese, say, it asks for the same as `exact`.
    """
    if not answers:
        return None
    text = normalised(answer_part(said))
    return float(any(_has_words(text, normalised(answer)) for answer in answers))


def anls(said: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float | None:
    """1 - edits / length of the longer text, 0 below 0.5; the best over the accepted answers.

    The mean of it is Average Normalized Levenshtein Similarity (Biten et al. 2019, https://arxiv.org/abs/1905.13648,
    equation 1). Letter case and the amount of white space do not count. At exactly 0.5 the paper gives 0 and the
    evaluation script of ST-VQA and DocVQA (https://rrc.cvc.uab.es) 0.5; this follows the script.

    Raises:
        BadOption: rapidfuzz is not installed.
    """
    if not answers:
        return None
    distance = optional_library("rapidfuzz.distance", "The score 'anls'").Levenshtein.normalized_distance
    text = _lowered(answer_part(said))
    nearest = 1.0 - min(distance(text, _lowered(answer)) for answer in answers)
    return nearest if nearest >= ANLS_THRESHOLD else 0.0


def rouge_l(said: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float | None:
    """F-measure of the longest common subsequence of words, the best over the accepted answers.

    ROUGE-L of a sentence (Lin 2004, https://aclanthology.org/W04-1013) by the rouge-score package, without stemming. It
    sees Latin letters and digits only: answers without any are left out.

    Raises:
        BadOption: rouge-score is not installed.
    """
    readable = [answer for answer in answers if _LATIN.search(answer)]
    if not readable:
        return None
    return float(_rouge_l().score_multi(readable, answer_part(said))["rougeL"].fmeasure)


def choice_letter(said: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float | None:
    """1.0 if `chosen` finds the right choice in what was said; 0.0 for another, for none and for several."""
    if not answers or not choices:
        return None
    index = chosen(said, choices)
    return float(index is not None and choices[index] in answers)


def chosen(said: str, choices: Sequence[str]) -> int | None:
    """Which choice a model means, from 0; None if that cannot be told.

    The first of these that speaks decides, and if it names several choices the answer is none:

    1. the whole text is a letter or a choice: "B", "(b)", "B.", "the cat"
    2. it begins with a letter: "B. the cat", "**B**: because ..."
    3. letters that are called the answer: "The answer is B", "Option (B)", "\\boxed{B}"
    4. capital letters on their own: "I would go for B"
    5. choices whose text is in it as whole words

    Letters are A for the first choice and so on. "A" and "I" before a word are no letters in 2 and 4, letters after
    "not" never are, and a choice inside a longer one that was said ("red" in "dark red") was not said.
    """
    text = answer_part(said)
    letters = string.ascii_uppercase[: len(choices)]
    for found in (_whole, _leading, _called_answer, _on_their_own, _texts_in):
        named = found(text, letters, choices)
        if named:
            return named.pop() if len(named) == 1 else None
    return None


def likeliest(loglik_C: Sequence[float], num_tokens_C: Sequence[int]) -> int:
    """Which choice is likeliest per token, from 0; of equals the first.

    The mean log-likelihood of a choice's tokens given the question, so that long choices are not at a disadvantage
    (length normalisation as in GPT-3, Brown et al. 2020, https://arxiv.org/abs/2005.14165, section 2.4).

    Args:
        loglik_C: `[C]` sum of the log-probabilities of each choice's tokens, in nats.
        num_tokens_C: `[C]` how many tokens that were.

    Raises:
        BadOption: no choices, unequal lengths, a choice without tokens or a log-likelihood that is not a number.
    """
    loglik_C, num_tokens_C = np.asarray(loglik_C, np.float64), np.asarray(num_tokens_C)
    if loglik_C.ndim != 1 or not len(loglik_C) or loglik_C.shape != num_tokens_C.shape:
        shapes = f"{list(loglik_C.shape)} and {list(num_tokens_C.shape)}"
        raise BadOption(f"Need a log-likelihood and a number of tokens for every choice, got shapes {shapes}.")
    if np.isnan(loglik_C).any() or (num_tokens_C < 1).any():
        raise BadOption(
            f"Every choice needs a log-likelihood and at least one token, got {loglik_C.tolist()} and "
            f"{num_tokens_C.tolist()}."
        )
    return int((loglik_C / num_tokens_C).argmax())


def choice_likelihood(
    loglik_C: Sequence[float], num_tokens_C: Sequence[int], answers: Sequence[str], choices: Sequence[str]
) -> float | None:
    """1.0 if the `likeliest` choice is right; None without choices or a right one."""
    if not answers or not choices:
        return None
    return float(choices[likeliest(loglik_C, num_tokens_C)] in answers)


SCORES: dict[str, Score] = {
    "anls": anls,
    "choice-letter": choice_letter,
    "contains": contains,
    "exact": exact,
    "rouge-l": rouge_l,
}


def get_score(name: str) -> Score:
    """The score `(said, answers, choices) -> float in [0, 1] or None` of that name; BadOption if there is none."""
    return look_up("score", name, SCORES)


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _lowered(text: str) -> str:
    return " ".join(text.lower().split())


def _has_words(text: str, words: str) -> bool:
    return f" {words} " in f" {text} "


@cache
def _rouge_l():
    return optional_library("rouge_score.rouge_scorer", "The score 'rouge-l'").RougeScorer(["rougeL"])


# The ways to name a choice: (text, letters, choices) -> places of all choices found named.

_END = r"(?![^\W_]|['’-][^\W_])"  # not inside a word, and not of "I'd" or "A-frame"
_LETTER = r"(?<![^\W_])[\[({{*_`\"“]{{0,4}}[{letters}]" + _END + r"[\])}}*_`\"”]{{0,4}}"
_OR = r"\s*(?:[,/&]|\bor\b|\band\b)\s*"
_CALLED = (
    r"(?i:\b(?:answer|(?:correct|right|best)\s+(?:option|choice|letter))\b(?:[^.\n]{0,60}?\b(?:is|was|be)\b)?"
    r"|\\boxed\{(?:\\text)?)[\s:=*_\"]*(?i:option|choice|letter)?\s*"
)
_BEFORE = re.compile(r"(?i)(\b(?:not|never|neither|nor|isn['’]t)\s+)?(\b(?:option|choice|letter)\s+)?$")


def _whole(text: str, letters: str, choices: Sequence[str]) -> set[int]:
    same = {i for i, choice in enumerate(choices) if normalised(choice) == normalised(text)}
    bare = text.strip(string.punctuation + string.whitespace).upper()
    return same | ({letters.index(bare)} if len(bare) == 1 and bare in letters else set())


def _leading(text: str, letters: str, choices: Sequence[str]) -> set[int]:
    match = re.match(_mention(letters), text)
    sure = match and (not match[0][-1].isalpha() or re.match(r"\s*(?:[^\w\s]|\n|$)", text[match.end() :]))
    return _places(match[0], letters) if sure else set()


def _called_answer(text: str, letters: str, choices: Sequence[str]) -> set[int]:
    named = set()
    for match in re.finditer(f"{_CALLED}({_mention(letters + letters.lower())})", text):
        if not (match[1].islower() and _is_word(match[1], text[match.end() :])):
            named |= _places(match[1], letters)
    return named


def _on_their_own(text: str, letters: str, choices: Sequence[str]) -> set[int]:
    named = set()
    for match in re.finditer(_mention(letters), text):
        negated, option = _BEFORE.search(text[max(0, match.start() - 40) : match.start()]).groups()
        if not negated and (option or not _is_word(match[0], text[match.end() :])):
            named |= _places(match[0], letters)
    return named


def _texts_in(text: str, letters: str, choices: Sequence[str]) -> set[int]:
    said, texts = normalised(text), [normalised(choice) for choice in choices]
    named = set()
    for words in sorted(set(texts), key=lambda words: (-len(words), words)):
        if _has_words(said, words):
            named |= {i for i, one in enumerate(texts) if one == words}
            said = f" {said} ".replace(f" {words} ", " | ")  # a shorter choice inside it was not said
    return named


def _mention(letters: str) -> str:
    """Pattern of a letter, or of several as alternatives: "B", "(B)", "A or B"."""
    one = _LETTER.format(letters=letters)
    return f"{one}(?:{_OR}{one})*"


def _places(mention: str, letters: str) -> set[int]:
    alone = re.findall(rf"(?<![^\W_])[^\W_]{_END}", mention)
    return {letters.index(letter.upper()) for letter in alone}


def _is_word(mention: str, rest: str) -> bool:
    """Whether "A" or "I" is the article or the pronoun, going by what comes next."""
    return mention.upper() in ("A", "I") and re.match(r"\s+[^\W_]", rest) is not None
