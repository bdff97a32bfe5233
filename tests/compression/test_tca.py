"""TCA's condensation: counts, centres, merges and books; what it does in real towers is in test_tca_stream."""

import math

import pytest
import torch

from tokensieve.compression import get_method
from tokensieve.compression.condensation import (
    condense,
    drop_rate_for,
    farthest_centers,
    merge_weights,
    num_left,
    rank_score,
    split_patches,
)
from tokensieve.compression.tca import condensing_blocks, tca
from tokensieve.compression.tower_stage import BlockView
from tokensieve.errors import BadOption


def tokens(batch=2, num=40, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, num, width, generator=generator)
    return x, torch.rand(batch, num, generator=generator)


def zeros(batch=2):
    return torch.zeros(batch, dtype=torch.int64)


# --- counts


@pytest.mark.parametrize(
    "rate, counts", [(0.035, (176, 14, 6)), (0.1, (137, 40, 19)), (0.105, (134, 42, 20)), (0.175, (92, 70, 34))]
)
def test_published_splits_of_196_patches(rate, counts):
    split = split_patches(196, rate)
    assert (split.keep, split.merge, split.fuse) == counts and sum(counts) == 196


@pytest.mark.parametrize(
    "rate, after",
    [(0.035, (181, 166, 154)), (0.1, (142, 103, 76)), (0.105, (139, 100, 73)), (0.175, (97, 52, 28)), (0, (196,) * 3)],
)
def test_published_token_counts_of_vit_b16(rate, after):
    left, got = 196, []
    for _ in range(3):
        left = num_left(left, rate)
        got.append(left)
    assert tuple(got) == after


def test_a_block_never_adds_tokens():
    assert split_patches(196, 0.001).keep + 5 > 196  # which is what the counts alone would do
    assert all(num_left(num, rate / 1000) <= num for num in (1, 16, 49, 196) for rate in range(0, 334, 3))
    assert num_left(49, 0.035) == 49  # ViT-B/32


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("num", [16, 49, 64, 196, 256, 576])
def test_budgets_are_met_from_below(num, fuse):
    lowest = min(_ends(num, r / 1000, fuse) for r in range(1, 334) if _possible(num, r / 1000, fuse))
    for keep in range(1, num + 1, 3):
        left = _ends(num, drop_rate_for(num, keep, fuse=fuse), fuse)
        assert left <= max(keep, lowest)
        if keep > lowest:  # nothing closer from below
            assert not any(
                left < _ends(num, r / 1000, fuse) <= keep for r in range(334) if _possible(num, r / 1000, fuse)
            )
    assert drop_rate_for(num, num, fuse=fuse) == 0


def _ends(num, rate, fuse):
    for _ in range(3):
        num = num_left(num, rate, fuse=fuse)
    return num


def _possible(num, rate, fuse):
    for _ in range(3):
        after = num_left(num, rate, fuse=fuse)
        if after < num and split_patches(num, rate).keep < 1:
            return False
        num = after
    return True


@pytest.mark.parametrize(
    "depth, blocks",
    [(1, (0,)), (2, (0, 1)), (4, (1, 2, 3)), (8, (2, 4, 6)), (9, (2, 4, 6)), (12, (3, 6, 9)), (24, (3, 6, 9))],
)
def test_condensing_blocks(depth, blocks):
    assert condensing_blocks(depth) == blocks and blocks[-1] < depth


# --- scores, centres, merges


def test_rank_score_by_hand():
    attention = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]])
    assert rank_score(attention).tolist() == [[1.5, 0.5, 1.0]]  # heads rank (2, 1, 0) and (1, 0, 2)


def test_an_outlier_head_moves_the_mean_and_not_the_rank():
    heads = torch.rand(1, 5, 20, generator=torch.Generator().manual_seed(0)) / 20
    loud = heads.clone()
    loud[0, 0, 3] = 100.0
    assert loud.mean(1).argmax() == 3
    assert (rank_score(loud) - rank_score(heads)).abs().max() <= 19 / 5


def test_centres_by_hand():
    x = torch.tensor([[[0.0], [1.0], [10.0], [4.0], [-5.0]]])
    assert farthest_centers(x, torch.tensor([0])).tolist() == [[0, 2, 4, 3]]
    assert farthest_centers(x, torch.tensor([3])).tolist() == [[3, 4, 2, 0]]


def test_merge_by_hand():
    x = torch.tensor([[[0.0], [2.0], [100.0], [104.0], [200.0], [300.0]]])
    cluster, weight = merge_weights(x, torch.tensor([[0, 2, 4, 5]]))
    assert cluster.tolist() == [[0, 0, 1, 1, 2, 3]]
    torch.testing.assert_close(weight @ x, torch.tensor([[[1 / 1.5], [(100 + 104 / 4) / 1.25], [200.0], [300.0]]]))


