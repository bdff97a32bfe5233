"""CaCoVID, selection by a policy."""

import math
from fractions import Fraction

import pytest
import torch

from tests.compression.helpers import load_golden, plain, random_inputs, random_policy, random_video
from tokensieve.compression import get_method
from tokensieve.compression.cacovid import frame_quotas, select_by_policy
from tokensieve.compression.systematic import systematic_subset
from tokensieve.errors import BadOption

cacovid = get_method("cacovid")
CASES = ["cacovid_select-t16-keep15-imp50", "cacovid_select-t5-keep10-imp100", "cacovid_select-t8-keep25-imp50"]


def logits(count, seed):
    return random_inputs(count, 2, seed=seed)


def kept_logit(logits_N2):
    return logits_N2[:, 1] - logits_N2[:, 0]


# --- against the official code


@pytest.mark.parametrize("case", CASES)
def test_selection_matches_the_official_code(case):
    golden = load_golden(case)
    params = golden["params"]
    chosen = select_by_policy(
        golden["in_token_logits"],
        golden["in_frame_logits"],
        params["keep"],
        importance=params["imp_ratio"],
        frame_cap=params["max_sample_ratio_for_each_frame"],
    )
    assert torch.equal(chosen.kept, golden["out_mask"].nonzero()[:, 0])
    assert torch.equal(chosen.important.long(), golden["out_importance_mask"])
    assert chosen.quotas == golden["out_quota"].tolist()
    assert len(chosen.kept) == math.floor(params["keep"] * params["t"] * params["h"] * params["w"])


@pytest.mark.parametrize("case", [CASES[0], CASES[2]])  # in the other, 17 of 175 and 0.1 round to other quotas
def test_the_method_matches_the_official_code_at_the_same_count(case):
    golden = load_golden(case)
    params = golden["params"]
    mask = golden["out_mask"].bool()
    tokens = plain(torch.zeros(len(mask), 2), grids=((params["t"], params["h"], params["w"]),))
    plan = cacovid(
        tokens,
        int(mask.sum()),
        policy=lambda _: (golden["in_token_logits"], golden["in_frame_logits"]),
        importance=params["imp_ratio"],
        frame_cap=params["max_sample_ratio_for_each_frame"],
    )
    assert torch.equal(plan.mask(), mask)


# --- invariants


