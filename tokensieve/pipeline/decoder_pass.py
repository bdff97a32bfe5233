"""One forward of a batch of prompts while tokens leave: what is left of each, and what follows them into each layer."""

# Shape legend: B prompts, S tokens of the full prompt, T tokens now, N visual tokens that may be dropped, D width,
#               H heads

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tokensieve.compression import Plan, keep_all, num_to_keep
from tokensieve.compression.decoder_stage import DecoderStage, DecoderTokens, Raster, Step
from tokensieve.pipeline.attention_rows import attention_to
from tokensieve.pipeline.decode_choice import DecodeChoice
from tokensieve.pipeline.decoder_cache import CacheNotes
from tokensieve.pipeline.decoder_layout import Layout, take
from tokensieve.pipeline.decoder_prompt import Prompt


@dataclass(eq=False)
class Row:
    """One prompt during a forward: what is left of it."""

    prompt: Prompt
    left: Tensor  # [N] int64, indices among the candidates
    num_keep: int
    raters: Tensor
    memory: dict = field(default_factory=dict)


class PromptPass:
    """One forward of a batch of prompts.

    Args:
        stage: the method.
        steps: its steps by layer.
        choice: what chooses keys at decode, if the method does.
        keep: budget for each prompt.
        num_layers: of the language model.
        input_ids: `[B, S]`.
        valid_BS: bool, False at padding.
        prompts: where the visual tokens are.
        attention: name of the attention implementation.

    Attributes:
        active: whether any token is to leave.
        layout: what is there now.
        counts: visual tokens in every layer so far, for every row.
    """

    def __init__(
        self,
        stage: DecoderStage,
        steps: Mapping[int, Step],
        choice: DecodeChoice | None,
        keep: float | int,
        num_layers: int,
        input_ids: Tensor,
        valid_BS: Tensor,
        prompts: list[Prompt],
        attention: str,
    ):
        self.stage, self.steps, self.num_layers = stage, steps, num_layers
        self.input_ids, self.attention = input_ids, attention
        self.layout = Layout.full(valid_BS)
        self.layouts: list[Layout] = []  # of every layer that has run
        self.rows = [
            Row(
                prompt=prompt,
                left=torch.arange(len(prompt.candidates), device=input_ids.device),
                num_keep=num_to_keep(keep, len(prompt.candidates)) if len(prompt.candidates) else 0,
                raters=prompt.question,
            )
            for prompt in prompts
        ]
        self.active = bool(self.steps) and any(row.num_keep < len(row.left) for row in self.rows)
        self.chooses = choice is not None and any(choice.num_keep(len(r.left)) < len(r.left) for r in self.rows)
        self.counts: list[list[int]] = [[] for _ in prompts]
        self.twin: list[int] = []  # the first row with equal inputs
        self.carried: dict[int, Tensor] = {}  # layer -> [B, T, D] deepstack features to add at its entry
        self.before: tuple | None = None  # the layer that ran last, what entered it, and its arguments
        self.taken: dict[int, tuple[object, object]] = {}  # arguments already cut to the present layout

    def take_deepstack(self, deepstack: list[Tensor], visual_BS: Tensor) -> None:
        """Adds deepstack features at the entry of the next layer from now on, so that they follow the tokens."""
        for index, features in enumerate(deepstack):
            full = features.new_zeros(*visual_BS.shape, features.shape[-1])
            self.carried[index + 1] = full.masked_scatter(visual_BS[..., None].to(full.device), features)

    def enter(self, index: int, layer: nn.Module, hidden_BTD: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        """Hidden states and arguments for layer `index`."""
        if index in self.carried:
            hidden_BTD = hidden_BTD + self.carried.pop(index).to(hidden_BTD.device, hidden_BTD.dtype)
        cache = kwargs.get("cache")
        if index == 0 and self.active:
            self._start(hidden_BTD)
        cut = self._cut(kwargs)
        step = self.steps.get(index)
        if step is not None and self.active:
            looks_at = (layer, hidden_BTD, cut) if step.looks == "next" else self.before
            hidden_BTD = self._drop(step, hidden_BTD, looks_at, cache)
            cut = self._cut(kwargs)
        upcoming = self.steps.get(index + 1)
        self.before = (layer, hidden_BTD, cut) if upcoming is not None and upcoming.looks == "previous" else None
        self.layouts.append(self.layout)
        for row, counts in zip(self.rows, self.counts, strict=True):
            counts.append(row.prompt.num_structural + len(row.left))
        if cache is not None and (self.layout.index is not None or self.chooses):
            notes = CacheNotes.write(cache, self.layout, index, [row.prompt.candidates for row in self.rows])
            notes.may_choose = self.chooses
        return hidden_BTD, cut

    def _start(self, hidden_BSD: Tensor) -> None:
        valid_BS = self.layout.stays
        for row in range(len(self.rows)):
            same = row > 0 and all(torch.equal(t[row], t[row - 1]) for t in (self.input_ids, valid_BS, hidden_BSD))
            self.twin.append(self.twin[-1] if same else row)
        if not any(step.queries == "raters" for step in self.steps.values()):
            return
        for number, row in enumerate(self.rows):
            if self.twin[number] != number:
                row.raters = self.rows[self.twin[number]].raters
            elif len(row.left):
                with torch.no_grad():
                    visual, text = (hidden_BSD[number, c] for c in (row.prompt.candidates, row.prompt.question))
                    row.raters = row.prompt.question[self.stage.raters(visual, text)]

    def _cut(self, kwargs: Mapping[str, object]) -> dict:
        """The layer's arguments in the present layout; each is cut once for all layers that share it."""
        cut = dict(kwargs)
        if self.layout.index is None:
            return cut
        cut["attention_mask"] = self._once(kwargs.get("attention_mask"), self._cut_mask)
        cut["position_embeddings"] = self._once(kwargs["position_embeddings"], self._cut_rotary)
        if kwargs.get("position_ids") is not None:
            cut["position_ids"] = self._once(kwargs["position_ids"], lambda ids: self.layout.take(ids, 1))
        return cut

    def _once(self, value, fn: Callable):
        if id(value) not in self.taken:
            self.taken[id(value)] = (value, fn(value))  # the value is held, so that its id stays its own
        return self.taken[id(value)][1]

    def _cut_mask(self, mask: Tensor | None) -> Tensor | None:
        return self.layout.take_mask(mask, self.attention)

    def _cut_rotary(self, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return tuple(self.layout.take(values, 1) for values in cos_sin)

    def _drop(self, step: Step, hidden_BTD: Tensor, looks_at: tuple | None, cache) -> Tensor:
        plans: list[Plan] = []
        for number, row in enumerate(self.rows):
            if self.twin[number] != number:
                plans.append(plans[self.twin[number]])
            elif row.num_keep >= len(row.prompt.candidates):
                plans.append(keep_all(len(row.left), row.left.device))
            else:
                plans.append(self._select(step, number, row, hidden_BTD, looks_at))
        if all(len(plan.kept) == plan.num_tokens and plan.merge is None for plan in plans):
            return hidden_BTD
        stays_BS = self.layout.stays.clone()
        for number, (row, plan) in enumerate(zip(self.rows, plans, strict=True)):
            full = row.prompt.candidates[row.left]
            if plan.merge is not None:
                now = self.layout.columns(number, full)
                hidden_BTD = _merged(hidden_BTD, number, now, plan)
                self.carried = {layer: _merged(x, number, now, plan) for layer, x in self.carried.items()}
            kept = plan.kept.to(row.left.device)
            stays_BS[number, full] = False
            stays_BS[number, full[kept]] = True
            row.left = row.left[kept]
        layout = self.layout.keeping(stays_BS)
        order_BT = self.layout.order_to(layout)
        self.layout = layout
        self.taken.clear()
        if step.cut_cache and cache is not None:
            candidates = [row.prompt.candidates for row in self.rows]
            for index, earlier in enumerate(self.layouts):
                CacheNotes.cut(cache, index, earlier, layout, candidates)
        self.carried = {layer: take(x, order_BT, 1) for layer, x in self.carried.items()}
        return take(hidden_BTD, order_BT, 1)

    def _select(self, step: Step, number: int, row: Row, hidden_BTD: Tensor, looks_at: tuple | None) -> Plan:
        now = self.layout.columns(number, row.prompt.candidates[row.left])
        raster = row.prompt.raster
        if raster is not None:
            raster = Raster(block=raster.block[row.left], frame=raster.frame[row.left], place=raster.place[row.left])

        def attention() -> Tensor:
            layer, entered_BTD, arguments = looks_at
            cos, sin = (values.expand(len(self.rows), -1, -1)[number] for values in arguments["position_embeddings"])
            queries = {
                "last": self.layout.stays[number].nonzero()[-1],
                "question": row.prompt.question,
                "raters": row.raters,
                "all": self.layout.stays[number].nonzero()[:, 0],
            }[step.queries]
            return attention_to(
                layer,
                entered_BTD[number],
                cos,
                sin,
                self._mask_of(number, arguments.get("attention_mask")),
                self.layout.columns(number, queries),
                now,
                step.over_queries,
            )

        with torch.no_grad(), torch.autocast(hidden_BTD.device.type, enabled=False):
            tokens = DecoderTokens(
                hidden=hidden_BTD[number, now].detach(),
                attention=attention,
                raster=raster,
                num_first=len(row.prompt.candidates),
                num_keep=row.num_keep,
                counts=tuple(count - row.prompt.num_structural for count in self.counts[number]),
                num_layers=self.num_layers,
                memory=row.memory,
            )
            return self.stage.select(step, tokens)

    def _mask_of(self, number: int, mask: Tensor | None) -> Tensor | None:
        """The mask of one row for `attention_to`; a layer gets none only where all keys are real."""
        if mask is None:
            return None
        return mask.expand(len(self.rows), *mask.shape[1:])[number]


def _merged(hidden_BTD: Tensor, number: int, now_N: Tensor, plan: Plan) -> Tensor:
    """Hidden states with the merged tokens of one row at the places of the kept ones; the input is left as it is."""
    merged_KD = plan.merge.apply(hidden_BTD[number, now_N])
    row = torch.full_like(now_N[plan.kept], number)
    return hidden_BTD.index_put((row, now_N[plan.kept]), merged_KD)
