"""Records what a vision tower's last two layers look at, while it runs: for methods that need "tower".

Forward hooks keep the hidden states that enter the two blocks; queries and keys are made of them per item, with
the block's own norms, projections and rotary embedding. The tower itself runs as always, on SDPA or Flash.
"""

# Shape legend: B images of the tower's batch, S tokens of an image, P patches of an item, H heads, d width of a head,
#               V width of the tower, C channels

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from tokensieve.compression import TowerLayer, TowerView
from tokensieve.errors import UnsupportedModel

# Names of the first norm and the attention of a block, library by library.
_PARTS = (("layer_norm1", "self_attn"), ("norm1", "attn"), ("layernorm_before", "attention"))


@dataclass(frozen=True, kw_only=True)
class PatchMap:
    """Which part of the tower's batch is one item, and how its patches become projector rows.

    Attributes:
        start, stop: images `[start, stop)` of a tower that takes `[B, S, V]`, patches of one that takes `[S, V]`.
        num_prefix: tokens in front of every image that are no patches.
        to_rows: carries `[P, C]` per patch, images one after the other, to `[rows, C]` per projector row;
            patches that share a row are averaged.
    """

    start: int
    stop: int
    num_prefix: int
    to_rows: Callable[[Tensor], Tensor]


@dataclass
class _Call:
    norm: nn.Module
    attention: nn.Module
    hidden: list[Tensor] = field(default_factory=list)
    kwargs: list[dict] = field(default_factory=list)


class TowerRecorder:
    """Context manager: records the last two blocks of a tower for one forward.

    Args:
        blocks: the tower's blocks, in order.

    Raises:
        UnsupportedModel: fewer than two blocks, or blocks whose attention is not found.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        if len(blocks) < 2:
            raise UnsupportedModel(f"A tower of at least 2 blocks can be recorded, this one has {len(blocks)}.")
        self._blocks = {place: blocks[place] for place in (-1, -2)}
        self._calls = {place: _Call(*parts_of(block)) for place, block in self._blocks.items()}
        self._outputs: list[Tensor] = []
        self._hooks: list = []

    def __enter__(self) -> TowerRecorder:
        for place, call in self._calls.items():

            def record(_, args, kwargs, call=call):
                call.hidden.append(args[0] if args else kwargs["hidden_states"])
                call.kwargs.append(kwargs)

            self._hooks.append(self._blocks[place].register_forward_pre_hook(record, with_kwargs=True))
        self._hooks.append(
            self._blocks[-1].register_forward_hook(lambda _, __, out: self._outputs.append(_tensor(out)))
        )
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    def view(
        self,
        patches: PatchMap,
        to_tokens: Callable[[Tensor], Tensor],
        owners: Mapping[int, Tensor] | None = None,
    ) -> TowerView:
        """The record of one item.

        Args:
            patches: where the item is in the tower's batch.
            to_tokens: carries `[rows, C]` per projector row to `[N, C]` per visual token.
            owners: of a tower that was shortened, per layer: `[B, P]` int64, which of the tokens that entered the
                layer stands for each patch, -1 for a patch that was dropped before (it counts as 0).

        Raises:
            UnsupportedModel: the tower ran not once but several times.
        """
        if len(self._outputs) != 1:
            raise UnsupportedModel(f"The vision tower ran {len(self._outputs)} times for one encoding, not once.")

        def patches_to_tokens(values: Tensor, place: int) -> Tensor:
            columns = values if values.ndim > 1 else values[:, None]
            if owners is not None:
                columns = _spread(columns, owners[place][patches.start : patches.stop])
            carried = to_tokens(patches.to_rows(columns))
            return carried if values.ndim > 1 else carried[:, 0]

        layers = {}
        for place, call in self._calls.items():
            query, key, scale = _queries_and_keys(call, patches)
            layers[place] = TowerLayer(
                query=query,
                key=key,
                scale=scale,
                num_prefix=patches.num_prefix,
                to_tokens=partial(patches_to_tokens, place=place),
            )
        hidden = self._outputs[0][patches.start : patches.stop].detach()
        return TowerView(layers=layers, hidden=tuple(hidden) if hidden.ndim == 3 else (hidden,))


def join_views(views: Sequence[TowerView]) -> TowerView:
    """One view of items that follow each other, such as the frames of a video."""
    layers = {}
    for place in views[0].layers:
        parts = [view.layers[place] for view in views]
        lengths = [sum(k.shape[1] - part.num_prefix for k in part.key) for part in parts]

        def to_tokens(values: Tensor, parts=parts, lengths=lengths) -> Tensor:
            pieces = zip(parts, values.split(lengths), strict=True)
            return torch.cat([part.to_tokens(piece) for part, piece in pieces])

        layers[place] = TowerLayer(
            query=tuple(q for part in parts for q in part.query),
            key=tuple(k for part in parts for k in part.key),
            scale=parts[0].scale,
            num_prefix=parts[0].num_prefix,
            to_tokens=to_tokens,
        )
    return TowerView(layers=layers, hidden=tuple(h for view in views for h in view.hidden))


def parts_of(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The norm in front of a block's attention, and the attention."""
    for norm, attention in _PARTS:
        if hasattr(block, norm) and hasattr(block, attention):
            return getattr(block, norm), getattr(block, attention)
    raise UnsupportedModel(
        f"{type(block).__name__} is not known as a block of a vision tower.",
        hint=f"Blocks have one of these pairs of a norm and an attention: {_PARTS}.",
    )


def _spread(values_KC: Tensor, owner_BP: Tensor) -> Tensor:
    """`[B * K, C]` of the tokens left in each image to `[B * P, C]` of its patches."""
    values_BKC = values_KC.unflatten(0, (len(owner_BP), -1))
    spread_BPC = values_BKC.gather(1, owner_BP.clamp(min=0)[..., None].expand(-1, -1, values_KC.shape[1]))
    return spread_BPC.masked_fill((owner_BP < 0)[..., None], 0).flatten(0, 1)


def _tensor(out) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def _queries_and_keys(call: _Call, patches: PatchMap) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], float]:
    """One `[H, S, d]` query and key per group of the item, and the scale of their products."""
    attention, (hidden,), (kwargs,) = call.attention, call.hidden, call.kwargs
    hidden = call.norm(hidden[patches.start : patches.stop])
    if hasattr(attention, "q_proj"):
        query, key = attention.q_proj(hidden), attention.k_proj(hidden)
        if hasattr(attention, "q_norm"):  # InternVL: over all heads at once
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (query, key))
        return tuple(query), tuple(key), attention.scale
    query, key, _ = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    cos_Sd, sin_Sd = (part[patches.start : patches.stop] for part in kwargs["position_embeddings"])
    # The borders of the groups (frames or windows) inside the item; items never share a group.
    borders = kwargs["cu_seqlens"].tolist()
    lengths = [b - a for a, b in zip(borders, borders[1:], strict=False) if patches.start <= a < patches.stop and b > a]
    query, key = (_rotated(x, cos_Sd, sin_Sd).split(lengths) for x in (query, key))
    return *(tuple(g.transpose(0, 1) for g in groups) for groups in (query, key)), attention.scaling


def _rotated(x_SHd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    """Rotary embedding, halves paired, in float32 as the Qwen towers do it."""
    x = x_SHd.float()
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos_Sd[:, None].float() + turned * sin_Sd[:, None].float()).to(x_SHd.dtype)
