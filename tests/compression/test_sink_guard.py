"""Sinks among visual tokens, and the guard around methods that rank by attention."""

import dataclasses

import pytest
import torch

from tests.compression.helpers import random_tower, random_video
from tokensieve.compression import get_method, sink_guard
from tokensieve.compression.decoder_stage import DecoderTokens
from tokensieve.compression.sink_guard import (
    guarded_top,
    holds_sink,
    key_mass,
    leave_one_out_score,
    patch_key_mass,
    patch_norm_z,
    robust_z,
    set_aside,
    visual_sinks,
)
from tokensieve.compression.tower_view import TowerLayer, TowerView
from tokensieve.errors import BadOption

SCORE = torch.tensor([0.30, 0.02, 0.05, 0.25, 0.06, 0.04, 0.08, 0.07, 0.03, 0.10])
SINKS = torch.zeros(10, dtype=torch.bool).index_fill_(0, torch.tensor([0, 3]), True)
NO_SINKS = torch.zeros(10, dtype=torch.bool)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the guard


@pytest.mark.parametrize(
    ("mode", "kept"), [("off", [0, 3, 6, 9]), ("exclude", [4, 6, 7, 9]), ("protect", [0, 3, 4, 6, 7, 9])]
)
def test_the_guard_spends_the_budget_on_content(mode, kept):
    assert guarded_top(SCORE, SINKS, 4, mode).tolist() == kept


@pytest.mark.parametrize("mode", sink_guard.SINK_MODES)
@pytest.mark.parametrize("num_keep", [1, 4, 9, 10])
def test_without_sinks_every_mode_is_the_bare_ranking(mode, num_keep):
    bare = SCORE.topk(num_keep).indices.sort().values
    assert torch.equal(guarded_top(SCORE, NO_SINKS, num_keep, mode), bare)


@pytest.mark.parametrize("mode", sink_guard.SINK_MODES)
def test_equal_scores_go_to_the_lowest_index(mode):
    assert guarded_top(torch.ones(10), NO_SINKS, 3, mode).tolist() == [0, 1, 2]


def test_excluded_sinks_fill_what_the_others_leave():
    sinks = torch.ones(10, dtype=torch.bool).index_fill_(0, torch.tensor([1, 8]), False)
    assert guarded_top(SCORE, sinks, 4, "exclude").tolist() == [0, 1, 2, 8]
    assert guarded_top(SCORE, SINKS, 10, "exclude").tolist() == list(range(10))


def test_protection_never_exceeds_what_is_there():
    assert guarded_top(SCORE, SINKS, 9, "protect").tolist() == list(range(10))


@pytest.mark.parametrize("mode", ["exclude", "protect"])
def test_where_all_are_sinks_none_is(mode):
    assert guarded_top(SCORE, ~NO_SINKS, 4, mode).tolist() == [0, 3, 6, 9]


def test_sinks_of_one_picture_are_set_aside():
    member, is_sink = torch.arange(10, 16), torch.zeros(30, dtype=torch.bool)
    is_sink[[2, 11, 14, 20]] = True
    others, num_keep, aside = set_aside(member, 3, is_sink, "protect")
    assert (others.tolist(), num_keep, aside.tolist()) == ([10, 12, 13, 15], 3, [11, 14])
    others, num_keep, aside = set_aside(member, 5, is_sink, "exclude")
    assert (others.tolist(), num_keep, aside.tolist()) == ([10, 12, 13, 15], 4, [11])
    others, num_keep, aside = set_aside(member, 5, is_sink, "off")
    assert (others.tolist(), num_keep, aside.tolist()) == (member.tolist(), 5, [])


def test_unknown_modes_are_refused_with_a_suggestion():
    with pytest.raises(BadOption, match="off, exclude, protect; got 'protct'. Did you mean 'protect'"):
        guarded_top(SCORE, SINKS, 4, "protct")
    with pytest.raises(BadOption, match="got None"):
        guarded_top(SCORE, SINKS, 4, None)


# --- finding them


