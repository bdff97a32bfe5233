"""Attention sinks among visual tokens, and what a method that ranks by attention may do about them.

Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs.
Guo, Pai, Bai, Jiao, Jordan, Mei. https://arxiv.org/abs/2410.13835

A few tokens receive most of the attention, yet have large norms and carry little of their own place. For a method
that keeps what is attended to they are false friends: they use up its budget. Inside a language model they are still
what the heads rest on, and dropping them changes every output.

    m_hk   key mass: mean over the queries that see key k of the attention that head h pays to k
    z_k    0.6745 (n_k - median n) / median |n - median n|, with n_k the norm of the hidden state
    sink   m_hk > 0.3 in some head, or z_k > 6

    y - y_(-j) = a_j / (1 - a_j) * (v_j - y)     the exact change of one output when key j is dropped

What differs from the released code (GuoTianYu2000/Active-Dormant-Attention; written from the description):
- There key 0 or the one or two largest masses are the sinks. A vision tower has no key 0, so sinks are found; both
  thresholds are choices of this project (INFERRED), as the paper's code holds none.
- The three modes of the guard and the leave-one-out score are ours (INFERRED).
"""

# Shape legend: B batch, H heads, Q queries, K keys (in `guarded_top`: kept), S tokens of a group, R queries of a chunk,
#               P patches, N visual tokens, n those of one picture, d width of a head

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokensieve.compression.decoder_stage import DecoderTokens
from tokensieve.compression.plan import Plan, merge_plan
from tokensieve.compression.registry import did_you_mean
from tokensieve.compression.tower_view import TowerView
from tokensieve.errors import BadOption

SINK_MODES = ("off", "exclude", "protect")
KEY_MASS = 0.3
NORM_Z = 6.0

MAX_CHUNK_BYTES = 2**26  # attention of all heads for the queries of one chunk
SAME_NORM = 1e-5  # relative spread of norms below which they count as equal
ONLY_KEY = 1e-6  # a query that pays less than this to all other keys sees only one key


def check_sinks(mode: str) -> None:
    """Raises BadOption, with a suggestion, unless `mode` is one of `SINK_MODES`."""
    if mode not in SINK_MODES:
        raise BadOption(
            f"sinks must be one of {', '.join(SINK_MODES)}; got {mode!r}.", hint=did_you_mean(str(mode), SINK_MODES)
        )


def set_aside(member_n: Tensor, num_keep: int, is_sink_N: Tensor | None, mode: str) -> tuple[Tensor, int, Tensor]:
    """Takes the sinks out of a picture, so that a method works on the other tokens only.

    Args:
        member_n: `[n]` int64 tokens of the picture, rising.
        num_keep: its budget, at most n.
        is_sink_N: `[N]` bool; None only with "off". Where all tokens of a picture are sinks none counts as one.
        mode: "off" (nothing is taken out), "exclude" (sinks are dropped, but for the first of them where the budget
            exceeds the number of other tokens) or "protect" (all sinks stay, outside the budget).

    Returns:
        The other tokens, how many of them the method is to keep, and the sinks that stay as they are.

    Raises:
        BadOption: unknown mode.
    """
    check_sinks(mode)
    if mode == "off" or (is_sink_n := is_sink_N[member_n]).all():
        return member_n, num_keep, member_n[:0]
    others, sinks = member_n[~is_sink_n], member_n[is_sink_n]
    room = len(sinks) if mode == "protect" else max(0, num_keep - len(others))
    return others, min(num_keep, len(others)), sinks[:room]


def guarded_top(score_N: Tensor, is_sink_N: Tensor, num_keep: int, mode: str) -> Tensor:
    """The highest scores, with sinks treated as `mode` says; equal scores go to the lowest index.

    Args:
        score_N: `[N]`, higher is better.
        is_sink_N, num_keep, mode: as in `set_aside`, with all tokens as one picture.

    Returns:
        `[K]` int64 indices, rising. K is `num_keep`, with "protect" `num_keep` plus the number of sinks, and
        never above N.

    Raises:
        BadOption: unknown mode.
    """
    everyone = torch.arange(len(score_N), device=score_N.device)
    others, num_best, sinks = set_aside(everyone, num_keep, is_sink_N, mode)
    best = score_N[others].sort(descending=True, stable=True).indices[:num_best]
    return torch.cat([others[best], sinks]).sort().values


def add_sinks(plan: Plan, member_n: Tensor, sinks: Tensor, num_tokens: int) -> Plan:
    """The plan for all tokens, from one for `member_n` and the sinks that stay as they are.

    Args:
        plan: what a method makes of the tokens that `set_aside` left it.
        member_n: `[n]` int64, which of all tokens these are, rising.
        sinks: int64, none of them in `member_n`.
        num_tokens: N.
    """
    if plan.merge is None:
        return Plan(torch.cat([member_n[plan.kept], sinks]).sort().values, num_tokens)
    return merge_plan(
        num_tokens,
        torch.cat([member_n[plan.kept[plan.merge.target]], sinks]),
        torch.cat([member_n[plan.merge.source], sinks]),
        torch.cat([plan.merge.weight, torch.ones_like(sinks, dtype=plan.merge.weight.dtype)]),
        before_projector=plan.merge.before_projector,
    )


