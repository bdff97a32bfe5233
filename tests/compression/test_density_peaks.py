"""Density peaks against a plain loop in float64, and the order of ties."""

import pytest
import torch

from tests.compression.helpers import random_inputs
from tokensieve.compression import density_peaks
from tokensieve.compression.density_peaks import cluster, nearest_centre, peak_order


def clumps(num_tokens=60, width=8, seed=1):
    """Tokens around a few places, so that distances differ a lot."""
    x = random_inputs(num_tokens, width, seed)
    return 0.3 * x + random_inputs(5, width, seed=9).repeat(num_tokens // 5, 1)


def by_loops(x, num_neighbours):
    """Scores of the definition, one token at a time."""
    x = x.double()
    distance = (x[:, None] - x[None]).norm(dim=-1) / x.shape[1] ** 0.5
    density = [torch.exp(-row.sort().values[:num_neighbours].square().mean()) for row in distance]
    score = []
    for i, own in enumerate(density):
        to_denser = [distance[i, j] for j, other in enumerate(density) if other > own]
        score.append(own * min(to_denser, default=distance.max()))
    return torch.stack(score)


@pytest.mark.parametrize("num_neighbours", [3, 4, 7, 20])
def test_order_is_that_of_the_definition(num_neighbours):
    x = clumps()
    assert torch.equal(peak_order(x, num_neighbours), by_loops(x, num_neighbours).argsort(descending=True))


def test_tokens_go_to_the_nearest_centre():
    x = clumps()
    centres, label = cluster(x, 6, 4)
    assert torch.equal(centres, peak_order(x, 4)[:6])
    assert torch.equal(label, torch.stack([(x - x[c]).norm(dim=-1) for c in centres]).argmin(0))


def test_centres_of_clumps_are_one_of_each():
    x = clumps() - 0.2 * random_inputs(60, 8)
    centres, label = cluster(x, 5, 4)
    assert sorted((centres % 5).tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(centres[label] % 5, torch.arange(60) % 5)


def test_more_neighbours_than_tokens_means_all():
    x = clumps(5)
    assert torch.equal(peak_order(x, 99), peak_order(x, 5))
    assert peak_order(x[:1], 7).tolist() == [0] and nearest_centre(x[:1], torch.tensor([0])).tolist() == [0]


@pytest.mark.parametrize("fill", [0.0, 1.0, -3.7, 1e4])
def test_equal_tokens_are_taken_in_order(fill):
    x = torch.full((40, 16), fill)
    assert peak_order(x, 7).tolist() == list(range(40))
    label = nearest_centre(x, torch.tensor([3, 8]))
    assert label[8] == 1 and label.sum() == 1  # a centre belongs to itself, the others to the first


def test_of_copies_the_first_is_the_centre_and_the_others_come_last():
    x = clumps(30).repeat(2, 1)
    order = peak_order(x, 7)
    assert (order[:30] < 30).all() and order[30:].tolist() == list(range(30, 60))


def test_a_part_that_all_tokens_share_does_not_matter():
    x = clumps()
    assert torch.equal(peak_order(x + 300, 7), peak_order(x, 7))
    assert torch.equal(cluster(x + 300, 6, 7)[1], cluster(x, 6, 7)[1])


def test_long_tokens_do_not_underflow():
    x = clumps() * 1000  # squared distances of thousands and more, whose exp is 0
    assert by_loops(x, 4).max() == 0
    distance = (x[:, None] - x[None]).double().norm(dim=-1) / 8**0.5
    log_density = -distance.sort().values[:, :4].square().mean(-1)
    is_denser = log_density[None] > log_density[:, None]
    delta = distance.masked_fill(~is_denser, torch.inf).amin(-1).clamp(max=distance.max())
    assert torch.equal(peak_order(x, 4), (log_density + delta.log()).argsort(descending=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_on_the_same_numbers(dtype):
    x = clumps().to(dtype)
    assert torch.equal(peak_order(x, 7), peak_order(x.float(), 7))


def test_chunks_change_nothing_and_bound_the_memory(monkeypatch):
    x = clumps()
    order, (centres, label) = peak_order(x, 7), cluster(x, 6, 7)
    monkeypatch.setattr(density_peaks, "MAX_CHUNK_BYTES", 4 * 60 * 7)
    assert max(chunk.numel() for _, chunk in density_peaks._distance_chunks(x, x)) == 60 * 7
    assert torch.equal(peak_order(x, 7), order)
    monkeypatch.setattr(density_peaks, "MAX_CHUNK_BYTES", 4 * 6 * 7)
    assert torch.equal(nearest_centre(x, centres), label)


def test_the_largest_distance_is_that_of_all_chunks(monkeypatch):
    spread = torch.linspace(-1, 1, 9)[:, None] * torch.tensor([1.0, 0.5])
    corners = torch.tensor([[0.0, 0.0], [10.0, 0.0], [5.0, 9.5], [5.0, 3.0]])
    width = torch.tensor([0.02, 0.03, 0.04, 0.05])  # the first is the densest; the third is farther off than the second
    x = (corners[:, None] + width[:, None, None] * spread).flatten(0, 1)
    monkeypatch.setattr(density_peaks, "MAX_CHUNK_BYTES", 4 * 36 * 9)  # the last chunk is near all others
    assert (peak_order(x, 4)[:4] // 9).tolist() == [0, 2, 1, 3]
