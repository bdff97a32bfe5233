"""Estimates of the distance from a frozen reference policy, per token, from the actions taken.

John Schulman, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html. With d = log ref - log pi:

    k1 = -d             unbiased; may be negative
    k2 = d^2 / 2        biased, never negative; its gradient is unbiased for on-policy samples
    k3 = exp(d) - d - 1 unbiased, never negative, 0 only where the two agree

Put k2 or k3 into a loss. The gradient of k1 is 0 on average, so k1 belongs into the reward (there without gradient).

Where libraries differ: trl 1.16 multiplies k3 by exp(log pi - log pi_old), with gradient, by default
(`use_bias_correction_kl`), and has a weight of 0 unless told otherwise (`beta`); verl calls them kl, mse and
low_var_kl. Here d is cut at 20 nats in k3, where exp would swamp the rest of the batch.
"""

# Shape legend: B rows, T decisions or tokens of a row

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tokensieve.policies.lookup import look_up
from tokensieve.policies.ratio import MAX_LOG_RATIO, log_ratio


def k1(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """`log pi - log ref`, `[B, T]` nats, 0 where the mask is 0; no gradient to the reference.

    Raises:
        BadOption: the three are not of one shape `[B, T]`.
    """
    return -_log_ref_ratio(logprobs_BT, ref_logprobs_BT, mask_BT)


def k2(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Half the squared log ratio, `[B, T]` nats. Arguments and errors as in `k1`."""
    return _log_ref_ratio(logprobs_BT, ref_logprobs_BT, mask_BT).square() / 2


def k3(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """`exp(d) - d - 1`, `[B, T]` nats. Arguments and errors as in `k1`."""
    d_BT = _log_ref_ratio(logprobs_BT, ref_logprobs_BT, mask_BT).clamp(max=MAX_LOG_RATIO)
    return d_BT.expm1() - d_BT


KL_ESTIMATORS: dict[str, Callable[..., Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def get_kl(name: str) -> Callable[..., Tensor]:
    """The estimator `(logprobs, ref_logprobs, mask) -> [B, T]` of that name; BadOption if there is none."""
    return look_up("KL estimator", name, KL_ESTIMATORS)


def _log_ref_ratio(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return -log_ratio(logprobs_BT, ref_logprobs_BT.detach(), mask_BT)
