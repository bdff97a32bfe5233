"""Encode once, drop placeholders, hand the rest to an unmodified transformers model.

The seam is `mm_encoder_outputs`, a keyword of `forward` and `generate` in transformers 5: features computed
outside, scattered into the placeholders inside. Nothing in the model is patched. For the price of four rules:

1. positions are computed on the full prompt and cropped ("preserve"), so that a compressed prompt equals the
   full one with the dropped tokens masked out; "compact" renumbers, for parity with papers that do;
2. an explicit 2-D attention mask is always passed: without one, gaps in the positions are read as the borders
   of packed sequences;
3. `mm_encoder_outputs` is built afresh for every call, because beam search changes it in place;
4. the rope delta that Qwen models keep between calls is set to what follows from the compressed prompt.
"""

# Shape legend: B batch, L prompt length, K compressed prompt length, n visual tokens of an item, N candidates,
#               D width of the language model

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tokensieve.compression import Plan, Projector, Question, VisualTokens, apply_plan
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.families import family_of
from tokensieve.pipeline.families.base import ItemLayout
from tokensieve.pipeline.joining import join_frames
from tokensieve.pipeline.stages import POSITIONS, Stage
from tokensieve.pipeline.tower_recorder import TowerRecorder

if TYPE_CHECKING:
    from tokensieve.pipeline.towers import TowerHandle

MODALITIES = ("image", "video")
# Sequence-shaped inputs and what stands in for them at padded places; the pad id of `input_ids` is added later.
_SEQUENCE_INPUTS = {"attention_mask": 0, "mm_token_type_ids": 0, "token_type_ids": 0, "labels": -100}


@dataclass(frozen=True, kw_only=True)
class VisualItem:
    """One image or video of a batch.

    Attributes:
        row: which prompt of the batch it belongs to.
        modality: "image" or "video": the kind of placeholder it fills.
        slots: `[n]` int64, where its placeholders stand in the prompt.
        features: `[n, D]`.
        candidates: `[N]` int64, the places among the n that a method may drop.
        tokens: what the method looks at.
        deepstack: one `[n, D]` tensor per deepstack layer.
        output_type: class of the encoder's output, to wrap the kept features in again.
        in_tensor: whether that output holds one tensor for all items, or a list of them.
        tower_stage: the method that shortened the tower, or None.
        tower_plan: its tokens: those whose place holds a token that the tower still had at its end.
    """

    row: int
    modality: str
    slots: Tensor
    features: Tensor
    candidates: Tensor
    tokens: VisualTokens
    deepstack: tuple[Tensor, ...]
    output_type: type
    in_tensor: bool
    tower_stage: Stage | None = None
    tower_plan: Plan | None = None

    def kept(self, plan: Plan) -> Tensor:
        """`[k]` int64, places among the n that stay: what the plan keeps and every structural token."""
        stays = torch.ones(len(self.slots), dtype=torch.bool, device=self.slots.device)
        stays[self.candidates] = plan.mask().to(stays.device)
        return stays.nonzero().squeeze(1)

    def kept_features(self, plan: Plan) -> Tensor:
        """`[k, D]`, what the language model gets at `kept(plan)`: merged tokens among them, gradients included."""
        return self._carried(self.features, plan, self.tokens.projector)

    def kept_deepstack(self, plan: Plan) -> tuple[Tensor, ...]:
        """One `[k, D]` tensor per deepstack layer, merged as the features are."""
        return tuple(self._carried(layer, plan, None) for layer in self.deepstack)

    def _carried(self, values: Tensor, plan: Plan, projector: Projector | None) -> Tensor:
        places = self.kept(plan)
        if plan.merge is None:
            return values[places]
        if plan.merge.before_projector and projector is not None and projector.one_row_per_token:
            merged = projector.fn(apply_plan(plan, projector.inputs)).to(values.dtype)
        else:
            merged = apply_plan(plan, values[self.candidates])
        mine = torch.isin(places, self.candidates[plan.kept.to(places.device)])
        return values[places].masked_scatter(mine[:, None], merged)