@pytest.mark.parametrize("num_frames, places", [(1, 9), (2, 196), (3, 5), (8, 36), (40, 4)])
@pytest.mark.parametrize("importance", [0.1, 0.5, 1.0])
def test_every_count_is_met_exactly(num_frames, places, importance):
    tokens, frames = logits(num_frames * places, 1), logits(num_frames, 2)
    total = num_frames * places
    for num_keep in {1, 2, num_frames, total // 7 + 1, total // 3 + 1, total - 1, total}:
        chosen = select_by_policy(tokens, frames, Fraction(num_keep, total), importance=importance)
        assert len(chosen.kept) == num_keep and (chosen.kept.diff() > 0).all()
        assert sum(chosen.quotas) == math.floor(Fraction(importance) * num_keep)
        assert max(chosen.quotas) <= places and min(chosen.quotas) >= 0
        assert int(chosen.important.sum()) == sum(chosen.quotas)
        assert chosen.important[chosen.kept].sum() == sum(chosen.quotas)


@pytest.mark.parametrize("keep", [0.05, 0.15, 0.3, 0.9])
def test_a_float_share_keeps_what_floor_gives(keep):
    assert len(select_by_policy(logits(6 * 35, 1), logits(6, 2), keep).kept) == math.floor(keep * 6 * 35)


def test_the_coverage_is_even():
    chosen = select_by_policy(logits(8 * 36, 1), logits(8, 2), 0.25)
    others = (~chosen.important).nonzero()[:, 0]
    coverage = torch.searchsorted(others, chosen.kept[~chosen.important[chosen.kept]])
    gaps = coverage.diff()
    assert coverage[0] == 0 and coverage[-1] == len(others) - 1 and gaps.max() - gaps.min() <= 1


def test_no_two_coverage_ranks_coincide():
    for total in (97, 3137, 20001):
        for left_out in (1, 2, 3):
            keep = Fraction(total - left_out, total)
            chosen = select_by_policy(torch.zeros(total, 2), torch.zeros(1, 2), keep, importance=0.001)
            assert len(chosen.kept) == total - left_out


def test_with_full_importance_the_policy_decides_alone():
    tokens, frames = logits(8 * 36, 1), logits(8, 2)
    chosen = select_by_policy(tokens, frames, 0.25, importance=1.0)
    assert chosen.important[chosen.kept].all()
    for t, score_n in enumerate(kept_logit(tokens).view(8, 36)):
        best = score_n.topk(chosen.quotas[t]).indices.sort().values
        assert torch.equal(chosen.kept[chosen.kept // 36 == t] - 36 * t, best)


def test_everything_stays_where_everything_may():
    assert len(select_by_policy(logits(50, 1), logits(2, 2), 1.0, importance=1.0, frame_cap=1.0).kept) == 50


def test_quotas_never_exceed_a_frame():
    """Where the official code returns 294 of 392."""
    chosen = select_by_policy(logits(392, 1), torch.tensor([[0.0, 5], [0, -5]]), 1.0, importance=1.0, frame_cap=1.5)
    assert chosen.quotas == [196, 196] and len(chosen.kept) == 392


def test_a_constant_or_a_scale_changes_nothing():
    tokens, frames = logits(8 * 36, 1), logits(8, 2)
    kept = select_by_policy(tokens, frames, 0.25).kept
    shifted = tokens.view(8, 36, 2) + torch.arange(8.0)[:, None, None] * torch.tensor([0.0, 1.0])
    assert torch.equal(select_by_policy(shifted.flatten(0, 1), frames, 0.25).kept, kept)
    assert torch.equal(select_by_policy(tokens.sinh(), frames, 0.25).kept, kept) is False  # per logit: no monotone map
    score_N = kept_logit(tokens)
    risen = torch.stack([torch.zeros_like(score_N), score_N.exp() + score_N], 1)
    assert torch.equal(select_by_policy(risen, frames, 0.25).kept, kept)
    assert torch.equal(select_by_policy(tokens, 7 * frames, 0.25).kept, kept)


def test_quotas_follow_the_frames_up_to_one():
    frames = logits(16, 3)
    quotas = torch.tensor(frame_quotas(frames, 196, 0.15, 0.5, 0.225))
    ranked = quotas[kept_logit(frames).argsort()]
    assert (ranked.diff() >= -1).all() and quotas.max() == 22 and quotas.min() >= 1


@pytest.mark.parametrize("keep", [0.25, Fraction(72, 288)])
def test_the_default_cap_is_one_and_a_half_times_the_share(keep):
    frames = torch.tensor([[0.0, 9.0]] + [[0.0, 0.0]] * 7)
    assert max(select_by_policy(logits(288, 1), frames, keep).quotas) == int(0.5 * 36 * 1.5 * 0.25)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_equal_frames_get_equal_quotas(value):
    frames = torch.tensor([[0.0, value]]).repeat(4, 1)
    assert frame_quotas(frames, 20, 0.25, 0.8, 0.375) == [4, 4, 4, 4]


def test_equal_tokens_go_to_the_lowest_index():
    chosen = select_by_policy(torch.zeros(40, 2), torch.zeros(2, 2), 0.2, importance=1.0)
    assert chosen.kept.tolist() == [0, 1, 2, 3, 20, 21, 22, 23]


def test_half_precision_logits_are_compared_in_float32():
    tokens, frames = logits(96, 1).bfloat16(), logits(4, 2).bfloat16()
    chosen = select_by_policy(tokens, frames, 0.25)
    assert torch.equal(chosen.kept, select_by_policy(tokens.float(), frames.float(), 0.25).kept)


# --- the method


def test_the_policy_sees_the_tokens():
    tokens, seen = random_video(), []

    def policy(given):
        seen.append(given)
        return random_policy(given)

    plan = cacovid(tokens, 30, policy=policy)
    assert seen == [tokens]
    expected = select_by_policy(*random_policy(tokens), Fraction(30, 96))
    assert torch.equal(plan.kept, expected.kept)


def test_the_tiles_of_an_image_are_one_frame():
    tokens = plain(random_inputs(24), grids=((1, 2, 4), (1, 4, 4)))
    assert cacovid(tokens, 7, policy=lambda _: (logits(24, 1), logits(1, 2))).num_kept == 7


# --- bad input


@pytest.mark.parametrize("policy", [None, "cacovid", 3])
def test_without_a_policy_there_is_nothing_to_select_by(policy):
    with pytest.raises(BadOption, match="needs a trained policy, got policy=.*tokensieve train cacovid"):
        cacovid(random_video(), 30, policy=policy)


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda: (logits(95, 1), logits(4, 2)), r"token logits of shape \(96, 2\).*got \(95, 2\)"),
        (lambda: (logits(96, 1)[:, :1], logits(4, 2)), r"token logits of shape \(96, 2\)"),
        (lambda: (logits(96, 1), logits(3, 2)), r"frame logits of shape \(4, 2\)"),
        (lambda: (logits(96, 1), logits(4, 2) * torch.nan), "frame logits.*with NaN"),
        (lambda: (logits(96, 1) / 0, logits(4, 2)), "token logits.*infinite values"),
    ],
)
def test_bad_logits_are_refused(made, message):
    with pytest.raises(BadOption, match=message):
        cacovid(random_video(), 30, policy=lambda _: made())


@pytest.mark.parametrize("importance", [0, -1, 1.5, True, "0.5", float("nan")])
def test_bad_importance_is_refused(importance):
    with pytest.raises(BadOption, match=r"importance must be in \(0, 1\]"):
        cacovid(random_video(), 30, policy=random_policy, importance=importance)


@pytest.mark.parametrize("frame_cap", [0, -1, True, "1", float("inf"), float("nan")])
def test_bad_caps_are_refused(frame_cap):
    with pytest.raises(BadOption, match="frame_cap must be a finite number above 0"):
        cacovid(random_video(), 30, policy=random_policy, frame_cap=frame_cap)


@pytest.mark.parametrize("num_keep", [2, 7, 24, 95])
def test_without_frame_logits_the_whole_video_is_sampled_systematically(num_keep):
    video = random_video()
    score_N = torch.randn(96, generator=torch.Generator().manual_seed(4))
    score_N[24:] -= 30  # all good ones in the first frame

    def policy(tokens):
        return torch.stack([-score_N, score_N], -1), None

    plan = get_method("cacovid")(video, num_keep, policy=policy)
    assert plan.num_kept == num_keep
    assert torch.equal(plan.kept, systematic_subset(2 * score_N, num_keep))
    assert (plan.kept < 24).sum() == min(num_keep, 24)


@pytest.mark.parametrize("option", ["importance", "frame_cap"])
def test_options_that_need_frame_logits_are_refused_without(option):
    with pytest.raises(BadOption, match="no frame logits"):
        cacovid(random_video(), 30, policy=lambda tokens: (random_policy(tokens)[0], None), **{option: 0.5})