def test_a_member_nearer_than_1_outweighs_the_centre():
    x = torch.tensor([[[0.0], [0.5], [100.0], [200.0], [300.0]]])
    _, weight = merge_weights(x, torch.tensor([[0, 2, 3, 4]]))
    torch.testing.assert_close(weight[0, 0, :2], torch.tensor([1 / 3, 2 / 3]))


def test_merged_tokens_are_convex_and_clusters_a_partition():
    x, _ = tokens()
    centers = farthest_centers(x, zeros())
    cluster, weight = merge_weights(x, centers)
    torch.testing.assert_close(weight.sum(-1), torch.ones(2, 4))
    assert (weight >= 0).all() and torch.equal((weight > 0).sum(1), torch.ones(2, 40).long())
    assert torch.equal(cluster, torch.cdist(x, x.gather(1, centers[..., None].expand(-1, -1, 8))).argmin(-1))


@pytest.mark.parametrize("fill", [0.0, 3.0])
def test_copies_make_no_zero_tokens(fill):
    x = torch.full((2, 40, 8), fill)
    made = condense(x, tokens()[1], split_patches(40, 0.1), zeros())
    assert torch.allclose(made.x[:, :-1], x[:, :1])
    assert all(len(set(row.tolist())) == 4 for row in made.centers)