def test_robust_z_of_one_outlier():
    z = robust_z(torch.tensor([1, 1.1, 0.9, 1.05, 0.95, 40]))
    assert z[-1].item() == pytest.approx(350.5, abs=0.1)  # with the mean of the two middle values as median
    assert z[:-1].abs().max() < 1.13


def test_robust_z_of_equal_values():
    assert torch.equal(robust_z(torch.full((6,), 3.0)), torch.zeros(6))
    assert torch.equal(robust_z(torch.zeros(6)), torch.zeros(6))
    almost = torch.full((7,), 3.0)
    almost[2] *= 1 + 1e-6
    assert robust_z(almost).abs().max() < 1  # rounding is no outlier
    almost[2] = 4
    assert robust_z(almost)[2] > sink_guard.NORM_Z


def test_key_mass_is_the_mean_of_the_attention_map():
    query, key = torch.randn(3, 50, 8, generator=seeded()), torch.randn(3, 50, 8, generator=seeded(1))
    expected = (query @ key.transpose(1, 2) * 0.4).softmax(-1).mean(1)
    torch.testing.assert_close(key_mass(query, key, 0.4), expected)


def test_key_mass_does_not_depend_on_the_chunks(monkeypatch):
    query, key = torch.randn(3, 50, 8, generator=seeded()), torch.randn(3, 50, 8, generator=seeded(1))
    whole = key_mass(query, key, 0.4)
    monkeypatch.setattr(sink_guard, "MAX_CHUNK_BYTES", 4 * 3 * 50 * 7)  # 7 queries at a time, 1 in the last chunk
    torch.testing.assert_close(key_mass(query, key, 0.4), whole)


def with_sinks(tower, patch_by_mass, patch_by_norm, layer=-1, group=0):
    """Draws all attention of head 1 in one group to one patch, and makes the norm of another one large."""
    seen = tower.layers[layer]
    query, key, hidden = (list(groups) for groups in (seen.query, seen.key, tower.hidden))
    query[group], key[group], hidden[group] = (values[group].clone() for values in (query, key, hidden))
    query[group][1, :, 0], key[group][1, seen.num_prefix + patch_by_mass, 0] = 9, 9
    hidden[group][: seen.num_prefix] *= 100  # a class token is no visual token, and not part of the statistics
    hidden[group][seen.num_prefix + patch_by_norm] *= 20
    changed = dataclasses.replace(seen, query=tuple(query), key=tuple(key))
    return TowerView(layers={**tower.layers, layer: changed}, hidden=tuple(hidden))


