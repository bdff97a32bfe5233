"""Subset samplers: the official draws, the laws they follow, what they refuse."""

import itertools
import math

import pytest
import torch

from tests.compression.helpers import load_golden
from tokensieve.errors import BadOption
from tokensieve.policies.ocss import (
    cap_probabilities,
    count_groups,
    group_cap,
    group_probabilities,
    ocss_subsets,
    token_groups,
    token_probabilities,
)
from tokensieve.policies.samplers import (
    density_subset,
    frame_probabilities,
    frame_subsets,
    frames_to_draw,
    gumbel_subsets,
    peaks_of_frames,
    plackett_luce_logprobs,
)
from tokensieve.policies.subsets import Subsets, by_frame, keep_scores, largest, mask_of, subset_size

OCSS = ["cacovid_ocss-t3-r04", "cacovid_ocss-t4-r10"]
SAMPLING = ["cacovid_sampling-t5-r12", "cacovid_sampling-t8-r10"]
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(*shape, seed=1, sharp=2.0):
    return sharp * torch.randn(*shape, 2, generator=seeded(seed))


def steps(token_logits, params):
    """Scores, groups and both probabilities of a golden file's parameters."""
    score = by_frame(keep_scores(token_logits, "token_logits"), params["t"])
    num_groups = count_groups(params["rate"], score.shape[-1], params["group_size"])
    group = token_groups(score, num_groups)
    mass = group_probabilities(score, group, group_cap(num_groups, params["max_group_prob"]))
    return score, mass, token_probabilities(score, group, num_groups)


# --- parity with the official code


@pytest.mark.parametrize("case", range(7))
def test_cap_is_the_official_one(case):
    golden = load_golden("cacovid_cap-mixed")
    prob, expected = golden[f"in_p_{case:02d}"], golden[f"out_p_{case:02d}"]
    if prob.ndim == 1:
        torch.testing.assert_close(cap_probabilities(prob, golden["params"]["caps"][case]), expected, **CLOSE)
    else:  # there the whole matrix sums to 1 and only the floor acts
        torch.testing.assert_close(frame_probabilities(prob.log(), len(prob)) / len(prob), expected, **CLOSE)


@pytest.mark.parametrize("name", OCSS + SAMPLING)
def test_ocss_probabilities_and_subsets_are_the_official_ones(name):
    golden = load_golden(name)
    params = golden["params"]
    score, mass, prob = steps(golden["in_token_logits"], params)
    if name in OCSS:
        torch.testing.assert_close(mass, golden["out_group_prob"], **CLOSE)
        given_group = prob.gather(1, golden["in_draw_group_id"][..., None].expand(-1, -1, prob.shape[-1]))
        torch.testing.assert_close(given_group, golden["out_token_prob"], **CLOSE)
    order = golden["in_draw_token_idx"].transpose(0, 1).clone()
    order[0] = largest(score, order.shape[-1])
    start = params.get("num_content", 0)
    assert torch.equal(mask_of(order, score.shape[-1]), golden["out_mask"].bool()[start : start + len(order)])


@pytest.mark.parametrize("name", OCSS)
def test_ocss_draws_the_official_subsets_from_the_same_seed(name):
    golden = load_golden(name)
    params = golden["params"]
    subsets = ocss_subsets(
        golden["in_token_logits"],
        params["t"],
        params["rate"],
        params["num_token"],
        generator=seeded(params["torch_seed"]),
        group_size=params["group_size"],
        max_group_prob=params["max_group_prob"],
    )
    assert torch.equal(subsets.mask, golden["out_mask"].bool())


@pytest.mark.parametrize("name", ["cacovid_density-n196-k20", "cacovid_density-n64-k10"])
def test_density_is_the_official_one(name):
    golden = load_golden(name)
    rate = golden["params"]["k"] / golden["params"]["n"]
    assert torch.equal(density_subset(golden["in_x"], 1, rate).mask[0], golden["out_mask"].bool())


