"""Cautious Next Token Prediction (CNTP), arXiv 2507.03038, ACL 2025 Findings.

Where the model is sure, it draws one token as always. Where it is not, it tries several continuations up to the next
punctuation mark and keeps the one it finds least surprising.

H      entropy of the processed next-token distribution (after temperature, top-k, top-p), nats
N      number of trials, from 1 at `min_entropy` to `max_trials` at `max_entropy`
PPL    exp of the mean negative log-probability of a trial's tokens, under the processed distributions

Differs from the official code: all trials are one batch that shares the prefilled cache, where the official loop runs
them one by one on copies of every input (and prefills again, vision tower included, at the first token). The rule for
N is that of the code; the paper's Algorithm 1 rounds otherwise (`rule="paper"`). As there, trials are drawn even if
`do_sample` is off: only sure tokens are then greedy.
"""

# Shape legend: N trials, L tokens so far, V vocabulary

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from tokensieve.decoding.loop import Decoding, Loop
from tokensieve.errors import BadOption

MARKS = (".", ",", "\n", "?", "!", ":", ";", ")", "]", "}")
RULES = ("code", "paper")


def num_trials(
    entropy: float, max_trials: int = 10, min_entropy: float = 0.01, max_entropy: float = 1.5, rule: str = "code"
) -> int:
    """How many continuations to try at this entropy (nats): 1 up to `min_entropy`, `max_trials` from `max_entropy` on.

    "code" is the official code, `int(1 + (max_trials - 1) x)` with x the entropy scaled to [0, 1]; "paper" is
    Algorithm 1, `max(1, floor(max_trials x))`.
    """
    scaled = min(1.0, max(0.0, (entropy - min_entropy) / (max_entropy - min_entropy)))
    if rule == "paper":
        return max(1, math.floor(max_trials * scaled))
    return int(1 + (max_trials - 1) * scaled)


def punctuation_ids(tokenizer) -> frozenset[int]:
    """The ids of `. , ? ! : ; ) ] }` and a line break in a tokenizer (or a processor that has one).

    As in the official code the first id of each mark, but only where it stands for the mark: the first piece of a line
    break may be a mere space in SentencePiece tokenizers, and trials would end at every word.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    firsts = [(mark, tokenizer.encode(mark, add_special_tokens=False)[:1]) for mark in MARKS]
    return frozenset(ids[0] for mark, ids in firsts if ids and mark in tokenizer.decode(ids))


def cautious(
    punctuation: Collection[int],
    *,
    max_trials: int = 10,
    min_entropy: float = 0.01,
    max_entropy: float = 1.5,
    rule: str = "code",
    seed: int = 0,
) -> Decoding:
    """Cautious decoding, for `generate(custom_generate=...)`. One prompt at a time; needs a cache that can be cropped.

    Args:
        punctuation: ids that end a trial; see `punctuation_ids`.
        max_trials: most trials at one token; as many copies of the cache are held while they run.
        min_entropy: nats; up to here one token is drawn.
        max_entropy: nats; from here on `max_trials` are tried.
        rule: "code" or "paper", see `num_trials`.
        seed: of the draws.

    Use `do_sample=True` with a temperature and top-p; the paper has 0.8 to 1.2 and 0.9. `DecodeOutput.details` has
    "trials", how many were made at each decision.

    Raises:
        BadOption: a value that is not allowed.

    Example:
        >>> careful = cautious(punctuation_ids(vlm.processor))
        >>> vlm.answer("clip.mp4", "What happens?", custom_generate=careful, do_sample=True, temperature=0.8, top_p=0.9)
    """
    if isinstance(max_trials, bool) or not isinstance(max_trials, int) or max_trials < 1:
        raise BadOption(f"max_trials must be a whole number above 0, got {max_trials!r}.")
    if not 0 <= min_entropy < max_entropy:
        raise BadOption(f"Needed: 0 <= min_entropy < max_entropy, got {min_entropy!r} and {max_entropy!r} nats.")
    if rule not in RULES:
        raise BadOption(f"rule must be one of {RULES}, got {rule!r}.")
    ends = frozenset(punctuation)
    if not all(isinstance(i, int) for i in ends):
        raise BadOption("punctuation must hold token ids.", hint="Use punctuation_ids(tokenizer).")

    def run(loop: Loop) -> dict[str, object]:
        ends_P = torch.tensor(sorted(ends), dtype=torch.long, device=loop.logits_BV.device)
        counts, done = [], False
        while not done:
            scores_1V = loop.scores(loop.ids_BL, loop.logits_BV)
            probs_V = scores_1V[0].softmax(-1)
            entropy = -(probs_V * (probs_V + 1e-10).log()).sum()
            num = num_trials(float(entropy), max_trials, min_entropy, max_entropy, rule)
            counts.append(num)
            done = _one_token(loop, scores_1V) if num == 1 else _best_trial(loop, scores_1V, num, ends_P)
        return {"trials": counts}

    return Decoding("cautious", run, one_prompt=True, seed=seed)


def _one_token(loop: Loop, scores_1V: Tensor) -> bool:
    token_1 = loop.draw(scores_1V)
    loop.ids_BL = torch.cat([loop.ids_BL, token_1[:, None]], dim=1)
    if loop.stopped(loop.ids_BL).all():
        return True
    loop.logits_BV = loop.session.step(token_1[:, None])[:, -1]
    return False


def _best_trial(loop: Loop, scores_1V: Tensor, num: int, ends_P: Tensor) -> bool:
    """Appends the least surprising of `num` trials; returns whether the answer ends with it."""
    session, start = loop.session, loop.ids_BL.shape[1]
    session.require("crop")
    session.fork(num)
    ids_NL, scores_NV = loop.ids_BL.repeat(num, 1), scores_1V.repeat(num, 1)
    live_N = torch.ones(num, dtype=torch.bool, device=ids_NL.device)
    stopped_N, length_N = ~live_N, torch.zeros(num, dtype=torch.long, device=ids_NL.device)
    logp_N = torch.zeros(num, dtype=torch.float64, device=ids_NL.device)
    after_NV = torch.empty_like(scores_NV)
    while True:
        token_N = loop.draw(scores_NV, sample=True)
        token_N = token_N.where(live_N, torch.full_like(token_N, loop.pad_id))
        logp_N += scores_NV.log_softmax(-1).gather(1, token_N[:, None])[:, 0].double().where(live_N, 0.0)
        ids_NL = torch.cat([ids_NL, token_N[:, None]], dim=1)
        length_N += live_N
        stopped_N |= live_N & loop.stopped(ids_NL)
        grew_N, live_N = live_N, live_N & ~stopped_N & ~torch.isin(token_N, ends_P)
        if not live_N.any():
            break
        logits_NV = session.step(token_N[:, None])[:, -1]
        after_NV[grew_N] = logits_NV[grew_N]  # of a row that has ended the first logits after its last token
        scores_NV = loop.scores(ids_NL, logits_NV)
    best = int((-logp_N / length_N).argmin())
    length = int(length_N[best])
    loop.ledger.drafted_tokens += int(length_N.sum())
    loop.ledger.accepted_tokens += length
    loop.ids_BL = ids_NL[best : best + 1, : start + length]
    session.select([best])
    if stopped_N[best]:
        return True
    surplus = ids_NL.shape[1] - 1 - loop.ids_BL.shape[1]  # the tokens drawn last have not been through the model
    if surplus < 0:
        loop.logits_BV = session.step(loop.ids_BL[:, -1:])[:, -1]
    else:
        session.truncate(surplus)
        loop.logits_BV = after_NV[best : best + 1]
    return False