@pytest.mark.parametrize("num_prefix", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sinks_are_found_by_either_reason(num_prefix, dtype):
    tower = with_sinks(random_tower(num_prefix=num_prefix, dtype=dtype), patch_by_mass=5, patch_by_norm=11)
    assert visual_sinks(tower).nonzero()[:, 0].tolist() == [5, 11]
    assert patch_key_mass(tower).shape == (96, 2) and patch_norm_z(tower).shape == (96,)


def test_the_layer_is_the_one_asked_for():
    tower = with_sinks(random_tower(), patch_by_mass=5, patch_by_norm=11, layer=-2)
    assert visual_sinks(tower, layer=-2).nonzero()[:, 0].tolist() == [5, 11]
    assert visual_sinks(tower).nonzero()[:, 0].tolist() == [11]


def test_a_tower_without_sinks_has_none():
    assert not visual_sinks(random_tower()).any()


def test_one_sink_patch_makes_its_pooled_token_a_sink():
    def pooled(values):  # 4 patches become one token, as in families that pool
        return values.unflatten(0, (-1, 4)).mean(1)

    tower = with_sinks(random_tower(), patch_by_mass=5, patch_by_norm=11)
    layers = {place: dataclasses.replace(layer, to_tokens=pooled) for place, layer in tower.layers.items()}
    sinks = visual_sinks(TowerView(layers=layers, hidden=tower.hidden))
    assert sinks.shape == (24,) and sinks.nonzero()[:, 0].tolist() == [1, 2]
    assert holds_sink(torch.tensor([False] * 7 + [True]), pooled).tolist() == [False, True]


def test_windows_and_whole_items_may_differ_in_their_groups():
    tower = random_tower(num_prefix=0)  # as in Qwen towers: attention in groups, hidden states of the item in one
    joined = TowerView(layers=tower.layers, hidden=(torch.cat(tower.hidden),))
    assert torch.equal(patch_norm_z(joined), patch_norm_z(tower))


def test_finding_is_unchanged_by_permuting_patches():
    tower = with_sinks(random_tower(groups=1, patches=96, num_prefix=0), patch_by_mass=5, patch_by_norm=11)
    order = torch.randperm(96, generator=seeded())
    layer = tower.layers[-1]
    shuffled = TowerLayer(
        query=(layer.query[0][:, order],),
        key=(layer.key[0][:, order],),
        scale=layer.scale,
        num_prefix=0,
        to_tokens=layer.to_tokens,
    )
    found = visual_sinks(TowerView(layers={-1: shuffled}, hidden=(tower.hidden[0][order],)))
    assert torch.equal(found, visual_sinks(tower)[order])


# --- leave one out


def test_leave_one_out_is_the_change_of_the_output():
    attn = torch.randn(2, 3, 6, 7, generator=seeded()).softmax(-1)
    values = torch.randn(2, 3, 7, 5, generator=seeded(1))
    score = leave_one_out_score(attn, values)
    for key in range(7):
        rest = attn.clone()
        rest[..., key] = 0
        moved = (attn @ values - rest @ values / rest.sum(-1, keepdim=True)).norm(dim=-1)
        torch.testing.assert_close(score[:, key], moved.mean((1, 2)), rtol=1e-4, atol=1e-6)


def test_leave_one_out_of_the_worked_example():
    attn = torch.tensor([0.90, 0.04, 0.03, 0.02, 0.01]).view(1, 1, 1, 5)
    values = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1], [-1, 0]]).view(1, 1, 5, 2)
    expected = torch.tensor([[0.6364, 0.0396, 0.0294, 0.0274, 0.0106]])
    torch.testing.assert_close(leave_one_out_score(attn, values), expected, rtol=0, atol=5e-5)
    assert (attn[0, 0, 0] * values[0, 0].norm(dim=-1)).argmin() == 0  # attention times norm would drop the sink first


def test_a_query_that_sees_one_key_has_no_say_about_it():
    attn = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]).view(1, 1, 3, 3)
    values = torch.randn(1, 1, 3, 4, generator=seeded())
    alone = leave_one_out_score(attn, values)
    assert alone.isfinite().all()
    torch.testing.assert_close(alone, leave_one_out_score(attn[:, :, 1:], values) * 2 / 3)


# --- the methods that rank by attention


def video_with_sinks(layer=-1):
    """4 frames of 24 tokens; in the first one 5 draws attention and 11 has a long hidden state."""
    tower = with_sinks(random_tower(), patch_by_mass=5, patch_by_norm=11, layer=layer)
    return dataclasses.replace(random_video(), tower=tower)


PICTURES = [
    ("visionzip", -2, {}),
    ("prumerge", -1, {}),
    ("prumerge+", -1, {}),
    ("prumerge", -1, {"adaptive": True}),
    ("fastvid", -1, {}),
    ("holitom", -1, {}),
]
each_method = pytest.mark.parametrize(("name", "layer", "options"), PICTURES, ids=lambda v: str(v) if v else "")


def sources(plan, token):
    """What the kept token is made of."""
    place = plan.kept.tolist().index(token)
    entries = plan.merge.target == place
    return plan.merge.source[entries].tolist(), plan.merge.weight[entries].tolist()