@pytest.mark.parametrize("name", SAMPLING)
def test_frames_are_the_official_ones(name):
    golden = load_golden(name)
    params, num_frame = golden["params"], golden["params"]["num_frame"]
    score = keep_scores(golden["in_frame_logits"], "frame_logits")
    prob = frame_probabilities(score, num_frame).expand(num_frame, -1) / num_frame
    torch.testing.assert_close(prob, golden["out_frame_prob"], **CLOSE)
    index = golden["in_draw_frame_idx"].clone()
    num_places = params["h"] * params["w"]
    num_keep = subset_size(params["rate"], num_places) * params["t"]
    assert frames_to_draw(params["t"], num_places, num_keep, params["frame_ratio"]) == index.shape[1]
    index[0] = largest(score, index.shape[1])
    frames = torch.zeros(num_frame, params["t"], dtype=torch.bool).scatter_(1, index, True)
    assert torch.equal(frames, golden["out_frame_choice"].bool())
    mask = peaks_of_frames(golden["in_video_embeds"].view(params["t"], num_places, -1), frames, num_keep)
    assert torch.equal(mask, golden["out_mask"].bool()[-num_frame:])


@pytest.mark.parametrize("name", SAMPLING)
def test_the_whole_training_draw_is_the_official_one_from_the_same_seed(name):
    golden = load_golden(name)
    params = golden["params"]
    generator = seeded(params["torch_seed"])
    num_frames, rate = params["t"], params["rate"]
    content = density_subset(golden["in_video_embeds"], num_frames, rate)
    token = ocss_subsets(golden["in_token_logits"], num_frames, rate, params["num_token"], generator=generator)
    frame = frame_subsets(
        golden["in_frame_logits"],
        golden["in_video_embeds"],
        rate,
        params["num_frame"],
        generator=generator,
        frame_ratio=params["frame_ratio"],
    )
    assert torch.equal(torch.cat([content.mask, token.mask, frame.mask]), golden["out_mask"].bool())
    assert torch.equal(frame.frames, golden["out_frame_choice"].bool())


# --- the cap


@pytest.mark.parametrize("num_groups, cap", [(5, 0.5), (25, 0.1), (12, 1 / 6), (6, 1 / 3), (3, 0.34), (4, 0.25)])
def test_capped_probabilities_sum_to_one_below_the_cap(num_groups, cap):
    prob = logits(40, num_groups, sharp=5).diff(dim=-1)[..., 0].softmax(-1)
    capped = cap_probabilities(prob, cap)
    torch.testing.assert_close(capped.sum(-1), torch.ones(40))
    assert capped.max() <= cap + 1e-6 and capped.min() >= 0.99 * (1 - cap) / num_groups**2
    for row, expected in zip(prob, capped, strict=True):
        assert torch.equal(cap_probabilities(row, cap), expected)
    assert torch.equal(cap_probabilities(prob, 1.0).argsort(), prob.clamp(min=1 / num_groups**2).argsort())


@pytest.mark.parametrize("cap", [0.01, 1 / 6])
def test_a_cap_that_no_distribution_meets_gives_equal_shares(cap):
    torch.testing.assert_close(cap_probabilities(torch.tensor([0.9, 0.1, 0, 0, 0, 0]), cap), torch.full((6,), 1 / 6))


def test_the_cap_by_hand():
    # floor 1/9: .9, 1/9, 1/9 over 1.12222; the first is pinned at .5, the others share the rest
    torch.testing.assert_close(cap_probabilities(torch.tensor([0.9, 0.1, 0.0]), 0.5), torch.tensor([0.5, 0.25, 0.25]))
    # .5 pinned; of (.4, .1) 1/9 each at least: .3913, .1087 -> floored again .3913, .1111 -> normalised
    capped = cap_probabilities(torch.tensor([0.5, 0.3, 0.2]), 0.45)
    torch.testing.assert_close(capped, torch.tensor([0.45, 0.55 * 0.6, 0.55 * 0.4]))


