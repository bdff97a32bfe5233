"""What a subset is worth: rewards for G subsets of one sample, from one batch of the frozen model.

Three kinds:

    a name of `policies.REWARDS`   the model generates an answer, the reward compares it with the right one (CaCoVID)
    "match"                        1 if greedy generation would say exactly the right answer; found by teacher
                                   forcing, without generating (ours; equal to generating and comparing tokens)
    "loglik"                       how much likelier the right answer is than without any visual token (ours, not
                                   CaCoVID's): graded where correctness is 0 or 1
    "agree"                        minus KL(answer with all tokens || with the subset), on the model's own greedy
                                   answer: needs no label (ours)
"""

# Shape legend: G subsets, N candidates, M tokens of the answer, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.errors import BadOption
from tokensieve.pipeline.policy.samples import Sample
from tokensieve.pipeline.policy.scoring import SubsetScorer
from tokensieve.policies.lookup import look_up
from tokensieve.policies.rewards import REWARDS, loglik_gain

OWN = ("match", "loglik", "agree")


def check_reward(kind: str) -> None:
    """Raises BadOption, with a suggestion, unless `kind` is a reward."""
    look_up("reward", kind, {**REWARDS, **dict.fromkeys(OWN)})


@torch.no_grad()
def subset_rewards(
    scorer: SubsetScorer, sample: Sample, mask_GN: Tensor, kind: str, *, max_new_tokens: int = 16
) -> Tensor:
    """`[G]` float64: the reward of every subset.

    Args:
        scorer: the frozen model.
        sample: what is asked.
        mask_GN: bool, True where a candidate stays; as many in every row.
        kind: see above.
        max_new_tokens: longest generated answer.

    Raises:
        BadOption: the sample has no answer though the reward needs one, or there is no such reward.
    """
    check_reward(kind)
    if kind != "agree" and sample.answer_ids is None:
        raise BadOption(f"The reward {kind!r} needs the right answer.", hint="Use 'agree', or give answers.")
    if kind in REWARDS:
        texts = scorer.answers(sample, mask_GN, max_new_tokens)
        return torch.tensor([REWARDS[kind](text, sample.answer) for text in texts], dtype=torch.float64)
    if kind == "agree":
        own, full_MV = scorer.teach(sample, max_new_tokens)
        return -divergence(full_MV[None], scorer.answer_logits(sample, mask_GN, own)).double().cpu()
    logits_GMV = scorer.answer_logits(sample, mask_GN)
    if kind == "match":
        return (logits_GMV.argmax(-1) == sample.answer_ids).all(1).double().cpu()
    return loglik_gain(logits_GMV, scorer.blind_logits(sample), sample.answer_ids[None]).double().cpu()


def divergence(teacher_XMV: Tensor, student_XMV: Tensor, kind: str = "forward") -> Tensor:
    """`[X]` nats: mean over answer tokens of the divergence between two predictions, from logits.

    Args:
        teacher_XMV: with all tokens; X may be 1.
        student_XMV: with some.
        kind: "forward" KL(teacher || student), "reverse" KL(student || teacher), or "jsd", Jensen-Shannon.

    Raises:
        BadOption: another kind.
    """
    teacher, student = teacher_XMV.float().log_softmax(-1), student_XMV.float().log_softmax(-1)
    if kind == "forward":
        return _kl(teacher, student)
    if kind == "reverse":
        return _kl(student, teacher)
    if kind == "jsd":
        middle = torch.logaddexp(teacher, student) - torch.tensor(2.0).log()
        return (_kl(teacher, middle) + _kl(student, middle)) / 2
    raise BadOption(f"divergence must be 'forward', 'reverse' or 'jsd', got {kind!r}.")


def _kl(p_XMV: Tensor, q_XMV: Tensor) -> Tensor:
    return (p_XMV.exp() * (p_XMV - q_XMV)).sum(-1).mean(-1)
