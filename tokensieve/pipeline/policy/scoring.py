"""Tries many subsets of one sample's visual tokens in one batch: what the frozen model answers with each.

The vision tower ran once, when the sample was made. The text before the first visual token is the same for all
subsets: it goes through the language model once and its cache is shared.
"""

# Shape legend: G subsets, N candidates, n visual tokens of the item, k of them kept, L prompt length, P length of the
#               shared prefix, M tokens of the answer, V vocabulary, D width

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tokensieve.errors import BadOption
from tokensieve.pipeline.generation import generate_options
from tokensieve.pipeline.policy.samples import Sample
from tokensieve.pipeline.vlm import VLM

MIN_SHARED = 4  # a shorter prefix costs less than a second call of the model


class SubsetScorer:
    """The frozen model as a judge of subsets.

    Args:
        vlm: its model is put into evaluation mode and frozen; a compression it has set must be off.

    Raises:
        BadOption: a compression is on.
    """

    def __init__(self, vlm: VLM):
        if vlm.compression is not None:
            raise BadOption("The judge must see all tokens of a subset.", hint="Call vlm.compress(None) first.")
        self.vlm = vlm
        self._taught: WeakKeyDictionary[Sample, dict[int, tuple[Tensor, Tensor]]] = WeakKeyDictionary()
        self._blind: WeakKeyDictionary[Sample, Tensor] = WeakKeyDictionary()
        vlm.model.eval().requires_grad_(False)

    @torch.no_grad()
    def answer_logits(self, sample: Sample, mask_GN: Tensor, answer: Tensor | None = None) -> Tensor:
        """`[G, M, V]` float32: the model's prediction of every token of the answer, given the answer before it.

        Args:
            sample: what is asked.
            mask_GN: bool, True where a candidate stays; as many in every row.
            answer: `[M]` ids; the sample's own where left out.

        Raises:
            BadOption: there is no answer, or rows differ in size.
        """
        answer = sample.answer_ids if answer is None else answer
        if answer is None:
            raise BadOption("This sample has no answer to look for.")
        emitted = self._emitted(sample.inputs_with(answer), sample, mask_GN, target="forward")
        out = self.vlm.model(**emitted, logits_to_keep=len(answer) + 1)
        return out.logits[:, :-1].float()

    def answers(self, sample: Sample, mask_GN: Tensor, max_new_tokens: int = 16) -> list[str]:
        """What the model says with each subset, greedily.

        Raises:
            BadOption: rows differ in size.
        """
        new = self._generated(sample, mask_GN, max_new_tokens)
        return [text.strip() for text in self.vlm.processor.batch_decode(new, skip_special_tokens=True)]

    def own_answer(self, sample: Sample, max_new_tokens: int = 16) -> Tensor:
        """`[M]` ids that the model generates greedily with all tokens, its end token included."""
        return self._generated(sample, _everything(sample), max_new_tokens)[0]

    def teach(self, sample: Sample, max_new_tokens: int = 16) -> tuple[Tensor, Tensor]:
        """`own_answer` `[M]` and the predictions `[M, V]` of it with all tokens; worked out once a sample."""
        known = self._taught.setdefault(sample, {})
        if max_new_tokens not in known:
            own = self.own_answer(sample, max_new_tokens)
            known[max_new_tokens] = own, self.answer_logits(sample, _everything(sample), own)[0]
        return known[max_new_tokens]

    def blind_logits(self, sample: Sample) -> Tensor:
        """`[1, M, V]`: `answer_logits` without any visual token; worked out once a sample.

        Raises:
            BadOption: there is no answer.
        """
        if sample not in self._blind:
            self._blind[sample] = self.answer_logits(sample, ~_everything(sample))
        return self._blind[sample]

    @torch.no_grad()
    def _generated(self, sample: Sample, mask_GN: Tensor, max_new_tokens: int) -> Tensor:
        emitted = self._emitted(sample.inputs, sample, mask_GN, target="generate")
        # With a cache at hand `generate` goes on behind the shared prefix.
        ids = self.vlm.model.generate(**emitted, **generate_options(self.vlm.model, max_new_tokens, {}))
        return ids[:, emitted["input_ids"].shape[1] :]

    def _emitted(self, inputs: dict[str, Tensor], sample: Sample, mask_GN: Tensor, target: str) -> dict[str, object]:
        emitted = self.vlm.adapter.emit_subsets(inputs, sample.item, mask_GN, target=target)
        shared = int(sample.item.slots.min())
        if shared < MIN_SHARED or len(mask_GN) == 1 or not self.vlm.adapter.family.causal_prompt:
            return emitted
        cache = self.vlm.model(
            input_ids=emitted["input_ids"][:1, :shared],
            attention_mask=emitted["attention_mask"][:1, :shared],
            position_ids=emitted["position_ids"][..., :1, :shared],
            use_cache=True,
            logits_to_keep=1,
        ).cache
        cache.batch_repeat_interleave(len(mask_GN))
        emitted["cache"] = cache
        if target == "forward":
            for name in ("input_ids", "position_ids", "mm_token_type_ids", "token_type_ids"):
                if name in emitted:
                    emitted[name] = emitted[name][..., shared:]
        return emitted


def _everything(sample: Sample) -> Tensor:
    return torch.ones(1, len(sample.tokens), dtype=torch.bool)