def test_condense_by_its_definition():
    x, score = tokens()
    split = split_patches(40, 0.15)
    made = condense(x, score, split, torch.tensor([2, 5]))
    assert (split.keep, split.merge, split.fuse) == (20, 14, 6) and made.x.shape == (2, 25, 8)
    for b in range(2):
        order = sorted(range(40), key=lambda i: -score[b, i])
        assert made.keep[b].tolist() == order[:20] and made.band[b].tolist() == order[20:34]
        assert made.rest[b].tolist() == sorted(order[34:])
        assert torch.equal(made.x[b, :20], x[b, order[:20]])
        torch.testing.assert_close(made.x[b, -1], sum(score[b, i] * x[b, i] for i in order[34:]))
        band = x[b, order[20:34]]
        centers = [int(made.centers[b, 0])]
        assert centers == [[2, 5][b]]
        for _ in range(3):
            centers.append(max(range(14), key=lambda i: min(math.dist(band[i], band[c]) for c in centers)))
        assert made.centers[b].tolist() == centers
        for k in range(4):
            members = [i for i in range(14) if min(range(4), key=lambda j: math.dist(band[i], band[centers[j]])) == k]
            weight = torch.tensor(
                [1.0 if i == centers[k] else 1 / math.dist(band[i], band[centers[k]]) for i in members]
            )
            torch.testing.assert_close(made.x[b, 20 + k], (weight[:, None] * band[members]).sum(0) / weight.sum())
    dropped = condense(x, score, split, torch.tensor([2, 5]), fuse=False)
    assert torch.equal(dropped.x, made.x[:, :-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_choose_what_float32_chooses_on_the_same_numbers(dtype):
    x, score = tokens()
    split = split_patches(40, 0.1)
    made = condense(x.to(dtype), score, split, zeros())
    full = condense(x.to(dtype).float(), score, split, zeros())
    assert made.x.dtype == dtype and torch.equal(made.x.float(), full.x.to(dtype).float())
    assert torch.equal(made.centers, full.centers) and torch.equal(made.cluster, full.cluster)


def test_equal_scores_keep_their_order():
    x, _ = tokens()
    made = condense(x, torch.ones(2, 40), split_patches(40, 0.1), zeros())
    assert torch.equal(torch.cat([made.keep, made.band, made.rest], 1), torch.arange(40).expand(2, -1))


def test_gradients_are_finite():
    x, score = tokens()
    x.requires_grad_()
    condense(x, score, split_patches(40, 0.1), zeros()).x.square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any(-1).all()


# --- the stage


def reduced(stage, num_patches=40, num_prefix=1, keep=0.5, sizes=None):
    x, _ = tokens(num=num_patches + num_prefix)
    attention = torch.rand(2, 4, num_patches + num_prefix, generator=torch.Generator().manual_seed(1))
    stage.begin(num_tokens=x.shape[1], num_prefix=num_prefix, num_blocks=12, keep=keep, batch=2)
    size = torch.ones(x.shape[:2]) if sizes is None else sizes
    view = BlockView(
        index=3,
        num_blocks=12,
        num_prefix=num_prefix,
        size=size,
        class_attention=attention.mean(1),
        head_attention=attention,
    )
    return x, attention, stage.reduce(x, view)


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_the_books(variant, num_prefix):
    sizes = torch.arange(1.0, 41 + num_prefix).expand(2, -1)
    stage = tca(drop_rate=0.1, variant=variant)
    x, attention, out = reduced(stage, num_prefix=num_prefix, sizes=sizes)
    num_out = out.x.shape[1]
    assert num_out == num_prefix + num_left(40, 0.1, fuse=variant == "released")
    assert torch.equal(out.x[:, :num_prefix], x[:, :num_prefix])
    step = stage.steps[3]
    score = attention.mean(1) if variant == "released" else rank_score(attention[:, :, num_prefix:])
    best = score[:, -40:].argsort(dim=1, descending=True, stable=True)[:, : step.keep.shape[1]]
    assert torch.equal(step.keep, best)
    for b in range(2):
        assert len(set(out.anchor[b].tolist())) == num_out
        assert torch.equal(out.target[b, out.anchor[b]], torch.arange(num_out))
        dropped = (out.target[b] == -1).nonzero()[:, 0] - num_prefix
        assert dropped.tolist() == ([] if variant == "released" else step.rest[b].tolist())
        for k in range(num_out):
            assert out.size[b, k] == sizes[b, out.target[b] == k].sum()
        if variant == "released":
            assert (out.target[b, num_prefix + step.rest[b]] == num_out - 1).all()
        merged = num_prefix + step.keep.shape[1] + step.cluster[b]
        assert torch.equal(out.target[b, num_prefix + step.band[b]], merged)


def test_the_budget_sets_the_rate_and_drop_rate_overrides_it():
    stage = tca()
    reduced(stage, keep=0.5)
    assert stage.rate == drop_rate_for(40, 20) > 0
    reduced(stage, keep=1.0)
    assert stage.rate == 0 and not any(map(stage.acts_in, range(12)))
    stage = tca(drop_rate=0.1)
    reduced(stage, keep=1.0)
    assert stage.rate == 0.1 and [b for b in range(12) if stage.acts_in(b)] == [3, 6, 9]


def test_autocast_does_not_matter():
    _, _, plain = reduced(tca(drop_rate=0.1))
    with torch.autocast("cpu", torch.bfloat16):
        _, _, out = reduced(tca(drop_rate=0.1))
    assert torch.equal(out.x, plain.x) and torch.equal(out.target, plain.target)


def test_first_centres():
    def first(choice):
        stage = tca(drop_rate=0.1, first_center=choice)
        reduced(stage)
        return stage.steps[3].centers[:, 0].tolist()

    band = split_patches(40, 0.1).merge
    assert first(0) == [0, 0] and first(3) == [3, 3]
    assert first(lambda block, size: size - block) == [band - 3] * 2
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    expected = [int(torch.randint(band, (1,), generator=generator)) for _ in range(2)]
    assert first(torch.Generator().manual_seed(1)) == expected
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(BadOption, match=rf"first_center must lie in 0\.\.{band - 1} in block 3"):
        first(band)


def test_anchor_choice_is_by_cosine_with_the_block_before():
    stage = tca(drop_rate=0.1)
    x, _, _ = reduced(stage)
    assert stage.extra_tokens(3, x) is None
    stage.anchors = torch.randn(5, 12, 8, generator=torch.Generator().manual_seed(2))
    stage.anchors[4, 2] = 100 * x[0, 0]
    stage.anchors[1, 2] = 0.01 * x[1, 0]
    extra = stage.extra_tokens(3, x)
    assert stage.anchor_rows[3].tolist() == [4, 1]
    assert torch.equal(extra[:, 0], stage.anchors[[4, 1], 2])
    assert stage.extra_tokens(0, x) is None  # nothing lies before block 0


def test_the_mean_token_stands_for_the_class_token_where_there_is_none():
    stage = tca(drop_rate=0.1)
    x, _, out = reduced(stage, num_prefix=0)
    stage.after_block(3, out.x)
    expected = (out.x * out.size[..., None]).sum(1) / 40
    torch.testing.assert_close(stage.path[0], expected)
    stage.begin(num_tokens=40, num_prefix=0, num_blocks=12, keep=1, batch=2)
    stage.after_block(0, x)
    torch.testing.assert_close(stage.path[0], x.mean(1))


@pytest.mark.parametrize(
    "option, value, words",
    [
        ("variant", "realised", "Did you mean 'released'"),
        ("drop_rate", 0.34, "below 1/3"),
        ("drop_rate", -0.1, "below 1/3"),
        ("drop_rate", float("nan"), "below 1/3"),
        ("drop_rate", True, "below 1/3"),
        ("drop_rate", "0.1", "below 1/3"),
        ("blocks", (3, 3), "rising"),
        ("blocks", (), "rising"),
        ("blocks", (-1, 2), "rising"),
        ("first_center", -1, "first_center"),
        ("first_center", "random", "first_center"),
    ],
)
def test_bad_options(option, value, words):
    with pytest.raises(BadOption, match=words):
        tca(**{option: value})


def test_what_only_the_tower_can_tell():
    with pytest.raises(BadOption, match=r"blocks must lie in 0\.\.11"):
        reduced(tca(blocks=(3, 12)))
    with pytest.raises(BadOption, match="leaves no patch of 40"):
        reduced(tca(drop_rate=0.33))


def test_it_is_registered():
    method = get_method("tca")
    assert method.place == "tower" and method.effect == "merges" and method.needs == ("attention",)
    for option in method.options():
        assert option in method.fn.__doc__
