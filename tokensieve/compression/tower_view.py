"""What a method at the projector may see of the vision tower: queries and keys, and attention made of them.

No attention map is made: a chunk of one at a time, and only column sums or the class row survive. SDPA and Flash stay
on in the tower itself.
"""

# Shape legend: G groups (images, frames or windows) that attend among themselves, S tokens of a group (class token
#               included), H heads, d width of a head, P patches of the item, N visual tokens, C channels

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Of a map that is summed up, one [h, r, S] chunk of heads and queries: what stays in a CPU's cache is three times as
# fast there, and a GPU wants large products.
MAX_CACHED_BYTES, MAX_CHUNK_BYTES = 2**20, 2**26


@dataclass(frozen=True, kw_only=True, eq=False)
class TowerLayer:
    """Queries and keys of one self-attention layer of the tower, as they enter the product (rotated, normed).

    Attributes:
        query, key: one `[H, S, d]` per group; groups may differ in S.
        scale: what the products are multiplied with before the softmax.
        num_prefix: tokens in front of each group that are no patches (1 for a class token, else 0).
        to_tokens: carries numbers per patch, `[P]` or `[P, C]` in the tower's order, groups one after the other
            without their prefix, to numbers per visual token, `[N]` or `[N, C]`; patches that become one token
            are averaged.
    """

    query: tuple[Tensor, ...]
    key: tuple[Tensor, ...]
    scale: float
    num_prefix: int
    to_tokens: Callable[[Tensor], Tensor]

    def class_attention(self, *, one_head: bool = False) -> Tensor:
        """`[N]` float32: attention from the class token to every token, mean over heads, sums to at most 1 a group.

        Args:
            one_head: take all heads as one of width H * d, scaled by `(H * d) ** -0.5` (PruMerge).

        Raises:
            ValueError: there is no class token (`num_prefix` is 0).
        """
        if self.num_prefix == 0:
            raise ValueError("This tower has no class token; use received_attention.")
        return self._per_token(lambda q, k: self._probabilities(q[:, :1], k, one_head).mean(0)[0])

    def received_attention(self) -> Tensor:
        """`[N]` float32: attention every token receives, mean over heads and over all queries of its group."""
        return self._per_token(self._received)

    def _received(self, query: Tensor, key: Tensor) -> Tensor:
        """`[S]`, summed up in chunks of queries of one head."""
        most = MAX_CACHED_BYTES if key.device.type == "cpu" else MAX_CHUNK_BYTES
        num_heads, length, _ = query.shape
        heads_at_once = max(1, min(num_heads, most // (4 * length * length)))
        rows_at_once = max(1, most // (4 * length * heads_at_once))
        total_S = torch.zeros(length, device=key.device)
        for heads in range(0, num_heads, heads_at_once):
            key_hSd = key[heads : heads + heads_at_once].float()
            for query_hrd in query[heads : heads + heads_at_once].split(rows_at_once, dim=1):
                logits_hrS = (query_hrd.float() @ key_hSd.transpose(-1, -2)).mul_(self.scale)
                total_S += logits_hrS.softmax(-1).sum((0, 1))
        return total_S / (num_heads * length)

    def salience(self) -> Tensor:
        """`[N]`: `class_attention` where there is a class token, else `received_attention`."""
        return self.class_attention() if self.num_prefix else self.received_attention()

    def mean_keys(self) -> Tensor:
        """`[N, d]` float32: keys averaged over heads."""
        return self._per_token(lambda q, k: k.float().mean(0))

    def all_keys(self) -> Tensor:
        """`[N, H * d]` float32: keys of all heads side by side."""
        return self._per_token(lambda q, k: _side_by_side(k.float()))

    def _per_token(self, of_group: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            groups = [of_group(q, k)[self.num_prefix :] for q, k in zip(self.query, self.key, strict=True)]
            return self.to_tokens(torch.cat(groups))

    def _probabilities(self, query: Tensor, key: Tensor, one_head: bool = False) -> Tensor:
        query, key, scale = query.float(), key.float(), self.scale
        if one_head:
            query, key = _side_by_side(query)[None], _side_by_side(key)[None]
            scale = key.shape[-1] ** -0.5
        return (query @ key.transpose(-1, -2) * scale).softmax(-1)


def _side_by_side(heads_HSd: Tensor) -> Tensor:
    return heads_HSd.transpose(0, 1).flatten(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class TowerView:
    """The last layers of the vision tower for one item.

    Attributes:
        layers: by distance from the end: -1 the last self-attention layer, -2 the one before.
        hidden: what the last block gave, one `[S, V]` per group, prefix included, before the final norm.
    """

    layers: Mapping[int, TowerLayer]
    hidden: tuple[Tensor, ...]
