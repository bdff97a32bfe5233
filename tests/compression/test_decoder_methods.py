"""Methods inside the language model, as pure functions: golden vectors, equations, budgets, bad options."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.compression.helpers import load_golden
from tokensieve.compression import apply_plan, get_method, list_methods
from tokensieve.compression.decoder_stage import (
    Chosen,
    DecoderTokens,
    Raster,
    Step,
    check_number,
    check_whole,
    checked_layer,
    keep_best,
)
from tokensieve.compression.density_peaks import cluster
from tokensieve.compression.framefusion import merge_similar_frames
from tokensieve.compression.holitom_decoder import halve_into_nearest
from tokensieve.compression.prunevid_decoder import frames_of, keep_best_of_groups
from tokensieve.compression.sparsevlm import (
    PLAIN,
    RECYCLED,
    keep_and_recycle,
    num_recycled,
    schedule,
    visual_words,
)
from tokensieve.errors import BadOption

METHODS = [m.name for m in list_methods("decoder")]


def stage_of(method, **options):
    return get_method(method).fn(**options)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def raster_of(frames, places, block=0):
    return Raster(
        block=torch.full((frames * places,), block),
        frame=torch.arange(frames).repeat_interleave(places),
        place=torch.arange(places).repeat(frames),
    )


def tokens_of(hidden, num_keep, attention=None, raster=None, **more):
    num_tokens = len(hidden)
    attention = draw(2, num_tokens, seed=9).exp() if attention is None else attention
    return DecoderTokens(
        hidden=hidden,
        attention=lambda: attention,
        raster=raster or raster_of(1, num_tokens),
        **{"num_first": num_tokens, "num_keep": num_keep, **more},
    )


def run(stage, hidden, num_keep, num_layers, raster=None):
    """All steps of a stage, as the hooks run them: counts in every layer, plans, and hidden states at the end."""
    steps = {step.layer: step for step in stage.steps(num_layers)}
    num_first, memory, counts, plans = len(hidden), {}, [], []
    raster = raster or raster_of(1, num_first)
    for layer in range(num_layers):
        if layer in steps:
            tokens = tokens_of(
                hidden,
                num_keep,
                raster=raster,
                num_first=num_first,
                counts=tuple(counts),
                num_layers=num_layers,
                memory=memory,
            )
            plan = stage.select(steps[layer], tokens)
            hidden = apply_plan(plan, hidden)
            raster = Raster(block=raster.block[plan.kept], frame=raster.frame[plan.kept], place=raster.place[plan.kept])
            plans.append(plan)
        counts.append(len(hidden))
    return counts, plans, hidden


# FastV


@pytest.mark.parametrize("name", ["fastv-s60", "fastv-s80"])
def test_fastv_golden(name):
    golden = load_golden(name)
    start, length, keep = (golden["params"][k] for k in ("sys_length", "image_length", "keep_tokens"))
    last_row = golden["in_attention"][0, :, -1, start : start + length]
    hidden = golden["in_hidden_states"][0]
    stage = stage_of("fastv")
    plan = stage.select(stage.steps(32)[0], tokens_of(hidden[start : start + length], keep, last_row))
    text = torch.arange(len(hidden))
    kept = torch.cat([text[:start], start + plan.kept, text[start + length :]])
    assert torch.equal(kept, golden["out_keep_index"])
    assert torch.equal(hidden[kept], golden["out_hidden_states"][0])
    assert torch.equal(kept, golden["out_position_ids"][0])


def test_fastv_looks_at_the_last_row_of_the_layer_before():
    assert stage_of("fastv").steps(32) == (Step(layer=2, looks="previous", queries="last"),)
    assert stage_of("fastv", layer=5).steps(6)[0].layer == 5


def test_fastv_averages_heads_and_the_first_of_equals_wins():
    attention = torch.tensor([[0.3, 0.1, 0.1, 0.2], [0.0, 0.2, 0.2, 0.0]])
    plan = stage_of("fastv").select(Step(layer=2), tokens_of(draw(4, 8), 2, attention))
    assert plan.kept.tolist() == [0, 1]


# PyramidDrop


def test_pyramiddrop_layers_and_default_halving():
    stage = stage_of("pyramiddrop")
    steps = stage.steps(32)
    assert [step.layer for step in steps] == [8, 16, 24]
    assert all(step.looks == "next" and step.queries == "last" for step in steps)
    assert run(stage, draw(576, 4), 72, 32)[0] == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert [step.layer for step in stage.steps(3)] == [1, 2] and [step.phase for step in stage.steps(3)] == [2, 3]
    assert [step.layer for step in stage_of("pyramiddrop", stages=2).steps(28)] == [14]


def test_pyramiddrop_keeps_the_highest_at_every_step():
    counts, plans, _ = run(stage_of("pyramiddrop"), draw(60, 4), 5, 8)
    assert counts == [60, 60, 26, 26, 11, 11, 5, 5]
    score = draw(2, 60, seed=9).exp().mean(0)
    assert torch.equal(plans[0].kept, score.topk(26).indices.sort().values)


# SparseVLM


@pytest.mark.parametrize("name", ["sparsevlm-n40", "sparsevlm-n57"])
def test_sparsevlm_golden(name):
    golden = load_golden(name)
    x, count = golden["in_x"][0], golden["params"]["cluster_num"]
    centres, label = cluster(x, count, count)
    assert len(centres) == count
    means = torch.stack([x[label == i].mean(0) for i in range(count)])
    torch.testing.assert_close(means, golden["out_merged"][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("table", [RECYCLED, PLAIN])
def test_sparsevlm_schedule_has_the_rows_of_the_table(table):
    for row in table[1:-1]:
        assert schedule(576, row[-1], table) == row
    assert schedule(1152, 2 * table[2][-1], table) == tuple(2 * n for n in table[2])
    for keep in range(1, 577):
        first, second, last = schedule(576, keep, table)
        assert 576 >= first >= second >= last == keep


def test_sparsevlm_layers():
    assert [step.layer for step in stage_of("sparsevlm").steps(32)] == [3, 7, 16]
    assert [step.layer for step in stage_of("sparsevlm").steps(28)] == [3, 7, 16]
    assert [step.layer for step in stage_of("sparsevlm").steps(16)] == [2, 4, 8]
    assert [(s.layer, s.phase) for s in stage_of("sparsevlm").steps(3)] == [(1, 1), (2, 2)]
    assert [step.layer for step in stage_of("sparsevlm", layers=(1, 2, 3)).steps(5)] == [2, 3, 4]
    assert all(step.queries == "raters" and step.looks == "previous" for step in stage_of("sparsevlm").steps(32))


def test_sparsevlm_raters_are_above_the_mean():
    visual, text = torch.eye(3), torch.tensor([[5.0, 5.0, 5.0], [0.0, 0.0, 0.0], [6.0, 5.0, 5.0], [-9.0, 0.0, 0.0]])
    share = (visual @ text.T).softmax(-1).mean(0)
    assert visual_words(visual, text).tolist() == (share > share.mean()).tolist() == [True, False, True, False]
    assert visual_words(visual, torch.zeros(2, 3)).all()  # all alike: all judge


@pytest.mark.parametrize("num_keep", [2, 3, 17, 50, 98, 99])
def test_sparsevlm_recycles_within_the_budget(num_keep):
    x, score = draw(100, 8), draw(100, seed=4)
    plan = keep_and_recycle(x, score, num_keep)
    assert len(plan.kept) == num_keep
    order = score.argsort(descending=True)
    # The most whole tokens that leave room for the clusters of the rest, or half.
    fits = [n for n in range((num_keep + 1) // 2, num_keep) if n + num_recycled(100 - n)[1] <= num_keep]
    num_best = max(fits, default=(num_keep + 1) // 2)
    best, num_more, num_clusters = order[:num_best], num_recycled(100 - num_best)[0], num_keep - num_best
    assert num_clusters == num_recycled(100 - num_best)[1] or not fits
    merged = apply_plan(plan, x)
    stays = torch.isin(plan.kept, best)
    assert torch.equal(merged[stays], x[best.sort().values]) and stays.sum() == num_best
    recycled = order[num_best : num_best + num_more].sort().values
    centre, label = cluster(x[recycled], num_clusters, num_clusters)
    assert torch.equal(plan.kept[~stays], recycled[centre].sort().values)
    for i in range(num_clusters):
        at = (plan.kept == recycled[centre[i]]).nonzero().item()
        torch.testing.assert_close(merged[at], x[recycled[label == i]].mean(0))


def test_sparsevlm_counts_of_recycled():
    assert num_recycled(276) == (83, 9) and num_recycled(1) == (1, 1) and num_recycled(30) == (10, 2)


def test_sparsevlm_without_recycling_only_prunes():
    counts, plans, _ = run(stage_of("sparsevlm", recycle=False), draw(576, 4), 20, 32)
    assert counts == [576] * 3 + [66] * 4 + [34] * 9 + [20] * 16 and all(plan.merge is None for plan in plans)
    counts, plans, _ = run(stage_of("sparsevlm"), draw(576, 4), 26, 32)
    assert counts == [576] * 3 + [238] * 4 + [48] * 9 + [26] * 16 and all(plan.merge is not None for plan in plans)


# FrameFusion


@pytest.mark.parametrize("name", ["framefusion-t6", "framefusion-t10-budget"])
def test_framefusion_golden(name):
    golden = load_golden(name)
    params, hidden = golden["params"], golden["in_hidden_states"][0]
    frames, places, start = params["t"], params["n"], params["video_start"]
    length = frames * places
    stage = stage_of(
        "framefusion",
        similarity=params["similarity_lower_bound"],
        min_share=params["ratio_lower_bound"],
        budget="mean",
        budget_layers=28,
    )
    tokens = tokens_of(
        hidden[start : start + length],
        round(params["cost"] * length),
        raster=raster_of(frames, places),
        num_layers=3,
    )
    plan = stage.select(stage.steps(3)[0], tokens)
    text = torch.arange(len(hidden))
    kept = torch.cat([text[:start], start + plan.kept, text[start + length :]])
    assert torch.equal(kept, golden["out_keep_index"])
    got = torch.cat([hidden[:start], apply_plan(plan, tokens.hidden), hidden[start + length :]])
    torch.testing.assert_close(got, golden["out_hidden_states"][0], rtol=1e-5, atol=1e-5)


def test_framefusion_merges_runs_into_their_first_token():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    # Frames of two places: the first place shows a, a, b, b; the second b, a, a, a.
    x = torch.stack([a, b, 3 * a, a, b, a, b, 5 * a])
    plan, share, capped = merge_similar_frames(x, raster_of(4, 2), 0.6, 8)
    assert plan.kept.tolist() == [0, 1, 3, 4] and share == 4 / 8 and not capped
    torch.testing.assert_close(apply_plan(plan, x), torch.stack([2 * a, b, 7 / 3 * a, b]))
    # Later, a token meets the last frame that still has one at its place.
    raster = Raster(block=torch.zeros(2).long(), frame=torch.tensor([0, 3]), place=torch.tensor([1, 1]))
    assert merge_similar_frames(torch.stack([a, a]), raster, 0.6, 2)[0].kept.tolist() == [0]
    other = Raster(block=torch.tensor([0, 1]), frame=torch.tensor([0, 0]), place=torch.tensor([1, 1]))
    assert merge_similar_frames(torch.stack([a, a]), other, 0.6, 2)[0].kept.tolist() == [0, 1]


def test_framefusion_cap_takes_the_most_similar():
    x = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.2], [1.0, 0.9], [1.0, 0.8]]), dim=-1)
    plan, share, capped = merge_similar_frames(x, raster_of(4, 1), 0.6, 2)
    assert capped and share == 3 / 4 and plan.kept.tolist() == [0, 2]


def test_framefusion_prunes_once_after_the_last_merge():
    frames = draw(4, 10, 8)
    counts, plans, _ = run(stage_of("framefusion"), frames.flatten(0, 1), 12, 6, raster_of(4, 10))
    assert counts[0] >= 36 and counts[1:] == [12] * 5  # hardly anything is alike: prune before layer 1
    assert plans[1].merge is None and all(len(p.kept) == p.num_tokens == 12 for p in plans[2:])
    still = frames[:1].expand(4, -1, -1).flatten(0, 1) + 0.01 * draw(40, 8, seed=3)
    counts, plans, _ = run(stage_of("framefusion"), still, 12, 6, raster_of(4, 10))
    assert counts == [12] * 6 and plans[0].merge is not None  # the cap binds: done
    counts, _, _ = run(stage_of("framefusion"), still, 5, 6, raster_of(4, 10))
    assert counts[0] == 10 and counts[-1] == 5
    assert run(stage_of("framefusion"), frames.flatten(0, 1), 12, 1, raster_of(4, 10))[0] == [12]


def test_framefusion_is_done_once_the_cap_binds():
    still = draw(1, 10, 8).expand(4, -1, -1).flatten(0, 1)
    stage = stage_of("framefusion", budget="mean")
    tokens = tokens_of(still, 20, raster=raster_of(4, 10), num_first=50, num_layers=8, counts=(50, 45, 43))
    assert stage.allowed(3, tokens) == 4.4
    tokens = tokens_of(still, 20, raster=raster_of(4, 10), num_first=50, num_layers=8, counts=(42, 41))
    plan = stage.select(stage.steps(8)[2], tokens)
    assert len(plan.kept) == 13 and tokens.memory["state"] == "done"  # 12.83 are allowed
    after = tokens_of(still[:13], 20, raster=raster_of(1, 13), counts=(42, 41, 13), num_layers=8, memory=tokens.memory)
    assert len(stage.select(stage.steps(8)[3], after).kept) == 13


def test_framefusion_mean_budget():
    """The mean over the layers is met, whatever merged before."""
    hidden = draw(1, 10, 8).expand(4, -1, -1) + 0.8 * draw(4, 10, 8, seed=3)
    stage = stage_of("framefusion", budget="mean")
    counts, _, _ = run(stage, hidden.flatten(0, 1), 20, 24, raster_of(4, 10))
    assert counts[0] > counts[-1] and counts[-1] < 20 and abs(sum(counts) / 24 - 20) < 1
    parity = stage_of("framefusion", budget="mean", budget_layers=28)
    shallow = [run(s, hidden.flatten(0, 1), 20, 4, raster_of(4, 10))[0] for s in (stage, parity)]
    assert shallow[0][:2] == shallow[1][:2] == counts[:2] and abs(sum(shallow[0]) / 4 - 20) < 1
    assert shallow[1][-1] == (28 * 20 - sum(counts[:2])) // 26 > shallow[0][-1]


# PruneVid, stage 2


def test_prunevid_takes_the_maximum_and_every_frame_its_share():
    attention = torch.tensor([[0.9, 0.1, 0.6, 0.1, 0.3, 0.2, 0.1, 0.1], [0.1, 0.7, 0.6, 0.1, 0.1, 0.2, 0.3, 0.4]])
    stage = stage_of("prunevid-decoder")
    tokens = tokens_of(draw(8, 4), 4, attention, raster_of(2, 4))
    assert stage.select(stage.steps(28)[0], tokens).kept.tolist() == [0, 1, 4, 7]
    assert stage.steps(28) == (Step(layer=11, queries="question", over_queries="max", cut_cache=True),)
    assert stage.steps(3)[0].layer == 2 and stage_of("prunevid-decoder", layer=0).steps(3)[0].layer == 1
    assert frames_of(None, 3).tolist() == [0, 0, 0]


def test_prunevid_groups_add_up():
    score, group = draw(30), torch.tensor([0] * 3 + [1] * 17 + [2] * 10)
    for num_keep in range(1, 31):
        plan = keep_best_of_groups(score, group, num_keep)
        quota = torch.bincount(group[plan.kept], minlength=3)
        assert len(plan.kept) == num_keep
        assert ((quota - num_keep * torch.tensor([3, 17, 10]) / 30).abs() < 1).all()
        for g in range(3):
            mine = (group == g).nonzero()[:, 0]
            best = mine[score[mine].topk(int(quota[g])).indices].sort().values
            assert torch.equal(plan.kept[group[plan.kept] == g], best)
    two = keep_best_of_groups(torch.ones(4), torch.tensor([0, 0, 1, 1]), 3)
    assert two.kept.tolist() == [0, 1, 2]  # equal remainders: the earlier frame


# HoliTom "M"


def test_holitom_halves_in_order():
    x, kept = draw(20, 6), torch.tensor([2, 9, 15])
    plan = halve_into_nearest(x, kept)
    want = {int(k): x[k].clone() for k in kept}
    unit = F.normalize(x, dim=-1)
    for d in sorted(set(range(20)) - set(kept.tolist())):
        nearest = int(kept[(unit[d] @ unit[kept].T).argmax()])
        want[nearest] = (want[nearest] + x[d]) / 2
    torch.testing.assert_close(apply_plan(plan, x), torch.stack([want[int(k)] for k in kept]))


def test_holitom_ties_and_large_sets():
    x = torch.ones(5, 4)
    plan = halve_into_nearest(x, torch.tensor([1, 3]))
    assert plan.merge.source[plan.merge.target == 0].tolist() == [1, 0, 2, 4]
    assert plan.merge.weight[plan.merge.target == 0].tolist() == [1 / 8, 1 / 8, 1 / 4, 1 / 2]
    x = draw(1, 64) * draw(40, 1, seed=1).abs()
    assert (halve_into_nearest(x, torch.tensor([5, 9, 17])).merge.target == 0).sum() == 38  # alike up to rounding
    x = draw(3000, 4)
    merged = apply_plan(halve_into_nearest(x, torch.tensor([0, 1])), x)  # weights underflow to 0, not to NaN
    assert merged.isfinite().all() and merged.abs().max() < 4
    assert [s.layer for s in stage_of("holitom-decoder").steps(28)] == [18]
    assert [s.layer for s in stage_of("holitom-decoder").steps(3)] == [2]


# DyCoke, stage 2


def test_dycoke_reuses_the_choice_while_attention_is_alike():
    stage = stage_of("dycoke-decoder")
    assert stage.decode_layer(28) == 3 and stage.decode_layer(3) == 2 and stage.steps(28) == ()
    first = stage.select_at_decode(torch.tensor([0.1, 0.5, 0.3, 0.4]), 2, None)
    assert first.kept.tolist() == [False, True, False, True]
    alike = torch.tensor([0.1, 0.5, 0.45, 0.4])
    again = stage.select_at_decode(alike, 2, first)
    assert again.kept.tolist() == first.kept.tolist() and torch.equal(again.attention, alike)
    other = stage.select_at_decode(torch.tensor([0.9, 0.0, 0.2, 0.1]), 2, again)
    assert other.kept.tolist() == [True, False, True, False]
    never = stage_of("dycoke-decoder", reuse=2)
    assert never.select_at_decode(alike, 2, first).kept.tolist() == [False, True, True, False]
    opposite = Chosen(kept=first.kept, attention=-first.attention)
    assert stage_of("dycoke-decoder", reuse=-1).select_at_decode(alike, 2, opposite).kept is first.kept


# All


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dycoke-decoder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_layers", [3, 28])
def test_every_method_meets_the_budget_in_any_dtype(method, dtype, num_layers):
    hidden = (draw(1, 24, 16).expand(5, -1, -1) + 0.7 * draw(5, 24, 16, seed=1)).flatten(0, 1).to(dtype)
    for num_keep in (1, 2, 30, 119):
        counts, plans, out = run(stage_of(method), hidden, num_keep, num_layers, raster_of(5, 24))
        assert counts[-1] == num_keep == len(out) and out.isfinite().all() and out.dtype == dtype
        assert all(a >= b for a, b in zip(counts, counts[1:], strict=False))
        if get_method(method).effect == "prunes":
            assert all(plan.merge is None for plan in plans)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_repeatable_and_leaves_random_state_alone(method):
    hidden, state = draw(60, 8), torch.get_rng_state()
    a, b = (run(stage_of(method), hidden, 20, 6, raster_of(5, 12))[2] for _ in range(2))
    assert torch.equal(a, b) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_documents_its_options_and_layers(method):
    entry = get_method(method)
    assert all(f"{option}:" in entry.fn.__doc__ for option in entry.options())
    for num_layers in (2, 3, 24, 32, 80):
        layers = [step.layer for step in stage_of(method).steps(num_layers)]
        assert layers == sorted(set(layers)) and all(0 <= layer < num_layers for layer in layers)
    with pytest.raises(BadOption, match="works in the decoder"):
        entry(None, 0.5)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("fastv", {"layer": 0}, "from 1 up, got 0"),
        ("fastv", {"layer": 2.0}, "whole number"),
        ("fastv", {"layer": True}, "whole number"),
        ("pyramiddrop", {"stages": 1}, "from 2 up"),
        ("sparsevlm", {"layers": (2, 6)}, "three whole numbers"),
        ("sparsevlm", {"layers": (2, 6, 6)}, "rise"),
        ("sparsevlm", {"layers": (-1, 2, 6)}, "from 0 up"),
        ("framefusion", {"similarity": 1.5}, "from -1 to 1"),
        ("framefusion", {"min_share": float("nan")}, "from 0 to 1"),
        ("framefusion", {"budget": "median"}, "final"),
        ("framefusion", {"budget_layers": 28}, "belongs to budget"),
        ("framefusion", {"budget": "mean", "budget_layers": 0}, "from 1 up"),
        ("prunevid-decoder", {"layer": -1}, "from 0 up"),
        ("holitom-decoder", {"layer": 0}, "from 1 up"),
        ("dycoke-decoder", {"reuse": "often"}, "number from"),
        ("dycoke-decoder", {"layer": 0}, "from 1 up"),
    ],
)
def test_bad_options(method, options, words):
    with pytest.raises(BadOption, match=words):
        stage_of(method, **options)


def test_layers_that_a_model_lacks():
    for method, options in [
        ("fastv", {"layer": 28}),
        ("dycoke-decoder", {"layer": 28}),
        ("prunevid-decoder", {"layer": 27}),
        ("holitom-decoder", {"layer": 28}),
        ("sparsevlm", {"layers": (2, 6, 27)}),
    ]:
        with pytest.raises(BadOption, match="in this model"):
            stage_of(method, **options).steps(28)
            stage_of(method, **options).decode_layer(28)
    for method in ("fastv", "pyramiddrop", "sparsevlm", "prunevid-decoder", "holitom-decoder"):
        with pytest.raises(BadOption, match="layer"):
            stage_of(method).steps(1)


def test_helpers():
    assert keep_best(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2).kept.tolist() == [1, 2]
    assert checked_layer(None, 18, 1, 5) == 5 and checked_layer(None, 0, 1, 5) == 1 and checked_layer(3, 0, 1, 5) == 3
    assert check_whole(3, "n", 3) == 3 and check_number(1, "x", 0, 1) == 1.0
    for words in ({"looks": "back"}, {"queries": "first"}, {"over_queries": "sum"}, {"layer": 0}):
        with pytest.raises(ValueError, match="Step|layer 0"):
            Step(**{"layer": 1, **words})
