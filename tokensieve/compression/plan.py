"""A plan says which tokens stay, and what they take over from the others; one function applies it to anything."""

# Shape legend: N tokens in, K tokens kept, E entries of a merge

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Merge:
    """What the kept tokens take over: kept token k becomes the sum of `weight * token[source]` where `target == k`.

    Linear, so that the same merge serves features, deepstack layers and token sizes. A kept token whose only entry
    is itself with weight 1 stays as it is.

    Attributes:
        source: `[E]` int64 in [0, N).
        target: `[E]` int64 in [0, K), rising; every kept token has at least one entry.
        weight: `[E]` float32.
        before_projector: the method merges what enters the projector; where one projector row is one visual
            token the model adapter does so, elsewhere the features are merged.
    """

    source: Tensor
    target: Tensor
    weight: Tensor
    before_projector: bool = False

    def __post_init__(self) -> None:
        if not (self.source.shape == self.target.shape == self.weight.shape) or self.source.ndim != 1:
            raise ValueError(
                f"Merge needs source, target and weight of one length, got {tuple(self.source.shape)}, "
                f"{tuple(self.target.shape)}, {tuple(self.weight.shape)}."
            )
        if (self.target.diff() < 0).any():
            raise ValueError("Merge.target must rise.")

    def apply(self, values: Tensor) -> Tensor:
        """Merges along the first axis: `[N, ...]` to `[K, ...]`, summed in float32, in the dtype of `values`."""
        num_kept = int(self.target[-1]) + 1
        lengths = torch.bincount(self.target, minlength=num_kept).to(values.device)
        flat = values.flatten(1) if values.ndim > 1 else values[:, None]
        # Sums as it gathers, so nothing of E rows is ever held; repeatable on GPUs, unlike index_add.
        merged = F.embedding_bag(
            self.source.to(values.device),
            flat.float(),
            lengths.cumsum(0) - lengths,
            mode="sum",
            per_sample_weights=self.weight.to(values.device),
        )
        return merged.view(num_kept, *values.shape[1:]).to(values.dtype)


@dataclass(frozen=True, eq=False)
class Plan:
    """Kept tokens of one image or video, and the merge into them, if there is one.

    Attributes:
        kept: `[K]` int64, strictly rising, each in [0, num_tokens). A merged token stands at the place of the kept
            token it is merged into.
        num_tokens: N.
        merge: what kept tokens take over from others; None for pure pruning.
    """

    kept: Tensor
    num_tokens: int
    merge: Merge | None = None

    def __post_init__(self) -> None:
        kept = self.kept
        if kept.ndim != 1 or kept.dtype != torch.int64:
            raise ValueError(f"Plan.kept must be a 1-D int64 tensor, got {tuple(kept.shape)} {kept.dtype}.")
        if len(kept) and (kept[0] < 0 or kept[-1] >= self.num_tokens or (kept.diff() <= 0).any()):
            shown = f"{kept[:8].tolist()}{'...' if len(kept) > 8 else ''}"
            raise ValueError(f"Plan.kept must rise strictly inside [0, {self.num_tokens}), got {shown}.")
        if self.merge is not None and len(self.merge.target.unique()) != len(kept):
            raise ValueError(f"Every one of the {len(kept)} kept tokens needs an entry in Plan.merge.")

    @property
    def num_kept(self) -> int:
        return len(self.kept)

    def mask(self) -> Tensor:
        """`[N]` bool, True where a token stays."""
        mask = torch.zeros(self.num_tokens, dtype=torch.bool, device=self.kept.device)
        mask[self.kept] = True
        return mask


def apply_plan(plan: Plan, values: Tensor, dim: int = 0) -> Tensor:
    """What the plan makes of `values` along its token axis `dim` (whose length must be N): merged, else gathered.

    For what must not be mixed, such as positions, gather with `plan.kept`.

    Raises:
        ValueError: the axis does not have `plan.num_tokens` entries.
    """
    if values.shape[dim] != plan.num_tokens:
        raise ValueError(
            f"The plan is for {plan.num_tokens} tokens, but axis {dim} of {tuple(values.shape)} is not that long."
        )
    if plan.merge is not None:
        return plan.merge.apply(values.movedim(dim, 0)).movedim(0, dim)
    return values.index_select(dim, plan.kept.to(values.device))


def keep_all(num_tokens: int, device: torch.device | str = "cpu") -> Plan:
    """The plan that drops nothing."""
    return Plan(torch.arange(num_tokens, device=device), num_tokens)


def merge_plan(
    num_tokens: int, anchor_E: Tensor, source_E: Tensor, weight_E: Tensor, *, before_projector: bool = False
) -> Plan:
    """The plan in which every token named in `anchor_E` stays and becomes the sum of its `weight * token[source]`.

    Args:
        num_tokens: N.
        anchor_E, source_E: int64 in [0, N), entries in any order.
        weight_E: float.
        before_projector: as in `Merge`.
    """
    kept, target_E = anchor_E.unique(return_inverse=True)
    order = target_E.sort(stable=True).indices
    return Plan(kept, num_tokens, Merge(source_E[order], target_E[order], weight_E[order].float(), before_projector))
