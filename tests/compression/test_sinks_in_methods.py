"""The option `sinks` of the methods inside the language model, and where scenes and frames meet it at the projector."""

import dataclasses

import pytest
import torch

from tests.compression.helpers import random_inputs, random_tower, random_video
from tests.compression.test_sink_guard import video_with_sinks, with_sinks
from tokensieve.compression import Merge, Plan, apply_plan, get_method
from tokensieve.compression.decoder_stage import DecoderTokens, Raster
from tokensieve.compression.density_peaks import cluster
from tokensieve.compression.holitom_decoder import halve_into_nearest
from tokensieve.compression.sink_guard import SINK_MODES, add_sinks, guarded_plan
from tokensieve.compression.sparsevlm import keep_and_recycle
from tokensieve.errors import BadOption

MODES = pytest.mark.parametrize("mode", ["exclude", "protect"])

# --- in the language model: 40 tokens in 4 frames; 3 draws attention in one head, 25 has a long hidden state

DECODER = [
    ("pyramiddrop", {}),
    ("sparsevlm", {}),
    ("sparsevlm", {"recycle": False}),
    ("prunevid-decoder", {}),
    ("holitom-decoder", {}),
]
each_method = pytest.mark.parametrize(("name", "options"), DECODER, ids=lambda v: str(v) if v else "")
OTHERS = torch.tensor([j for j in range(40) if j not in (3, 25)])


