"""PruMerge and PruMerge+."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from tests.compression.helpers import load_golden, plain, random_inputs, random_tower, random_video
from tokensieve.compression import TowerLayer, TowerView, apply_plan, get_method
from tokensieve.compression import prumerge as module
from tokensieve.compression.prumerge import (
    merge_picture,
    most_similar,
    outlier_and_spread_patches,
    outlier_patches,
    scores_and_keys,
    top_and_spread_patches,
    top_patches,
)
from tokensieve.compression.tokens import identity
from tokensieve.errors import BadOption

prumerge, prumerge_plus = get_method("prumerge"), get_method("prumerge+")
both = pytest.mark.parametrize("method", [prumerge, prumerge_plus], ids=["prumerge", "prumerge+"])


def tower_of(query_SC, key_SC):
    """A tower whose last layer has these queries and keys, as one head or cut into several."""
    layer = TowerLayer(
        query=(query_SC.unflatten(1, (2, -1)).transpose(0, 1),),
        key=(key_SC.unflatten(1, (2, -1)).transpose(0, 1),),
        scale=99.0,  # one head of full width has a scale of its own
        num_prefix=1,
        to_tokens=identity,
    )
    return TowerView(layers={-1: layer, -2: layer}, hidden=(query_SC,))


def image_tokens(num_tokens=60, num_prefix=1):
    tokens = plain(random_inputs(num_tokens), grids=((1, 6, num_tokens // 6),))
    return dataclasses.replace(tokens, tower=random_tower(1, num_tokens, num_prefix=num_prefix))


# --- against the official code


@pytest.mark.parametrize("case", ["prumerge-base", "prumerge-plus"])
def test_prumerge_matches_the_official_code(case):
    golden = load_golden(case)
    hidden_nC = golden["in_hidden_states"][0, 1:]
    tower = tower_of(golden["in_queries"][0], golden["in_keys"][0])
    score_n, key_nC = scores_and_keys(tower)
    is_plus = golden["params"]["plus"]
    kept_K = (outlier_and_spread_patches if is_plus else outlier_patches)(score_n)

    method = prumerge_plus if is_plus else prumerge
    plan = method(dataclasses.replace(plain(hidden_nC), tower=tower), 2, adaptive=True)
    extra = plan.kept[~torch.isin(plan.kept, kept_K)]
    assert len(extra) == 1
    official_order = torch.cat([kept_K, extra])
    ours_KC = apply_plan(plan, hidden_nC)[torch.searchsorted(plan.kept, official_order)]
    torch.testing.assert_close(ours_KC, golden["out_tokens"][0], rtol=1e-5, atol=1e-5)


# --- against the equations


def by_the_equations(score, keys, x, kept, num_neighbours=32):
    """The merged tokens of `kept`, then the extra one, with loops."""
    made = []
    for i in kept:
        others = [j for j in range(len(x)) if j != i]
        others.sort(key=lambda j: -F.cosine_similarity(keys[i], keys[j], dim=0).item())
        made.append(x[i] + sum(score[j] * x[j] for j in others[:num_neighbours]))
    made.append(sum(score[j] * x[j] for j in range(len(x)) if j not in kept))
    return torch.stack(made)


@pytest.mark.parametrize("num_keep", [1, 2, 15, 59])
def test_an_image_by_the_equations(num_keep):
    tokens = image_tokens()
    score_n, key_nC = scores_and_keys(tokens.tower)
    kept = score_n.topk(num_keep - 1).indices.tolist()
    plan = prumerge.fn(tokens, num_keep)
    dropped = [j for j in range(60) if j not in kept]
    extra = max(dropped, key=lambda j: score_n[j].item())
    assert plan.kept.tolist() == sorted([*kept, extra]) and plan.merge.before_projector
    expected = by_the_equations(score_n, key_nC, tokens.features, kept)
    ours = apply_plan(plan, tokens.features)[torch.searchsorted(plan.kept, torch.tensor([*kept, extra]))]
    torch.testing.assert_close(ours, expected)


def test_attention_takes_all_heads_as_one():
    tokens = image_tokens()
    layer = tokens.tower.layers[-1]
    score_n, key_nC = scores_and_keys(tokens.tower)
    query, key = (part[0].transpose(0, 1).flatten(1) for part in (layer.query, layer.key))
    torch.testing.assert_close(score_n, (query[0] @ key.T / 16**0.5).softmax(-1)[1:])
    assert torch.equal(key_nC, key[1:])


def test_without_a_class_token_received_attention_decides():
    tower = random_tower(1, 40, num_prefix=0)
    assert torch.equal(scores_and_keys(tower)[0], tower.layers[-1].received_attention())


def test_neighbours_leave_the_token_itself_out_and_chunks_do_not_matter(monkeypatch):
    keys, kept = random_inputs(50), torch.tensor([7, 3, 49])
    neighbours = most_similar(keys, kept, 5)
    assert neighbours.shape == (3, 5) and not (neighbours == kept[:, None]).any()
    monkeypatch.setattr(module, "MAX_MATRIX_BYTES", 4 * 50)
    assert torch.equal(most_similar(keys, kept, 5), neighbours)
    assert most_similar(keys, kept, 99).shape == (3, 49)


# --- who is kept


def test_outliers_lie_above_the_third_quartile():
    score = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 30, 14.4])  # Q3 + 1.5 IQR = 7.75 + 6.75 = 14.5
    assert outlier_patches(score).tolist() == [8]
    score[9] = 29
    assert outlier_patches(score).tolist() == [8, 9]


@pytest.mark.parametrize("select", [outlier_patches, outlier_and_spread_patches])
def test_without_outliers_one_patch_is_kept(select):
    assert select(torch.arange(12.0))[0] == 11
    assert select(torch.ones(12))[0] == 0
    assert select(torch.ones(1)).tolist() == [0]
    assert select(torch.ones(2))[0] == 0


def test_plus_adds_every_sth_patch():
    score = torch.ones(40)
    score[[3, 9, 20]] = torch.tensor([5.0, 7.0, 6.0])
    step = int(int(40 / 3) / 3)
    expected = [9, 20, 3, *(i for i in range(0, 40, step) if i not in (3, 9, 20))]
    assert outlier_and_spread_patches(score).tolist() == expected


def test_plus_takes_all_where_many_are_outliers():
    score = torch.cat([torch.ones(9), torch.full((2,), 9.0)])  # 11 // 2 // 3 = 1
    assert outlier_and_spread_patches(score).sort().values.tolist() == list(range(11))


@pytest.mark.parametrize("num_keep", [0, 1, 2, 5, 20, 59, 60])
def test_plus_under_a_budget(num_keep):
    score = random_inputs(60, 1)[:, 0]
    kept = top_and_spread_patches(score, num_keep)
    num_top = min(num_keep, max(1, round(num_keep / 4)))
    assert len(kept.unique()) == num_keep
    assert torch.equal(kept[:num_top], top_patches(score, num_top))


def test_plus_is_spread_over_the_picture():
    kept = top_and_spread_patches(torch.arange(100.0), 20)[5:].tolist()  # the top are 95 to 99
    assert kept[0] < 95 / 15 and kept[-1] > 95 - 95 / 15
    assert {b - a for a, b in zip(kept, kept[1:], strict=False)} <= {6, 7}


def test_equal_scores_go_to_the_lowest_index():
    assert top_patches(torch.ones(50), 3).tolist() == [0, 1, 2]


# --- budgets, videos


@both
@pytest.mark.parametrize("num_keep", [1, 2, 3, 4, 5, 30, 92, 95])
def test_the_budget_is_met_with_the_extra_tokens(method, num_keep):
    assert method.fn(random_video(), num_keep).num_kept == num_keep


@both
def test_adaptive_takes_what_the_outliers_of_each_frame_give(method):
    tokens = random_video()
    plan = method(tokens, 50, adaptive=True)
    assert torch.equal(plan.kept, method(tokens, 5, adaptive=True).kept)
    rule = outlier_patches if method is prumerge else outlier_and_spread_patches
    score_N, _ = scores_and_keys(tokens.tower)
    counts = [min(24, len(rule(score_n)) + 1) for score_n in score_N.split(24)]
    assert torch.bincount(plan.kept // 24).tolist() == counts


@both
def test_frames_do_not_mix(method):
    plan = method(random_video(), 30)
    assert torch.equal(plan.merge.source // 24, plan.kept[plan.merge.target] // 24)


def test_a_picture_that_keeps_everything_stays_as_it_is():
    tokens = plain(random_inputs(30), grids=((1, 2, 2), (1, 2, 13)), crop=torch.tensor([0] * 4 + [1] * 26))
    layers = {
        place: TowerLayer(
            query=tuple(random_inputs(1 + n, 8, seed=n)[None] for n in (4, 26)),
            key=tuple(random_inputs(1 + n, 8, seed=2 * n)[None] for n in (4, 26)),
            scale=0.3,
            num_prefix=1,
            to_tokens=identity,
        )
        for place in (-1, -2)
    }
    plan = prumerge(dataclasses.replace(tokens, tower=TowerView(layers=layers, hidden=())), 20)
    assert plan.num_kept == 20 and plan.kept[:4].tolist() == [0, 1, 2, 3]
    assert torch.equal(apply_plan(plan, tokens.features)[:4], tokens.features[:4])


def test_merge_picture_of_nothing_kept_is_one_sum():
    score, x = torch.tensor([0.1, 0.5, 0.4]), random_inputs(3)
    anchor, source, weight = merge_picture(score, x, torch.empty(0, dtype=torch.int64))
    assert anchor.tolist() == [1, 1, 1] and source.tolist() == [0, 1, 2] and torch.equal(weight, score)


# --- bad input


@both
def test_bad_options_are_refused(method):
    with pytest.raises(BadOption, match="adaptive must be True or False"):
        method(image_tokens(), 10, adaptive=1)


@both
def test_attention_that_is_no_number_is_refused(method):
    tokens = image_tokens()
    tokens.tower.layers[-1].key[0][0, 3, 0] = torch.nan
    with pytest.raises(BadOption, match="attention of the vision tower is NaN"):
        method(tokens, 10)
