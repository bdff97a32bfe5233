"""FSQ against the numbers of the paper's notebook, of the PyPI class, and of arithmetic on paper."""

import numpy as np
import pytest
import torch

from tokensieve.errors import BadOption
from tokensieve.vla import FSQ

ALL_LEVELS = [(8, 8, 8, 6, 5), (8, 6, 5), (8, 5, 5, 5), (7, 5, 5, 5, 5)]
MAIN = ALL_LEVELS[0]


def normal(*shape, seed=0):
    return 1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("levels", [*ALL_LEVELS, (2, 3), (4,)])
def test_index_digits_code_and_back(levels):
    fsq = FSQ(levels)
    index = torch.arange(fsq.num_codes)
    digits = fsq.index_to_digits(index)
    assert torch.equal(fsq.digits_to_index(digits), index)
    codes = fsq.digits_to_codes(digits)
    assert torch.equal(fsq.codes_to_digits(codes), digits) and len(codes.unique(dim=0)) == fsq.num_codes
    assert digits.amin(0).eq(0).all() and torch.equal(digits.amax(0) + 1, torch.tensor(levels))


@pytest.mark.parametrize("variant", ["jax", "pypi"])
@pytest.mark.parametrize("levels", ALL_LEVELS)
def test_every_digit_is_reached_and_is_a_fixed_value(levels, variant):
    fsq = FSQ(levels, variant)
    z = torch.linspace(-9, 9, 4001)[:, None].expand(-1, len(levels))
    codes = fsq.quantise(z)
    for i, level in enumerate(levels):
        assert fsq.codes_to_digits(codes)[:, i].unique().tolist() == list(range(level))
        expected = (torch.arange(level) - level // 2) / (level // 2)
        torch.testing.assert_close(codes[:, i].unique(), expected)


def test_values_of_odd_and_even_levels():
    codes = FSQ((8, 5)).digits_to_codes(torch.tensor([[0, 0], [4, 2], [7, 4]]))
    assert codes.tolist() == [[-1, -1], [0, 0], [0.75, 1]]
    third = FSQ((6,)).digits_to_codes(torch.arange(6)[:, None])[:, 0]
    torch.testing.assert_close(third, torch.tensor([-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3]))


def test_basis_and_the_papers_codes():
    fsq = FSQ(MAIN)
    assert fsq.basis == (1, 8, 64, 512, 3072) and fsq.num_codes == 15360
    assert fsq.index_to_digits(torch.tensor([12372, 1375])).tolist() == [[4, 2, 1, 0, 4], [7, 3, 5, 2, 0]]


@pytest.mark.parametrize(
    ("variant", "slopes"),
    [("pypi", [0.8580, 0.8580, 0.8580, 0.8009, 1.0010]), ("jax", [0.8563] * 3 + [0.7991, 0.9990])],
)
def test_zero_is_the_middle_and_has_a_gradient(variant, slopes):
    fsq, z = FSQ(MAIN, variant), torch.zeros(5, requires_grad=True)
    code = fsq.quantise(z)
    code.sum().backward()
    assert code.tolist() == [0] * 5 and fsq.codes_to_digits(code).tolist() == [4, 4, 4, 3, 2]
    assert int(fsq.digits_to_index(fsq.codes_to_digits(code))) == 7972
    torch.testing.assert_close(z.grad, torch.tensor(slopes), rtol=0, atol=1e-4)


def test_the_gradient_is_that_of_the_squashing_and_dies_far_out():
    fsq, z = FSQ(MAIN), normal(50, 5).requires_grad_()
    fsq.quantise(z).sum().backward()
    numeric = (fsq._squash(z + 1e-6) - fsq._squash(z - 1e-6)) / 2e-6 / fsq._halves(z)
    torch.testing.assert_close(z.grad, numeric.detach(), rtol=1e-5, atol=1e-7)
    far = torch.full((5,), 30.0, requires_grad=True)
    fsq.quantise(far).sum().backward()
    assert far.grad.abs().max() < 1e-6


@pytest.mark.parametrize("levels", ALL_LEVELS)
def test_the_jax_variant_is_the_papers_formulas(levels):
    """Transcribed to NumPy from the paper's appendix."""
    z, level = normal(2000, len(levels)).numpy(), np.array(levels)
    half = (level - 1) * (1 - 1e-3) / 2
    offset = np.where(level % 2 == 1, 0.0, 0.5)
    expected = np.round(np.tanh(z + np.tan(offset / half)) * half - offset) / (level // 2)
    np.testing.assert_array_equal(FSQ(levels, "jax").quantise(torch.from_numpy(z)).numpy(), expected)


def test_the_variants_disagree_as_often_as_they_should():
    z = normal(200_000, 5)
    jax, pypi = (FSQ(MAIN, variant).quantise(z) for variant in ("jax", "pypi"))
    assert (jax != pypi).double().mean() == pytest.approx(0.0030, abs=2e-4)
    assert (jax != pypi).any(-1).double().mean() == pytest.approx(0.015, abs=1e-3)


@pytest.mark.parametrize("levels", ALL_LEVELS)
def test_the_pypi_variant_is_the_pypi_class(levels):
    theirs = pytest.importorskip("vector_quantize_pytorch").FSQ(levels=list(levels))
    fsq, z, theirs_z = FSQ(levels, "pypi"), normal(1, 2000, len(levels)).float(), normal(1, 2000, len(levels)).float()
    z.requires_grad_(), theirs_z.requires_grad_()
    codes, (their_codes, their_index) = fsq.quantise(z), theirs(theirs_z)
    assert torch.equal(codes, their_codes)
    digits = fsq.codes_to_digits(codes)
    assert torch.equal(fsq.digits_to_index(digits), their_index.long())
    assert torch.equal(digits, theirs.indices_to_level_indices(their_index).long())
    torch.testing.assert_close(fsq.digits_to_codes(digits), theirs.indices_to_codes(their_index))
    codes.square().sum().backward(), their_codes.square().sum().backward()
    torch.testing.assert_close(z.grad, theirs_z.grad)


def test_half_precision_is_widened():
    z = normal(5000, 5).to(torch.bfloat16)
    assert torch.equal(FSQ(MAIN).quantise(z), FSQ(MAIN).quantise(z.float()))


@pytest.mark.parametrize(
    ("levels", "variant"),
    [((), "jax"), ((8, 1), "jax"), ((2, 8), "pypi"), ((8, 8.0), "jax"), ((True, 8), "jax"), ("88", "jax"), (8, "jax")]
    + [((1024,) * 4, "jax"), ((2,) * 32, "jax"), ((8, 5), "torch")],
)
def test_options_that_are_refused(levels, variant):
    with pytest.raises(BadOption):
        FSQ(levels, variant)


def test_values_that_are_refused():
    fsq = FSQ((8, 5))
    for call, value in [
        (fsq.digits_to_codes, torch.tensor([8, 0])),
        (fsq.digits_to_codes, torch.tensor([0, -1])),
        (fsq.digits_to_index, torch.tensor([0, 5])),
        (fsq.digits_to_index, torch.tensor([0.0, 1.0])),
        (fsq.index_to_digits, torch.tensor(40)),
        (fsq.index_to_digits, torch.tensor([0, -1])),
        (fsq.codes_to_digits, torch.tensor([torch.nan, 0.0])),
        (fsq.codes_to_digits, torch.tensor([1.0, 0.0])),
        (fsq.codes_to_digits, torch.tensor([0.1, 0.0])),
        (fsq.quantise, torch.zeros(3)),
        (fsq.quantise, torch.tensor(0.0)),
    ]:
        with pytest.raises(BadOption):
            call(value)
    assert fsq.index_to_digits(torch.zeros(0, dtype=torch.int64)).shape == (0, 2)
