"""EViT: the selection against loops, and its schedules."""

import math

import pytest
import torch

from tokensieve.compression import get_method
from tokensieve.compression.evit import blocks_of_depth, counts_for_budget, evit, keep_attended
from tokensieve.errors import BadOption


def random_step(batch=2, num_tokens=21, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, num_tokens, width, generator=generator)
    size = torch.randint(1, 5, (batch, num_tokens), generator=generator).float()
    return x, size, torch.rand(batch, num_tokens, generator=generator).softmax(-1)


def tokens_after(stage, num_tokens=197, num_prefix=1, num_blocks=12, keep=0.5):
    """Token counts at the first block and after each, run on random scores."""
    stage.begin(num_tokens=num_tokens, num_prefix=num_prefix, num_blocks=num_blocks, keep=keep, batch=1)
    counts = [num_tokens]
    for block in range(num_blocks):
        n = counts[-1]
        if stage.acts_in(block):
            x, size, attention = random_step(1, n)
            kept = stage._num_kept[block]
            n = keep_attended(x, size, attention, kept, num_prefix, fuse=stage.fuse).x.shape[1]
        counts.append(n)
    return counts


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
@pytest.mark.parametrize("num_keep", [1, 7, 14])
def test_equals_the_equations_in_loops(num_keep, num_prefix, fuse):
    x, size, attention = random_step()
    reduced = keep_attended(x, size, attention, num_keep, num_prefix, fuse=fuse)
    for i in range(len(x)):
        ranked = sorted(range(num_prefix, 21), key=lambda j: -float(attention[i, j]))
        kept, others = [*range(num_prefix), *ranked[:num_keep]], ranked[num_keep:]
        rows = [x[i, j] for j in kept]
        sizes = [size[i, j] for j in kept]
        if fuse:
            rows.append(sum(attention[i, j] * x[i, j] for j in others))
            sizes.append(sum(size[i, j] for j in others))
        torch.testing.assert_close(reduced.x[i], torch.stack(rows))
        torch.testing.assert_close(reduced.size[i], torch.stack(sizes))
        assert reduced.anchor[i].tolist() == kept + ([others[0]] if fuse else [])
        for j in range(21):
            fate = kept.index(j) if j in kept else len(kept) if fuse else -1
            assert reduced.target[i, j] == fate


def test_equal_scores_keep_the_first_patches():
    x, size, _ = random_step()
    reduced = keep_attended(x, size, torch.full((2, 21), 1 / 21), 4, 1)
    assert reduced.anchor.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_a_batch_equals_its_images_one_by_one():
    x, size, attention = random_step(batch=3)
    together = keep_attended(x, size, attention, 6, 1)
    for i in range(3):
        alone = keep_attended(x[i : i + 1], size[i : i + 1], attention[i : i + 1], 6, 1)
        torch.testing.assert_close(together.x[i : i + 1], alone.x)
        assert torch.equal(together.target[i : i + 1], alone.target)


def test_half_precision_and_gradients():
    x, size, attention = random_step()
    reduced = keep_attended(x.bfloat16() * 1e4, size, attention, 6, 1)
    assert reduced.x.dtype == torch.bfloat16 and reduced.x.isfinite().all()
    x.requires_grad_(), attention.requires_grad_()
    keep_attended(x, size, attention, 6, 1).x.sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()
    assert (attention.grad != 0).sum() == 2 * (20 - 6)  # the fused tokens' weights


# --- schedules


@pytest.mark.parametrize("rate, tokens", [(0.9, [197, 179, 163, 148]), (0.7, [197, 140, 100, 72]), (1.0, [197] * 4)])
def test_the_papers_keep_rates(rate, tokens):
    counts = tokens_after(evit(keep_rate=rate))
    assert counts == [*[tokens[0]] * 4, *[tokens[1]] * 3, *[tokens[2]] * 3, *[tokens[3]] * 3]


def test_without_fusion_there_is_one_token_less():
    counts = tokens_after(evit(keep_rate=0.7, fuse=False))
    assert counts[-1] == 1 + math.ceil(0.7 * math.ceil(0.7 * math.ceil(0.7 * 196)))


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("keep, left", [(1.0, 196), (195, 195), (0.5, 98), (64, 64), (2, 2), (1, 196), (0.004, 1)])
def test_the_budget_is_met_exactly(keep, left, fuse):
    counts = tokens_after(evit(fuse=fuse), keep=keep)
    assert counts[-1] == 1 + left
    assert all(after <= before for before, after in zip(counts, counts[1:], strict=False))


def test_counts_shrink_by_one_factor():
    assert counts_for_budget(1000, 125, 3) == [500, 250, 125]


def test_blocks_follow_the_depth():
    assert blocks_of_depth(12) == [3, 6, 9] and blocks_of_depth(24) == [6, 12, 18]
    assert blocks_of_depth(3) == [0, 1, 2] and blocks_of_depth(2) == [0, 1] and blocks_of_depth(1) == [0]
    stage = evit(blocks=(1, 4))
    stage.begin(num_tokens=17, num_prefix=1, num_blocks=6, keep=0.5, batch=1)
    assert [block for block in range(6) if stage.acts_in(block)] == [1, 4]


@pytest.mark.parametrize("rate", [0, 1.5, -0.1, "0.7"])
def test_a_bad_keep_rate_is_refused(rate):
    with pytest.raises(BadOption, match="keep_rate must be in"):
        evit(keep_rate=rate)


@pytest.mark.parametrize("blocks", [[], [-1], [2.0]])
def test_bad_blocks_are_refused(blocks):
    with pytest.raises(BadOption, match="blocks must be"):
        evit(blocks=blocks)


def test_blocks_beyond_the_tower_are_refused():
    with pytest.raises(BadOption, match="block 6.*blocks 0 to 5"):
        evit(blocks=[3, 6]).begin(num_tokens=17, num_prefix=1, num_blocks=6, keep=0.5, batch=1)


def test_is_registered_for_the_tower():
    method = get_method("evit")
    assert method.place == "tower" and method.options() == {"keep_rate": None, "fuse": True, "blocks": None}
