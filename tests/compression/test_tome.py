"""ToMe: the matching against the official code and against loops, and its schedules."""

import pytest
import torch

from tests.compression.helpers import load_golden
from tokensieve.compression import get_method
from tokensieve.compression.tome import merge_similar, merges_for_budget, merges_from_r, tome
from tokensieve.compression.tower_stage import BlockView
from tokensieve.errors import BadOption


def random_step(batch=2, num_tokens=21, width=6, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, num_tokens, width, generator=generator)
    size = torch.randint(1, 5, (batch, num_tokens), generator=generator).float()
    return x, size, torch.randn(batch, num_tokens, d, generator=generator)


def merged_by_loops(x_ND, size_N, metric_Nd, r, num_prefix):
    """The card's equations for one image, token by token: x, size, target, anchor."""
    num_tokens = len(x_ND)
    unit_Nd = metric_Nd / metric_Nd.norm(dim=-1, keepdim=True)
    best = {}
    for a in range(0, num_tokens, 2):
        for b in range(1, num_tokens, 2):
            s_ab = float(unit_Nd[a] @ unit_Nd[b])
            if a >= num_prefix and b >= num_prefix and (a not in best or s_ab > best[a][0]):
                best[a] = (s_ab, b)
    r = min(r, (num_tokens - num_prefix) // 2)
    merged = dict((a, best[a][1]) for a in sorted(best, key=lambda a: -best[a][0])[:r])
    patches = range(num_prefix, num_tokens)
    stay_in_a = [a for a in patches if a % 2 == 0 and a not in merged]
    anchor = [*range(num_prefix), *stay_in_a, *(b for b in patches if b % 2)]
    rows, sizes = [], []
    for place in anchor:
        group = [place, *(a for a, b in merged.items() if b == place)]
        sizes.append(sum(size_N[i] for i in group))
        rows.append(sum(size_N[i] * x_ND[i] for i in group) / sizes[-1])
    target = [anchor.index(merged.get(i, i)) for i in range(num_tokens)]
    return torch.stack(rows), torch.stack(sizes), torch.tensor(target), torch.tensor(anchor)


@pytest.mark.parametrize("case", ["tome-cls-r8", "tome-cls-r13-sizes"])
def test_matches_the_official_code(case):
    golden = load_golden(case)
    reduced = merge_similar(
        golden["in_x"], golden["in_size"][..., 0], golden["in_metric"], golden["params"]["r"], num_prefix=1
    )
    torch.testing.assert_close(reduced.x, golden["out_x"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reduced.size, golden["out_size"][..., 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_prefix", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("num_tokens, r", [(21, 4), (20, 7), (20, 100), (9, 1)])
def test_equals_the_equations_in_loops(num_tokens, r, num_prefix):
    x, size, metric = random_step(num_tokens=num_tokens)
    reduced = merge_similar(x, size, metric, r, num_prefix)
    for i in range(len(x)):
        rows, sizes, target, anchor = merged_by_loops(x[i], size[i], metric[i], r, num_prefix)
        torch.testing.assert_close(reduced.x[i], rows)
        torch.testing.assert_close(reduced.size[i], sizes)
        assert torch.equal(reduced.target[i], target) and torch.equal(reduced.anchor[i], anchor)


def test_no_merge_changes_nothing_but_the_order():
    x, size, metric = random_step()
    reduced = merge_similar(x, size, metric, 0, num_prefix=1)
    order = [0, *range(2, 21, 2), *range(1, 21, 2)]
    torch.testing.assert_close(reduced.x, x[:, order])
    assert torch.equal(reduced.size, size[:, order])


def test_sizes_and_the_weighted_mean_are_preserved():
    x, size, metric = random_step()
    reduced = merge_similar(x, size, metric, 9, num_prefix=1)
    torch.testing.assert_close(reduced.size.sum(1), size.sum(1))
    torch.testing.assert_close((reduced.x * reduced.size[..., None]).sum(1), (x * size[..., None]).sum(1))


def test_equal_tokens_merge_in_reading_order():
    metric = torch.tensor([0.3, -1.7, 0.01]).expand(1, 13, 3) * torch.linspace(1, 40, 13)[None, :, None]
    reduced = merge_similar(torch.randn(1, 13, 2), torch.ones(1, 13), metric, 3, num_prefix=1)
    assert reduced.anchor[0].tolist() == [0, 8, 10, 12, 1, 3, 5, 7, 9, 11]  # 2, 4, 6 merge into 1
    assert reduced.size[0].tolist() == [1, 1, 1, 1, 4, 1, 1, 1, 1, 1]


def test_a_batch_equals_its_images_one_by_one():
    x, size, metric = random_step(batch=3)
    together = merge_similar(x, size, metric, 6, 1)
    for i in range(3):
        alone = merge_similar(x[i : i + 1], size[i : i + 1], metric[i : i + 1], 6, 1)
        torch.testing.assert_close(together.x[i : i + 1], alone.x)
        assert torch.equal(together.target[i : i + 1], alone.target)


def test_half_precision_and_gradients():
    x, size, metric = random_step()
    reduced = merge_similar(x.bfloat16() * 1e4, size, metric.bfloat16(), 6, 1)
    assert reduced.x.dtype == torch.bfloat16 and reduced.x.isfinite().all()


@pytest.mark.parametrize("r", [0, 6, 9])
def test_gradients_are_those_of_the_equations(r):
    x, size, metric = random_step(d=2, seed=2)  # so few numbers that several tokens merge into one
    x.requires_grad_()
    reduced = merge_similar(x, size, metric, r, 1)
    rows = torch.stack([merged_by_loops(x[i], size[i], metric[i], r, 1)[0] for i in range(len(x))])
    weight = torch.rand(rows.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad((each * weight).sum(), x)[0] for each in (reduced.x, rows))
    assert r == 0 or torch.bincount(reduced.target[0]).max() > 2
    torch.testing.assert_close(ours, theirs)


# --- schedules


def test_the_budget_is_met_exactly_wherever_halving_can_reach_it():
    for num_patches in (16, 49, 196):
        for num_blocks in (1, 2, 5, 12):
            fewest = num_patches
            for _ in range(num_blocks):
                fewest -= fewest // 2
            for num_keep in range(1, num_patches + 1, 3):
                merges, left = merges_for_budget(num_patches, num_keep, num_blocks), num_patches
                for r in merges:
                    assert 0 <= r <= left // 2
                    left -= r
                assert len(merges) == num_blocks and left == max(fewest, num_keep)


def test_the_budget_is_spread_evenly():
    assert merges_for_budget(196, 98, 12) == [9, 9, *[8] * 10]
    assert merges_for_budget(196, 196, 12) == [0] * 12
    assert merges_for_budget(16, 4, 2) == [8, 4]  # six and six cannot be: the second block halves at most


def test_the_papers_schedules():
    assert merges_from_r(8, 3) == [8, 8, 8]
    assert merges_from_r([5, 3], 3) == [5, 3] and merges_from_r([5, 3, 1, 1], 3) == [5, 3, 1]
    assert merges_from_r((8, -1.0), 5) == [16, 12, 8, 4, 0]
    assert merges_from_r((8, 0.5), 5) == [4, 6, 8, 10, 12]
    assert merges_from_r((7, 0.3), 1) == [4]


@pytest.mark.parametrize("r, tokens", [(3, 14), ([0, 4], 13), (100, 9), ([2, -1.0], 13)])
def test_the_stage_follows_r_and_caps_it(r, tokens):
    stage = tome(r=r)
    stage.begin(num_tokens=17, num_prefix=1, num_blocks=2, keep=0.5, batch=2)
    block = 0 if stage.acts_in(0) else 1
    x, size, metric = random_step(num_tokens=17)
    view = BlockView(index=block, num_blocks=2, num_prefix=1, size=size, keys=metric)
    assert stage.reduce(x, view).x.shape[1] == tokens


def test_all_tokens_means_no_block_acts():
    stage = tome()
    stage.begin(num_tokens=17, num_prefix=1, num_blocks=3, keep=1.0, batch=1)
    assert not any(stage.acts_in(block) for block in range(3))


@pytest.mark.parametrize("r", [-1, 2.5, "8", True, [3, -2], (8, 2.0), (8,), [1, "2"], {}])
def test_a_bad_r_is_refused(r):
    with pytest.raises(BadOption, match="r must be a number of merges"):
        tome(r=r)


def test_is_registered_for_the_tower():
    method = get_method("tome")
    assert method.place == "tower" and method.options() == {"r": None, "proportional": True}
    assert tome(proportional=False).proportional is False and tome().proportional is True
