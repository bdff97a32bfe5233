"""What holds for every registered method. A new method is tested here because it is registered."""

import dataclasses
import warnings

import pytest
import torch

from tests.compression.helpers import random_inputs, random_mlp, random_video
from tokensieve.compression import apply_plan, list_methods
from tokensieve.errors import BadOption

METHODS = list_methods()
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def changed(tokens, features=None, inputs=None):
    """The same tokens with other features or projector inputs."""
    projector = tokens.projector if inputs is None else dataclasses.replace(tokens.projector, inputs=inputs)
    features = tokens.features if features is None else features
    return dataclasses.replace(tokens, features=features, projector=projector)


def assert_valid(plan, method, num_keep, num_tokens):
    assert plan.num_tokens == num_tokens and plan.kept.dtype == torch.int64
    assert (plan.kept.diff() > 0).all() and 0 <= plan.kept[0] and plan.kept[-1] < num_tokens
    if method.output_length == "exact":
        assert plan.num_kept == num_keep
    else:
        assert num_keep <= plan.num_kept <= num_tokens


@each_method
@pytest.mark.parametrize("keep", [1, 1.0, 96, 97, 10**9, 0.999])
def test_identity_when_the_budget_covers_all(method, keep):
    assert method(random_video(), keep).kept.tolist() == list(range(96))


@each_method
@pytest.mark.parametrize("keep, num_keep", [(2, 2), (24, 24), (0.25, 24), (0.5, 48), (95, 95), (1e-9, 1)])
def test_exact_count_and_order(method, keep, num_keep):
    tokens = random_video()
    plan = method(tokens, keep, generator=seeded())
    assert_valid(plan, method, num_keep, 96)
    assert torch.equal(apply_plan(plan, tokens.features), tokens.features[plan.kept])


@each_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(method, dtype):
    assert_valid(method(random_video(dtype), 30), method, 30, 96)


@each_method
def test_half_precision_selects_what_float32_selects_on_the_same_numbers(method):
    half = random_video(torch.bfloat16)
    module = random_mlp().to(torch.bfloat16).float()
    full = changed(half, half.features.float(), half.projector.inputs.float())
    mlp = dataclasses.replace(half.projector.mlp, w1=module[0].weight, b1=module[0].bias, w2=module[2].weight)
    full = dataclasses.replace(full, projector=dataclasses.replace(full.projector, fn=module, mlp=mlp))
    assert torch.equal(method(half, 30).kept, method(full, 30).kept)


@each_method
def test_non_contiguous_tensors(method):
    tokens = random_video()
    strided = changed(tokens, tokens.features.T.contiguous().T, tokens.projector.inputs.T.contiguous().T)
    assert not strided.features.is_contiguous()
    assert torch.equal(method(strided, 30).kept, method(tokens, 30).kept)


@each_method
def test_gradients_flow_through_the_kept_tokens_only(method):
    tokens = random_video()
    features = tokens.features.clone().requires_grad_()
    plan = method(changed(tokens, features, tokens.projector.inputs.clone().requires_grad_()), 30)
    apply_plan(plan, features).sum().backward()
    assert torch.equal(features.grad.sum(-1) != 0, plan.mask())


@each_method
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference", "no_grad"])
def test_the_grad_mode_does_not_matter(method, mode):
    expected = method(random_video(), 30).kept
    with mode():
        assert torch.equal(method(random_video(), 30).kept, expected)


@each_method
def test_autocast_does_not_matter(method):
    tokens = random_video()
    with torch.autocast("cpu", torch.bfloat16):
        plan = method(tokens, 30)
    assert torch.equal(plan.kept, method(tokens, 30).kept)


@each_method
@pytest.mark.parametrize("fill", [0.0, 1.0, -3.7])
def test_equal_tokens_still_give_the_count(method, fill):
    tokens = random_video()
    equal = changed(tokens, torch.full_like(tokens.features, fill), torch.full_like(tokens.projector.inputs, fill))
    assert_valid(method(equal, 30), method, 30, 96)


@each_method
def test_one_zero_token(method):
    tokens = random_video()
    features = tokens.features.clone()
    features[17] = 0
    assert_valid(method(changed(tokens, features), 30), method, 30, 96)


@each_method
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_tokens_that_are_not_numbers_are_refused(method, bad):
    tokens = random_video()
    features = tokens.features.clone()
    features[17, 3] = bad
    tokens = changed(tokens, features)
    if "features" not in method.needs:
        assert_valid(method(tokens, 30), method, 30, 96)
        return
    with pytest.raises(BadOption, match="NaN or infinite"):
        method(tokens, 30)


@each_method
def test_inputs_are_left_as_they_are(method):
    tokens = random_video()
    features, inputs = tokens.features.clone(), tokens.projector.inputs.clone()
    method(tokens, 30)
    assert torch.equal(tokens.features, features) and torch.equal(tokens.projector.inputs, inputs)


@each_method
def test_randomness_comes_from_the_generator_only(method):
    tokens = random_video()
    before = torch.get_rng_state()
    unseeded = method(tokens, 30)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(method(tokens, 30).kept, unseeded.kept)
    one, two = method(tokens, 30, generator=seeded(3)), method(tokens, 30, generator=seeded(3))
    assert torch.equal(one.kept, two.kept)


@each_method
@pytest.mark.parametrize("keep", [0, 0.0, -1, -0.5, float("nan"), float("inf"), 1.5, True, "x", "0.5", None])
def test_bad_budgets_are_refused(method, keep):
    with pytest.raises(BadOption, match="keep"):
        method(random_video(), keep)


@each_method
def test_unknown_options_are_refused_even_when_nothing_is_dropped(method):
    with pytest.raises(BadOption, match=f"'{method.name}' has no option 'no_such'"):
        method(random_video(), 1.0, no_such=3)


@each_method
def test_ordinary_use_gives_no_warning(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(random_video(), 30)


@each_method
def test_a_single_token(method):
    tokens = random_video()
    one = dataclasses.replace(tokens, features=tokens.features[:1], grids=((1, 1, 1),), crop=tokens.crop[:1])
    assert method(one, 0.25).kept.tolist() == [0]


@each_method
def test_facts_are_filled_in(method):
    assert method.title and method.output_length
    if not method.title.startswith("Baseline"):
        assert method.url.startswith("https://arxiv.org/abs/") and method.licence and method.differs
    for option in method.options():
        assert option in method.fn.__doc__


def test_the_first_methods_are_there():
    names = {m.name for m in METHODS}
    assert {"divprune", "evs", "norm-diversity", "random", "uniform", "zoprune"} <= names


def test_random_inputs_differ_by_seed():  # else half of the tests above say nothing
    assert not torch.equal(random_inputs(seed=1), random_inputs(seed=2))
