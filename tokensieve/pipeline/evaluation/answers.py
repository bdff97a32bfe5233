"""Greedy answers that do not depend on how many prompts share a batch, and how likely the choices of a question are.

A clip goes through the tower alone, and a method at the projector looks at one clip at a time, so what is kept cannot
depend on a batch. The language model does run on batches, and there the shape of a batch moves every logit by rounding.
Greedy decoding turns that into another word only where two tokens are nearly equally likely. So a batch is checked:
where the two best logits are nearer than rounding explains, that prompt is answered once more, alone. What counts is
always what the prompt alone gets. Methods inside the language model choose by numbers that rounding moves, so they run
alone.
"""

# Shape legend: B prompts, V vocabulary, M tokens of a choice

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tokensieve.compression import Plan
from tokensieve.errors import TokensieveError
from tokensieve.pipeline.evaluation.prompts import emit
from tokensieve.pipeline.generation import generate_options, num_generated
from tokensieve.pipeline.results import Prepared
from tokensieve.pipeline.vlm import VLM

# How far a batch can move a logit, as a share of the largest one; on the shipped model 4e-7, 6e-3 and 7e-4 were seen.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
GREEDY = {"num_beams": 1, "num_return_sequences": 1}  # whatever the model's own generation config says


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the model said to one prompt.

    Attributes:
        text: the answer.
        visual_tokens: how many the language model got; with a method inside it, how many reached its last layer.
        prompt_tokens: text and visual tokens that it got.
        generated_tokens: tokens up to and including the end token.
        seconds: of generating; the prompts of a batch have equal shares.
    """

    text: str
    visual_tokens: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float


@torch.no_grad()
def answer_all(
    vlm: VLM, prompts: Sequence[Prepared], plans: Sequence[Sequence[Plan]], *, batch: int, max_new_tokens: int
) -> list[Said | TokensieveError]:
    """Greedy answers under the compression in force, the same for every `batch`.

    Args:
        vlm: its decoder stage is at work; what the other stages chose is in `plans`.
        prompts: of `encode_clip`.
        plans: one for every item of every prompt.
        batch: prompts that go through the language model together.
        max_new_tokens: longest answer.
    """
    alone = batch == 1 or (vlm.compression is not None and vlm.compression.at("decoder") is not None)
    said: list[Said | TokensieveError | None] = [None] * len(prompts)
    for start in range(0, 0 if alone else len(prompts), batch):
        part = slice(start, start + batch)
        said[part] = _answer(vlm, prompts[part], plans[part], max_new_tokens)
    for row, of_batch in enumerate(said):
        if of_batch is None:
            try:
                (said[row],) = _answer(vlm, prompts[row : row + 1], plans[row : row + 1], max_new_tokens)
            except TokensieveError as error:
                said[row] = error
    return said


def _answer(
    vlm: VLM, prompts: Sequence[Prepared], plans: Sequence[Sequence[Plan]], max_new_tokens: int
) -> list[Said | None]:
    """None for those that must be asked alone."""
    options = generate_options(vlm.model, max_new_tokens, GREEDY)
    close = _CloseCalls(ROUNDING.get(vlm.model.dtype, ROUNDING[torch.float32]))
    start = _now(vlm)
    emitted = emit(vlm, prompts, plans)
    ids = vlm.model.generate(**emitted, **options, logits_processor=LogitsProcessorList([close]))
    seconds = (_now(vlm) - start) / len(prompts)
    new = ids[:, emitted["input_ids"].shape[1] :]
    texts = vlm.processor.batch_decode(new, skip_special_tokens=True)
    left = vlm.last_layer_tokens() or [
        sum(len(item.kept(plan)) for item, plan in zip(prompt.items, own, strict=True))
        for prompt, own in zip(prompts, plans, strict=True)
    ]
    lengths = emitted["attention_mask"].sum(-1).tolist()
    said: list[Said | None] = []
    for row, text in enumerate(texts):
        length = num_generated(new[row], vlm.model, options)
        steps = close.steps[:length]
        unsure = len(prompts) > 1 and any(step[row] for step in steps)
        answer = Said(
            text=text.strip(),
            visual_tokens=left[row],
            prompt_tokens=lengths[row],
            generated_tokens=length,
            seconds=seconds,
        )
        said.append(None if unsure else answer)
    return said


@torch.no_grad()
def choice_logliks(
    vlm: VLM, prompt: Prepared, plans: Sequence[Plan], choices: Sequence[str]
) -> tuple[list[float], list[int]]:
    """How likely the model is to say each choice to a prompt: sums of log-probabilities, and how many tokens those are.

    By teacher forcing through `model.generate`, so that the prompt goes through the model exactly as for an answer,
    under any compression. Choices of one token share a single pass. The end token does not count.
    """
    encoded = [vlm.processor.tokenizer.encode(choice, add_special_tokens=False) for choice in choices]
    start: Tensor | None = None
    logliks = []
    for ids in encoded:
        if len(ids) > 1 or start is None:
            steps = _forced(vlm, prompt, plans, ids)
            start = steps[0]
        else:
            steps = [start]
        logliks.append(sum(float(step_V[token]) for step_V, token in zip(steps, ids, strict=True)))
    return logliks, [len(ids) for ids in encoded]


def _forced(vlm: VLM, prompt: Prepared, plans: Sequence[Plan], ids: Sequence[int]) -> list[Tensor]:
    """`[V]` log-probabilities at each of M steps while the model is made to say `ids`."""
    forced = _Forced(ids)
    options = generate_options(vlm.model, len(ids), GREEDY)
    vlm.model.generate(**emit(vlm, [prompt], [plans]), **options, logits_processor=LogitsProcessorList([forced]))
    return forced.steps


class _CloseCalls(LogitsProcessor):
    """Notes at every step for which rows rounding could change the best token; changes nothing."""

    def __init__(self, rounding: float):
        self.rounding = rounding
        self.steps: list[list[bool]] = []

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        best_B2 = scores_BV.topk(2).values
        largest_B = scores_BV.masked_fill(scores_BV.isinf(), 0).abs().amax(-1)  # suppressed tokens are at -inf
        margin_B = best_B2[:, 0] - best_B2[:, 1]
        self.steps.append((~(margin_B > 2 * self.rounding * largest_B)).tolist())  # NaN is close, too
        return scores_BV


class _Forced(LogitsProcessor):
    """Lets only the given tokens through and notes what the model would have thought of all."""

    def __init__(self, ids: Sequence[int]):
        self.ids = ids
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores_1V: Tensor) -> Tensor:
        token = self.ids[len(self.steps)]
        self.steps.append(scores_1V[0].log_softmax(-1))
        only_1V = torch.full_like(scores_1V, -torch.inf)
        only_1V[:, token] = 0
        return only_1V


def _now(vlm: VLM) -> float:
    if vlm.model.device.type == "cuda":
        torch.cuda.synchronize(vlm.model.device)
    return time.perf_counter()
