"""From losses per token to one number."""

import pytest
import torch

from tests.policies.fixture import GROUPS, MASK, NEW, OLD, REWARDS, close
from tokensieve.errors import BadOption
from tokensieve.policies import MODES, aggregate, denominator_of, grpo, ppo_clip

LOSS = ppo_clip(NEW, OLD, grpo(REWARDS, GROUPS), MASK)
WITHOUT_ROW_5 = MASK * torch.tensor([1, 1, 1, 1, 1, 0])[:, None]


def options(mode):
    return {"length": 4} if mode == "seq-mean-token-sum-norm" else {}


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("seq-mean-token-mean", -0.02322606),
        ("token-mean", -0.29034936),
        ("seq-mean-token-sum", -0.87104807),
        ("seq-mean-token-sum-norm", -0.21776202),
    ],
)
def test_worked_values(mode, expected):
    close(aggregate(LOSS, MASK, mode, **options(mode)), expected)


def test_the_value_of_verl_without_mean_over_rows():
    close(aggregate(LOSS, MASK, "seq-mean-token-sum-norm", length=4, denominator=1), -1.30657210)


def test_a_masked_row():
    mode = "seq-mean-token-mean"
    close(aggregate(LOSS, WITHOUT_ROW_5, mode), -0.21691630)  # as verl
    close(aggregate(LOSS, WITHOUT_ROW_5, mode, count_empty_rows=True), -0.18076359)  # as trl


@pytest.mark.parametrize("mode", MODES)
def test_by_hand_with_weights(mode):
    loss = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 0, 3], [0.5, 0.5, 0], [0, 0, 0]])
    sums, totals = torch.tensor([[10.0, 4.5], [4.0, 1]], dtype=torch.float64)
    expected = {
        "token-mean": sums.sum() / 5,
        "seq-mean-token-mean": (sums / totals).mean(),
        "seq-mean-token-sum": sums.mean(),
        "seq-mean-token-sum-norm": sums.mean() / 4,
    }[mode]
    close(aggregate(loss, weights, mode, **options(mode)), expected)
    scale = 2 / 3 if mode != "token-mean" else 1
    close(aggregate(loss, weights, mode, count_empty_rows=True, **options(mode)), expected * scale)
    assert denominator_of(weights, mode) == (5 if mode == "token-mean" else 2)
    assert denominator_of(weights, mode, count_empty_rows=True) == (5 if mode == "token-mean" else 3)


@pytest.mark.parametrize("mode", MODES)
def test_batches_with_a_common_denominator_add_up(mode):
    whole = aggregate(LOSS, WITHOUT_ROW_5, mode, **options(mode))
    parts = [slice(0, 1), slice(1, 5), slice(5, 6)]
    denominator = sum(denominator_of(WITHOUT_ROW_5[i], mode) for i in parts)
    total = sum(aggregate(LOSS[i], WITHOUT_ROW_5[i], mode, denominator=denominator, **options(mode)) for i in parts)
    close(total, whole)


@pytest.mark.parametrize("mode", MODES)
def test_what_stands_under_the_mask_does_not_matter(mode):
    loss = LOSS.masked_fill(MASK == 0, torch.nan).requires_grad_()
    value = aggregate(loss, MASK, mode, **options(mode))
    close(value.detach(), aggregate(LOSS, MASK, mode, **options(mode)))
    assert torch.equal(torch.autograd.grad(value, loss)[0] != 0, MASK != 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count_empty_rows", [False, True])
def test_an_empty_mask_gives_0_and_no_gradient(mode, count_empty_rows):
    loss = LOSS.clone().requires_grad_()
    value = aggregate(loss, MASK * 0, mode, count_empty_rows=count_empty_rows, **options(mode))
    assert value == 0 and torch.autograd.grad(value, loss)[0].abs().max() == 0
    no_rows = aggregate(LOSS[:0], MASK[:0], mode, count_empty_rows=count_empty_rows, **options(mode))
    assert no_rows == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", [MASK.bool(), MASK.half(), MASK.double()])
def test_any_kind_of_mask(mode, mask):
    close(aggregate(LOSS, mask, mode, **options(mode)), aggregate(LOSS, MASK, mode, **options(mode)))


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_is_summed_in_float32(mode):
    loss = torch.full((2, 5000), 1.001, dtype=torch.bfloat16)
    mask = torch.ones(2, 5000, dtype=torch.bfloat16)
    value = aggregate(loss, mask, mode, **options(mode))
    assert value.dtype == torch.float32
    each = 1 if "sum" not in mode else 5000 if mode == "seq-mean-token-sum" else 1250
    torch.testing.assert_close(value, loss.float()[0, 0] * each)


# --- what a user can get wrong


def test_unknown_mode():
    with pytest.raises(BadOption, match="no aggregation 'seq-mean'; there are token-mean, .*Did you mean"):
        aggregate(LOSS, MASK, "seq-mean")


@pytest.mark.parametrize("length", [None, 0, -1, float("nan")])
def test_missing_length(length):
    with pytest.raises(BadOption, match="needs a constant length above 0, got"):
        aggregate(LOSS, MASK, "seq-mean-token-sum-norm", length=length)


@pytest.mark.parametrize("mode", MODES[:3])
def test_a_length_that_is_of_no_use(mode):
    with pytest.raises(BadOption, match="has no length, got 4"):
        aggregate(LOSS, MASK, mode, length=4)


def test_bad_shapes():
    with pytest.raises(BadOption, match=r"got \(6, 4\) and \(6, 3\)"):
        aggregate(LOSS, MASK[:, :3])
    with pytest.raises(BadOption, match="one shape"):
        aggregate(LOSS[0], MASK[0])