@each_method
def test_protected_sinks_stay_as_they_are_outside_the_budget(name, layer, options):
    plan = get_method(name)(video_with_sinks(layer), 16, sinks="protect", **options)
    assert sources(plan, 5) == ([5], [1.0]) and sources(plan, 11) == ([11], [1.0])
    assert plan.merge.source.tolist().count(5) == 1 and plan.merge.source.tolist().count(11) == 1
    if not options:
        assert [int((plan.kept // 24 == frame).sum()) for frame in range(4)] == [6, 4, 4, 4]


@each_method
def test_excluded_sinks_are_neither_kept_nor_merged(name, layer, options):
    tokens = video_with_sinks(layer)
    plan = get_method(name)(tokens, 16, sinks="exclude", **options)
    assert not {5, 11} & {*plan.kept.tolist(), *plan.merge.source.tolist()}
    protected = get_method(name)(tokens, 16, sinks="protect", **options)
    assert sorted({*protected.kept.tolist()} - {5, 11}) == plan.kept.tolist()
    if not options:
        assert plan.num_kept == 16


@each_method
def test_off_is_the_method_of_the_paper_and_so_is_any_mode_without_sinks(name, layer, options):
    method = get_method(name)
    tokens = video_with_sinks(layer)
    bare, off = method(tokens, 16, **options), method(tokens, 16, sinks="off", **options)
    assert torch.equal(bare.kept, off.kept) and torch.equal(bare.merge.weight, off.merge.weight)
    assert 5 in bare.kept  # what the guard is for: the sink takes a place
    without = method(random_video(), 16, **options)
    for mode in ("exclude", "protect"):
        plan = method(random_video(), 16, sinks=mode, **options)
        assert torch.equal(plan.kept, without.kept) and torch.equal(plan.merge.source, without.merge.source)


@each_method
def test_the_layer_that_ranks_is_the_layer_that_is_searched(name, layer, options):
    other = video_with_sinks(-1 if layer == -2 else -2)
    protected, excluded = (get_method(name)(other, 16, sinks=mode, **options) for mode in ("protect", "exclude"))
    assert {*protected.kept.tolist()} - {*excluded.kept.tolist()} == {11}  # only the one with the norm is a sink


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "prumerge+", "fastvid", "holitom"])
def test_frames_without_a_share_still_protect_their_sinks(name):
    tower = with_sinks(
        random_tower(), patch_by_mass=5, patch_by_norm=11, layer=-2 if name == "visionzip" else -1, group=1
    )
    plan = get_method(name)(dataclasses.replace(random_video(), tower=tower), 2, sinks="protect")  # frames 0 and 2
    assert plan.num_kept == 4 and [k for k in plan.kept.tolist() if k // 24 == 1] == [24 + 5, 24 + 11]


@pytest.mark.parametrize("mode", ["exclude", "protect"])
def test_the_outlier_rule_still_needs_no_budget(mode):
    few, many = (get_method("prumerge")(video_with_sinks(), k, sinks=mode, adaptive=True) for k in (4, 95))
    assert torch.equal(few.kept, many.kept)


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "prumerge+", "fastvid", "holitom"])
def test_methods_refuse_unknown_modes(name):
    with pytest.raises(BadOption, match="sinks must be one of off, exclude, protect; got 'on'"):
        get_method(name)(random_video(), 16, sinks="on")


@pytest.mark.parametrize(
    ("mode", "kept"), [("off", [0, 3, 6, 9]), ("exclude", [4, 6, 7, 9]), ("protect", [0, 3, 4, 6, 7, 9])]
)
def test_fastv_finds_sinks_in_its_row_and_in_the_hidden_states(mode, kept):
    attention = torch.stack([SCORE, SCORE.clone()])
    attention[1, 0] = 0.31  # above the threshold in one head; token 3 is an outlier in norm
    hidden = torch.randn(10, 16, generator=seeded())
    hidden = hidden / hidden.norm(dim=-1, keepdim=True) * torch.linspace(0.9, 1.1, 10)[:, None]
    hidden[3] *= 40
    tokens = DecoderTokens(hidden=hidden, attention=lambda: attention, raster=None, num_first=10, num_keep=4)
    stage = get_method("fastv").fn(sinks=mode)
    plan = stage.select(stage.steps(8)[0], tokens)
    assert plan.kept.tolist() == kept and plan.num_tokens == 10 and plan.merge is None


def test_fastv_refuses_unknown_modes():
    with pytest.raises(BadOption, match="sinks must be one of"):
        get_method("fastv").fn(sinks="on")
