"""Sink reports, entropies and the exact error of dropping keys."""

import dataclasses
from math import log

import numpy as np
import pytest
import torch

from tests.compression.helpers import plain, random_inputs, random_tower, random_video
from tests.compression.test_sink_guard import with_sinks
from tokensieve.analysis import (
    SinkReport,
    attention_drop_error,
    attention_sinks,
    column_entropy,
    draw_sinks,
    row_entropy,
    tower_sinks,
)
from tokensieve.analysis.sink_picture import _OUTLINE, _tile
from tokensieve.analysis.sinks import median_of_others
from tokensieve.compression.sink_guard import visual_sinks
from tokensieve.errors import BadOption


def maps(*rows):
    """One map `[1, 1, Q, K]`."""
    return torch.tensor(rows)[None, None]


def random_maps(batch=2, heads=3, queries=7, keys=7, causal=False, seed=0):
    logits = 2 * torch.randn(batch, heads, queries, keys, generator=torch.Generator().manual_seed(seed))
    if causal:
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(-1)


FIRST = maps([1.0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0])
ITSELF = torch.eye(4)[None, None]
EVENLY = maps([1.0, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0], [1 / 4] * 4)
SINK = maps(*[[0.7, 0.1, 0.1, 0.1]] * 4)
LOCAL = maps([0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7])


# --- entropies and key mass


@pytest.mark.parametrize(
    ("attn", "causal", "row", "column"),
    [
        (FIRST, True, 0.0, 1.0),
        (ITSELF, True, 0.0, 0.0),
        (EVENLY, True, 0.75, 0.985228),
        (SINK, False, 0.6784, 1.0),
        (LOCAL, False, 0.6784, 0.6784),
    ],
    ids=["first key", "itself", "evenly", "sink", "sharp local head"],
)
def test_entropies(attn, causal, row, column):
    assert row_entropy(attn, causal=causal).item() == pytest.approx(row, abs=5e-5)
    assert column_entropy(attn, causal=causal).item() == pytest.approx(column, abs=5e-5)


@pytest.mark.parametrize(
    ("attn", "mass"),
    [(FIRST, [1.0, 0, 0, 0]), (ITSELF, [0.25, 1 / 3, 0.5, 1]), (EVENLY, [0.520833, 0.361111, 0.291667, 0.25])],
)
def test_causal_key_mass_counts_the_queries_that_see_the_key(attn, mass):
    report = attention_sinks(attn, causal=True)
    torch.testing.assert_close(report.key_mass, torch.tensor(mass)[None, None], rtol=0, atol=1e-6)


def test_entropies_by_hand_on_random_causal_attention():
    attn = random_maps(causal=True)
    rows, columns = torch.zeros(2, 3), torch.zeros(2, 3)
    for b in range(2):
        for h in range(3):
            a = attn[b, h].double()
            entropy = lambda p: -sum(x * log(x) for x in p.tolist() if x > 0)  # noqa: E731
            rows[b, h] = sum(entropy(a[q]) / log(q + 1) for q in range(1, 7)) / 7
            columns[b, h] = max(entropy(a[:, k] / a[:, k].sum()) / log(7 - k) for k in range(6))
    torch.testing.assert_close(row_entropy(attn, causal=True), rows, rtol=0, atol=1e-6)
    torch.testing.assert_close(column_entropy(attn, causal=True), columns, rtol=0, atol=1e-6)


def test_later_queries_of_a_causal_map_see_all_earlier_keys():
    whole, late = random_maps(causal=True), random_maps(causal=True)[:, :, 4:]
    mass = attention_sinks(late, causal=True).key_mass
    torch.testing.assert_close(mass[..., :5], whole[:, :, 4:, :5].mean(2))
    torch.testing.assert_close(mass[..., 6], whole[:, :, 6, 6])
    assert (row_entropy(late, causal=True) <= 1).all()


# --- the report


def test_a_sink_is_told_from_a_sharp_local_head():
    sink, local = attention_sinks(SINK, causal=False), attention_sinks(LOCAL, causal=False)
    assert sink.is_sink.tolist() == [[True, False, False, False]] and not local.is_sink.any()
    assert sink.head_activity.item() == pytest.approx(0.3) and local.head_activity.item() == 1
    assert sink.norm_z is None and sink.value_ratio is None


def test_both_reasons_are_reported():
    hidden = torch.tensor([1, 1.1, 0.9, 1.05, 0.95, 40])[None, :, None]
    attn = torch.full((1, 2, 6, 6), 0.1)
    attn[0, 1, :, 2] = 0.5
    report = attention_sinks(attn, hidden, causal=False)
    assert report.by_mass.nonzero()[:, 1].tolist() == [2] and report.by_norm.nonzero()[:, 1].tolist() == [5]
    assert report.is_sink.nonzero()[:, 1].tolist() == [2, 5]
    assert report.norm_z[0, 5].item() == pytest.approx(350.5, abs=0.1)
    torch.testing.assert_close(report.head_activity, torch.tensor([[0.4, 0.4]]) + torch.tensor([[0.4, 0.0]]))


