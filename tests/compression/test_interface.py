"""Budget, plan, tokens and registry."""

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from tests.compression.helpers import plain, random_inputs, random_mlp
from tokensieve.compression import (
    Plan,
    Projector,
    TwoLayerMLP,
    VisualTokens,
    apply_plan,
    check_keep,
    get_method,
    in_dtype_of_input,
    keep_all,
    list_methods,
    num_to_keep,
    register_method,
    registry,
)
from tokensieve.errors import BadOption

# --- budget


@pytest.mark.parametrize(
    "keep, num_tokens, expected",
    [
        (1, 10, 10),
        (1.0, 10, 10),
        (0.5, 10, 5),
        (0.25, 10, 2),  # 2.5 rounds to even
        (0.35, 10, 4),  # 3.5 too
        (0.1, 320, 32),  # not 31: nothing is truncated
        (2, 10, 2),
        (2.0, 10, 2),
        (11, 10, 10),
        (1e-12, 10, 1),
        (0.5, 1, 1),
        (np.float32(0.5), 10, 5),
        (np.int64(4), 10, 4),
        (Fraction(1, 2), 10, 5),
        (0.5, 0, 0),
    ],
)
def test_num_to_keep(keep, num_tokens, expected):
    assert num_to_keep(keep, num_tokens) == expected


@pytest.mark.parametrize("keep, kind", [(1, float), (0.3, float), (2, int), (2.0, int), (np.int64(7), int)])
def test_check_keep_says_fraction_or_count_by_type(keep, kind):
    assert type(check_keep(keep)) is kind


@pytest.mark.parametrize("keep", [0, -1, 1.5, 2.5, float("nan"), float("-inf"), True, False, "0.5", None, [1], 1j])
def test_check_keep_refuses(keep):
    with pytest.raises(BadOption, match="keep must be a") as caught:
        check_keep(keep)
    assert isinstance(caught.value, ValueError) and caught.value.exit_code == 2


# --- plan


def test_plan_mask_and_count():
    plan = Plan(torch.tensor([0, 2, 5]), 6)
    assert plan.num_kept == 3
    assert plan.mask().tolist() == [True, False, True, False, False, True]


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_apply_plan_along_any_axis(dim):
    plan = Plan(torch.tensor([1, 3]), 4)
    values = torch.arange(64).reshape(4, 4, 4)
    assert torch.equal(apply_plan(plan, values, dim), values.index_select(dim, torch.tensor([1, 3])))


def test_apply_plan_refuses_another_length():
    with pytest.raises(ValueError, match="for 4 tokens"):
        apply_plan(Plan(torch.tensor([1]), 4), torch.zeros(5, 2))


def test_keep_all():
    assert keep_all(3).kept.tolist() == [0, 1, 2] and keep_all(0).num_kept == 0


@pytest.mark.parametrize(
    "kept",
    [
        torch.tensor([1, 0]),
        torch.tensor([1, 1]),
        torch.tensor([-1, 0]),
        torch.tensor([0, 4]),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([0.0, 1.0]),
        torch.tensor([[0, 1]]),
        torch.tensor([True, False]),
    ],
    ids=str,
)
def test_plan_refuses(kept):
    with pytest.raises(ValueError, match="Plan.kept must"):
        Plan(kept, 4)


def test_plan_error_stays_short():
    with pytest.raises(ValueError) as caught:
        Plan(torch.arange(5000).flip(0), 5000)
    assert len(str(caught.value)) < 200


def test_plans_compare_by_identity():
    one = keep_all(3)
    assert one == one and one != keep_all(3)


# --- tokens


def test_tokens_know_their_number():
    assert len(plain(torch.zeros(24, 3), grids=((2, 3, 4),))) == 24


@pytest.mark.parametrize(
    "features, grids, crop",
    [
        (torch.zeros(5, 3), ((1, 2, 2),), torch.zeros(5)),
        (torch.zeros(4, 3), ((1, 2, 2),), torch.zeros(5)),
        (torch.zeros(4), ((1, 2, 2),), torch.zeros(4)),
        (torch.zeros(1, 4, 3), ((1, 2, 2),), torch.zeros(4)),
        (torch.tensor(1.0), ((1, 2, 2),), torch.zeros(4)),
    ],
)
def test_tokens_that_do_not_agree(features, grids, crop):
    with pytest.raises(ValueError, match="do not agree"):
        VisualTokens(features=features, grids=grids, crop=crop.long())


def test_two_layer_mlp_checks_its_shapes():
    with pytest.raises(ValueError, match="w1"):
        TwoLayerMLP(w1=torch.zeros(3, 2), b1=None, w2=torch.zeros(5, 4), act=nn.GELU())


def test_module_in_the_dtype_of_its_input():
    module = nn.Sequential(random_mlp(), nn.BatchNorm1d(32)).eval().to(torch.bfloat16)
    x = random_inputs(4)
    y = in_dtype_of_input(module)(x)
    assert y.dtype == torch.float32 and module[0][0].weight.dtype == torch.bfloat16
    torch.testing.assert_close(y, module.float()(x))


# --- registry


@pytest.fixture
def empty_registry(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", {})


def test_unknown_method_names_the_nearest():
    with pytest.raises(BadOption, match="Did you mean 'zoprune'"):
        get_method("zooprune")


def test_unknown_option_names_the_nearest():
    with pytest.raises(BadOption, match="Did you mean 'estimator'"):
        get_method("zoprune")(plain(torch.zeros(4, 2)), 2, estimater="zo")
    with pytest.raises(BadOption, match="takes none"):
        get_method("uniform")(plain(torch.zeros(4, 2)), 2, step=1)


def test_options_are_read_from_the_signature():
    assert get_method("zoprune").options() == {"estimator": "auto", "num_directions": 64, "step": 0.01}
    assert get_method("uniform").options() == {}


def test_methods_are_listed_by_name_and_place():
    names = [m.name for m in list_methods()]
    assert names == sorted(names)
    assert "zoprune" in [m.name for m in list_methods("projector")]
    assert "zoprune" not in [m.name for m in list_methods("decoder")]


def test_registering(empty_registry):
    @register_method("first", title="Keeps the first tokens", needs=())
    def first(tokens, num_keep, *, generator=None, skip=0):
        return Plan(torch.arange(skip, skip + num_keep), len(tokens))

    method = get_method("first")
    assert method.options() == {"skip": 0}
    assert method(plain(torch.zeros(8, 2)), 3, skip=1).kept.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="already registered"):
        register_method("first", title="again")(first)


def test_methods_run_without_gradients(empty_registry):
    @register_method("curious", title="Looks at the grad mode", needs=())
    def curious(tokens, num_keep, *, generator=None):
        assert not torch.is_grad_enabled()
        return Plan(torch.arange(num_keep), len(tokens))

    get_method("curious")(plain(torch.zeros(8, 2)), 3)


@pytest.mark.parametrize("fact", [{"place": "roof"}, {"effect": "adds"}, {"needs": ("magic",)}])
def test_unknown_facts_are_refused(empty_registry, fact):
    with pytest.raises(ValueError, match="must be"):
        register_method("x", title="x", **fact)(lambda tokens, num_keep, *, generator=None: None)
    assert list_methods() == []


def test_importing_the_package_does_not_import_torch():
    code = "import sys, tokensieve; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_projector_keeps_what_it_is_given():
    inputs = random_inputs(4)
    projector = Projector(inputs=inputs, fn=nn.Identity(), to_tokens=lambda s: s)
    assert projector.mlp is None and projector.inputs is inputs
