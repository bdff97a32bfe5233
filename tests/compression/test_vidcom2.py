"""VidCom2. There are no golden vectors: the official code was not read."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.compression.helpers import plain, random_inputs
from tokensieve.compression import get_method
from tokensieve.compression.vidcom2 import choose, frame_quotas, redundancies, steady_channels

vidcom2 = get_method("vidcom2")


def video(frames=5, places=12, width=16, seed=1):
    return plain(random_inputs(frames * places, width, seed=seed), grids=((frames, 1, places),))


def by_the_equations(tokens, num_keep):
    """Redundancies and quotas in float64, with loops."""
    frames, places = tokens.grids[0][0], tokens.grids[0][2]
    x = tokens.features.double()
    steady = sorted(range(x.shape[1]), key=lambda c: x[:, c].var().item())[: x.shape[1] // 2]
    x = F.normalize(x[:, sorted(steady)], dim=1)

    def redundancy(token, centre):
        return sum(math.exp(-(token - centre).square().sum().item() / (2 * a)) for a in (0.125, 0.25, 0.5, 1, 2))

    to_video = torch.tensor([redundancy(token, x.mean(0)) for token in x]).view(frames, places)
    to_frame = torch.tensor(
        [redundancy(x[i], x[i // places * places : i // places * places + places].mean(0)) for i in range(len(x))]
    ).view(frames, places)
    weight = torch.softmax(-to_video.mean(1) / 0.01, 0)
    share = num_keep / len(x)
    quotas = [max(1, round(places * min(1.0, share * (1 + w.item() - weight.mean().item())))) for w in weight]
    return to_video + to_frame, quotas


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_keep", [8, 20, 33])
def test_vidcom2_by_the_equations(seed, num_keep):
    tokens = video(seed=seed)
    redundancy, quotas = by_the_equations(tokens, num_keep)
    order = [row.argsort().tolist() for row in redundancy]
    chosen = [(t, p) for t, quota in enumerate(quotas) for p in order[t][:quota]]
    best = [(t, order[t][0]) for t in range(5)]
    others = [(t, p) for t in range(5) for p in range(12) if (t, p) not in chosen]

    def redundancy_of(place):
        return redundancy[place].item()

    while len(chosen) > num_keep:
        chosen.remove(max((c for c in chosen if c not in best), key=redundancy_of))
    chosen += sorted(others, key=redundancy_of)[: num_keep - len(chosen)]
    assert vidcom2(tokens, num_keep).kept.tolist() == sorted(12 * t + p for t, p in chosen)


def test_the_intermediate_numbers():
    tokens = video()
    x_TnC = steady_channels(tokens.features.view(5, 12, 16))
    redundancy_Tn, to_video_Tn = redundancies(x_TnC)
    expected, quotas = by_the_equations(tokens, 20)
    torch.testing.assert_close(redundancy_Tn, expected, rtol=1e-5, atol=1e-5)
    assert frame_quotas(to_video_Tn.mean(1), 12, 20 / 60).tolist() == quotas


def test_only_steady_channels_are_looked_at():
    x = random_inputs(60, 16)
    loud = x.clone()
    loud[:, ::2] += 100 * random_inputs(60, 8, seed=5)
    tokens, changed = (plain(y, grids=((5, 1, 12),)) for y in (x, loud))
    other = loud.clone()
    other[:, ::2] *= -3
    assert torch.equal(vidcom2(changed, 20).kept, vidcom2(plain(other, grids=tokens.grids), 20).kept)
    assert steady_channels(loud.view(5, 12, 16)).shape == (5, 12, 8)


def test_a_frame_unlike_the_others_gets_more_tokens():
    x = 5 * random_inputs(60, 16, seed=6)  # channels 8 to 15 vary most and are not looked at
    x[:, :8] = 1 + 0.1 * random_inputs(60, 8, seed=7)
    x[24:36, :4] *= -1
    kept_T = torch.bincount(vidcom2(plain(x, grids=((5, 1, 12),)), 20).kept // 12, minlength=5)
    assert kept_T.argmax() == 2 and kept_T[2] >= 7 and kept_T.min() >= 1


def test_copies_of_the_common_are_dropped_first():
    x = torch.ones(24, 16) + 0.01 * random_inputs(24, 16)
    x[[5, 17]] = 4 * random_inputs(2, 16, seed=9).sign()
    assert vidcom2(plain(x, grids=((2, 1, 12),)), 2).kept.tolist() == [5, 17]


@pytest.mark.parametrize("share", [1e-6, 0.3, 1.0])
def test_quotas_lie_between_one_and_the_frame(share):
    quota_T = frame_quotas(torch.tensor([0.1, 0.5, 0.9]), 12, share)
    assert quota_T.min() >= 1 and quota_T.max() <= 12
    assert quota_T[0] >= quota_T[1] >= quota_T[2]


def test_equal_frames_get_equal_quotas():
    assert frame_quotas(torch.full((4,), 0.7), 12, 0.25).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(
    "num_keep, kept",
    [
        (1, [2]),  # fewer tokens than frames: the best of all frames
        (2, [2, 5]),
        (3, [2, 3, 5]),  # then the rest of the quotas by score, not by quota
        (4, [2, 3, 4, 5]),
        (5, [0, 2, 3, 4, 5]),  # then whatever is least redundant
        (6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_the_repair(num_keep, kept):
    redundancy_Tn = torch.tensor([[0.4, 0.9, 0.1], [0.3, 0.5, 0.2]])
    assert choose(redundancy_Tn, torch.tensor([1, 3]), num_keep).tolist() == kept


@pytest.mark.parametrize("num_frames, num_keep", [(5, 3), (5, 5), (5, 59), (7, 8), (1, 4), (60, 61)])
def test_the_budget_is_met_exactly(num_frames, num_keep):
    places = 12
    plan = vidcom2(video(num_frames, places), num_keep)
    assert plan.num_kept == num_keep
    if num_keep >= num_frames:
        assert len((plan.kept // places).unique()) == num_frames


def test_equal_tokens_go_in_reading_order_within_a_frame():
    equal = plain(torch.ones(24, 8), grids=((2, 1, 12),))
    assert vidcom2(equal, 6).kept.tolist() == [0, 1, 2, 12, 13, 14]


@pytest.mark.parametrize("grids", [((1, 4, 6),), ((1, 2, 4), (1, 2, 8))])
def test_an_image_is_one_frame(grids):
    assert vidcom2(plain(random_inputs(24), grids=grids), 7).num_kept == 7


def test_one_channel():
    assert vidcom2(plain(random_inputs(24, 1), grids=((2, 3, 4),)), 7).num_kept == 7