@pytest.mark.parametrize(
    "rate, num_keep, num_groups, smallest, cap",
    [(0.01, 2, 50, 3, 0.1), (0.02, 4, 25, 7, 0.1), (0.04, 8, 12, 16, 1 / 6), (0.08, 16, 6, 32, 1 / 3)]
    + [
        (0.09, 18, 5, 39, 0.4),
        (0.12, 24, 4, 49, 0.5),
        (0.5, 98, 1, 196, 1.0),
        (0.25, 49, 2, 98, 0.9),
        (1.0, 196, 1, 196, 1.0),
    ],
)
def test_the_table_of_group_numbers(rate, num_keep, num_groups, smallest, cap):
    assert subset_size(rate, 196) == num_keep
    assert count_groups(rate, 196) == num_groups and 196 // num_groups == smallest
    assert group_cap(num_groups) == pytest.approx(cap)


# --- OCSS


@pytest.mark.parametrize(
    "num_places, rate", [(196, 0.02), (36, 0.1), (35, 0.12), (16, 0.3), (9, 0.05), (4, 1.0), (1, 0.1)]
)
def test_a_subset_lies_in_one_group_of_every_frame(num_places, rate):
    token_logits = logits(3 * num_places)
    subsets = ocss_subsets(token_logits, 3, rate, 12, generator=seeded())
    num_keep = max(round(rate * num_places), 1)
    mask = subsets.mask.view(12, 3, num_places)
    assert (mask.sum(-1) == num_keep).all()
    score = by_frame(keep_scores(token_logits, "x"), 3)
    group = token_groups(score, count_groups(rate, num_places))
    for row, label in itertools.product(range(1, 12), range(3)):
        assert len(group[label][mask[row, label]].unique()) == 1
    assert torch.equal(mask[0], mask_of(score.topk(num_keep).indices[None], num_places).view(3, -1))


def test_groups_are_cut_by_falling_score():
    group = token_groups(torch.tensor([[0.1, 3.0, 0.1, -1.0, 2.0, 0.0, 9.0]]), 3)
    assert group.tolist() == [[1, 0, 1, 2, 0, 2, 0]]  # of equal scores the first stands first
    assert token_groups(torch.zeros(2, 11), 4).tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]] * 2


def test_draws_follow_the_probabilities():
    token_logits = logits(2 * 12, seed=4, sharp=1.0)
    score = by_frame(keep_scores(token_logits, "x"), 2)
    group = token_groups(score, 3)
    mass = group_probabilities(score, group, group_cap(3))
    prob = token_probabilities(score, group, 3)
    drawn = ocss_subsets(token_logits, 2, 1 / 12, 20000, generator=seeded(), group_size=4, greedy_first=False)
    expected = (mass[..., None] * prob).sum(1).flatten()  # one token a frame
    torch.testing.assert_close(drawn.mask.float().mean(0), expected, atol=0.012, rtol=0)


def test_probabilities_inside_a_group_are_clamped():
    score = torch.tensor([[9.0, 0, 0, 0, -3, -3, -3, -9], [0, 0, 0, 0, -90, -91, -92, -200]])
    prob = token_probabilities(score, token_groups(score, 2), 2)
    torch.testing.assert_close(prob[0, 0, :4], torch.tensor([0.5, 0.125, 0.125, 0.125]) / 0.875)
    last = torch.tensor([0.0, 0.0, 0.0, -6.0]).softmax(0).clamp(0.125, 0.5)
    torch.testing.assert_close(prob[0, 1, 4:], last / last.sum(), rtol=1e-3, atol=0)  # the mass is small, so 1e-8 shows
    torch.testing.assert_close(prob[1, 1, 4:], torch.full((4,), 0.25))
    assert (prob[:, 0, 4:] == 0).all() and (prob[:, 1, :4] == 0).all()


def test_tokens_without_a_chance_can_be_drawn():
    extreme = torch.stack([torch.zeros(64), torch.linspace(-2e4, 2e4, 64)], -1)
    subsets = ocss_subsets(extreme, 2, 0.1, 300, generator=seeded())
    assert subsets.mask.any(0).all()


# --- plain draws