def test_drained_values_of_the_published_head():
    norms = torch.tensor([0.0496, 0.4355, 0.2344, 0.3926, 0.0781, 0.4609, 0.2344, 0.4316, 0.0781])
    report = attention_sinks(random_maps(1, 1, 9, 9), projected_values=norms.view(1, 1, 9, 1), causal=False)
    assert report.value_ratio[0, 0, 0].item() == pytest.approx(0.158, abs=5e-4)
    assert report.value_ratio[0, 0, 4].item() == pytest.approx(0.249, abs=5e-4)


@pytest.mark.parametrize("count", [2, 5, 6])
def test_median_of_others(count):
    values = torch.randn(3, count, generator=torch.Generator().manual_seed(0))
    values[1] = 2.0
    for row, medians in zip(values.numpy(), median_of_others(values).numpy(), strict=True):
        np.testing.assert_allclose(medians, [np.median(np.delete(row, i)) for i in range(count)], rtol=1e-6)


def test_the_report_is_unchanged_by_permuting_keys():
    attn, order = random_maps(), torch.randperm(7, generator=torch.Generator().manual_seed(3))
    hidden, values = random_inputs(14, 5).view(2, 7, 5), random_inputs(42, 4).view(2, 3, 7, 4)
    hidden[1, 2] *= 50
    one = attention_sinks(attn, hidden, values, causal=False)
    two = attention_sinks(attn[..., order], hidden[:, order], values[:, :, order], causal=False)
    assert one.is_sink.any()
    for name in ("key_mass", "norm_z", "value_ratio", "by_mass", "by_norm"):
        torch.testing.assert_close(getattr(two, name), getattr(one, name)[..., order])
    torch.testing.assert_close(two.head_activity, one.head_activity)


def test_one_by_one_equals_the_batch():
    attn, hidden = random_maps(causal=True), random_inputs(14, 5).view(2, 7, 5)
    both = attention_sinks(attn, hidden, causal=True)
    for i in range(2):
        one = attention_sinks(attn[i : i + 1], hidden[i : i + 1], causal=True)
        torch.testing.assert_close(one.key_mass[0], both.key_mass[i])
        assert torch.equal(one.is_sink[0], both.is_sink[i])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(4, 4),), "attn must be"),
        ((random_maps(queries=8),), "8 queries and 7 keys"),
        ((random_maps(), torch.zeros(2, 6, 5)), r"hidden must be \[2, 7\] and a width"),
        ((random_maps(), None, torch.zeros(2, 7, 5)), r"projected_values must be \[2, 3, 7\]"),
    ],
)
def test_shapes_that_do_not_agree_are_refused(arguments, words):
    with pytest.raises(BadOption, match=words):
        attention_sinks(*arguments, causal=True)


# --- what dropping keys changes


ATTN = torch.tensor([0.90, 0.04, 0.03, 0.02, 0.01]).view(1, 1, 1, 5)
VALUES = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1], [-1, 0]]).view(1, 1, 5, 2)


def kept(*keys, num_keys=5):
    return torch.zeros(1, num_keys, dtype=torch.bool).index_fill_(1, torch.tensor(keys), True)


@pytest.mark.parametrize(
    ("keep", "error"),
    [
        ((1, 2, 3, 4), 0.6364),
        ((0, 2, 3, 4), 0.0396),
        ((0, 1, 3, 4), 0.0294),
        ((0, 1, 2, 4), 0.0274),
        ((0, 1, 2, 3), 0.0106),
        ((0, 1, 2), 0.0210),
        ((1, 2, 3), 0.7974),
        ((0, 1, 2, 3, 4), 0.0),
    ],
)
def test_drop_errors_of_the_worked_example(keep, error):
    assert attention_drop_error(ATTN, VALUES, kept(*keep)).item() == pytest.approx(error, abs=5e-5)


