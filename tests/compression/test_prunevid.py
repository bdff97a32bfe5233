"""PruneVid, stage 1."""

import pytest
import torch

from tests.compression.helpers import load_golden, plain, random_inputs
from tokensieve.compression import apply_plan, get_method
from tokensieve.compression.density_peaks import cluster
from tokensieve.compression.prunevid import contiguous_lengths, mean_cosine, scene_lengths
from tokensieve.compression.temporal import frames_of
from tokensieve.errors import BadOption

prunevid = get_method("prunevid")


def video(frames):
    """Tokens of `frames` [T, n, D], in rows of n."""
    return plain(frames.flatten(0, 1), grids=((frames.shape[0], 1, frames.shape[1]),))


def two_scenes(num_places=24, moving=6, seed=1):
    """6 + 4 frames; all places but the last `moving` stand still but for a little noise."""
    x = random_inputs(10 * num_places, 16, seed).reshape(10, num_places, 16)
    still = random_inputs(2 * num_places, 16, seed=7).reshape(2, num_places, 16)
    scene = torch.tensor([0] * 6 + [1] * 4)
    frames = still[scene] + 0.1 * x + 2 * random_inputs(2, 16, seed=8)[scene][:, None]
    frames[:, num_places - moving :] = x[:, num_places - moving :]
    return frames


