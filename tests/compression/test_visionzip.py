"""VisionZip, and how methods for one picture are run on videos and tiles."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from tests.compression.helpers import load_golden, plain, random_inputs, random_tower, random_video
from tokensieve.compression import TowerLayer, TowerView, apply_plan, get_method, merge_plan
from tokensieve.compression.tokens import identity
from tokensieve.compression.views import split_views
from tokensieve.compression.visionzip import scores_and_keys, zip_picture
from tokensieve.errors import BadOption

visionzip = get_method("visionzip")


def image_tokens(num_tokens=40, num_prefix=1, seed=3):
    tokens = plain(random_inputs(num_tokens), grids=((1, 5, num_tokens // 5),))
    return dataclasses.replace(tokens, tower=random_tower(1, num_tokens, num_prefix=num_prefix, seed=seed))


# --- against the official code


@pytest.mark.parametrize("case", ["visionzip-b1-nodivide", "visionzip-b2"])
def test_visionzip_matches_the_official_code(case):
    golden = load_golden(case)
    num_dominant, num_contextual = golden["params"]["dominant"] - 1, golden["params"]["contextual"]  # less the class
    for attention_HNN, hidden_NC, key_Nd, tokens_KC, dominant_K in zip(
        golden["in_attention"],
        golden["in_hidden_states"],
        golden["in_key_metric"],
        golden["out_tokens"],
        golden["out_dominant_index"],
        strict=True,
    ):
        score_n = attention_HNN[:, 0, 1:].mean(0)
        entries = zip_picture(score_n, key_Nd[1:], num_dominant, num_contextual)
        plan = merge_plan(len(score_n), *entries)
        is_dominant_K = torch.isin(plan.kept, dominant_K[1:] - 1)
        assert int(is_dominant_K.sum()) == num_dominant
        ours_KC = apply_plan(plan, hidden_NC[1:])
        official_KC = tokens_KC[1:]  # without the class token: dominant ones, then contextual ones
        torch.testing.assert_close(ours_KC[is_dominant_K], official_KC[:num_dominant], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours_KC[~is_dominant_K], official_KC[num_dominant:], rtol=1e-5, atol=1e-5)


# --- against the equations


def by_the_equations(score, keys, x, num_dominant, num_contextual):
    """The kept indices and tokens, with loops."""
    dominant = sorted(range(len(score)), key=lambda i: (-score[i], i))[:num_dominant]
    rest = [i for i in range(len(score)) if i not in dominant]
    stride = max(1, len(rest) // num_contextual)
    targets = rest[::stride][:num_contextual]
    members = {t: [] for t in targets}
    for i in rest:
        if i not in targets:
            members[max(targets, key=lambda t: F.cosine_similarity(keys[i], keys[t], dim=0).item())].append(i)
    made = {i: x[i] for i in dominant}
    for t in targets:
        made[t] = x[t] + (x[members[t]].mean(0) if members[t] else 0)
    return sorted(made), torch.stack([made[i] for i in sorted(made)])


@pytest.mark.parametrize("num_keep, num_dominant", [(32, 27), (10, 8), (7, 6), (3, 3), (39, 33)])
def test_an_image_by_the_equations(num_keep, num_dominant):
    tokens = image_tokens()
    layer = tokens.tower.layers[-2]
    plan = visionzip(tokens, num_keep)
    if num_dominant == num_keep:
        kept = sorted(layer.class_attention().topk(num_keep).indices.tolist())
        expected = tokens.features[kept]
    else:
        kept, expected = by_the_equations(
            layer.class_attention(), layer.mean_keys(), tokens.features, num_dominant, num_keep - num_dominant
        )
    assert plan.kept.tolist() == kept
    torch.testing.assert_close(apply_plan(plan, tokens.features), expected)
    assert plan.merge.before_projector


def test_without_a_class_token_the_last_layer_decides():
    tower = random_tower(1, 40, num_prefix=0)
    score_N, key_Nd = scores_and_keys(tower)
    assert torch.equal(score_N, tower.layers[-1].received_attention())
    assert torch.equal(key_Nd, tower.layers[-1].mean_keys())


def test_the_class_token_of_the_layer_before_the_last_decides():
    tower = random_tower(1, 40)
    score_N, key_Nd = scores_and_keys(tower)
    assert torch.equal(score_N, tower.layers[-2].class_attention())
    assert torch.equal(key_Nd, tower.layers[-2].mean_keys())


@pytest.mark.parametrize("dominant, num_dominant", [(0.5, 10), (1.0, 20), (0.01, 1), (1, 20)])
def test_the_dominant_share(dominant, num_dominant):
    tokens = image_tokens()
    plan = visionzip(tokens, 20, dominant=dominant)
    best = tokens.tower.layers[-2].class_attention().topk(num_dominant).indices
    assert plan.num_kept == 20 and plan.mask()[best].all()
    is_merged_K = (torch.bincount(plan.merge.target) > 1) & ~torch.isin(plan.kept, best)
    assert (torch.bincount(plan.merge.target)[torch.isin(plan.kept, best)] == 1).all()
    assert bool(is_merged_K.any()) == (num_dominant < 20)


def test_every_token_is_used_once_and_contextual_tokens_weigh_two():
    plan = visionzip(image_tokens(), 20)
    assert plan.merge.source.sort().values.tolist() == list(range(40))
    weight_K = torch.zeros(20).index_add_(0, plan.merge.target, plan.merge.weight)
    num_members_K = torch.bincount(plan.merge.target)
    torch.testing.assert_close(weight_K, torch.where(num_members_K > 1, 2.0, 1.0))


def test_equal_scores_go_to_the_lowest_index():
    anchor, _, _ = zip_picture(torch.ones(12), random_inputs(12), 4, 2)
    assert anchor[:4].tolist() == [0, 1, 2, 3]


def test_equal_keys_all_go_to_the_first_target():
    anchor, source, weight = zip_picture(torch.arange(12.0), torch.ones(12, 3), 2, 2)
    assert set(anchor[source < 10].tolist()) == {0, 5}
    assert anchor[(source < 10) & (source != 5)].eq(0).all()
    torch.testing.assert_close(weight[(source > 0) & (source < 10) & (source != 5)], torch.full((8,), 1 / 8))


# --- videos and tiles


@pytest.mark.parametrize("num_keep, shares", [(30, [8, 7, 8, 7]), (4, [1, 1, 1, 1]), (2, [0, 1, 0, 1])])
def test_every_frame_gets_its_share(num_keep, shares):
    tokens = random_video()
    kept_T = torch.bincount(visionzip(tokens, num_keep).kept // 24, minlength=4)
    assert sorted(kept_T.tolist()) == sorted(shares) and kept_T.sum() == num_keep


def test_frames_do_not_mix():
    plan = visionzip(random_video(), 30)
    assert torch.equal(plan.merge.source // 24, plan.kept[plan.merge.target] // 24)


def test_a_frame_is_compressed_as_if_alone():
    video = random_video()
    plan = visionzip(video, 40)
    layers = {
        place: TowerLayer(query=lay.query[2:3], key=lay.key[2:3], scale=lay.scale, num_prefix=1, to_tokens=identity)
        for place, lay in video.tower.layers.items()
    }
    frame = plain(video.features[48:72], grids=((1, 4, 6),))
    frame = dataclasses.replace(frame, tower=TowerView(layers=layers, hidden=video.tower.hidden[2:3]))
    alone = visionzip(frame, 10)
    assert torch.equal(plan.kept[(plan.kept >= 48) & (plan.kept < 72)] - 48, alone.kept)


def test_split_views_of_tiles():
    crop = torch.tensor([0] * 6 + [1, 2] * 5)
    views = split_views(plain(random_inputs(16), grids=((1, 2, 3), (1, 2, 5)), crop=crop), 7)
    assert [member.tolist() for member, _ in views] == [list(range(6)), [6, 8, 10, 12, 14], [7, 9, 11, 13, 15]]
    assert [share for _, share in views] == [3, 2, 2]


def test_split_views_of_a_video_spreads_over_time():
    views = split_views(plain(random_inputs(24), grids=((8, 1, 3),)), 4)
    shares = [share for _, share in views]
    assert sum(shares) == 4 and max(shares) == 1
    first, last = shares.index(1), 7 - shares[::-1].index(1)
    assert first <= 1 and last >= 6


# --- bad input


@pytest.mark.parametrize("dominant", [0, -0.5, 1.5, True, "0.5", None, float("nan")])
def test_bad_shares_are_refused(dominant):
    with pytest.raises(BadOption, match="dominant must be a share"):
        visionzip(image_tokens(), 10, dominant=dominant)


def test_attention_that_is_no_number_is_refused():
    tokens = image_tokens()
    tokens.tower.layers[-2].key[0][0, 3, 0] = torch.nan
    with pytest.raises(BadOption, match="attention of the vision tower is NaN"):
        visionzip(tokens, 10)
