"""The greedy loop, DivPrune and the budget over tiles, against plain readings of their definitions."""

import pytest
import torch

from tests.compression.helpers import load_golden, plain, random_inputs
from tokensieve.compression import get_method, maxmin
from tokensieve.compression.maxmin import greedy_max_min, most_isolated, unit_rows
from tokensieve.compression.score_diversity import relative_score, score_diversity_order, select_by_score, share_budget
from tokensieve.errors import BadOption


def slow_greedy(x, num_keep, first, weight):
    """The definition, in float64, one number at a time."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    picks = [first]
    while len(picks) < num_keep:
        best, best_value = None, -1.0
        for i in range(len(x)):
            value = float(weight[i]) * min(float(1 - unit[i] @ unit[p]) for p in picks)
            if i not in picks and value > best_value:
                best, best_value = i, value
        picks.append(best)
    return picks


@pytest.mark.parametrize("weighted", [False, True])
def test_greedy_follows_its_definition(weighted):
    x = random_inputs(40, 8)
    weight = torch.rand(40, generator=torch.Generator().manual_seed(2)) if weighted else None
    order = greedy_max_min(unit_rows(x), 12, torch.tensor([5]), weight)
    assert order.tolist() == slow_greedy(x, 12, 5, torch.ones(40) if weight is None else weight)


@pytest.mark.parametrize("seed", range(5))
def test_long_sequences_give_the_same_without_the_matrix(monkeypatch, seed):
    unit = unit_rows(random_inputs(90, 8, seed=seed))
    expected = greedy_max_min(unit, 30, most_isolated(unit))
    monkeypatch.setattr(maxmin, "MAX_MATRIX_BYTES", 4 * 90 * 7)  # 7 rows at a time
    assert torch.equal(greedy_max_min(unit, 30, most_isolated(unit)), expected)


def test_most_isolated_ignores_the_token_itself():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, -1.0]])
    assert most_isolated(unit_rows(x)).item() == 4


def test_ties_go_to_the_lowest_index():
    unit = unit_rows(torch.ones(6, 3))
    assert greedy_max_min(unit, 4, torch.tensor([2])).tolist() == [2, 0, 1, 3]


def test_copies_come_last():
    x = random_inputs(40, 256)  # wide enough for rounding to tell a token from its copy
    order = greedy_max_min(unit_rows(torch.cat([x, 1.7 * x])), 80, torch.tensor([0])).tolist()
    assert {i % 40 for i in order[:40]} == set(range(40))  # one of each, before any second one
    assert order[40:] == sorted(order[40:])


def test_a_zero_row_is_far_from_everything():
    x = torch.cat([torch.ones(5, 3), torch.zeros(1, 3)])
    assert unit_rows(x)[5].tolist() == [0, 0, 0]
    assert maxmin.cosine_distance(unit_rows(x), unit_rows(x))[5].tolist() == [1] * 6
    assert greedy_max_min(unit_rows(x), 2, torch.tensor([0])).tolist() == [0, 5]


# --- DivPrune


@pytest.mark.parametrize("case", ["divprune-n120", "divprune-n65-half-even"])
def test_divprune_matches_the_official_code(case):
    golden = load_golden(case)
    unit = unit_rows(golden["in_x"])
    order = greedy_max_min(unit, len(golden["out_order"]), most_isolated(unit))
    assert torch.equal(order, golden["out_order"])
    kept = get_method("divprune")(plain(golden["in_x"]), golden["params"]["ratio"]).kept
    assert torch.equal(kept, golden["out_keep_index"])


def test_divprune_is_scale_free_and_knows_no_tiles():
    x = random_inputs(48)
    scale = torch.linspace(0.1, 50, 48)[:, None]
    kept = get_method("divprune")(plain(x), 12).kept
    assert torch.equal(get_method("divprune")(plain(x * scale), 12).kept, kept)
    assert torch.equal(get_method("divprune")(plain(x, crop=torch.arange(48) // 12), 12).kept, kept)


# --- score times diversity


def test_relative_score():
    assert relative_score(torch.tensor([1.0, 3.0, 2.0])).tolist() == pytest.approx([0, 1, 0.5])


@pytest.mark.parametrize("score", [torch.zeros(4), torch.ones(4), 5 + 1e-4 * torch.arange(4.0), -torch.ones(4)])
def test_scores_equal_up_to_rounding_count_as_one(score):
    assert relative_score(score).tolist() == [1, 1, 1, 1]


def test_equal_scores_are_farthest_point_sampling_from_token_0():
    golden = load_golden("zooprune_select-equal-scores")
    order = score_diversity_order(golden["in_features"], golden["in_sensitivity"], golden["params"]["k"])
    assert torch.equal(order, golden["out_order"])
    assert torch.equal(order.sort().values, golden["out_keep_index"])
    assert order.tolist() == slow_greedy(golden["in_features"], len(order), 0, torch.ones(50))


def test_the_first_pick_has_the_highest_score_and_the_lowest_comes_last():
    x, score = random_inputs(20), torch.rand(20, generator=torch.Generator().manual_seed(0))
    order = score_diversity_order(x, score, 20)
    assert order[0] == score.argmax() and order[-1] == score.argmin()


def test_tiles_match_the_official_code():
    golden = load_golden("zooprune_multi-crops")
    real = (golden["in_frame_label"] >= 0).nonzero()[:, 0]  # newline tokens are no candidates here
    sizes, share = golden["params"]["crop_tokens"], golden["params"]["k_frame"]
    tokens = plain(
        golden["in_features"][real],
        grids=tuple((1, 1, size) for size in sizes),
        crop=golden["in_frame_label"][real],
    )
    plan = select_by_score(tokens, golden["in_sensitivity"][real], share * len(sizes))
    assert torch.equal(real[plan.kept], golden["out_keep_index"])


def test_tiles_are_selected_one_by_one_even_when_interleaved():
    x, score = random_inputs(60), torch.rand(60, generator=torch.Generator().manual_seed(0))
    crop = torch.arange(60) % 3
    plan = select_by_score(plain(x, crop=crop), score, 17)
    for tile, share in enumerate([6, 6, 5]):
        member = (crop == tile).nonzero()[:, 0]
        alone = select_by_score(plain(x[member]), score[member], share)
        assert torch.equal(plan.kept[crop[plan.kept] == tile], member[alone.kept])


@pytest.mark.parametrize(
    "counts, num_keep, shares",
    [
        ([25, 30, 30, 24], 28, [7, 7, 7, 7]),
        ([25, 30, 30, 24], 30, [8, 8, 7, 7]),
        ([9, 2, 9], 12, [5, 2, 5]),
        ([9, 2, 9], 13, [6, 2, 5]),
        ([2, 2, 100], 50, [2, 2, 46]),
        ([5, 5, 5], 2, [1, 1, 0]),
        ([5], 3, [3]),
        ([3, 4], 7, [3, 4]),
    ],
)
def test_share_budget(counts, num_keep, shares):
    assert share_budget(counts, num_keep) == shares and sum(shares) == num_keep


@pytest.mark.parametrize("num_keep", [1, 2, 3, 7, 20, 58, 59])
def test_the_count_is_exact_over_uneven_tiles(num_keep):
    crop = torch.tensor([0] * 30 + [1] * 4 + [4] * 25 + [7])  # numbers may have gaps
    tokens = plain(random_inputs(60), crop=crop)
    assert select_by_score(tokens, tokens.features.norm(dim=-1), num_keep).num_kept == num_keep
    assert select_by_score(tokens, torch.ones(60), num_keep).num_kept == num_keep


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_numbers_are_refused(bad):
    score = torch.ones(20)
    score[3] = bad
    with pytest.raises(BadOption, match="scores are NaN or infinite"):
        select_by_score(plain(random_inputs(20)), score, 5)


def test_norm_diversity_starts_with_the_longest_token():
    x = torch.nn.functional.normalize(random_inputs(30), dim=-1) * torch.linspace(1, 2, 30)[:, None]
    order = score_diversity_order(x, x.norm(dim=-1), 8)
    assert order[0] == 29
    assert torch.equal(get_method("norm-diversity")(plain(x), 8).kept, order.sort().values)
