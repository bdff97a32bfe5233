"""What holds for every registered method. A new method is tested here because it is registered."""

import dataclasses
import re
import warnings

import pytest
import torch

from tests.compression.helpers import options_for, random_inputs, random_mlp, random_tower, random_video
from tokensieve.compression import apply_plan, list_methods
from tokensieve.errors import BadOption

METHODS = list_methods("projector")
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def run(method, tokens, keep, **options):
    return method(tokens, keep, **options_for(method), **options)


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
        assert 1 <= plan.num_kept <= num_tokens
    assert (plan.merge is None) or method.effect == "merges"


@each_method
@pytest.mark.parametrize("keep", [1, 1.0, 96, 97, 10**9, 0.999])
def test_identity_when_the_budget_covers_all(method, keep):
    assert run(method, random_video(), keep).kept.tolist() == list(range(96))


@each_method
@pytest.mark.parametrize("keep, num_keep", [(2, 2), (24, 24), (0.25, 24), (0.5, 48), (95, 95), (1e-9, 1)])
def test_exact_count_and_order(method, keep, num_keep):
    tokens = random_video()
    plan = run(method, tokens, keep, generator=seeded())
    assert_valid(plan, method, num_keep, 96)
    got = apply_plan(plan, tokens.features)
    assert got.shape == tokens.features[plan.kept].shape and got.isfinite().all()
    if method.effect == "prunes":
        assert torch.equal(got, tokens.features[plan.kept])


@each_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(method, dtype):
    assert_valid(run(method, random_video(dtype), 30), method, 30, 96)


@each_method
def test_half_precision_selects_what_float32_selects_on_the_same_numbers(method):
    half = random_video(torch.bfloat16)
    module = random_mlp().to(torch.bfloat16).float()
    full = changed(half, half.features.float(), half.projector.inputs.float())
    full = dataclasses.replace(full, question=dataclasses.replace(half.question, embeds=half.question.embeds.float()))
    mlp = dataclasses.replace(half.projector.mlp, w1=module[0].weight, b1=module[0].bias, w2=module[2].weight)
    full = dataclasses.replace(full, projector=dataclasses.replace(full.projector, fn=module, mlp=mlp))
    assert torch.equal(run(method, half, 30).kept, run(method, full, 30).kept)


@each_method
def test_non_contiguous_tensors(method):
    tokens = random_video()
    strided = changed(tokens, tokens.features.T.contiguous().T, tokens.projector.inputs.T.contiguous().T)
    assert not strided.features.is_contiguous()
    assert torch.equal(run(method, strided, 30).kept, run(method, tokens, 30).kept)


@each_method
def test_gradients_flow_through_the_kept_and_merged_tokens_only(method):
    tokens = random_video()
    features = tokens.features.clone().requires_grad_()
    plan = run(method, changed(tokens, features, tokens.projector.inputs.clone().requires_grad_()), 30)
    apply_plan(plan, features).sum().backward()
    reached = plan.mask()
    if plan.merge is not None:
        reached = torch.zeros(96).index_add(0, plan.merge.source, plan.merge.weight) != 0
    assert torch.equal(features.grad.sum(-1) != 0, reached)


@each_method
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference", "no_grad"])
def test_the_grad_mode_does_not_matter(method, mode):
    expected = run(method, random_video(), 30).kept
    with mode():
        assert torch.equal(run(method, random_video(), 30).kept, expected)


@each_method
def test_autocast_does_not_matter(method):
    tokens = random_video()
    with torch.autocast("cpu", torch.bfloat16):
        plan = run(method, tokens, 30)
    assert torch.equal(plan.kept, run(method, tokens, 30).kept)


@each_method
@pytest.mark.parametrize("fill", [0.0, 1.0, -3.7])
def test_equal_tokens_still_give_the_count(method, fill):
    tokens = random_video()
    equal = changed(tokens, torch.full_like(tokens.features, fill), torch.full_like(tokens.projector.inputs, fill))
    assert_valid(run(method, equal, 30), method, 30, 96)


