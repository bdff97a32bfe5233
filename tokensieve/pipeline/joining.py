"""Frames that a model gets as images, joined to one video: features, rasters, projectors, towers and plans alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokensieve.compression import Plan, Projector, VisualTokens
from tokensieve.compression.tokens import identity
from tokensieve.errors import BadOption
from tokensieve.pipeline.tower_recorder import join_views

if TYPE_CHECKING:
    from tokensieve.pipeline.adapter import VisualItem


def join_frames(items: Sequence[VisualItem]) -> list[VisualItem]:
    """Joins all image items of a prompt to one item whose raster is `(frames, height, width)`."""
    joined = []
    for row in sorted({item.row for item in items}):
        frames = [item for item in items if item.row == row]
        grids = [grid for item in frames for grid in item.tokens.grids]
        if len(set(grids)) > 1:
            raise BadOption(
                f"Frames of one video must have equal rasters, got {sorted(set(grids))}.",
                hint="Turn off image splitting in the processor, or pass the frames as images.",
            )
        lengths = [len(item.slots) for item in frames]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        tokens = [item.tokens for item in frames]
        joined.append(
            replace(
                frames[0],
                slots=torch.cat([item.slots for item in frames]),
                features=torch.cat([item.features for item in frames]),
                candidates=torch.cat([item.candidates + s for item, s in zip(frames, starts, strict=True)]),
                tokens=VisualTokens(
                    features=torch.cat([t.features for t in tokens]),
                    grids=((len(grids), *grids[0][1:]),),
                    crop=torch.zeros(sum(map(len, tokens)), dtype=torch.long, device=tokens[0].features.device),
                    projector=_join_projectors([t.projector for t in tokens]),
                    tower=join_views([t.tower for t in tokens]) if tokens[0].tower is not None else None,
                ),
                deepstack=tuple(torch.cat(layer) for layer in zip(*(item.deepstack for item in frames), strict=True)),
                tower_plan=_join_plans([item.tower_plan for item in frames]),
            )
        )
    return joined


def _join_plans(plans: Sequence[Plan | None]) -> Plan | None:
    if plans[0] is None:
        return None
    starts = [sum(plan.num_tokens for plan in plans[:i]) for i in range(len(plans))]
    kept = torch.cat([plan.kept + start for plan, start in zip(plans, starts, strict=True)])
    return Plan(kept, sum(plan.num_tokens for plan in plans))


def _join_projectors(projectors: Sequence[Projector | None]) -> Projector | None:
    if any(p is None for p in projectors):
        return None
    lengths = [len(p.inputs) for p in projectors]

    def to_tokens(values: Tensor) -> Tensor:
        parts = zip(projectors, values.split(lengths), strict=True)
        return torch.cat([projector.to_tokens(part) for projector, part in parts])

    carry = identity if all(p.one_row_per_token for p in projectors) else to_tokens
    return replace(projectors[0], inputs=torch.cat([p.inputs for p in projectors]), to_tokens=carry)