class RaggedFeatures(Tensor):
    """Features of items of unequal length in one `[1, total, D]` block.

    Beam search repeats such a block as a whole and pairs features with the wrong prompts, silently
    (transformers 5.24). It slices the block to do so; this class makes that slice an error.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # results of operations are plain tensors

    def __getitem__(self, key):
        if isinstance(key, slice):
            raise BadOption(
                "Beams or several returned sequences need as many kept tokens in every prompt of the batch "
                "with this model family.",
                hint="Give `keep` as a whole number, use a method with a fixed length, or pass one prompt at a time.",
            )
        return super().__getitem__(key)


class VLMAdapter:
    """Compresses the processor output of one transformers vision-language model.

    Args:
        model: any `*ForConditionalGeneration` of a supported family.

    Raises:
        UnsupportedModel: the family is unknown, or this transformers release has no `mm_encoder_outputs` for it.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.base = model.model
        self.family = family_of(model.config.model_type)
        if not model._supports_mm_encoder_outputs():
            raise UnsupportedModel(
                f"{type(model).__name__} does not take mm_encoder_outputs.", hint="Install transformers 5.24 or newer."
            )
        self.projector = self.base.get_submodule(self.family.projector_path)

    def check_tower(self, stage: Stage) -> None:
        """Raises UnsupportedModel unless a tower method can work in every tower of the model."""
        for modality in MODALITIES:
            if hasattr(self.base, f"get_{modality}_features"):
                self._shortened(modality, stage).remove()

    def _shortened(self, modality: str, stage: Stage) -> TowerHandle:
        from tokensieve.pipeline.towers import compress_tower
        from tokensieve.pipeline.towers.compress import last_block_read

        tower = self.family.tower(self.base, modality)
        blocks = self.family.tower_blocks(self.base, modality)
        last = last_block_read(self.model, len(blocks))
        return compress_tower(tower, stage.method.name, stage.keep, last_block=last, unmerge=True, **stage.options)

    def encode(
        self,
        inputs: Mapping[str, Tensor],
        frames_as_video: bool = False,
        *,
        needs: Collection[str] = (),
        questions: Sequence[str] | None = None,
        tower: Stage | None = None,
    ) -> list[VisualItem]:
        """Runs the vision encoder and finds the placeholders of every item.

        Args:
            inputs: the processor's output: `input_ids`, pixels, grids. Left as they are.
            frames_as_video: treat all images of a prompt as the frames of one video, for families that get
                videos as images; frames must have equal rasters.
            needs: what to record for the methods: "tower", "question" (see `Method.needs`; others are ignored).
            questions: one a prompt: the text that goes with "question".
            tower: a method that shortens the vision tower. Its output is spread over the full raster again, so that
                pooling and packing go on as always and every method at the projector sees a raster; tokens that
                hold no surviving place are left out by `VisualItem.tower_plan`.

        Returns:
            Items in the order of their placeholders, images first. Empty for a prompt of text alone.

        Raises:
            BadOption: placeholders and features do not match, or frames differ.
        """
        items: list[VisualItem] = []
        for modality in MODALITIES:
            encoder = getattr(self.base, f"get_{modality}_features", None)
            arguments = _arguments_of(encoder, inputs) if encoder else {}
            if not any(name.startswith("pixel_values") for name in arguments):
                continue
            seen: list[Tensor] = []
            hook = self.projector.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
            recorder = TowerRecorder(self.family.tower_blocks(self.base, modality)) if "tower" in needs else None
            shortened = self._shortened(modality, tower) if tower else None
            try:
                with recorder or nullcontext():
                    out = encoder(**arguments, return_dict=True)
            finally:
                hook.remove()
                if shortened:
                    shortened.remove()
            layouts = self.family.layouts(self.base, modality, out, inputs, torch.cat(seen))
            views = [None] * len(layouts)
            if recorder:
                owners = shortened and _owners(shortened, self.family.tower_blocks(self.base, modality))
                views = [recorder.view(of.patches, of.projector.to_tokens, owners) for of in layouts]
            placed = self._place(layouts, views, modality, out, inputs["input_ids"])
            if shortened:
                anchors_BP = shortened.trace.anchor_mask()
                placed = [
                    replace(item, tower_stage=tower, tower_plan=_surviving(item, layout, anchors_BP))
                    for item, layout in zip(placed, layouts, strict=True)
                ]
            items += placed
        if frames_as_video:
            frames = [item for item in items if item.modality == "image"]
            items = join_frames(frames) + [item for item in items if item.modality != "image"]
        return self.with_questions(items, inputs, questions) if "question" in needs else items

    def with_questions(
        self, items: Sequence[VisualItem], inputs: Mapping[str, Tensor], questions: Sequence[str] | None
    ) -> list[VisualItem]:
        """The items with what their prompts ask; `questions` holds the text of each prompt, where it is known."""
        embed = self.model.get_input_embeddings()
        asked = []
        for item in items:
            is_text_L = self._is_text(inputs, item.row)
            question = Question(
                embeds=embed(inputs["input_ids"][item.row, is_text_L]).detach(),
                text=None if questions is None else questions[item.row],
                num_before=int(is_text_L[: item.slots[0]].sum()),
            )
            asked.append(replace(item, tokens=replace(item.tokens, question=question)))
        return asked

    def special_ids(self) -> list[int]:
        """Ids that are no text: placeholders, and tokens that begin, end or fill a prompt."""
        config = self.model.config
        special = {getattr(config, f"{m}_token_id", None) for m in MODALITIES}
        for owner in (config, config.get_text_config(), self.model.generation_config):
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                value = getattr(owner, name, None)
                special |= set(value) if isinstance(value, list | tuple) else {value}
        return sorted(special - {None})

    def _is_text(self, inputs: Mapping[str, Tensor], row: int) -> Tensor:
        """`[L]` bool: all text of a prompt: its tokens but placeholders, special ones and padding."""
        ids_L = inputs["input_ids"][row]
        is_text_L = ~torch.isin(ids_L, torch.tensor(self.special_ids(), device=ids_L.device))
        if inputs.get("attention_mask") is not None:
            is_text_L &= inputs["attention_mask"][row].bool()
        return is_text_L

    def _place(self, layouts, views, modality: str, out, input_ids: Tensor) -> list[VisualItem]:
        placeholder = getattr(self.model.config, f"{modality}_token_id")
        rows, slots = (input_ids == placeholder).nonzero(as_tuple=True)
        lengths = [len(layout.features) for layout in layouts]
        if sum(lengths) != len(slots):
            raise BadOption(
                f"The prompt has {len(slots)} {modality} placeholders, but the encoder gave {sum(lengths)} tokens.",
                hint="Let the model's processor make the prompt.",
            )
        items = []
        for layout, view, row, slot in zip(layouts, views, rows.split(lengths), slots.split(lengths), strict=True):
            device = layout.features.device
            structural = layout.structural
            if structural is None:
                structural = torch.zeros(len(slot), dtype=torch.bool, device=device)
            candidates = (~structural).nonzero().squeeze(1)
            crop = layout.crop if layout.crop is not None else torch.zeros(len(candidates), dtype=torch.long)
            items.append(
                VisualItem(
                    row=int(row[0]),
                    modality=modality,
                    slots=slot,
                    features=layout.features,
                    candidates=candidates,
                    tokens=VisualTokens(
                        features=layout.features[candidates].detach(),
                        grids=layout.grids,
                        crop=crop.to(device),
                        times_s=layout.times_s,
                        projector=layout.projector,
                        tower=view,
                    ),
                    deepstack=layout.deepstack,
                    output_type=type(out),
                    in_tensor=isinstance(out.pooler_output, Tensor),
                )
            )
        return items

    def emit(
        self,
        inputs: Mapping[str, Tensor],
        items: Sequence[VisualItem],
        plans: Sequence[Plan],
        *,
        positions: str = "preserve",
        target: str = "generate",
        pad_token_id: int = 0,
    ) -> dict[str, object]:
        """Keyword arguments for the model with the dropped tokens left out.

        Args:
            inputs: what `encode` was given, with `labels` for a training loss. Left as they are.
            items: what `encode` returned.
            plans: one plan an item.
            positions: "preserve" (kept tokens keep their positions) or "compact" (renumbered 0, 1, 2 ...).
            target: "generate", or "forward" for `model(...)`, which counts positions differently in PaliGemma.
            pad_token_id: fills the left of shorter prompts; it is masked, so any valid id will do.

        Raises:
            BadOption: unknown `positions` or `target`.
        """
        if positions not in POSITIONS:
            raise BadOption(f"positions must be one of {POSITIONS}, got {positions!r}.")
        if target not in ("generate", "forward"):
            raise BadOption(f"target must be 'generate' or 'forward', got {target!r}.")
        mask_BL = inputs.get("attention_mask")
        if mask_BL is None:
            mask_BL = torch.ones_like(inputs["input_ids"])
        full = {**inputs, "attention_mask": mask_BL}
        stays_BL = mask_BL.bool()
        for item, plan in zip(items, plans, strict=True):
            places = item.kept(plan)
            stays_BL[item.row, item.slots] = False
            stays_BL[item.row, item.slots[places.to(item.slots.device)]] = True

        emitted = self._packed(full, stays_BL, positions, target, pad_token_id)
        encoded = {}
        for modality in MODALITIES:
            chosen = [(item, plan) for item, plan in zip(items, plans, strict=True) if item.modality == modality]
            if chosen:
                encoded[modality] = _encoder_output(chosen)
        if encoded:
            emitted["mm_encoder_outputs"] = encoded
        return emitted

    def emit_subsets(
        self, inputs: Mapping[str, Tensor], item: VisualItem, mask_GN: Tensor, *, target: str = "forward"
    ) -> dict[str, object]:
        """As `emit` for one prompt, once for every row of `mask_GN`: the same prompt with G subsets of its tokens.

        Args:
            inputs: of one prompt, `[1, L]`, without padding, and its grids.
            item: its only image or video.
            mask_GN: bool, True where a candidate stays; as many in every row.
            target: as in `emit`.

        Raises:
            BadOption: rows keep different numbers of tokens.
        """
        device = item.features.device
        mask_GN = mask_GN.to(device)
        if len(mask_GN.sum(1).unique()) != 1:
            raise BadOption(f"All subsets need one size, got {mask_GN.sum(1).unique().tolist()} tokens.")
        num_subsets, length = len(mask_GN), inputs["input_ids"].shape[1]
        among_Gn = torch.ones(num_subsets, len(item.slots), dtype=torch.bool, device=device)
        among_Gn[:, item.candidates] = mask_GN
        stays_GL = torch.ones(num_subsets, length, dtype=torch.bool, device=device)
        stays_GL[:, item.slots] = among_Gn
        full = {k: v.repeat(num_subsets, *[1] * (v.ndim - 1)) for k, v in inputs.items()}
        full.setdefault("attention_mask", torch.ones_like(full["input_ids"]))
        emitted = self._packed(full, stays_GL, "preserve", target, 0)
        place_Gk = among_Gn.nonzero()[:, 1].view(num_subsets, -1)
        features_GkD = item.features[place_Gk]
        more = {}
        if item.deepstack:
            more = {"deepstack_features": [list(layer[place_Gk]) for layer in item.deepstack]}
        encoded = item.output_type(pooler_output=features_GkD if item.in_tensor else list(features_GkD), **more)
        return emitted | {"mm_encoder_outputs": {item.modality: encoded}}

    def place(self, items: Sequence[VisualItem], input_ids: Tensor) -> list[VisualItem]:
        """Items of one prompt at the places that their placeholders have in another, `[1, L]`.

        Raises:
            BadOption: the other prompt has another number of placeholders.
        """
        placed = []
        for modality in MODALITIES:
            mine = [item for item in items if item.modality == modality]
            if not mine:
                continue
            slots = (input_ids[0] == getattr(self.model.config, f"{modality}_token_id")).nonzero().squeeze(1)
            lengths = [len(item.slots) for item in mine]
            if len(slots) != sum(lengths):
                raise BadOption(f"The prompt has {len(slots)} {modality} placeholders, the items fill {sum(lengths)}.")
            placed += [replace(item, slots=s) for item, s in zip(mine, slots.split(lengths), strict=True)]
        return placed

    def _packed(
        self, full: Mapping[str, Tensor], stays_BL: Tensor, positions: str, target: str, pad_token_id: int
    ) -> dict[str, object]:
        """What runs along the prompt, without the places that do not stay."""
        fill = {"input_ids": pad_token_id, **_SEQUENCE_INPUTS}
        packed: dict[str, object] = {k: left_pack(full[k], stays_BL, fill[k]) for k in fill if full.get(k) is not None}
        packed["position_ids"] = self._positions(full, stays_BL, positions, target)
        return packed

    def _positions(self, full: Mapping[str, Tensor], stays_BL: Tensor, positions: str, target: str) -> Tensor:
        others = {k: v for k, v in full.items() if k not in ("input_ids", "labels")}
        ids = self.model._prepare_position_ids_for_generation(full["input_ids"], others)
        packed = left_pack(ids.expand(*ids.shape[:-2], *stays_BL.shape), stays_BL, 0)
        mask_BK = left_pack(stays_BL.long(), stays_BL, 0)
        counter_BK = (mask_BK.cumsum(-1) - 1).clamp(min=0)
        if positions == "compact":
            packed = counter_BK.expand(packed.shape).clone()
        elif packed.ndim == 3:
            packed[0] = counter_BK  # the text counter of M-RoPE models tells packed sequences apart: no gaps
        if packed.ndim == 3:
            self.base.rope_deltas = packed[1:].amax((0, 2))[:, None] + 1 - mask_BK.sum(-1, keepdim=True)
        if target == "forward" and self.family.forward_position_offset:
            packed = packed + self.family.forward_position_offset
        return packed


