"""Merging plans, against the matrix product that they stand for."""

import pytest
import torch

from tokensieve.compression import Merge, Plan, apply_plan, merge_plan


def random_merge(num_tokens=30, num_kept=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(num_tokens, generator=generator)[:num_kept]
    weights = torch.randn(num_kept, num_tokens, generator=generator)
    weights[torch.rand(num_kept, num_tokens, generator=generator) < 0.7] = 0
    weights[torch.arange(num_kept), kept] = 1
    return kept, weights


def from_matrix(kept, weights):
    """The plan whose kept token `kept[k]` is made of row k of `weights` `[K, N]`, kept tokens in any order."""
    order = kept.argsort()
    target, source = weights[order].nonzero(as_tuple=True)
    return Plan(kept[order], weights.shape[1], Merge(source, target, weights[order][target, source].float()))


def test_a_plan_from_entries_in_any_order_is_that_of_their_matrix():
    kept, weights = random_merge()
    row, source = weights.nonzero(as_tuple=True)
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(2))
    row, source = row[order], source[order]
    made = merge_plan(30, kept[row], source, weights[row, source])
    values = torch.randn(30, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(made.kept, kept.sort().values)
    torch.testing.assert_close(apply_plan(made, values), apply_plan(from_matrix(kept, weights), values))


@pytest.mark.parametrize("shape", [(30,), (30, 5), (30, 2, 3)])
def test_a_merge_is_a_matrix_product(shape):
    kept, weights = random_merge()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    merged = apply_plan(from_matrix(kept, weights), values)
    expected = torch.tensordot(weights[kept.argsort()], values, 1)
    torch.testing.assert_close(merged, expected)
    merged.square().sum().backward()
    got, values.grad = values.grad, None
    torch.tensordot(weights[kept.argsort()], values, 1).square().sum().backward()
    torch.testing.assert_close(got, values.grad)


def test_along_another_axis_and_in_half_precision():
    kept, weights = random_merge()
    values = torch.randn(2, 30, 4)
    whole = apply_plan(from_matrix(kept, weights), values, dim=1)
    torch.testing.assert_close(whole, torch.einsum("kn,bnd->bkd", weights[kept.argsort()], values))
    assert apply_plan(from_matrix(kept, weights), values.bfloat16(), dim=1).dtype == torch.bfloat16


def test_a_merged_token_stands_at_the_place_of_its_anchor():
    made = from_matrix(torch.tensor([5, 2]), torch.eye(6)[[5, 2]] * 3)
    assert made.kept.tolist() == [2, 5] and made.mask().nonzero()[:, 0].tolist() == [2, 5]
    assert apply_plan(made, torch.arange(6.0)).tolist() == [6.0, 15.0]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Merge(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.ones(2)), "must rise"),
        (lambda: Merge(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(2)), "one length"),
        (lambda: from_matrix(torch.tensor([0, 1]), torch.eye(3)[[0, 0]] * torch.tensor([[1.0], [0.0]])), "needs an"),
        (lambda: from_matrix(torch.tensor([1, 1]), torch.eye(3)[[0, 1]]), "rise strictly"),
        (lambda: Plan(torch.tensor([0, 1]), 3, Merge(torch.tensor([0]), torch.tensor([0]), torch.ones(1))), "needs an"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
