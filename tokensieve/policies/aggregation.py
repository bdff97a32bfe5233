"""From losses per token to one number: the third of an objective's three parts.

With weights w (the mask), sums over tokens t of row b, B rows that count, and a constant length L:

    mode                     value                                        known as
    token-mean               sum_bt w loss / sum_bt w                     DAPO, BNPO; verl's default
    seq-mean-token-mean      1/B sum_b (sum_t w loss / sum_t w)           GRPO
    seq-mean-token-sum       1/B sum_b sum_t w loss
    seq-mean-token-sum-norm  1/(B L) sum_b sum_t w loss                   Dr. GRPO

DAPO and BNPO differ in the denominator only: BNPO divides by the tokens of the batch at hand, DAPO by those of the
whole optimiser step, over all accumulated batches and ranks. For the latter pass as `denominator` the sum of
`denominator_of` over them, divided by the number of ranks where gradients are averaged over ranks, as DDP does.

Where libraries differ, and what holds here:
- trl's `loss_type` is "dapo" unless told otherwise, not "grpo"; it has aggregation and loss in one option.
- A row whose weights are all 0 is left out of the number of rows, as in verl and OpenRLHF; `count_empty_rows=True`
  counts it, as trl does.
- verl's seq-mean-token-sum-norm has no mean over rows, in spite of its name: pass `denominator=1` for its value. It
  takes the padded width as length, which changes from batch to batch; here `length` must be given.
"""

# Shape legend: B rows, T decisions or tokens of a row

from __future__ import annotations

from torch import Tensor

from tokensieve.compression.registry import did_you_mean
from tokensieve.errors import BadOption
from tokensieve.policies.ratio import widened

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def aggregate(
    loss_BT: Tensor,
    mask_BT: Tensor,
    mode: str = "token-mean",
    *,
    length: int | None = None,
    denominator: Tensor | float | None = None,
    count_empty_rows: bool = False,
) -> Tensor:
    """One number (0-d, float32 or wider) to minimise; 0, with gradients of 0, where all weights are 0.

    Args:
        loss_BT: a loss per token; what stands where the mask is 0 is ignored, NaN included.
        mask_BT: 0/1 or weights >= 0.
        mode: one of `MODES`.
        length: the constant L of seq-mean-token-sum-norm, such as the most tokens a row may have; None elsewhere.
        denominator: above 0; what to divide by in place of `denominator_of(mask, mode)`.
        count_empty_rows: rows without weight count in the number of rows; token-mean has none.

    Raises:
        BadOption: the shapes differ, the mode is unknown, or `length` is missing, not above 0 or of no use.
    """
    check_mode(mode, length)
    if loss_BT.ndim != 2 or loss_BT.shape != mask_BT.shape:
        raise BadOption(
            f"Loss and mask must have one shape [B, T], got {tuple(loss_BT.shape)} and {tuple(mask_BT.shape)}."
        )
    loss_BT = widened(loss_BT).masked_fill(mask_BT == 0, 0.0)
    weight_BT = mask_BT.to(loss_BT.dtype)
    sum_B = (weight_BT * loss_BT).sum(1)
    if mode == "seq-mean-token-mean":
        sum_B = sum_B / _or_one(weight_BT.sum(1))
    elif mode == "seq-mean-token-sum-norm":
        sum_B = sum_B / length
    if denominator is None:
        denominator = _or_one(denominator_of(weight_BT, mode, count_empty_rows=count_empty_rows))
    return sum_B.sum() / denominator


def denominator_of(mask_BT: Tensor, mode: str, *, count_empty_rows: bool = False) -> Tensor:
    """What `aggregate` divides by, 0-d: the sum of weights in token-mean, else the number of rows."""
    if mode == "token-mean":
        return widened(mask_BT).sum()
    rows_B = (mask_BT != 0).any(1)
    return (rows_B | count_empty_rows).sum()


def check_mode(mode: str, length: int | None) -> None:
    """Raises BadOption unless `mode` is one of `MODES` and `length` a number above 0 just where the mode needs it."""
    if mode not in MODES:
        raise BadOption(
            f"There is no aggregation {mode!r}; there are {', '.join(MODES)}.", hint=did_you_mean(str(mode), MODES)
        )
    if mode != "seq-mean-token-sum-norm" and length is not None:
        raise BadOption(f"Aggregation {mode!r} has no length, got {length!r}.", hint="Leave `length` out.")
    if mode == "seq-mean-token-sum-norm" and (length is None or not length > 0):
        raise BadOption(
            f"Aggregation {mode!r} needs a constant length above 0, got {length!r}.",
            hint="Give the most tokens that a row may have.",
        )


def _or_one(total: Tensor) -> Tensor:
    return total.where(total > 0, 1)