@dataclass(frozen=True, kw_only=True)
class KeptRaster:
    """Where the visual tokens of one item that a prompt still holds stood in the item's raster.

    `emit` puts a tuple of these, in the order of the placeholders, into the attribute `kept_rasters` of every
    encoder output, so that methods inside the language model know frames and places.

    Attributes:
        row: prompt of the batch (before beams multiply the rows).
        token: `[k]` int64, index among the item's N candidates, -1 for a structural token.
        grids: `(frames, height, width)` per raster block of the N candidates.
    """

    row: int
    token: Tensor
    grids: tuple[tuple[int, int, int], ...]


def _encoder_output(chosen: Sequence[tuple[VisualItem, Plan]]):
    """What the model expects in `mm_encoder_outputs` for the kept tokens of all items of one modality."""
    first = chosen[0][0]
    features = [item.kept_features(plan) for item, plan in chosen]
    if not first.in_tensor:
        layers = zip(*(item.kept_deepstack(plan) for item, plan in chosen), strict=True)
        more = {"deepstack_features": [list(layer) for layer in layers]} if first.deepstack else {}
        out = first.output_type(pooler_output=features, **more)
    elif len({len(f) for f in features}) == 1:
        out = first.output_type(pooler_output=torch.stack(features))
    else:
        out = first.output_type(pooler_output=torch.cat(features)[None].as_subclass(RaggedFeatures))
    out.kept_rasters = tuple(_kept_raster(item, plan) for item, plan in chosen)
    return out


