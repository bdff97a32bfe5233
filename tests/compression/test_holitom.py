"""HoliTom before the language model."""

import dataclasses
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from tests.compression.helpers import load_golden, plain, random_inputs
from tests.compression.test_prunevid import assert_same_rows
from tokensieve.compression import apply_plan, get_method
from tokensieve.compression.holitom import least_cosine, merge_and_prune, scene_lengths
from tokensieve.compression.maxmin import unit_rows
from tokensieve.compression.temporal import still_places
from tokensieve.errors import BadOption

holitom = get_method("holitom")


def with_salience(frames, salience=None, grids=None):
    """Tokens of `frames` [T, n, D], and a tower in which they receive attention `salience` [T, n]."""
    tokens = plain(frames.flatten(0, 1), grids=grids or ((frames.shape[0], 1, frames.shape[1]),))
    if salience is None:
        salience = random_inputs(*frames.shape[:2], seed=3).abs()
    layer = SimpleNamespace(received_attention=lambda: salience.flatten())
    return dataclasses.replace(tokens, tower=SimpleNamespace(layers={-1: layer}))


def half_still(seed=1):
    """5 + 3 frames of 20 places; the first 12 stand still inside a scene but for a little noise."""
    x = random_inputs(8 * 20, 16, seed).reshape(8, 20, 16)
    still = random_inputs(2 * 12, 16, seed=7).reshape(2, 12, 16)
    frames = x.clone()
    frames[:, :12] = still[torch.tensor([0] * 5 + [1] * 3)] + 0.1 * x[:, :12]
    return frames


# --- against the official code


@pytest.mark.parametrize("case", ["holitom-dynamic", "holitom-mixed-r15"])
def test_official_counts_match_the_official_code(case):
    golden = load_golden(case)
    params = golden["params"]
    x = golden["in_x"]
    unit = unit_rows(x)
    cosine = (unit[1:] * unit[:-1]).sum(-1)
    lengths = scene_lengths(cosine > params["tau"])
    first, last = golden["out_segments"].T
    assert lengths == (last - first + 1).tolist()
    still = still_places(least_cosine(cosine, lengths), lengths, params["tau"])
    num_keep = params["r"] * params["t"] * params["n"]
    plan = merge_and_prune(x, golden["in_attn"], still, lengths, num_keep, official_counts=True)
    assert_same_rows(apply_plan(plan, x.flatten(0, 1)), golden["out_tokens"])


def test_the_method_is_the_official_one_but_for_the_counts():
    golden = load_golden("holitom-dynamic")
    x = golden["in_x"]
    tokens = with_salience(x, golden["in_attn"])
    official = holitom(tokens, 30, official_counts=True)
    assert_same_rows(apply_plan(official, tokens.features), golden["out_tokens"])
    assert official.num_kept == 34 and holitom(tokens, 30).num_kept == 30


# --- scenes


def saved_by(alike, cuts):
    bounds = [0, *cuts, len(alike) + 1]
    scenes = zip(bounds[:-1], bounds[1:], strict=True)
    return sum(int(alike[s : e - 1].all(0).sum()) * (e - s - 1) for s, e in scenes if e - s > 1)


def test_no_other_cut_saves_more():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        alike = torch.rand(6, 9, generator=generator) < 0.7
        lengths = scene_lengths(alike)
        cuts = torch.tensor(lengths).cumsum(0)[:-1].tolist()
        every = [c for k in range(7) for c in combinations(range(1, 7), k)]
        assert sum(lengths) == 7 and saved_by(alike, cuts) == max(saved_by(alike, c) for c in every)


def test_frames_without_still_places_are_scenes_of_their_own():
    assert scene_lengths(torch.zeros(5, 9, dtype=torch.bool)) == [1] * 6
    assert scene_lengths(torch.ones(5, 9, dtype=torch.bool)) == [6]
    assert scene_lengths(torch.ones(0, 9, dtype=torch.bool)) == [1]


def test_least_cosine_is_that_inside_the_scene():
    cosine = torch.tensor([[0.9, 0.1], [0.8, 0.2], [-1.0, -1.0], [0.5, 0.6]])
    assert torch.equal(least_cosine(cosine, [3, 2]), torch.tensor([[0.8, 0.1], [0.5, 0.6]]))
    assert torch.equal(least_cosine(cosine, [1, 1, 3])[:2], torch.zeros(2, 2))


# --- merge and prune


def test_still_places_merge_and_the_most_salient_others_stay():
    frames = half_still()
    salience = random_inputs(8, 20, seed=3).abs()
    plan = holitom(with_salience(frames, salience), 44)  # 24 + 8 * 8 = 88 are left after the merge: half of all
    merged = apply_plan(plan, frames.flatten(0, 1))
    frame, place = plan.kept // 20, plan.kept % 20
    for t in range(8):
        expected = salience[t, 12:].topk(4).indices.sort().values + 12
        mine = (frame == t) & (place >= 12)
        assert torch.equal(place[mine], expected)
        assert torch.equal(merged[mine], frames[t, expected])
    for first, length in ((0, 5), (5, 3)):
        mean = frames[first : first + length, :12].mean(0)
        centre = place[(frame == first) & (place < 12)]
        assert len(centre) == 6
        label = torch.stack([(mean - mean[c]).norm(dim=-1) for c in centre]).argmin(0)
        for k, c in enumerate(centre):
            others = [p for p in range(12) if label[p] == k and p != c]
            expected = 0.6 * mean[c] + 0.4 * mean[others].mean(0) if others else mean[c]
            torch.testing.assert_close(merged[(frame == first) & (place == c)][0], expected)


def test_weights_add_up_to_one():
    plan = holitom(with_salience(half_still()), 30)
    sums = torch.zeros(30).index_add(0, plan.merge.target, plan.merge.weight)
    torch.testing.assert_close(sums, torch.ones(30))


@pytest.mark.parametrize("num_keep", [2, 3, 8, 31, 87, 88, 89, 120, 159])
def test_the_budget_is_met(num_keep):
    assert holitom(with_salience(half_still()), num_keep).num_kept == num_keep


def test_official_counts_overshoot_less_than_a_token_a_frame_and_leave_still_videos_small():
    tokens = with_salience(half_still())
    for num_keep in (5, 31, 60, 80):
        assert num_keep - 2 <= holitom(tokens, num_keep, official_counts=True).num_kept < num_keep + 8 + 2
    assert holitom(tokens, 120, official_counts=True).num_kept == 88


def test_equal_salience_keeps_the_first_places():
    frames = random_inputs(4 * 10).reshape(4, 10, 16)
    plan = holitom(with_salience(frames, torch.ones(4, 10)), 12)
    assert (plan.kept % 10).tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize("grids", [((1, 8, 9),), ((1, 4, 9), (1, 6, 6))])
def test_of_an_image_the_most_salient_tokens_stay(grids):
    salience = random_inputs(1, 72, seed=3).abs()
    plan = holitom(with_salience(random_inputs(72)[None], salience, grids), 10)
    assert torch.equal(plan.kept, salience[0].topk(10).indices.sort().values)
    assert torch.equal(plan.merge.source, plan.kept) and (plan.merge.weight == 1).all()


@pytest.mark.parametrize(
    "options",
    [{"threshold": 1.01}, {"threshold": float("nan")}, {"threshold": True}, {"official_counts": 1}],
)
def test_bad_options(options):
    with pytest.raises(BadOption, match=next(iter(options))):
        holitom(with_salience(half_still()), 40, **options)


def test_no_tower():
    with pytest.raises(BadOption, match="vision tower"):
        holitom(plain(random_inputs(24)), 6)
