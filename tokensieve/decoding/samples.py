"""Best of several samples: by self-certainty, by Borda voting, or by majority (self-consistency, arXiv 2203.11171).

All samples of a prompt share one prefill, are drawn as one batch, and are scored as they grow: one number a token is
kept, not the logits. What they are worth is told by `voting`.
"""

# Shape legend: B prompts, M samples of each, R = B * M rows, L tokens so far, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from tokensieve.decoding.loop import Decoding, Loop
from tokensieve.decoding.voting import borda_votes, check_finite, check_power, mean_certainty, token_certainty
from tokensieve.errors import BadOption


def best_of(
    num_samples: int = 8,
    *,
    power: float | None = 0.3,
    answer_of: Callable[[list[int]], Hashable | None] | None = None,
    seed: int = 0,
) -> Decoding:
    """Draws `num_samples` answers and returns one of them, for `generate(custom_generate=...)`. Takes any batch.

    Args:
        num_samples: M, drawn for each prompt.
        power: of Borda voting, see `borda_votes`; None takes the most certain sample, for open questions.
        answer_of: what a sample answers, from the ids it generated (end token left out): a number that it ends with,
            say, or its text in lower case; None where it gives no answer. The ids themselves if left out.
        seed: of the draws.

    Use `do_sample=True`; the paper has temperature 0.6 and top-p 0.9. `DecodeOutput.details` has "certainty"
    `[B, M]`, "candidates" (B lists of M lists of ids), "winner" `[B]` and, with voting, "votes" (a dict a prompt).

    Raises:
        BadOption: a value that is not allowed; and, when called, `do_sample` off with several samples.

    Example:
        >>> text_of = lambda ids: processor.decode(ids, skip_special_tokens=True).strip().lower() or None
        >>> model.generate(**inputs, custom_generate=best_of(8, answer_of=text_of), do_sample=True, temperature=0.6)
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise BadOption(f"num_samples must be a whole number above 0, got {num_samples!r}.")
    if power is not None:
        check_power(power)
    elif answer_of is not None:
        raise BadOption("power=None takes the most certain sample, whatever it answers.", hint="Leave answer_of out.")

    def run(loop: Loop) -> dict[str, object]:
        if num_samples > 1 and not loop.config.do_sample:
            raise BadOption(
                f"{num_samples} samples without do_sample would all be the same.",
                hint="Pass do_sample=True, and a temperature.",
            )
        prompts = len(loop.ids_BL)
        loop.session.fork(num_samples)
        loop.ids_BL = loop.ids_BL.repeat_interleave(num_samples, dim=0)
        loop.logits_BV = loop.logits_BV.repeat_interleave(num_samples, dim=0)
        certainty_R, length_R = _sample_to_the_end(loop)
        certainty_BM = certainty_R.view(prompts, num_samples)
        candidates = [
            ids[loop.prompt_length :][:length] for ids, length in zip(loop.ids_BL.tolist(), length_R, strict=True)
        ]
        grouped = [candidates[i : i + num_samples] for i in range(0, len(candidates), num_samples)]
        details: dict[str, object] = {"certainty": certainty_BM, "candidates": grouped}
        if power is None:
            winners = certainty_BM.argmax(1).tolist()
        else:
            answers = [[_answer(ids, loop, answer_of) for ids in group] for group in grouped]
            votes = [borda_votes(c, a, power) for c, a in zip(certainty_BM.tolist(), answers, strict=True)]
            winners = [vote.winner for vote in votes]
            details["votes"] = [vote.votes for vote in votes]
        rows = [num_samples * prompt + winner for prompt, winner in enumerate(winners)]
        lengths = [length_R[row] for row in rows]
        loop.ledger.drafted_tokens = sum(length_R) if num_samples > 1 else 0
        loop.ledger.accepted_tokens = sum(lengths) if num_samples > 1 else 0
        loop.session.select(rows)
        loop.ids_BL = loop.ids_BL[rows][:, : loop.prompt_length + max(lengths)]
        return details | {"winner": winners}

    return Decoding("best_of", run, branches=False, seed=seed)


def self_consistency(
    num_samples: int = 8, *, answer_of: Callable[[list[int]], Hashable | None] | None = None, seed: int = 0
) -> Decoding:
    """Majority voting among sampled answers: `best_of` with power 0. Arguments, errors and details as there."""
    return best_of(num_samples, power=0, answer_of=answer_of, seed=seed)


def _sample_to_the_end(loop: Loop) -> tuple[Tensor, list[int]]:
    """Continues every row until all have stopped; returns the rows' self-certainty and numbers of new tokens."""
    live_R = torch.ones(len(loop.ids_BL), dtype=torch.bool, device=loop.ids_BL.device)
    sum_R = torch.zeros(len(live_R), dtype=torch.float64, device=live_R.device)
    length_R = torch.zeros_like(live_R, dtype=torch.long)
    while True:
        certainty_R = token_certainty(loop.logits_BV)
        check_finite(certainty_R[live_R])
        sum_R += certainty_R.double().where(live_R, 0.0)
        length_R += live_R
        token_R = loop.draw(loop.scores(loop.ids_BL, loop.logits_BV))
        token_R = token_R.where(live_R, torch.full_like(token_R, loop.pad_id))
        loop.ids_BL = torch.cat([loop.ids_BL, token_R[:, None]], dim=1)
        live_R = live_R & ~loop.stopped(loop.ids_BL)
        if not live_R.any():
            return mean_certainty(sum_R, length_R), length_R.tolist()
        loop.logits_BV = loop.session.step(token_R[:, None])[:, -1]


def _answer(ids: list[int], loop: Loop, answer_of) -> Hashable | None:
    ends = getattr(loop.config, "_eos_token_tensor", None)
    ends = set() if ends is None else set(ends.tolist())
    body = ids[:-1] if ids and ids[-1] in ends else ids
    return (tuple(body) or None) if answer_of is None else answer_of(body)
