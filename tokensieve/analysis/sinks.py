"""Attention sinks: a report on who receives the attention, which heads rest, and what dropping keys would change.

Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs.
Guo, Pai, Bai, Jiao, Jordan, Mei. https://arxiv.org/abs/2410.13835

    m_hk   key mass: mean over the queries that see key k of A_h[q, k]
    row    mean over queries q of H(A[q, :]) / ln(keys that q sees); 0 for a query that sees one key
    column max over keys k of H(A[:, k] / sum A[:, k]) / ln(queries that see k); 0 for a key seen once
    ratio  ||W_O^h v_k|| / the median of the other keys' norms: far below 1 for a drain

A head is dormant on an input where it attends to the sink, active where it attends elsewhere. A low row entropy and a
high column entropy together mean a sink; a sharp local head has a low column entropy as well.

What differs from the released code (GuoTianYu2000/Active-Dormant-Attention; written from the description):
- Sinks are found (see `compression/sink_guard.py`), attention may be bidirectional, and a head's activity is a number:
  the share of attention it pays to keys that are no sinks (INFERRED; there a toy probe with a fixed threshold).
- Values are projected by their own layer's output projection, which the caller applies (one of the released notebooks
  uses that of layer 24 for all layers).
"""

# Shape legend: B batch, H heads, Q queries, K keys, N visual tokens, P patches, D hidden width, d width of a head

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.compression import VisualTokens
from tokensieve.compression.sink_guard import holds_sink, patch_key_mass, patch_norm_z, robust_z, sinks_by
from tokensieve.errors import BadOption


@dataclass(frozen=True, kw_only=True, eq=False)
class SinkReport:
    """Who receives the attention. All float32; the key axis K is the visual tokens for a vision tower.

    Attributes:
        key_mass: `[B, H, K]`, mean attention from the queries that see the key, in [0, 1].
        norm_z: `[B, K]`, robust z of the norm of the hidden state; None without hidden states.
        value_ratio: `[B, H, K]`, norm of the projected value over the median of the others; None without values.
        by_mass: `[B, K]` bool, key mass above `sink_guard.KEY_MASS` in some head.
        by_norm: `[B, K]` bool, norm z above `sink_guard.NORM_Z`.
        head_activity: `[B, H]`, share of attention paid to keys that are no sinks, mean over queries: near 0 for a
            dormant head, 1 where there is no sink.
    """

    key_mass: Tensor
    norm_z: Tensor | None
    value_ratio: Tensor | None
    by_mass: Tensor
    by_norm: Tensor
    head_activity: Tensor

    @property
    def is_sink(self) -> Tensor:
        """`[B, K]` bool: a sink by either reason."""
        return self.by_mass | self.by_norm


@torch.no_grad()
def attention_sinks(
    attn: Tensor, hidden: Tensor | None = None, projected_values: Tensor | None = None, *, causal: bool
) -> SinkReport:
    """Finds sinks in attention maps.

    In a causal map few queries see the last keys, so their key mass says little. Do not call it inside a graph that
    is exported: find sinks at calibration time and store them.

    Args:
        attn: `[B, H, Q, K]`, rows sum to 1.
        hidden: `[B, K, D]`, hidden states after the layer.
        projected_values: `[B, H, K, D]`, each head's values after its slice of the output projection.
        causal: whether query i of Q sees only the first K - Q + i + 1 keys.

    Raises:
        BadOption: shapes do not agree, or a causal map has more queries than keys.
    """
    seen_QK = _seen(attn, causal)
    _check_shapes(attn, hidden, projected_values)
    attn = attn.float()
    mass_BHK = attn.sum(2) / seen_QK.sum(0).clamp(min=1)
    norm_z = None if hidden is None else robust_z(hidden.float().norm(dim=-1))
    by_mass_BK, by_norm_BK = sinks_by(mass_BHK, mass_BHK.new_zeros(mass_BHK[:, 0].shape) if norm_z is None else norm_z)
    is_sink_BK = by_mass_BK | by_norm_BK
    value_ratio = None
    if projected_values is not None:
        norm_BHK = projected_values.float().norm(dim=-1)
        value_ratio = norm_BHK / median_of_others(norm_BHK)
    return SinkReport(
        key_mass=mass_BHK,
        norm_z=norm_z,
        value_ratio=value_ratio,
        by_mass=by_mass_BK,
        by_norm=by_norm_BK,
        head_activity=1 - attn.masked_fill(~is_sink_BK[:, None, None], 0.0).sum(-1).mean(-1),
    )


