"""DyCoke, stage 1."""

import dataclasses
import warnings

import pytest
import torch
from torch.nn import functional as F

from tests.compression.helpers import load_golden, plain, random_inputs, random_video
from tokensieve.compression import get_method
from tokensieve.compression.dycoke import frames_back, released_frames_back
from tokensieve.errors import BadOption

dycoke = get_method("dycoke")


def video(frames, places=10, seed=1):
    return plain(random_inputs(frames * places, seed=seed), grids=((frames, 1, places),))


def counts(plan, places=10):
    return torch.bincount(plan.kept // places, minlength=plan.num_tokens // places).tolist()


# --- against the official code


@pytest.mark.parametrize("case", ["dycoke-f7-odd", "dycoke-f8"])
def test_dycoke_matches_the_official_code(case):
    golden = load_golden(case)
    num_frames, places = golden["params"]["F"], golden["params"]["n"]
    tokens = plain(golden["in_x"], grids=((num_frames, 1, places),))
    source = golden["out_source_index"]
    plan = dycoke(tokens, len(source), as_released=True)
    assert torch.equal(plan.kept, source.sort().values)
    in_official_order = tokens.features[source]
    torch.testing.assert_close(in_official_order, golden["out_tokens"], rtol=1e-5, atol=1e-5)
    assert not torch.equal(dycoke(tokens, len(source)).kept, plan.kept)


def test_the_released_loop_keeps_what_the_paper_s_settings_keep():
    tokens = video(32, 196)  # 3098 of 6272, K = 0.7
    assert counts(dycoke(tokens, 3098, as_released=True), 196) == [
        196 if t % 4 == 0 or t == 30 else 58 for t in range(32)
    ]


# --- against the equations


@pytest.mark.parametrize("num_frames", range(2, 14))
def test_windows(num_frames):
    back = frames_back(num_frames)
    for t, step in enumerate(back):
        assert t - step == [t, t - 1, t - 2, t - 1][t % 4]


@pytest.mark.parametrize(
    "num_frames, back",
    [
        (5, [0, 1, 2, 1, None]),
        (6, [0, 1, 2, 1, 0, 1]),
        (7, [0, 1, 2, 1, 0, 1, None]),
        (8, [0, 1, 2, 1, 0, 1, 0, 1]),
        (9, [0, 1, 2, 1, 0, 1, 2, 1, None]),
        (10, [0, 1, 2, 1, 0, 1, 2, 1, 0, 1]),
        (11, [0, 1, 2, 1, 0, 1, 2, 1, 0, 1, None]),
        (12, [0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 0, 1]),
    ],
)
def test_released_windows(num_frames, back):
    assert released_frames_back(num_frames) == back


@pytest.mark.parametrize("num_frames", [2, 3, 4, 5, 7, 8])
def test_each_compared_frame_keeps_its_least_similar_tokens(num_frames):
    tokens = video(num_frames)
    compared = [t for t in range(num_frames) if t % 4]
    num_keep = 10 * (num_frames - len(compared)) + 3 * len(compared)
    plan = dycoke(tokens, num_keep)
    x = tokens.features.view(num_frames, 10, -1)
    expected = []
    for t in range(num_frames):
        places = range(10)
        if t % 4:
            earlier = {1: t - 1, 2: t - 2, 3: t - 1}[t % 4]
            likeness = F.cosine_similarity(x[t], x[earlier], dim=-1)
            places = sorted(likeness.argsort()[:3].tolist())
        expected += [10 * t + p for p in places]
    assert plan.kept.tolist() == expected


@pytest.mark.parametrize(
    "num_keep, shares",
    [
        (20, [10, 0, 0, 0, 10, 0, 0]),
        (21, [10, 1, 0, 0, 10, 0, 0]),
        (27, [10, 2, 2, 1, 10, 1, 1]),
        (69, [10, 10, 10, 10, 10, 10, 9]),
    ],
)
def test_the_budget_is_met_exactly(num_keep, shares):
    assert counts(dycoke(video(7), num_keep)) == shares


@pytest.mark.parametrize("num_keep", [2, 19])
def test_whole_frames_are_the_least(num_keep):
    assert dycoke(video(7), num_keep).kept.tolist() == [*range(10), *range(40, 50)]


def test_still_places_tie_and_the_first_stay():
    still = plain(random_inputs(10).repeat(4, 1), grids=((4, 1, 10),))
    assert dycoke(still, 16).kept.tolist() == [*range(10), 10, 11, 20, 21, 30, 31]


def test_brightness_does_not_count_but_direction_does():
    x = random_inputs(10)
    changed = 3 * x
    changed[[4, 7]] = -x[[4, 7]]
    assert dycoke(plain(torch.cat([x, changed]), grids=((2, 1, 10),)), 12).kept.tolist() == [*range(10), 14, 17]


# --- images, bad input


@pytest.mark.parametrize("grids", [((1, 4, 6),), ((1, 2, 6), (1, 2, 6))])
def test_an_image_stays_whole_with_a_warning(grids):
    with pytest.warns(UserWarning, match="needs a video of two or more frames.*all its 24 tokens stay"):
        assert dycoke(plain(random_inputs(24), grids=grids), 6).num_kept == 24


def test_the_released_loop_needs_five_frames():
    with pytest.raises(BadOption, match="more than 4 frames, this video has 4"):
        dycoke(video(4), 12, as_released=True)


def test_the_released_loop_cannot_keep_its_lost_frame():
    assert counts(dycoke(video(7), 69, as_released=True)) == [10] * 6 + [0]


def test_bad_options_are_refused():
    with pytest.raises(BadOption, match="as_released must be True or False, got 'yes'"):
        dycoke(video(8), 30, as_released="yes")


def test_a_video_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dycoke(dataclasses.replace(random_video(), projector=None), 30)