def test_a_plain_subset_has_its_size_in_every_frame():
    subsets = gumbel_subsets(logits(4 * 25), 4, 0.2, 9, generator=seeded())
    assert (subsets.mask.view(9, 4, 25).sum(-1) == 5).all()
    assert torch.equal(mask_of(subsets.order, 25), subsets.mask)
    assert torch.equal(subsets.order[0], largest(by_frame(keep_scores(logits(4 * 25), "x"), 4), 5))
    over_all = gumbel_subsets(logits(4 * 25), 1, 0.2, 400, generator=seeded(), greedy_first=False)
    assert (over_all.mask.sum(-1) == 20).all() and over_all.mask.view(400, 4, 25).sum(-1).unique().numel() > 5


def test_plain_draws_have_the_likelihood_that_is_told():
    token_logits = logits(4, sharp=1.0)
    drawn = gumbel_subsets(token_logits, 1, 0.5, 40000, generator=seeded(), greedy_first=False)
    share = torch.zeros(4, 4)
    share.index_put_(tuple(drawn.order[:, 0].T), torch.tensor(1 / 40000), accumulate=True)
    pairs = torch.tensor([[i, j] for i in range(4) for j in range(4) if i != j])
    told = plackett_luce_logprobs(token_logits, pairs[:, None]).sum(-1)[:, 0].exp()
    torch.testing.assert_close(told.sum(), torch.tensor(1.0))
    torch.testing.assert_close(share[tuple(pairs.T)], told, atol=0.01, rtol=0)