@torch.no_grad()
def tower_sinks(tokens: VisualTokens, layer: int = -1) -> SinkReport:
    """The report on the vision tower of one item: B = 1, K = N visual tokens; no values (they are not recorded).

    `key_mass` and `norm_z` of a token are the means over its patches; it is a sink if one of its patches is, the same
    tokens that `sink_guard.visual_sinks` finds. `head_activity` counts patches only: the class token is no visual
    token, so attention to it counts as active.

    Args:
        tokens: with `tokens.tower`.
        layer: whose attention is looked at: -1 (the last one) or -2. Norms are those after the last block.

    Raises:
        BadOption: these tokens come without the tower.
    """
    tower = tokens.tower
    if tower is None:
        raise BadOption(
            "A sink report needs the attention of the vision tower, and these tokens come without.",
            hint="Set a method that needs it (such as 'visionzip') before VLM.prepare.",
        )
    mass_PH, norm_z_P = patch_key_mass(tower, layer), patch_norm_z(tower)
    by_mass_P, by_norm_P = sinks_by(mass_PH.T, norm_z_P)
    seen = tower.layers[layer]
    sink_share_H = mass_PH[by_mass_P | by_norm_P].sum(0) / len(seen.key)
    return SinkReport(
        key_mass=seen.to_tokens(mass_PH).T[None],
        norm_z=seen.to_tokens(norm_z_P)[None],
        value_ratio=None,
        by_mass=holds_sink(by_mass_P, seen.to_tokens)[None],
        by_norm=holds_sink(by_norm_P, seen.to_tokens)[None],
        head_activity=1 - sink_share_H[None],
    )


@torch.no_grad()
def row_entropy(attn: Tensor, *, causal: bool) -> Tensor:
    """`[B, H]` float32 in [0, 1]: how widely queries look, mean over queries. Low: they look at few keys.

    Arguments and errors as in `attention_sinks`.
    """
    seen_Q = _seen(attn, causal).sum(1)
    return (_entropy(attn.float(), -1) / _log_or_inf(seen_Q)).mean(-1)


@torch.no_grad()
def column_entropy(attn: Tensor, *, causal: bool) -> Tensor:
    """`[B, H]` float32 in [0, 1]: how evenly queries look at a key, the largest over keys. High: all look at one key.

    Arguments and errors as in `attention_sinks`.
    """
    seen_K = _seen(attn, causal).sum(0)
    column_BHQK = attn.float()
    column_BHQK = column_BHQK / column_BHQK.sum(2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (_entropy(column_BHQK, 2) / _log_or_inf(seen_K)).amax(-1)


@torch.no_grad()
def attention_drop_error(attn: Tensor, values: Tensor, keep: Tensor) -> Tensor:
    """How far each output moves when keys are dropped and attention is shared among the others. Exact for one layer.

        y - y_keep = w_D * (mean_D - mean_keep)      w_D: attention on what is dropped

    Args:
        attn: `[B, H, Q, K]`, rows sum to 1.
        values: `[B, H, K, d]`, projected or not: the error has their units.
        keep: `[B, K]` bool.

    Returns:
        `[B, H, Q]` float32, exactly 0 where no attended key is dropped, infinite where none is kept.
    """
    attn, values = attn.float(), values.float()
    kept_BHQK = attn.masked_fill(~keep[:, None, None], 0.0)
    dropped_BHQK = attn - kept_BHQK
    weight_kept, weight_dropped = kept_BHQK.sum(-1, keepdim=True), dropped_BHQK.sum(-1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    mean_kept = kept_BHQK @ values / weight_kept.clamp(min=tiny)
    mean_dropped = dropped_BHQK @ values / weight_dropped.clamp(min=tiny)
    error_BHQ = weight_dropped[..., 0] * (mean_dropped - mean_kept).norm(dim=-1)
    return error_BHQ.masked_fill(weight_kept[..., 0] == 0, torch.inf)


def median_of_others(values: Tensor) -> Tensor:
    """For every entry of the last axis the median of the others: the mean of the two middle ones."""
    ranked, order = values.sort(-1)
    rank = order.argsort(-1)
    last = values.shape[-1] - 2

    def without_itself(middle: int) -> Tensor:
        return torch.where(rank <= middle, ranked[..., middle + 1, None], ranked[..., middle, None])

    return (without_itself(last // 2) + without_itself((last + 1) // 2)) / 2


def _seen(attn: Tensor, causal: bool) -> Tensor:
    """`[Q, K]` bool: which keys a query may look at."""
    if attn.ndim != 4:
        raise BadOption(f"attn must be [batch, heads, queries, keys], got {tuple(attn.shape)}.")
    num_queries, num_keys = attn.shape[-2:]
    seen_QK = torch.ones(num_queries, num_keys, dtype=torch.bool, device=attn.device)
    if not causal:
        return seen_QK
    if num_queries > num_keys:
        raise BadOption(
            f"Causal attention has as many keys as queries or more, got {num_queries} queries and {num_keys} keys."
        )
    return seen_QK.tril(num_keys - num_queries)


def _check_shapes(attn: Tensor, hidden: Tensor | None, projected_values: Tensor | None) -> None:
    batch, heads, _, keys = attn.shape
    for name, value, expected in (
        ("hidden", hidden, (batch, keys)),
        ("projected_values", projected_values, (batch, heads, keys)),
    ):
        if value is not None and value.shape[:-1] != expected:
            raise BadOption(
                f"{name} must be {[*expected]} and a width for attn {tuple(attn.shape)}, got {tuple(value.shape)}."
            )


def _entropy(probabilities: Tensor, dim: int) -> Tensor:
    return -torch.xlogy(probabilities, probabilities).sum(dim)


def _log_or_inf(counts: Tensor) -> Tensor:
    """Natural logarithm, infinite for 1 (so that the entropy over one place counts as 0)."""
    return counts.float().log().masked_fill(counts <= 1, torch.inf)