@each_method
def test_one_zero_token(method):
    tokens = random_video()
    features = tokens.features.clone()
    features[17] = 0
    assert_valid(run(method, changed(tokens, features), 30), method, 30, 96)


@each_method
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_tokens_that_are_not_numbers_are_refused(method, bad):
    tokens = random_video()
    features = tokens.features.clone()
    features[17, 3] = bad
    tokens = changed(tokens, features)
    if "features" not in method.needs:
        assert_valid(run(method, tokens, 30), method, 30, 96)
        return
    with pytest.raises(BadOption, match="NaN or infinite"):
        run(method, tokens, 30)


@each_method
def test_inputs_are_left_as_they_are(method):
    tokens = random_video()
    features, inputs = tokens.features.clone(), tokens.projector.inputs.clone()
    run(method, tokens, 30)
    assert torch.equal(tokens.features, features) and torch.equal(tokens.projector.inputs, inputs)


@each_method
def test_randomness_comes_from_the_generator_only(method):
    tokens = random_video()
    before = torch.get_rng_state()
    unseeded = run(method, tokens, 30)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(run(method, tokens, 30).kept, unseeded.kept)
    one, two = run(method, tokens, 30, generator=seeded(3)), run(method, tokens, 30, generator=seeded(3))
    assert torch.equal(one.kept, two.kept)


@each_method
@pytest.mark.parametrize("keep", [0, 0.0, -1, -0.5, float("nan"), float("inf"), 1.5, True, "x", "0.5", None])
def test_bad_budgets_are_refused(method, keep):
    with pytest.raises(BadOption, match="keep"):
        run(method, random_video(), keep)


@each_method
def test_unknown_options_are_refused_even_when_nothing_is_dropped(method):
    with pytest.raises(BadOption, match=f"'{re.escape(method.name)}' has no option 'no_such'"):
        run(method, random_video(), 1.0, no_such=3)


@each_method
def test_ordinary_use_gives_no_warning(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(method, random_video(), 30)


@each_method
def test_shuffled_places_shuffle_the_choice(method):
    """The same places of every frame change seats; a method that says so keeps the same tokens."""
    tokens = random_video()
    places = torch.randperm(24, generator=seeded(2))
    order = (torch.arange(4)[:, None] * 24 + places).flatten()
    shuffled = changed(tokens, tokens.features[order], tokens.projector.inputs[order])
    shuffled = dataclasses.replace(shuffled, tower=shuffled_tower(tokens.tower, places))
    same = torch.equal(order[run(method, shuffled, 30).kept].sort().values, run(method, tokens, 30).kept)
    assert same or not method.follows_tokens


def shuffled_tower(tower, places):
    seats = torch.cat([torch.zeros(1, dtype=torch.long), 1 + places])
    layers = {
        place: dataclasses.replace(
            layer, query=tuple(q[:, seats] for q in layer.query), key=tuple(k[:, seats] for k in layer.key)
        )
        for place, layer in tower.layers.items()
    }
    return dataclasses.replace(tower, layers=layers, hidden=tuple(h[seats] for h in tower.hidden))


@each_method
def test_a_tower_without_class_token(method):
    assert_valid(run(method, random_video(num_prefix=0), 30), method, 30, 96)


@each_method
def test_an_image(method):
    video = random_video()
    image = dataclasses.replace(video, grids=((1, 8, 12),), tower=random_tower(1, 96))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # methods for videos may say that an image gives them nothing to do
        plan = run(method, image, 30)
    assert 1 <= plan.num_kept <= 96


@each_method
def test_missing_evidence_is_named(method):
    for need in ("projector", "tower", "question"):
        if need in method.needs:
            with pytest.raises(BadOption, match=f"'{re.escape(method.name)}' needs the"):
                run(method, dataclasses.replace(random_video(), **{need: None}), 30)


@each_method
def test_a_single_token(method):
    tokens = random_video()
    tokens = dataclasses.replace(tokens, features=tokens.features[:1], grids=((1, 1, 1),), crop=tokens.crop[:1])
    one = dataclasses.replace(tokens, tower=random_tower(1, 1))
    assert run(method, one, 0.25).kept.tolist() == [0]


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
