"""Policy losses per token: the second of an objective's three parts.

With x = log pi - log pi_old, mask weights w and advantage A:

    ppo_clip           rho_t = exp x_t                          Schulman et al. https://arxiv.org/abs/1707.06347
    gspo               rho   = exp(sum_t w x / sum_t w)         Zheng et al. https://arxiv.org/abs/2507.18071
    ppo_clip_sequence  rho   = exp(sum_t w x)                   the ratio of whole sequences, trl's RLOO

    loss = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)
    dual clip (Ye et al. https://arxiv.org/abs/1912.09729): where A < 0 no more than -c A, c > 1

clip_high above clip_low is the "clip higher" of DAPO. At rho = 1 the gradient is that of REINFORCE; it is exactly 0
where A > 0 and rho > 1 + clip_high, and where A < 0 and rho < 1 - clip_low.

Where libraries differ, and what holds here:
- Dual clip is off by default, as in trl and OpenRLHF; verl has it on (c = 3). trl's `delta` is another formula: it
  caps rho before the minimum.
- Log ratios are cut at +-20, as in verl and OpenRLHF, so that nothing overflows; trl does not.
- gspo is the token form: the value is that of the sequence's ratio and the gradient that of the token's own
  log-probability. With one advantage a row, averaged over the row's tokens, it is GSPO itself. Its clips are small:
  3e-4 and 4e-4; 0.2 practically never clips.

For keep-or-drop decisions, hundreds to thousands a row, use ppo_clip or gspo: the ratio of whole rows is a product of
all of them and runs to 0 or infinity at once.
"""

# Shape legend: B rows, T decisions or tokens of a row

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

from torch import Tensor

from tokensieve.errors import BadOption
from tokensieve.policies.lookup import look_up
from tokensieve.policies.ratio import MAX_LOG_RATIO, log_ratio


def ppo_clip(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """The clipped surrogate with a ratio per token, `[B, T]`, to be minimised.

    Args:
        logprobs_BT: log-probabilities of the actions taken, nats, with gradient.
        old_logprobs_BT: the same under the policy that sampled them; no gradient is taken.
        advantages: `[B]`, or `[B, T]` for one per token.
        mask_BT: 0/1 or weights >= 0; where it is 0 the log ratio is 0 and has no gradient.
        clip_low, clip_high: how far the ratio may fall below 1 and rise above it.
        dual_clip: None, or c > 1.

    Raises:
        BadOption: a shape or an option is wrong.
    """
    x_BT = log_ratio(logprobs_BT, old_logprobs_BT.detach(), mask_BT)
    return _surrogate(x_BT, advantages, clip_low, clip_high, dual_clip)


def gspo(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    dual_clip: float | None = None,
) -> Tensor:
    """The clipped surrogate with the length-normalised ratio of the row, `[B, T]`; average it with
    `seq-mean-token-mean`. Arguments and errors as in `ppo_clip`.
    """
    x_BT = log_ratio(logprobs_BT, old_logprobs_BT.detach(), mask_BT)
    total_B1 = mask_BT.to(x_BT.dtype).sum(1, keepdim=True)
    mean_B1 = (mask_BT * x_BT).sum(1, keepdim=True) / total_B1.where(total_B1 > 0, 1.0)
    return _surrogate(mean_B1.detach() + x_BT - x_BT.detach(), advantages, clip_low, clip_high, dual_clip)


def ppo_clip_sequence(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """The clipped surrogate with the ratio of whole rows, `[B, T]`, alike along a row; average it with
    `seq-mean-token-mean`. For rows of few tokens. Arguments and errors as in `ppo_clip`.
    """
    x_BT = log_ratio(logprobs_BT, old_logprobs_BT.detach(), mask_BT)
    sum_BT = (mask_BT * x_BT).sum(1, keepdim=True).expand_as(x_BT)
    return _surrogate(sum_BT, advantages, clip_low, clip_high, dual_clip)


POLICY_LOSSES: dict[str, Callable[..., Tensor]] = {
    "gspo": gspo,
    "ppo_clip": ppo_clip,
    "ppo_clip_sequence": ppo_clip_sequence,
}


def get_policy_loss(name: str) -> Callable[..., Tensor]:
    """The loss `(logprobs, old_logprobs, advantages, mask, *, clip_low, clip_high, dual_clip) -> [B, T]` of that
    name; BadOption if there is none."""
    return look_up("policy loss", name, POLICY_LOSSES)


def check_clip(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    """Raises BadOption unless 0 <= clip_low <= 1, clip_high >= 0 and dual_clip is None or above 1, all finite."""
    if not _is_number(clip_low) or not 0 <= clip_low <= 1:
        raise BadOption(f"clip_low must be in [0, 1], got {clip_low!r}.")
    if not _is_number(clip_high) or clip_high < 0:
        raise BadOption(f"clip_high must be a finite number from 0 up, got {clip_high!r}.")
    if dual_clip is not None and (not _is_number(dual_clip) or dual_clip <= 1):
        raise BadOption(f"dual_clip must be None or a finite number above 1, got {dual_clip!r}.")


def _surrogate(
    log_ratio_BT: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> Tensor:
    check_clip(clip_low, clip_high, dual_clip)
    if advantages.shape not in (log_ratio_BT.shape, log_ratio_BT.shape[:1]):
        raise BadOption(
            f"Advantages must have shape [B] or [B, T] of {tuple(log_ratio_BT.shape)}, got {tuple(advantages.shape)}."
        )
    advantages = advantages.detach().to(log_ratio_BT)
    advantages_BT = advantages if advantages.ndim == 2 else advantages[:, None]
    ratio_BT = log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    gain_BT = (ratio_BT * advantages_BT).minimum(ratio_BT.clamp(1 - clip_low, 1 + clip_high) * advantages_BT)
    if dual_clip is not None:
        gain_BT = gain_BT.maximum(dual_clip * advantages_BT).where(advantages_BT < 0, gain_BT)
    return -gain_BT


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
