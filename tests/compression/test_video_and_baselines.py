"""EVS, uniform and random."""

import pytest
import torch

from tests.compression.helpers import load_golden, plain, random_inputs
from tokensieve.compression import get_method

evs, uniform, random = get_method("evs"), get_method("uniform"), get_method("random")


def video(frames, height=4, width=6, seed=1):
    return plain(random_inputs(frames * height * width, seed=seed), grids=((frames, height, width),))


# --- EVS


@pytest.mark.parametrize("case", ["evs-t8-q75", "evs-t20-q90-int"])
def test_evs_matches_the_official_code(case):
    golden = load_golden(case)
    params = golden["params"]
    tokens = plain(golden["in_x"], grids=((params["t"], params["h"], params["w"]),))
    mask = golden["out_mask"].bool()
    assert torch.equal(evs(tokens, int(mask.sum())).mask(), mask)


@pytest.mark.parametrize("num_keep, kept", [(2, 24), (24, 24), (25, 25), (95, 95)])
def test_evs_keeps_the_first_frame_whole(num_keep, kept):
    plan = evs(video(4), num_keep)
    assert plan.num_kept == kept and plan.kept[:24].tolist() == list(range(24))


def test_evs_keeps_what_changed():
    x = random_inputs(24)
    frames = x.repeat(5, 1).reshape(5, 24, -1)
    frames[3, 7] = -frames[3, 7]  # changes at frame 3, and back at frame 4
    plan = evs(plain(frames.flatten(0, 1), grids=((5, 4, 6),)), 26)
    assert plan.kept[24:].tolist() == [3 * 24 + 7, 4 * 24 + 7]


def test_evs_breaks_ties_in_a_still_video_by_reading_order():
    still = plain(random_inputs(24).repeat(5, 1), grids=((5, 4, 6),))
    assert evs(still, 30).kept.tolist() == list(range(30))


def test_evs_ignores_brightness_but_not_direction():
    x = random_inputs(24)
    plan = evs(plain(torch.cat([x, 7 * x, -x]), grids=((3, 4, 6),)), 48)
    assert plan.kept.tolist() == [*range(24), *range(48, 72)]


@pytest.mark.parametrize("grids", [((1, 4, 6),), ((1, 2, 6), (1, 2, 6)), ((2, 1, 6), (1, 2, 6))])
def test_evs_warns_that_an_image_stays_whole(grids):
    with pytest.warns(UserWarning, match="needs a video.*all its 24 tokens stay"):
        assert evs(plain(random_inputs(24), grids=grids), 6).num_kept == 24


# --- uniform


@pytest.mark.parametrize(
    "num_tokens, num_keep, kept",
    [(10, 3, [1, 5, 8]), (10, 5, [1, 3, 5, 7, 9]), (9, 3, [1, 4, 7]), (4, 3, [0, 2, 3]), (100, 2, [25, 75])],
)
def test_uniform_takes_the_centres(num_tokens, num_keep, kept):
    assert uniform(plain(torch.zeros(num_tokens, 2)), num_keep).kept.tolist() == kept


def test_uniform_gaps_differ_by_at_most_one():
    for num_tokens in (17, 196, 577):
        for num_keep in range(2, num_tokens):
            kept = uniform(plain(torch.zeros(num_tokens, 1)), num_keep).kept
            gaps = kept.diff()
            assert len(kept) == num_keep and (num_keep < 3 or gaps.max() - gaps.min() <= 1)


# --- random


def test_random_follows_its_generator():
    tokens = plain(torch.zeros(200, 2))

    def kept(seed):
        return random(tokens, 50, generator=torch.Generator().manual_seed(seed)).kept.tolist()

    assert kept(1) == kept(1) != kept(2)
    assert random(tokens, 50).kept.tolist() == kept(0)


def test_random_moves_on_with_a_generator_that_is_used_again():
    tokens, generator = plain(torch.zeros(200, 2)), torch.Generator().manual_seed(0)
    first, second = (random(tokens, 50, generator=generator).kept.tolist() for _ in range(2))
    assert first != second


def test_random_is_fair():
    tokens, generator = plain(torch.zeros(20, 1)), torch.Generator().manual_seed(0)
    counts = sum(random(tokens, 5, generator=generator).mask().long() for _ in range(2000))
    assert (counts - 500).abs().max() < 100  # 5 standard deviations