def tokens_with_sinks(sinks=True, num_keep=12, left=None, dtype=torch.float32):
    """One prompt, or what is `left` of it; token 25 is in the ranking where the method ranks by attention alone."""
    hidden, attention = random_inputs(40, 16, seed=2), random_inputs(2, 40, seed=4).abs() / 40
    hidden = hidden / hidden.norm(dim=-1, keepdim=True) * torch.linspace(0.9, 1.1, 40)[:, None]
    attention[:, 25] = 0.2
    if sinks:
        attention[1, 3] = 0.4  # the mean over heads is below the threshold, this head is not
        hidden[25] *= 30
    left = torch.arange(40) if left is None else left
    return DecoderTokens(
        hidden=hidden[left].to(dtype),
        attention=lambda: attention[:, left],
        raster=Raster(block=left * 0, frame=left // 10, place=left % 10),
        num_first=40,
        num_keep=num_keep,
        num_layers=32,
    )


def last_step(name, tokens, **options):
    stage = get_method(name).fn(**options)
    return stage.select(stage.steps(32)[-1], tokens)


def same(a, b):
    """Whether two plans are equal bit by bit."""
    if (a.merge is None) != (b.merge is None):
        return False
    pairs = [(a.kept, b.kept)]
    if a.merge is not None:
        pairs += [(getattr(a.merge, part), getattr(b.merge, part)) for part in ("source", "target", "weight")]
    return a.num_tokens == b.num_tokens and all(torch.equal(x, y) for x, y in pairs)


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_protected_sinks_stay_as_they_are_outside_the_budget(name, options, dtype):
    tokens = tokens_with_sinks(dtype=dtype)
    plan = last_step(name, tokens, sinks="protect", **options)
    assert plan.num_kept == 14 and plan.num_tokens == 40 and plan.mask()[[3, 25]].all()
    merged = apply_plan(plan, tokens.hidden)
    for token in (3, 25):
        assert torch.equal(merged[plan.kept == token][0], tokens.hidden[token])
        assert plan.merge is None or plan.merge.source.tolist().count(token) == 1


@each_method
def test_excluded_sinks_are_neither_kept_nor_merged(name, options):
    tokens = tokens_with_sinks()
    plan = last_step(name, tokens, sinks="exclude", **options)
    assert plan.num_kept == 12 and not plan.mask()[[3, 25]].any()
    assert plan.merge is None or not {3, 25} & {*plan.merge.source.tolist()}
    protected = last_step(name, tokens, sinks="protect", **options)
    assert [k for k in protected.kept.tolist() if k not in (3, 25)] == plan.kept.tolist()


@each_method
@MODES
def test_the_others_get_what_the_method_makes_of_them_alone(name, options, mode):
    guarded = last_step(name, tokens_with_sinks(), sinks=mode, **options)
    alone = last_step(name, tokens_with_sinks(left=OTHERS), **options)
    hidden = tokens_with_sinks().hidden
    stays = ~torch.isin(guarded.kept, torch.tensor([3, 25]))
    assert torch.equal(guarded.kept[stays], OTHERS[alone.kept])
    assert torch.equal(apply_plan(guarded, hidden)[stays], apply_plan(alone, hidden[OTHERS]))


@each_method
def test_off_is_the_method_of_the_paper_and_so_is_any_mode_without_sinks(name, options):
    bare = last_step(name, tokens_with_sinks(), **options)
    assert same(bare, last_step(name, tokens_with_sinks(), sinks="off", **options))
    assert bare.num_kept == 12 and bare.mask()[[3, 25]].all()  # what the guard is for: sinks take places
    without = last_step(name, tokens_with_sinks(sinks=False), **options)
    for mode in ("exclude", "protect"):
        assert same(without, last_step(name, tokens_with_sinks(sinks=False), sinks=mode, **options))


def test_off_is_the_bare_functions():
    tokens = tokens_with_sinks()
    score = tokens.attention().mean(0)
    best = score.sort(descending=True, stable=True).indices[:12].sort().values
    assert same(last_step("pyramiddrop", tokens), Plan(best, 40))
    assert same(last_step("sparsevlm", tokens, recycle=False), Plan(best, 40))
    assert same(last_step("sparsevlm", tokens), keep_and_recycle(tokens.hidden, score, 12))
    assert same(last_step("holitom-decoder", tokens), halve_into_nearest(tokens.hidden, best))


@each_method
def test_excluded_sinks_fill_what_the_others_leave(name, options):
    plan = last_step(name, tokens_with_sinks(num_keep=39), sinks="exclude", **options)
    assert plan.num_kept == 39 and plan.mask()[3] and not plan.mask()[25]
    assert last_step(name, tokens_with_sinks(num_keep=39), sinks="protect", **options).num_kept == 40


@each_method
def test_where_all_are_sinks_none_is(name, options):
    tokens = dataclasses.replace(tokens_with_sinks(), attention=lambda: random_inputs(2, 40, seed=4).abs() + 0.31)
    for mode in ("exclude", "protect"):
        assert same(last_step(name, tokens, sinks=mode, **options), last_step(name, tokens, **options))


@each_method
def test_unknown_modes_are_refused(name, options):
    with pytest.raises(BadOption, match="sinks must be one of off, exclude, protect; got 'on'"):
        get_method(name).fn(sinks="on", **options)


@pytest.mark.parametrize("mode", SINK_MODES)
def test_pyramiddrop_counts_without_sinks_at_every_step(mode):
    stage, left, counts = get_method("pyramiddrop").fn(sinks=mode), torch.arange(40), []
    for step in stage.steps(32):
        left = left[stage.select(step, tokens_with_sinks(num_keep=5, left=left)).kept]
        counts.append(len(left))
    assert counts == ([22, 12, 7] if mode == "protect" else [20, 10, 5])
    assert len({3, 25} & {*left.tolist()}) == (0 if mode == "exclude" else 2)


@pytest.mark.parametrize("num_keep", [2, 5, 12, 20, 30])
def test_sparsevlm_recycles_no_sink_as_a_centre_or_member(num_keep):
    tokens = tokens_with_sinks(num_keep=num_keep)
    plan = last_step("sparsevlm", tokens, sinks="protect")
    score = tokens.attention().mean(0)[OTHERS]
    expected = keep_and_recycle(tokens.hidden[OTHERS], score, num_keep)
    merged = apply_plan(plan, tokens.hidden)
    stays = torch.isin(plan.kept, OTHERS)
    assert torch.equal(merged[stays], apply_plan(expected, tokens.hidden[OTHERS]))
    assert int((plan.merge.target.bincount() > 1).sum()) >= 1  # something was recycled
    assert last_step("sparsevlm", tokens_with_sinks(num_keep=38), sinks="protect").merge is None  # nothing is left to


@MODES
def test_prunevid_shares_the_budget_by_the_other_tokens_of_each_frame(mode):
    tokens = tokens_with_sinks(num_keep=19)  # of 9 + 10 + 9 + 10: a half
    plan = last_step("prunevid-decoder", tokens, sinks=mode)
    others = plan.kept[torch.isin(plan.kept, OTHERS)]
    assert (others // 10).bincount().tolist() == [5, 5, 4, 5]
    score = tokens.attention().amax(0)
    for frame, quota in enumerate([5, 5, 4, 5]):
        mine = OTHERS[OTHERS // 10 == frame]
        assert torch.equal(others[others // 10 == frame], mine[score[mine].topk(quota).indices].sort().values)


@MODES
def test_prunevid_frames_of_sinks_alone_have_no_share(mode):
    tokens = tokens_with_sinks()
    attention = tokens.attention().clone()
    attention[0, 30:] = 0.5
    plan = last_step("prunevid-decoder", dataclasses.replace(tokens, attention=lambda: attention), sinks=mode)
    assert plan.num_kept == (24 if mode == "protect" else 12)
    assert int((plan.kept >= 30).sum()) == (10 if mode == "protect" else 0)


# --- the helpers


def test_sinks_join_a_plan_in_their_places():
    member, sinks = torch.tensor([1, 2, 4, 6]), torch.tensor([0, 5])
    pruned = add_sinks(Plan(torch.tensor([1, 3]), 4), member, sinks, 7)
    assert same(pruned, Plan(torch.tensor([0, 2, 5, 6]), 7))
    merge = Merge(torch.tensor([0, 1, 3]), torch.tensor([0, 0, 1]), torch.tensor([0.25, 0.75, 1.0]), True)
    joined = add_sinks(Plan(torch.tensor([1, 3]), 4, merge), member, sinks, 7)
    assert joined.kept.tolist() == [0, 2, 5, 6] and joined.merge.before_projector
    values = torch.arange(7.0) ** 2
    assert apply_plan(joined, values).tolist() == [0, 0.25 * 1 + 0.75 * 4, 25, 36]


def test_select_gets_the_others_and_the_budget():
    seen = []

    def select(member, num_best):
        seen.append((member.tolist(), num_best))
        return Plan(torch.arange(num_best), len(member))

    tokens = tokens_with_sinks()
    for mode, num_keep in (("off", 40), ("exclude", 12), ("exclude", 39), ("protect", 39)):
        guarded_plan(tokens, tokens.attention(), num_keep, mode, select)
    assert seen == [(list(range(40)), 40), (OTHERS.tolist(), 12), (OTHERS.tolist(), 38), (OTHERS.tolist(), 38)]
    with pytest.raises(BadOption, match="sinks must be one of"):
        guarded_plan(tokens, tokens.attention(), 12, "on", select)


# --- at the projector: fastvid and holitom (more of them in test_sink_guard.py)


def still_video(group=1):
    """4 equal frames but for a little noise; in frame `group` tokens 5 and 11 are sinks."""
    tokens = random_video()
    frame = tokens.features[:24].repeat(4, 1)
    tower = with_sinks(random_tower(), patch_by_mass=5, patch_by_norm=11, group=group)
    return dataclasses.replace(tokens, features=frame + 0.01 * random_inputs(96, 32), tower=tower)


@MODES
@pytest.mark.parametrize("num_keep", [2, 12, 22, 28, 29, 60, 88])
@pytest.mark.parametrize("name", ["fastvid", "holitom"])
def test_the_budget_is_met_beside_sinks(name, num_keep, mode):
    tokens = still_video()
    plan = get_method(name)(tokens, num_keep, sinks=mode)
    sums = torch.zeros(plan.num_kept).index_add(0, plan.merge.target, plan.merge.weight)
    torch.testing.assert_close(sums, torch.ones(plan.num_kept))
    if mode == "exclude":
        assert plan.num_kept == num_keep
        assert not {29, 35} & {*plan.kept.tolist(), *plan.merge.source.tolist()}
    else:
        assert plan.num_kept == num_keep + 2
        merged = apply_plan(plan, tokens.features)
        for token in (29, 35):
            assert torch.equal(merged[plan.kept == token][0], tokens.features[token])
            assert plan.merge.source.tolist().count(token) == 1


@pytest.mark.parametrize(("name", "full"), [("fastvid", 92), ("holitom", 95)])  # a full frame, a full video
def test_excluded_sinks_fill_full_pictures(name, full):
    plan = get_method(name)(still_video(), full, sinks="exclude")
    assert plan.num_kept == full and plan.mask()[29] and not plan.mask()[35]
    if name == "holitom":
        assert not get_method(name)(still_video(), 94, sinks="exclude").mask()[[29, 35]].any()


@MODES
@pytest.mark.parametrize("group", [0, 1, 3])
def test_holitom_merges_still_places_around_a_sink(group, mode):
    """Places 5 and 11 move while a sink is there; all other places are one token in all 4 frames."""
    tokens = still_video(group)
    plan = get_method("holitom")(tokens, 28, sinks=mode)  # 22 still places and 3 loose tokens at 5 and at 11
    frames = tokens.features.unflatten(0, (4, -1))
    merged, place = apply_plan(plan, tokens.features), plan.kept % 24
    for kept, row in zip(plan.kept.tolist(), merged, strict=True):
        if kept % 24 in (5, 11):
            assert torch.equal(row, tokens.features[kept])
        else:
            torch.testing.assert_close(row, frames[:, kept % 24].mean(0))
    expected = [4, 4] if mode == "protect" else [3, 3]
    assert [int((place == p).sum()) for p in (5, 11)] == expected
    assert torch.equal(get_method("holitom")(tokens, 24).kept, torch.arange(24))  # off: 5 and 11 stand still


@MODES
def test_holitom_official_counts_are_of_the_other_tokens(mode):
    plan = get_method("holitom")(still_video(), 14, sinks=mode, official_counts=True)
    # Half of 28: 11 of 22 still places, 1 of the 2 loose ones of frames 0, 2 and 3.
    assert plan.num_kept == 14 + 2 * (mode == "protect")
    moving = get_method("holitom")(video_with_sinks(), 47, sinks=mode, official_counts=True)  # half of 94
    assert (moving.kept // 24).bincount().tolist() == [13 if mode == "protect" else 11, 12, 12, 12]


@MODES
def test_fastvid_keeps_the_most_salient_others_of_each_frame(mode):
    tokens = video_with_sinks()
    plan = get_method("fastvid")(tokens, 16, sinks=mode, context_share=0)
    salience = tokens.tower.layers[-1].salience().view(4, 24).clone()
    salience[0, [5, 11]] = -1
    expected = (salience.topk(4).indices + 24 * torch.arange(4)[:, None]).flatten().tolist()
    assert plan.kept.tolist() == sorted(expected + [5, 11] * (mode == "protect"))
    plan = get_method("fastvid")(tokens, 18, sinks=mode, context_share=0.4)  # 5, 4, 5, 4; 2, 1, 2, 1 of them context
    whole = plan.kept[plan.merge.target.bincount() == 1]
    assert (whole // 24).bincount().tolist() == [5 if mode == "protect" else 3, 3, 3, 3]


@MODES
def test_fastvid_context_is_made_of_the_others(mode):
    tokens = video_with_sinks()
    plan = get_method("fastvid")(tokens, 16, sinks=mode, context_share=1.0, min_scenes=4)  # every frame is a scene
    others = torch.tensor([p for p in range(24) if p not in (5, 11)])
    centre, _ = cluster(tokens.features[others], 4, 4)
    first = [k for k in plan.kept.tolist() if k < 24 and k not in (5, 11)]
    assert first == others[centre].sort().values.tolist()
    from_first = {s for s in plan.merge.source.tolist() if s < 24}
    assert from_first == ({*range(24)} if mode == "protect" else {*others.tolist()})