def assert_same_rows(rows, expected):
    """Equal at rtol 1e-5, atol 1e-5, in whatever order."""
    assert rows.shape == expected.shape
    nearest = torch.cdist(rows, expected, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    assert len(nearest.unique()) == len(rows)
    torch.testing.assert_close(rows, expected[nearest], rtol=1e-5, atol=1e-5)


# --- against the official code


@pytest.mark.parametrize("case", ["prunevid-t12", "prunevid-t16", "prunevid-group14", "prunevid-group15"])
def test_official_rule(case):
    golden = load_golden(case)
    params = golden["params"]
    x = golden["in_x"][0]
    tokens = plain(x, grids=((params["t"], params["h"], params["w"]),))
    ratio = params["temporal_segment_ratio"]
    assert scene_lengths(frames_of(tokens).mean(1), ratio) == golden["out_window_sizes"].tolist()
    plan = prunevid(
        tokens,
        2,
        temporal_segment_ratio=ratio,
        threshold=params["threshold"],
        cluster_ratio=params["cluster_ratio"],
    )
    assert_same_rows(apply_plan(plan, x), golden["out_tokens"][0])


# --- scenes


@pytest.mark.parametrize(
    "labels, lengths",
    [
        ([2, 2, 2, 1, 1, 0, 0], [3, 2, 2]),
        ([0, 1, 1, 1, 0, 0, 0, 0], [4, 4]),  # a single frame in front
        ([0, 0, 0, 1, 2, 2], [4, 2]),  # between two: to the longer run
        ([0, 0, 1, 2, 2, 2], [2, 4]),
        ([0, 0, 1, 2, 2], [3, 2]),  # equal: to the left
        ([0, 0, 0, 1, 1, 0, 0], [3, 4]),  # the second run of 0 is shorter than the first
        ([0, 0, 1, 0, 0], [5]),  # equally long runs of one label grow together
        ([2, 2, 2, 2, 3, 0, 3, 0, 1, 1, 1, 1], [8, 4]),
        ([0, 1, 0, 1], [4]),  # no run
        ([0], [1]),
    ],
)
def test_labels_made_contiguous(labels, lengths):
    assert contiguous_lengths(labels) == lengths


def test_scenes_are_found():
    frames = two_scenes().mean(1)
    assert scene_lengths(frames, 0.25) == [6, 4]
    assert scene_lengths(frames[4:8], 0.25) == [4] and scene_lengths(frames[4:8], 0.5) == [2, 2]
    assert scene_lengths(frames[5:8], 0.25) == [3]  # at least one cluster


def test_mean_cosine_is_over_pairs_of_different_frames():
    x = random_inputs(6 * 5).reshape(6, 5, 16)
    x[1, 3] = 0
    unit = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    pairs = [(unit[s] * unit[t]).sum(-1) for s in range(4) for t in range(4) if s != t]
    likeness = mean_cosine(x, [4, 1, 1])
    torch.testing.assert_close(likeness[0], torch.stack(pairs).mean(0))
    assert (likeness[1:].abs() < 1e-6).all()


# --- the merge


def test_still_places_become_their_mean_and_stand_in_the_first_frame():
    frames = two_scenes()
    num_left = 2 * 18 + 10 * 6
    plan = prunevid(video(frames), num_left)
    merged = apply_plan(plan, frames.flatten(0, 1))
    for first, scene in ((0, frames[:6]), (6, frames[6:])):
        place = torch.searchsorted(plan.kept, torch.arange(18) + first * 24)
        assert torch.equal(plan.kept[place], torch.arange(18) + first * 24)
        torch.testing.assert_close(merged[place], scene[:, :18].mean(0))
    moving = (torch.arange(240).reshape(10, 24)[:, 18:]).flatten()
    place = torch.searchsorted(plan.kept, moving)
    assert torch.equal(merged[place], frames[:, 18:].flatten(0, 1))


def test_every_token_has_a_part_and_clusters_are_means():
    frames = two_scenes()
    plan = prunevid(video(frames), 40)
    assert torch.equal(plan.merge.source.sort().values, torch.arange(240))
    sums = torch.zeros(40).index_add(0, plan.merge.target, plan.merge.weight)
    torch.testing.assert_close(sums, torch.ones(40))
    constant = apply_plan(plan, torch.full((240, 3), 2.5))
    torch.testing.assert_close(constant, torch.full((40, 3), 2.5))


def test_budget_is_shared_in_proportion_with_one_for_every_group():
    frames = two_scenes()
    plan = prunevid(video(frames), 40)  # 12 groups: 18 and 18 still, ten of 6
    frame_of_kept = plan.kept // 24
    is_still = (plan.kept % 24 < 18).int()
    still = torch.zeros(10, dtype=torch.int).index_add(0, frame_of_kept, is_still)
    # one each, the other 28 in proportion to 17, 5 * 6, 17, 5 * 4
    assert still.tolist() == [7, 0, 0, 0, 0, 0, 7, 0, 0, 0]
    assert frame_of_kept.bincount().sub(still).tolist() == [3, 3, 3, 3, 3, 3, 2, 2, 2, 2]


@pytest.mark.parametrize("num_keep", [1, 2, 3, 11, 12, 13, 40, 95, 96, 97, 150, 239])
def test_the_budget_is_met(num_keep):
    frames = two_scenes()
    plan = prunevid.fn(video(frames), num_keep)
    assert plan.num_kept == num_keep
    assert torch.equal(plan.merge.source.sort().values, torch.arange(240))


def test_of_a_still_video_the_least_alike_places_stay_apart():
    frames = random_inputs(24).repeat(4, 1).reshape(4, 24, 16)
    frames[:, 3] += 0.3 * random_inputs(4, seed=5)  # still by threshold, but the least alike
    plan = prunevid(video(frames), 30)  # 24 if all were merged, so two places stay apart
    own_frames = [p for p in range(24) if {p, p + 24, p + 48, p + 72} <= set(plan.kept.tolist())]
    assert plan.num_kept == 30 and own_frames == [3, 23]


def test_the_official_rule_ignores_the_budget():
    frames = two_scenes()
    few, many = (prunevid(video(frames), k, cluster_ratio=0.5) for k in (5, 200))
    assert torch.equal(few.kept, many.kept) and few.num_kept == 2 * 9 + 10 * 6
    assert prunevid(video(frames), 5, cluster_ratio=0.01).num_kept == 2 + 60  # never an empty cluster


def test_threshold_one_merges_nothing_over_time():
    plan = prunevid(video(two_scenes()), 10, cluster_ratio=1.0, threshold=1)
    assert plan.kept.tolist() == list(range(240))


@pytest.mark.parametrize("grids", [((1, 8, 9),), ((1, 4, 9), (1, 6, 6))])
def test_an_image_is_clustered(grids):
    x = random_inputs(72)
    plan = prunevid(plain(x, grids=grids), 10)
    centres, label = cluster(x, 10, 7)
    assert torch.equal(plan.kept, centres.sort().values)
    expected = torch.stack([x[label == k].mean(0) for k in centres.argsort()])
    torch.testing.assert_close(apply_plan(plan, x), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"temporal_segment_ratio": 0},
        {"temporal_segment_ratio": 1.5},
        {"temporal_segment_ratio": None},
        {"cluster_ratio": 0},
        {"cluster_ratio": True},
        {"cluster_ratio": float("nan")},
        {"cluster_ratio": "0.5"},
        {"threshold": 1.01},
        {"threshold": float("nan")},
        {"threshold": None},
        {"threshold": True},
    ],
)
def test_bad_options(options):
    with pytest.raises(BadOption, match=next(iter(options))):
        prunevid(video(two_scenes()), 40, **options)