def _kept_raster(item: VisualItem, plan: Plan) -> KeptRaster:
    token_n = torch.full((len(item.slots),), -1, dtype=torch.long, device=item.candidates.device)
    token_n[item.candidates] = torch.arange(len(item.candidates), device=token_n.device)
    return KeptRaster(row=item.row, token=token_n[item.kept(plan)], grids=item.tokens.grids)


def _owners(shortened: TowerHandle, blocks: Sequence[nn.Module]) -> dict[int, Tensor]:
    """Which token stood for each patch when it entered the last block, and the one before."""
    return {place: shortened.trace_after(len(blocks) + place - 1).owner for place in (-1, -2)}


def _surviving(item: VisualItem, layout: ItemLayout, anchors_BP: Tensor) -> Plan:
    patches = layout.patches
    held_P = anchors_BP[patches.start : patches.stop].flatten().float()
    held_N = layout.projector.to_tokens(patches.to_rows(held_P[:, None]))[:, 0] > 0
    return Plan(held_N.nonzero().squeeze(1), len(item.tokens))


def _arguments_of(encoder, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = inspect.signature(encoder).parameters
    return {name: inputs[name] for name in names if inputs.get(name) is not None}


def left_pack(values: Tensor, stays_BL: Tensor, fill: int) -> Tensor:
    """Keeps the marked entries of the last axis and moves them to the right end of the longest row.

    `values` is `[..., B, L]`, the result `[..., B, K]` with `fill` to the left of shorter rows.
    """
    longest = int(stays_BL.sum(-1).max())
    # A stable sort by "stays" puts dropped entries first and keeps the order of the others.
    order_BK = stays_BL.int().sort(dim=-1, stable=True).indices[:, stays_BL.shape[1] - longest :]
    order = order_BK.expand(*values.shape[:-2], *order_BK.shape)
    real_BK = stays_BL.gather(1, order_BK)
    return values.gather(-1, order).masked_fill(~real_BK, fill)
