"""FastVID."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from tests.compression.helpers import load_golden, plain, random_inputs
from tokensieve.compression import apply_plan, get_method
from tokensieve.compression.density_peaks import peak_order
from tokensieve.compression.fastvid import anchor_shares, merge_to_centres, prune_by_density, scene_lengths
from tokensieve.compression.maxmin import unit_rows
from tokensieve.errors import BadOption

fastvid = get_method("fastvid")


def with_salience(frames, salience=None, grids=None):
    """Tokens of `frames` [T, n, D], and a tower in which they have the salience [T, n]."""
    tokens = plain(frames.flatten(0, 1), grids=grids or ((frames.shape[0], 1, frames.shape[1]),))
    if salience is None:
        salience = random_inputs(*frames.shape[:2], seed=3).abs()
    layer = SimpleNamespace(salience=lambda: salience.flatten())
    return dataclasses.replace(tokens, tower=SimpleNamespace(layers={-1: layer}))


def frames_of_noise(num_frames=6, num_places=20, seed=1):
    return random_inputs(num_frames * num_places, seed=seed).reshape(num_frames, num_places, 16)


# --- against the official code


@pytest.mark.parametrize("case", ["fastvid-t8", "fastvid-t10-beta20", "fastvid-t12"])
def test_official_code(case):
    golden = load_golden(case)
    params = golden["params"]
    num_frames, num_places, start = params["t"], params["n"], params["video_start"]
    end = start + num_frames * num_places
    x = golden["in_hidden_states"][0, start:end]
    plan = prune_by_density(
        x.unflatten(0, (num_frames, -1)),
        golden["in_frame_global"],
        golden["in_frame_attn"].view(num_frames, -1),
        num_frames * int(num_places * params["retention_ratio"]),
        min_scenes=params["DySeg_c"],
        threshold=params["DySeg_tau"],
        context_share=params["STPrune_d"],
        anchor_spacing=params["DTM_p"],
        centre_weight=params["DTM_beta"],
    )
    kept = golden["out_keep_index"]
    is_video = (kept >= start) & (kept < end)
    assert torch.equal(plan.kept, kept[is_video] - start)
    expected = golden["out_hidden_states"][0, is_video]
    torch.testing.assert_close(apply_plan(plan, x), expected, rtol=1e-5, atol=1e-5)


# --- scenes and anchor frames


def test_cuts_at_the_lowest_cosines_and_below_the_threshold():
    angle = torch.tensor([0.0, 0.1, 0.4, 0.45, 0.65, 1.9, 1.92])  # steps 0.1 0.3 0.05 0.2 1.25 0.02
    g = torch.stack([angle.cos(), angle.sin()], dim=-1)
    assert scene_lengths(g, 1, 0.9) == [5, 2]
    assert scene_lengths(g, 3, 0.9) == [2, 3, 2]
    assert scene_lengths(g, 1, 0.97) == [2, 3, 2]
    assert scene_lengths(g, 4, -1) == [2, 2, 1, 2]
    assert scene_lengths(g, 99, 0.9) == [1] * 7
    assert scene_lengths(g[:1], 8, 0.9) == [1]


def test_equal_frames_are_cut_from_the_first_on():
    assert scene_lengths(torch.ones(5, 3), 3, 0.9) == [1, 1, 3]


@pytest.mark.parametrize(
    "room, num_centres, spacing, shares",
    [
        ([9] * 5, 7, 4, [(4, 4), (0, 3)]),
        ([9] * 9, 6, 4, [(8, 2), (4, 2), (0, 2)]),
        ([9] * 4, 2, 4, [(3, 2)]),
        ([9] * 5, 1, 4, [(4, 1)]),
        ([9], 3, 4, [(0, 3)]),
        ([9] * 3, 0, 4, []),
        ([9] * 4, 12, 4, [(3, 6), (0, 6)]),  # no room in one frame
        ([9] * 4, 20, 4, [(3, 5), (2, 5), (1, 5), (0, 5)]),
        ([2, 9], 11, 9, [(1, 9), (0, 2)]),
    ],
)
def test_anchor_shares(room, num_centres, spacing, shares):
    assert anchor_shares(room, num_centres, spacing) == shares


# --- selection and merge


def test_salient_tokens_stay_as_they_are():
    frames, salience = frames_of_noise(), random_inputs(6, 20, seed=3).abs()
    plan = fastvid(with_salience(frames, salience), 60)  # 10 a frame: 6 salient, 4 context
    merged = apply_plan(plan, frames.flatten(0, 1))
    for t in range(6):
        top = salience[t].topk(6).indices.sort().values + 20 * t
        place = torch.searchsorted(plan.kept, top)
        assert torch.equal(plan.kept[place], top)
        assert torch.equal(merged[place], frames.flatten(0, 1)[top])


def test_context_of_one_scene():
    frames, salience = frames_of_noise(), random_inputs(6, 20, seed=3).abs()
    x = frames.flatten(0, 1)
    plan = fastvid(with_salience(frames, salience), 30, min_scenes=1, threshold=-1)  # 3 salient and 2 context a frame
    merged = apply_plan(plan, x)
    rank = salience.argsort(dim=-1, descending=True).argsort(dim=-1).flatten()
    other = (rank >= 3).nonzero()[:, 0]
    for anchor in (5, 1):  # the last frame and the fourth before it hold 6 centres each
        candidates = other[other // 20 == anchor]
        centres = candidates[peak_order(x[candidates], 4)[:6]]
        label = (unit_rows(x[other]) @ unit_rows(x[centres]).T).argmax(-1)
        for k, centre in enumerate(centres):
            expected = 0.6 * x[centre] + 0.4 * x[other[label == k]].mean(0)
            torch.testing.assert_close(merged[plan.kept == centre][0], expected)
    assert plan.num_kept == 30


def test_merge_weights():
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
    label, weight = merge_to_centres(unit_rows(x), torch.tensor([0, 3]), 0.1)
    assert label.tolist() == [0, 0, 0, 1]
    # 3 tokens: the centre has 1 / 4 and a third of the rest
    torch.testing.assert_close(weight, torch.tensor([0.5, 0.25, 0.25, 1.0]))
    label, weight = merge_to_centres(unit_rows(x), torch.tensor([0, 3]), 0.6)
    torch.testing.assert_close(weight, torch.tensor([0.6 + 0.4 / 3, 0.4 / 3, 0.4 / 3, 1.0]))


def test_a_centre_stays_in_its_own_cluster_beside_a_copy():
    label, weight = merge_to_centres(unit_rows(torch.ones(4, 3)), torch.tensor([1, 2]), 0.6)
    assert label.tolist() == [0, 0, 1, 0] and weight[2] == 1


@pytest.mark.parametrize("num_keep", [2, 5, 6, 7, 54, 61, 72, 84, 100, 119])
@pytest.mark.parametrize("options", [{}, {"min_scenes": 1, "threshold": -1}, {"context_share": 1.0}])
def test_the_budget_is_met_also_where_the_official_code_fails(num_keep, options):
    plan = fastvid(with_salience(frames_of_noise()), num_keep, **options)
    assert plan.num_kept == num_keep
    sums = torch.zeros(num_keep).index_add(0, plan.merge.target, plan.merge.weight)
    torch.testing.assert_close(sums, torch.ones(num_keep))


def test_without_context_it_is_the_most_salient_tokens_of_each_frame():
    frames, salience = frames_of_noise(), random_inputs(6, 20, seed=3).abs()
    plan = fastvid(with_salience(frames, salience), 30, context_share=0)
    expected = salience.topk(5, dim=-1).indices.sort(dim=-1).values + 20 * torch.arange(6)[:, None]
    assert torch.equal(plan.kept, expected.flatten())


def test_frame_vectors_are_mean_tokens():
    frames, salience = frames_of_noise(), random_inputs(6, 20, seed=3).abs()
    tokens = with_salience(frames, salience)
    plan, same = fastvid(tokens, 30, min_scenes=3), prune_by_density(frames, frames.mean(1), salience, 30, 3)
    assert torch.equal(plan.kept, same.kept) and torch.equal(plan.merge.weight, same.merge.weight)


@pytest.mark.parametrize("grids", [((1, 8, 9),), ((1, 4, 9), (1, 6, 6))])
def test_an_image_is_one_frame(grids):
    salience = random_inputs(1, 72, seed=3).abs()
    plan = fastvid(with_salience(random_inputs(72)[None], salience, grids), 10)
    assert plan.num_kept == 10 and set(salience[0].topk(6).indices.tolist()) <= set(plan.kept.tolist())


@pytest.mark.parametrize(
    "options",
    [
        {"min_scenes": 0},
        {"min_scenes": 2.0},
        {"min_scenes": True},
        {"anchor_spacing": 0},
        {"anchor_spacing": "4"},
        {"threshold": 1.01},
        {"threshold": float("nan")},
        {"context_share": -0.1},
        {"context_share": 1.1},
        {"context_share": None},
        {"centre_weight": True},
        {"centre_weight": 2},
    ],
)
def test_bad_options(options):
    with pytest.raises(BadOption, match=next(iter(options))):
        fastvid(with_salience(frames_of_noise()), 40, **options)


def test_no_tower():
    with pytest.raises(BadOption, match="vision tower"):
        fastvid(plain(random_inputs(24)), 6)
