"""Samplers beside OCSS: plain draws without replacement, drawn frames, and tokens at density peaks.

The frame and the density sampler are those of CaCoVID (Ma, Zhou, Wang, Chen, Yang, Song, Zheng,
https://arxiv.org/abs/2602.01649, AAAI 2026). With s_i, f_j the keep-logit minus the drop-logit of token i, frame j,
and DPC(x, K) the K best density peaks of x (4 neighbours, the token itself counted):

    gumbel_subsets   k tokens of every frame without replacement by softmax(s): the largest s_i + Gumbel noise
    frame_subsets    frames without replacement by softmax(f), floored at 1 / G^2, G subsets; then DPC of all their
                     tokens together. Subset 0 takes the frames with the largest f
    density_subset   DPC of every frame; no policy is asked ("content" subset)

Plain draws have a likelihood of their own, of the order in which tokens were drawn (Plackett-Luce), given by
`plackett_luce_logprobs`; CaCoVID scores each token's two-class choice instead.

What differs from the official code (LivingFutureLab/CaCoVID; written from the description):
- Equal densities go by index (there: noise of up to 1e-6).
- As many frames are drawn as hold the subset (there: an error where the share of frames is below the rate).
- The official cap on a frame's probability never binds, because it is applied to the matrix of all subsets at once;
  only its floor acts, and only that is here.
"""

# Shape legend: V videos (any leading axes, or none), G subsets, T frames, n tokens a frame, N = T * n tokens,
#               k tokens kept of each frame, F frames drawn, C channels

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokensieve.compression.density_peaks import peak_order
from tokensieve.errors import BadOption
from tokensieve.policies.subsets import (
    Subsets,
    by_frame,
    check_count,
    check_generator,
    check_share,
    keep_scores,
    largest,
    mask_of,
    subset_size,
)

FRAME_RATIO = 0.125
NUM_NEIGHBOURS = 4


def gumbel_subsets(
    token_logits: Tensor,
    num_frames: int,
    rate: float,
    num_subsets: int,
    *,
    generator: torch.Generator,
    greedy_first: bool = True,
) -> Subsets:
    """Subsets drawn without replacement, token by token, in every frame.

    Args:
        token_logits: `[..., N, 2]` (drop, keep) per token, frame by frame; videos of one shape in front, which draw
            one after the other.
        num_frames: T; 1 draws from all tokens at once.
        rate: share of the tokens of a frame that stays, in (0, 1].
        num_subsets: G.
        generator: the source of all draws, on the CPU.
        greedy_first: subset 0 is the greedy one (the largest s) instead of a drawn one.

    Returns:
        `Subsets` with the order of drawing.

    Raises:
        BadOption: logits or an option are not as above.
    """
    check_count("num_subsets", num_subsets)
    check_generator(generator)
    score_VTn = by_frame(keep_scores(token_logits, "token_logits"), num_frames)
    num_places = score_VTn.shape[-1]
    num_keep = subset_size(rate, num_places)
    drawn = []
    for score_Tn in score_VTn.view(-1, num_frames, num_places):
        noise_GTn = torch.empty(num_subsets, *score_Tn.shape).exponential_(generator=generator).log().neg()
        if greedy_first:
            noise_GTn[0] = 0
        drawn.append(largest(score_Tn + noise_GTn, num_keep))
    order_VGTk = torch.stack(drawn).view(*score_VTn.shape[:-2], num_subsets, num_frames, num_keep)
    mask_VGN = mask_of(order_VGTk, num_places).to(token_logits.device)
    return Subsets(mask=mask_VGN, order=order_VGTk.to(token_logits.device))


def plackett_luce_logprobs(token_logits: Tensor, order_GTk: Tensor) -> Tensor:
    """`[..., G, T, k]` float32: log-probability of every draw, given the draws of the frame before it.

    The exact likelihood of what `gumbel_subsets` draws; gradients reach the logits. Draw j of a frame has
    `s_j - logsumexp(s of the tokens not drawn before it)`.

    Args:
        token_logits: `[..., N, 2]` (drop, keep).
        order_GTk: `Subsets.order`, `[..., G, T, k]`.
    """
    score_TN = token_logits.float().diff(dim=-1)[..., 0]
    score_Tn = score_TN.unflatten(-1, (order_GTk.shape[-2], -1))
    score_GTn = score_Tn.unsqueeze(-3).expand(*order_GTk.shape[:-1], -1)
    drawn_GTk = score_GTn.gather(-1, order_GTk)
    is_drawn_GTn = torch.zeros_like(score_GTn, dtype=torch.bool).scatter_(-1, order_GTk, True)
    never_GT = score_GTn.masked_fill(is_drawn_GTn, -torch.inf).logsumexp(-1, keepdim=True)
    left_GTk = torch.cat([never_GT, drawn_GTk.flip(-1)], -1).logcumsumexp(-1)[..., 1:].flip(-1)
    return drawn_GTk - left_GTk