def test_drop_error_is_the_change_of_the_output():
    attn, values = random_maps(queries=5), random_inputs(42, 4).view(2, 3, 7, 4)
    keep = torch.rand(2, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    rest = attn * keep[:, None, None]
    expected = (attn @ values - rest @ values / rest.sum(-1, keepdim=True)).norm(dim=-1)
    torch.testing.assert_close(attention_drop_error(attn, values, keep), expected)
    assert (attention_drop_error(attn, values, torch.ones_like(keep)) == 0).all()


def test_a_query_with_nothing_left_has_no_finite_error():
    error = attention_drop_error(EVENLY, random_inputs(4, 3).view(1, 1, 4, 3), kept(1, 2, num_keys=4))
    assert error[0, 0, 0] == torch.inf and error[0, 0, 1:].isfinite().all()


# --- the vision tower


def test_the_report_on_a_tower_holds_the_sinks_of_the_guard():
    tower = with_sinks(random_tower(), patch_by_mass=5, patch_by_norm=11)
    tokens = dataclasses.replace(random_video(), tower=tower)
    report = tower_sinks(tokens)
    assert torch.equal(report.is_sink[0], visual_sinks(tower))
    assert report.by_mass[0].nonzero()[:, 0].tolist() == [5] and report.by_norm[0].nonzero()[:, 0].tolist() == [11]
    assert report.key_mass.shape == (1, 2, 96) and report.norm_z.shape == (1, 96)
    torch.testing.assert_close(report.key_mass[0].mean(0), tower.layers[-1].received_attention())


def test_the_report_on_one_group_is_the_report_on_its_map():
    tower = with_sinks(random_tower(groups=1, num_prefix=0), patch_by_mass=5, patch_by_norm=11)
    query, key = tower.layers[-1].query[0], tower.layers[-1].key[0]
    attn = (query @ key.transpose(1, 2) * tower.layers[-1].scale).softmax(-1)[None]
    expected = attention_sinks(attn, tower.hidden[0][None], causal=False)
    report = tower_sinks(dataclasses.replace(plain(random_inputs(24)), tower=tower))
    for name in ("key_mass", "norm_z", "is_sink", "head_activity"):
        torch.testing.assert_close(getattr(report, name), getattr(expected, name))
    assert report.head_activity[0, 1] < 0.5 < report.head_activity[0, 0]


def test_tokens_without_a_tower_are_refused():
    with pytest.raises(BadOption, match="come without"):
        tower_sinks(plain(random_inputs(24)))


# --- the picture


@pytest.mark.parametrize("grids", [((4, 4, 6),), ((1, 4, 6), (1, 6, 12))], ids=["video", "two views"])
def test_the_picture_outlines_every_sink(grids):
    tower = with_sinks(random_tower(), patch_by_mass=5, patch_by_norm=11)
    tokens = dataclasses.replace(plain(random_inputs(96), grids=grids), tower=tower)
    report = tower_sinks(tokens)
    picture = draw_sinks(report, grids, title="a test", side=96)
    none = dataclasses.replace(report, by_mass=report.by_mass & False, by_norm=report.by_norm & False)
    changed = np.asarray(picture) != np.asarray(draw_sinks(none, grids, title="a test", side=96))
    assert changed.any() and picture.width > 2 * 2 * 96
    assert draw_sinks(report, grids, side=480, columns=1).width > 2 * 480  # room for the larger view
    without_norms = draw_sinks(dataclasses.replace(report, norm_z=None), grids, side=96)
    assert without_norms.height < picture.height and without_norms.width < picture.width


def test_an_outline_surrounds_its_token():
    is_sink = np.zeros((2, 3), dtype=bool)
    is_sink[1, 2] = True
    tile = _tile(np.zeros((2, 3)), is_sink, 20, (60, 40), "a label")
    outlined = (tile[:40, :60] == np.array(_OUTLINE)).all(-1)
    assert outlined[20, 40] and outlined[39, 59] and not outlined[30, 50]
    assert outlined.sum() == 20 * 20 - 14 * 14  # a ring of 3 pixels


def test_every_frame_shows_its_own_numbers():
    mass = torch.zeros(1, 1, 12)
    mass[..., 11] = 0.6
    nowhere = torch.zeros(1, 12, dtype=torch.bool)
    by_mass = nowhere.index_fill(1, torch.tensor([11]), True)
    activity = torch.ones(1, 1)
    report = SinkReport(
        key_mass=mass, norm_z=None, value_ratio=None, by_mass=by_mass, by_norm=nowhere, head_activity=activity
    )
    picture = np.asarray(draw_sinks(report, ((2, 2, 3),))).astype(int)
    report = dataclasses.replace(report, key_mass=torch.zeros(1, 1, 12), by_mass=nowhere)
    changed = (picture != np.asarray(draw_sinks(report, ((2, 2, 3),)))).any((0, 2)).nonzero()[0]
    assert changed.min() > picture.shape[1] // 2  # only the second frame


def test_the_picture_needs_the_grids_of_its_tokens():
    report = attention_sinks(random_maps(1), causal=False)
    with pytest.raises(BadOption, match="1 item with 6 tokens"):
        draw_sinks(report, ((1, 2, 3),))
    with pytest.raises(BadOption, match="got 2 with 7"):
        draw_sinks(attention_sinks(random_maps(2), causal=False), ((1, 1, 7),))