def guarded_plan(
    tokens: DecoderTokens, attention_HN: Tensor, num_keep: int, mode: str, select: Callable[[Tensor, int], Plan]
) -> Plan:
    """What a decoder method makes of the tokens of one prompt, with sinks treated as `mode` says.

    A sink is a token that takes more than `KEY_MASS` of the attention that the method looks at in some head, or whose
    hidden state is an outlier in norm.

    Args:
        tokens: the visual tokens of this step; all are one picture.
        attention_HN: what `tokens.attention()` gave.
        num_keep: how many this step leaves, at most N.
        mode: as in `set_aside`.
        select: the method: from `[n]` int64 tokens, rising, and how many of them stay (1 to n), a plan for these n.

    Raises:
        BadOption: unknown mode.
    """
    is_sink_N = None
    if mode != "off":
        by_mass_N, by_norm_N = sinks_by(attention_HN, robust_z(tokens.hidden.float().norm(dim=-1)))
        is_sink_N = by_mass_N | by_norm_N
    everyone = torch.arange(len(tokens), device=attention_HN.device)
    member_n, num_best, sinks = set_aside(everyone, num_keep, is_sink_N, mode)
    return add_sinks(select(member_n, num_best), member_n, sinks, len(tokens))


def robust_z(values: Tensor) -> Tensor:
    """Distance from the median along the last axis, in robust standard deviations (0.6745 / MAD); float32.

    Where most values are equal up to rounding the deviation is taken as `SAME_NORM` of the median.
    """
    values = values.float()
    centre = _median(values)
    away = values - centre
    tiny = torch.finfo(torch.float32).tiny
    return 0.6745 * away / torch.maximum(_median(away.abs()), SAME_NORM * centre.abs()).clamp(min=tiny)


def _median(values: Tensor) -> Tensor:
    """The mean of the two middle values, axis kept (`torch.median` takes the lower one)."""
    ranked = values.sort(-1).values
    last = ranked.shape[-1] - 1
    return (ranked[..., last // 2, None] + ranked[..., (last + 1) // 2, None]) / 2


def key_mass(query_HSd: Tensor, key_HSd: Tensor, scale: float) -> Tensor:
    """`[H, S]` float32: mean over all queries of the attention to every key; no causal mask.

    Runs over chunks of queries, so that memory stays below `MAX_CHUNK_BYTES` for each step.
    """
    query, key_HdS = query_HSd.float() * scale, key_HSd.float().transpose(1, 2)
    num_heads, num_queries = query.shape[:2]
    rows = max(1, MAX_CHUNK_BYTES // (4 * num_heads * key_HdS.shape[-1]))
    mass_HS = query.new_zeros(num_heads, key_HdS.shape[-1])
    for chunk_HRd in query.split(rows, dim=1):
        mass_HS += (chunk_HRd @ key_HdS).softmax(-1).sum(1)
    return mass_HS / num_queries


def patch_key_mass(tower: TowerView, layer: int = -1) -> Tensor:
    """`[P, H]` float32: key mass of every patch in its group. `layer` is -1 (the last one) or -2."""
    seen = tower.layers[layer]
    groups = zip(seen.query, seen.key, strict=True)
    return torch.cat([key_mass(q, k, seen.scale)[:, seen.num_prefix :] for q, k in groups], dim=1).T


def patch_norm_z(tower: TowerView) -> Tensor:
    """`[P]` float32: robust z of the norm of every patch of the item after the last block; no prefix tokens."""
    num_prefix = tower.layers[-1].num_prefix
    return robust_z(torch.cat([hidden[num_prefix:].float().norm(dim=-1) for hidden in tower.hidden]))


def sinks_by(key_mass_HK: Tensor, norm_z_K: Tensor) -> tuple[Tensor, Tensor]:
    """Two `[..., K]` bool: sinks by key mass (above `KEY_MASS` in some head), and by norm (z above `NORM_Z`)."""
    return (key_mass_HK > KEY_MASS).any(-2), norm_z_K > NORM_Z


def holds_sink(is_sink_P: Tensor, to_tokens: Callable[[Tensor], Tensor]) -> Tensor:
    """`[N]` bool: visual tokens that one or more sink patches went into."""
    return to_tokens(is_sink_P.float()) > 0


def sinks_to_guard(tower: TowerView, mode: str, layer: int = -1) -> Tensor | None:
    """What a method gives `set_aside` for its option `sinks`: `visual_sinks`, or None where the mode is "off"."""
    return None if mode == "off" else visual_sinks(tower, layer)


@torch.no_grad()
def visual_sinks(tower: TowerView, layer: int = -1) -> Tensor:
    """`[N]` bool: visual tokens with a patch that is a sink of the vision tower, for either reason.

    Args:
        tower: queries, keys and hidden states.
        layer: whose attention is looked at: -1 or -2. Norms are always those after the last block.
    """
    by_mass_P, by_norm_P = sinks_by(patch_key_mass(tower, layer).T, patch_norm_z(tower))
    return holds_sink(by_mass_P | by_norm_P, tower.layers[layer].to_tokens)


def leave_one_out_score(attn: Tensor, values: Tensor) -> Tensor:
    """How much outputs change when one key is dropped: mean over heads and queries of `a / (1 - a) * ||v - y||`.

    The exact change for one layer, without another forward. Raw attention overrates sinks as content;
    attention times `||v||` underrates them as keys to drop. This is right in both cases.

    Args:
        attn: `[B, H, Q, K]`, rows sum to 1.
        values: `[B, H, K, d]`.

    Returns:
        `[B, K]` float32. A query that sees only one key (`1 - a` below `ONLY_KEY`) has nothing to fall back on
        without it, so it has no say about this key.
    """
    attn_BHQK, values_BHKd = attn.float(), values.float()
    output_BHQd = attn_BHQK @ values_BHKd
    away_BHQK = torch.cdist(output_BHQd, values_BHKd, compute_mode="donot_use_mm_for_euclid_dist")
    rest_BHQK = 1 - attn_BHQK
    change_BHQK = attn_BHQK * away_BHQK / rest_BHQK.clamp(min=ONLY_KEY)
    return change_BHQK.masked_fill(rest_BHQK < ONLY_KEY, 0.0).mean((1, 2))