def frame_subsets(
    frame_logits: Tensor,
    features: Tensor,
    rate: float,
    num_subsets: int,
    *,
    generator: torch.Generator,
    frame_ratio: float = FRAME_RATIO,
    greedy_first: bool = True,
) -> Subsets:
    """Subsets of a few whole frames' most typical tokens, as large as those of the token samplers.

    Args:
        frame_logits: `[..., T, 2]` (drop, keep) per frame; videos of one shape in front, which draw one after the
            other.
        features: `[..., N, C]`, the tokens, frame by frame.
        rate: share of all tokens that stays: `T * round(rate * n)`, in (0, 1].
        num_subsets: G.
        generator: the source of all draws, on the CPU.
        frame_ratio: share of the frames that is drawn, in (0, 1]; more where these hold too few tokens.
        greedy_first: subset 0 is of the frames with the largest f instead of drawn ones.

    Returns:
        `Subsets` with the frames drawn.

    Raises:
        BadOption: logits, features or an option are not as above.
    """
    check_count("num_subsets", num_subsets)
    check_generator(generator)
    score_VT = keep_scores(frame_logits, "frame_logits")
    num_frames = score_VT.shape[-1]
    features_VTnC = _features_by_frame(features, num_frames, score_VT.shape[:-1])
    num_places = features_VTnC.shape[-2]
    num_keep = subset_size(rate, num_places) * num_frames
    num_drawn = frames_to_draw(num_frames, num_places, num_keep, frame_ratio)
    prob_VT = frame_probabilities(score_VT, num_subsets)

    chosen = []
    for score_T, prob_T in zip(score_VT.view(-1, num_frames), prob_VT.view(-1, num_frames), strict=True):
        index_GF = torch.multinomial(prob_T.expand(num_subsets, -1), num_drawn, generator=generator)
        if greedy_first:
            index_GF[0] = largest(score_T, num_drawn)
        chosen.append(torch.zeros(num_subsets, num_frames, dtype=torch.bool).scatter_(1, index_GF, True))
    frames_VGT = torch.stack(chosen)
    tokens_VTnC = features_VTnC.reshape(-1, *features_VTnC.shape[-3:])
    mask_VGN = torch.stack(
        [peaks_of_frames(f_TnC, frames_GT, num_keep) for f_TnC, frames_GT in zip(tokens_VTnC, frames_VGT, strict=True)]
    )
    lead = score_VT.shape[:-1]
    return Subsets(
        mask=mask_VGN.view(*lead, *mask_VGN.shape[1:]),
        frames=frames_VGT.view(*lead, num_subsets, num_frames).to(frame_logits.device),
    )


def frames_to_draw(num_frames: int, num_places: int, num_keep: int, frame_ratio: float = FRAME_RATIO) -> int:
    """F: `ceil(frame_ratio * T)` frames, or as many as hold `num_keep` tokens.

    Raises:
        BadOption: `frame_ratio` is not in (0, 1].
    """
    check_share("frame_ratio", frame_ratio)
    return max(math.ceil(num_frames * frame_ratio), math.ceil(num_keep / num_places))


def frame_probabilities(score_T: Tensor, num_subsets: int) -> Tensor:
    """`[..., T]` float32: probabilities for the draw of frames, floored at 1 / G^2."""
    prob_T = score_T.softmax(-1).clamp(min=1 / num_subsets**2)
    return prob_T / prob_T.sum(-1, keepdim=True)


def peaks_of_frames(features_TnC: Tensor, frames_GT: Tensor, num_keep: int) -> Tensor:
    """`[G, N]` bool: in every subset the `num_keep` best density peaks of its frames' tokens, taken together."""
    num_places = features_TnC.shape[1]
    token_mask_GN = frames_GT.to(features_TnC.device).repeat_interleave(num_places, dim=1)
    known: dict[tuple[int, ...], Tensor] = {}  # the same frames are drawn often
    rows = []
    for frames_T, tokens_N in zip(frames_GT.tolist(), token_mask_GN, strict=True):
        key = tuple(frames_T)
        if key not in known:
            place_M = tokens_N.nonzero()[:, 0]
            best_K = place_M[peak_order(features_TnC.flatten(0, 1)[place_M], NUM_NEIGHBOURS)[:num_keep]]
            known[key] = torch.zeros_like(tokens_N).index_fill(0, best_K, True)
        rows.append(known[key])
    return torch.stack(rows)


def density_subset(features: Tensor, num_frames: int, rate: float) -> Subsets:
    """One subset a video: the best density peaks of every frame. Nothing is random.

    Args:
        features: `[..., N, C]`, the tokens, frame by frame; videos of one shape in front.
        num_frames: T.
        rate: share of the tokens of a frame that stays, in (0, 1].

    Returns:
        `Subsets` with G = 1.

    Raises:
        BadOption: features or an option are not as above.
    """
    check_count("num_frames", num_frames)
    features_VTnC = _features_by_frame(features, num_frames, features.shape[:-2])
    num_keep = subset_size(rate, features_VTnC.shape[-2])
    rows_RnC = features_VTnC.flatten(0, -3)
    best_Rk = torch.stack([peak_order(row_nC, NUM_NEIGHBOURS)[:num_keep] for row_nC in rows_RnC])
    mask_Rn = torch.zeros(rows_RnC.shape[:2], dtype=torch.bool, device=features.device).scatter_(1, best_Rk, True)
    return Subsets(mask=mask_Rn.view(*features.shape[:-2], 1, -1))


def _features_by_frame(features: Tensor, num_frames: int, lead: torch.Size) -> Tensor:
    if features.ndim < 2 or features.shape[:-2] != lead or features.shape[-2] % num_frames:
        raise BadOption(
            f"features must be {(*lead, 'tokens', 'channels')} with tokens a multiple of {num_frames} frames, got "
            f"{tuple(features.shape)}."
        )
    if not features.isfinite().all():
        raise BadOption("Some features are NaN or infinite, so their density is not defined.")
    return features.detach().unflatten(-2, (num_frames, -1))