@pytest.mark.parametrize("num_keep", [1, 3, 6])
def test_plackett_luce_by_its_definition(num_keep):
    token_logits = logits(2, 12).double().requires_grad_()
    order = gumbel_subsets(token_logits, 2, num_keep / 6, 5, generator=seeded()).order
    got = plackett_luce_logprobs(token_logits, order)
    score = by_frame(token_logits.float().diff(dim=-1)[..., 0], 2)
    expected = torch.zeros_like(got)
    for v, g, t in itertools.product(range(2), range(5), range(2)):
        left = list(range(6))
        for j, token in enumerate(order[v, g, t].tolist()):
            expected[v, g, t, j] = score[v, t, token] - score[v, t, left].logsumexp(0)
            left.remove(token)
    torch.testing.assert_close(got, expected)
    if num_keep < 6:
        gradients = [torch.autograd.grad(x.sum(), token_logits, retain_graph=True)[0] for x in (got, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=2e-6)  # float32 inside
    assert torch.autograd.grad(got.sum(), token_logits)[0].isfinite().all()


# --- frames and density


def test_a_frame_subset_lies_in_its_frames():
    features = torch.randn(8 * 12, 6, generator=seeded(3))
    subsets = frame_subsets(logits(8), features, 0.1, 6, generator=seeded(), frame_ratio=0.25)
    assert subsets.frames.sum(-1).tolist() == [2] * 6 and subsets.order is None
    assert subsets.mask.sum(-1).tolist() == [8] * 6
    assert (subsets.mask.view(6, 8, 12).any(-1) <= subsets.frames).all()
    assert torch.equal(subsets.frames[0].nonzero()[:, 0], logits(8).diff(dim=-1)[:, 0].topk(2).indices.sort().values)
    assert subsets.frames[1:].unique(dim=0).shape[0] > 1


def test_more_frames_are_drawn_where_one_is_too_small():
    features = torch.randn(8 * 4, 6, generator=seeded(3))
    subsets = frame_subsets(logits(8), features, 0.5, 3, generator=seeded(), frame_ratio=0.125)
    assert subsets.frames.sum(-1).tolist() == [4] * 3 and subsets.mask.sum(-1).tolist() == [16] * 3
    assert frames_to_draw(8, 4, 3, 0.125) == 1 and frames_to_draw(8, 4, 5, 0.125) == 2
    assert frames_to_draw(5, 4, 1, 0.3) == 2


def test_improbable_frames_keep_a_chance():
    prob = frame_probabilities(torch.tensor([50.0, 0.0, 0.0]), 8)
    torch.testing.assert_close(prob, torch.tensor([1, 1 / 64, 1 / 64]) / (1 + 2 / 64))
    drawn = frame_subsets(
        torch.stack([torch.zeros(3), torch.tensor([50.0, 0, 0])], -1),
        torch.randn(9, 2, generator=seeded()),
        0.1,
        8,
        generator=seeded(1),
        frame_ratio=0.1,
        greedy_first=False,
    )
    assert drawn.frames.sum() == 8


def test_density_keeps_the_same_count_of_every_frame():
    features = torch.randn(2, 3 * 10, 5, generator=seeded(3))
    mask = density_subset(features, 3, 0.3).mask
    assert mask.shape == (2, 1, 30) and (mask.view(2, 3, 10).sum(-1) == 3).all()
    for v in range(2):
        assert torch.equal(density_subset(features[v], 3, 0.3).mask, mask[v])
    half = features.bfloat16()
    assert torch.equal(density_subset(half, 3, 0.3).mask, density_subset(half.float(), 3, 0.3).mask)


# --- all samplers


FEATURES = torch.randn(2, 3, 4 * 20, 6, generator=seeded(8))
SAMPLERS = {
    "ocss": lambda v, g, **more: ocss_subsets(logits(2, 3, 80)[v], 4, 0.15, 7, generator=g, **more),
    "gumbel": lambda v, g, **more: gumbel_subsets(logits(2, 3, 80)[v], 4, 0.15, 7, generator=g, **more),
    "frames": lambda v, g, **more: frame_subsets(logits(2, 3, 4)[v], FEATURES[v], 0.15, 7, generator=g, **more),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("greedy_first", [True, False])
def test_several_videos_are_one_after_the_other(name, greedy_first):
    generator = seeded(5)
    together = SAMPLERS[name](slice(None), seeded(5), greedy_first=greedy_first)
    for v in itertools.product(range(2), range(3)):
        alone = SAMPLERS[name](v, generator, greedy_first=greedy_first)
        for field in ("mask", "frames", "order"):
            one, all_of_them = getattr(alone, field), getattr(together, field)
            assert (one is None) == (all_of_them is None)
            assert one is None or torch.equal(one, all_of_them[v])


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_the_generator_is_random(name):
    state = torch.get_rng_state()
    first = SAMPLERS[name](0, seeded(5))
    torch.manual_seed(99)
    assert torch.equal(SAMPLERS[name](0, seeded(5)).mask, first.mask)
    assert not torch.equal(SAMPLERS[name](0, seeded(6)).mask, first.mask)
    torch.set_rng_state(state)
    SAMPLERS[name](0, seeded(5))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", SAMPLERS)
def test_subset_0_is_the_greedy_one_or_drawn(name):
    greedy, drawn = SAMPLERS[name](0, seeded(5)), SAMPLERS[name](0, seeded(5), greedy_first=False)
    others = [SAMPLERS[name](0, seeded(seed), greedy_first=False) for seed in range(3)]
    assert torch.equal(greedy.mask[:, 1:], drawn.mask[:, 1:])
    assert torch.equal(greedy.mask[:, 0], SAMPLERS[name](0, seeded(11)).mask[:, 0])
    assert any(not torch.equal(greedy.mask[:, 0], other.mask[:, 0]) for other in others)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_drawn_from_in_float32(dtype):
    half = logits(80).to(dtype).requires_grad_()
    score = keep_scores(half, "x")
    assert torch.equal(score, half.detach().float().diff(dim=-1)[:, 0]) and not score.requires_grad
    for sampler in (ocss_subsets, gumbel_subsets):
        mask = sampler(half, 4, 0.15, 5, generator=seeded()).mask
        assert torch.equal(mask, sampler(half.float(), 4, 0.15, 5, generator=seeded()).mask) and not mask.requires_grad


def test_kept_lists_the_mask():
    subsets = SAMPLERS["gumbel"](slice(None), seeded())
    assert subsets.kept.shape == (2, 3, 7, 12)
    assert torch.equal(torch.zeros_like(subsets.mask).scatter_(-1, subsets.kept, True), subsets.mask)
    assert (subsets.kept.diff() > 0).all()
    assert Subsets(mask=torch.tensor([[True, False, True]])).kept.tolist() == [[0, 2]]


# --- bad input


@pytest.mark.parametrize("sampler", [ocss_subsets, gumbel_subsets])
@pytest.mark.parametrize(
    "token_logits, num_frames, rate, num_subsets, message",
    [
        (logits(10), 3, 0.1, 4, "10 tokens cannot be 3 frames"),
        (logits(10), 0, 0.1, 4, "num_frames must be a whole number above 0, got 0"),
        (logits(10), 2.0, 0.1, 4, "num_frames must be a whole number"),
        (logits(10)[:, :1], 2, 0.1, 4, r"token_logits must be finite.*\(drop, keep\), got shape \(10, 1\)"),
        (logits(10)[:, 0], 2, 0.1, 4, "token_logits must be finite"),
        (logits(10) * torch.nan, 2, 0.1, 4, "token_logits.*with NaN"),
        (logits(10), 2, 0, 4, r"rate must be in \(0, 1\], got 0"),
        (logits(10), 2, 1.1, 4, "rate must be in"),
        (logits(10), 2, True, 4, "rate must be in"),
        (logits(10), 2, math.nan, 4, "rate must be in"),
        (logits(10), 2, 0.1, 0, "num_subsets must be a whole number above 0"),
        (logits(10), 2, 0.1, True, "num_subsets must be a whole number above 0"),
    ],
)
def test_bad_input_is_refused(sampler, token_logits, num_frames, rate, num_subsets, message):
    with pytest.raises(BadOption, match=message):
        sampler(token_logits, num_frames, rate, num_subsets, generator=seeded())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("generator", [None, 0, "cpu"])
def test_a_generator_is_needed(name, generator):
    with pytest.raises(BadOption, match="generator must be a torch.Generator on the CPU.*manual_seed"):
        SAMPLERS[name](0, generator)


@pytest.mark.parametrize("option", ["group_size", "max_group_prob"])
@pytest.mark.parametrize("value", [0, -1, True, "2", math.inf, math.nan])
def test_bad_group_options_are_refused(option, value):
    with pytest.raises(BadOption, match=f"{option} must be a finite number above 0"):
        ocss_subsets(logits(20), 2, 0.1, 4, generator=seeded(), **{option: value})


@pytest.mark.parametrize(
    "frame_logits, features, options, message",
    [
        (logits(4), torch.zeros(10, 3), {}, r"features must be \('tokens', 'channels'\).*multiple of 4 frames"),
        (logits(2, 4), torch.zeros(8, 3), {}, r"features must be \(2, 'tokens', 'channels'\)"),
        (logits(4), torch.zeros(8), {}, "features must be"),
        (logits(4), torch.full((8, 3), torch.inf), {}, "features are NaN or infinite"),
        (logits(4) / 0, torch.zeros(8, 3), {}, "frame_logits.*NaN or infinite"),
        (logits(4), torch.zeros(8, 3), {"frame_ratio": 0}, r"frame_ratio must be in \(0, 1\]"),
        (logits(4), torch.zeros(8, 3), {"frame_ratio": 1.5}, r"frame_ratio must be in \(0, 1\]"),
    ],
)
def test_bad_frames_are_refused(frame_logits, features, options, message):
    with pytest.raises(BadOption, match=message):
        frame_subsets(frame_logits, features, 0.1, 3, generator=seeded(), **options)


def test_bad_density_input_is_refused():
    with pytest.raises(BadOption, match="features must be"):
        density_subset(torch.zeros(10, 3), 3, 0.1)
    with pytest.raises(BadOption, match="num_frames must be"):
        density_subset(torch.zeros(10, 3), 0, 0.1)
    with pytest.raises(BadOption, match="rate must be"):
        density_subset(torch.zeros(9, 3), 3, 0)
