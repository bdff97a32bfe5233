"""`tokensieve bench`: formulas against published models and against what runs, memory, and the sums of a run."""

from __future__ import annotations

import json

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from tokensieve.compression import (
    Plan,
    density_peaks,
    holitom_decoder,
    list_methods,
    maxmin,
    registry,
    sensitivity,
    tower_view,
)
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline import attention_rows
from tokensieve.pipeline.bench import flops, presets, workload
from tokensieve.pipeline.bench.phases import FirstToken, Sample, Stopwatch
from tokensieve.pipeline.bench.run import Facts, Result, _Products, run, settings_of
from tokensieve.pipeline.bench.summary import growth, points
from tokensieve.pipeline.evaluation.settings import Setting
from tokensieve.pipeline.towers import base as towers
from tokensieve.pipeline.vlm import VLM

CPU = torch.device("cpu")
TEXT = 64

# --- formulas against worked values of published models

VICUNA_7B = flops.Language(layers=32, width=4096, query_width=4096, key_width=4096, inner=11008, vocabulary=32000)
VICUNA_13B = flops.Language(layers=40, width=5120, query_width=5120, key_width=5120, inner=13824, vocabulary=32000)
QWEN_7B = flops.Language(layers=28, width=3584, query_width=3584, key_width=512, inner=18944, vocabulary=152064)


def qwen_encoder(side: int) -> flops.Encoder:
    return presets.encoder_sizes(presets.config_of("qwen2.5-vl-7b"), side)


def encoder_of(name: str) -> flops.Encoder:
    config = presets.config_of(name)
    return presets.encoder_sizes(config, workload.side_of(config))


@pytest.mark.parametrize(
    ("of", "visual", "tera"),
    [
        (VICUNA_7B, 576, 8.40),
        (VICUNA_7B, 192, 3.33),
        (VICUNA_7B, 128, 2.50),
        (VICUNA_7B, 64, 1.66),
        (VICUNA_7B, 32, 1.25),
        (QWEN_7B, 6272, 90.75),
        (QWEN_7B, 1568, 21.83),
        (QWEN_7B, 941, 13.32),
        (QWEN_7B, 627, 9.11),
        (QWEN_7B, 1296, 18.12),
        (QWEN_7B, 130, 2.54),
        (QWEN_7B, 8192, 121.43),
        (QWEN_7B, 819, 11.68),
    ],
)
def test_prefill_of_published_models(of, visual, tera):
    assert flops.prefill_flops(of, visual + TEXT) / 1e12 == pytest.approx(tera, abs=0.006)


@pytest.mark.parametrize(
    ("of", "pictures", "tera"),
    [
        (encoder_of("llava-1.5-7b"), 1, 0.406),  # 0.381 in the blocks, 0.024 in the projector, the rest in the patches
        (qwen_encoder(1008), 1, 7.26),
        (qwen_encoder(448), 32, 43.10),
    ],
)
def test_encoders_of_published_models(of, pictures, tera):
    assert flops.encoder_flops(of, pictures) / 1e12 == pytest.approx(tera, rel=2e-3)


def test_towers_of_published_models():
    assert flops.tower_flops(encoder_of("llava-1.5-7b")) / 1e12 == pytest.approx(0.381, abs=5e-4)
    siglip = flops.Encoder(
        blocks=27, width=1152, inner=4304, gated=False, patches=729, num_prefix=0, patch_values=588, looks_at=None,
        projector=(0, (1,)),
    )  # fmt: skip
    assert flops.tower_flops(siglip) / 1e12 == pytest.approx(0.665, abs=5e-4)


def test_a_tower_that_drops_tokens():
    """ToMe on ViT-B/16 with r = 13: ideal speed-up 1.69."""
    vit = flops.Encoder(
        blocks=12, width=768, inner=3072, gated=False, patches=196, num_prefix=1, patch_values=768, looks_at=None,
        projector=(0, (1,)),
    )  # fmt: skip
    shorter = flops.encoder_flops(vit, 1, [197 - 13 * block for block in range(13)])
    assert flops.encoder_flops(vit, 1) / shorter == pytest.approx(1.69, abs=0.006)


@pytest.mark.parametrize(
    ("layer", "dropped", "left"), [(2, 0.5, 57.5), (3, 0.5, 58.9), (2, 0.75, 36.5), (2, 0.9, 23.9)]
)
def test_a_language_model_that_drops_tokens(layer, dropped, left):
    """FastV on LLaVA-1.5-7B."""
    full, short = 576 + TEXT, 576 - round(576 * dropped) + TEXT
    share = flops.prefill_flops(VICUNA_7B, [full] * layer + [short] * (32 - layer)) / flops.prefill_flops(
        VICUNA_7B, full
    )
    assert 100 * share == pytest.approx(left, abs=0.1)


def test_attention_share_and_the_half_that_may_be_masked():
    causal, whole = (flops.prefill_flops(QWEN_7B, 6272 + TEXT, causal=c) for c in (True, False))
    assert (whole - causal) / causal == pytest.approx(0.089, abs=5e-4)  # attention is 8.9 %, and twice that unmasked


def test_cache_of_published_models():
    assert flops.cache_bytes(VICUNA_7B, 1) == 512 * 1024
    assert flops.cache_bytes(QWEN_7B, 1) == 56 * 1024
    assert flops.cache_bytes(QWEN_7B, 6272) / 2**20 == 343
    assert flops.cache_bytes(QWEN_7B, [10, 20]) == flops.cache_bytes(QWEN_7B, 30) / 28


def test_one_more_token_costs_what_a_longer_prompt_costs_more():
    """Without the masked half, S steps from nothing do the attention of one prompt of S tokens twice over, less S."""
    steps = sum(flops.step_flops(VICUNA_7B, before) for before in range(50))
    heads = 49 * 2 * VICUNA_7B.width * VICUNA_7B.vocabulary
    own = 2 * 50 * VICUNA_7B.query_width * VICUNA_7B.layers
    assert steps == flops.prefill_flops(VICUNA_7B, 50) + heads + own


def test_saved():
    assert flops.saved(10, 5, 100, 50) == pytest.approx(1)
    assert flops.saved(10, 7.5, 100, 50) == pytest.approx(0.5)
    assert flops.saved(10, 12, 100, 50) == pytest.approx(-0.4)
    assert flops.saved(10, 5, 100, 100) is None
    # FastV on 13B, R = 75 %: 1.64 times as fast where 2.80 was possible.
    assert flops.saved(0.203, 0.124, 2.80, 1) == pytest.approx(0.61, abs=0.006)


# --- presets


@pytest.mark.parametrize(
    ("name", "billions", "visual"),
    [
        ("llava-onevision-0.5b", 0.894, 6273),
        ("llava-onevision-7b", 8.03, 6273),
        ("llava-1.5-7b", 7.06, 576),
        ("qwen2.5-vl-3b", 3.75, 4096),
        ("qwen2.5-vl-7b", 8.29, 4096),
    ],
)
def test_presets_have_the_true_size(name, billions, visual):
    config = presets.config_of(name)
    model = presets.random_model(config, torch.bfloat16, torch.device("meta"))
    assert sum(w.numel() for w in model.parameters()) / 1e9 == pytest.approx(billions, rel=2e-3)
    assert workload.num_visual(config, workload.default_frames(config)) == visual
    assert presets.language_sizes(config).layers == len(model.model.language_model.layers)


_TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2)
_TEXT |= dict(vocab_size=256, max_position_embeddings=4096)
_VIT = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=2, patch_size=4)
SMALL = {
    "llava": dict(
        vision_config=_VIT | dict(model_type="clip_vision_model", image_size=32, projection_dim=8),
        text_config=_TEXT | dict(model_type="llama"),
        image_token_index=250,
    ),
    "llava_onevision": dict(
        vision_config=_VIT | dict(model_type="siglip_vision_model", image_size=32, vision_use_head=False),
        text_config=_TEXT | dict(model_type="qwen2"),
        image_token_index=250,
        video_token_index=251,
    ),
    "qwen2_5_vl": dict(
        vision_config=dict(
            hidden_size=24, intermediate_size=40, depth=4, num_heads=2, patch_size=28, out_hidden_size=32,
            window_size=224, fullatt_block_indexes=[1, 3],
        ),
        text_config=_TEXT
        | dict(model_type="qwen2_5_vl_text")
        | dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}),
        image_token_id=250,
        video_token_id=251,
        vision_start_token_id=252,
        vision_end_token_id=253,
    ),
}  # fmt: skip


def small_config(family: str):
    return AutoConfig.for_model(family, **SMALL[family])


def small_vlm(family: str, attention: str = "sdpa") -> VLM:
    config = small_config(family)
    config._attn_implementation = attention
    model = presets.random_model(config, torch.float32, CPU)
    model.set_attn_implementation(attention)
    return VLM(model, name=family)


@pytest.mark.parametrize("family", workload.FAMILIES)
def test_formulas_count_what_runs(family, tmp_path):
    """Every matrix product and convolution of an eager model, counted as it runs."""
    vlm = small_vlm(family, "eager")
    load = workload.Workload.write(vlm.model.config, 4, 2, tmp_path)
    inputs = load.inputs(load.read())
    encoder = presets.encoder_sizes(vlm.model.config, workload.side_of(vlm.model.config))
    with torch.no_grad(), _Products() as products:
        prepared = vlm.compress_inputs(inputs, frames_as_video=load.frames_as_video)
    pictures = 2 * workload.num_pictures(vlm.model.config, 4)
    assert products.flops == flops.encoder_flops(encoder, pictures)

    language, length = presets.language_sizes(vlm.model.config), prepared["input_ids"].shape[1]
    assert length == workload.num_visual(vlm.model.config, 4) + TEXT
    with torch.no_grad(), _Products() as products:
        vlm.model.generate(**prepared, max_new_tokens=1, do_sample=False)
    rotary = products.flops - 2 * flops.prefill_flops(language, length, causal=False)
    assert 0 <= rotary <= 3 * 2 * length * 8 * 2  # angles are positions times frequencies, a product as well


def test_random_weights_are_finite_and_tied(tmp_path):
    config = small_config("llava_onevision")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = presets.random_model(config, torch.bfloat16, CPU)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.dtype == torch.bfloat16 and all(w.isfinite().all() for w in model.parameters())
    norm = model.model.language_model.norm.weight
    assert torch.equal(norm, torch.ones_like(norm))
    assert model.get_input_embeddings().weight.float().std() == pytest.approx(0.02, rel=0.05)


def test_configs_that_are_refused(tmp_path):
    with pytest.raises(BadOption, match="llava-onevision-0.5b"):
        presets.config_of("no/such-model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    with pytest.raises(UnsupportedModel, match="gemma3"):
        presets.config_of(str(tmp_path))
    evil = {"model_type": "llava", **SMALL["llava"]}
    evil["vision_config"] = evil["vision_config"] | {"auto_map": {"AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(evil))
    with pytest.raises(UnsupportedModel, match="code of its own"):
        presets.config_of(str(tmp_path))


def test_a_prompt_longer_than_the_positions_is_refused(tmp_path):
    with pytest.raises(BadOption, match="5000 frames"):
        workload.Workload.write(small_config("llava_onevision"), 5000, 1, tmp_path)


def test_frames_drift_and_scenes_change():
    clip = workload.make_clip(10, 32)
    assert (clip[1, :, :-2] == clip[0, :, 2:]).all() and (clip[8] != clip[7]).mean() > 0.9


# --- phases


def test_the_peak_of_a_phase_is_seen():
    watch = Stopwatch(CPU)
    if watch.in_use() is None:
        pytest.skip("the peak of memory cannot be reset here")
    torch.ones(2**26).sum()
    large = watch.lap()
    before = watch.in_use()
    torch.ones(2**20).sum()
    small = watch.lap()
    assert large.peak_bytes - before > 0.9 * 2**28 and small.peak_bytes - before < 2**27
    assert large.wall_s > 0 and large.cpu_s > 0


def test_generate_is_split_at_its_first_token():
    class Watch:
        steps, lapped_at = 0, []

        def lap(self):
            self.lapped_at.append(self.steps)
            return Sample(wall_s=5.0, cpu_s=0, peak_bytes=0)

        def elapsed(self):
            return Sample(wall_s=float(self.steps), cpu_s=0, peak_bytes=0)

    watch = Watch()
    first = FirstToken(watch, [1, 3])
    for watch.steps in range(4):
        assert first(torch.zeros(2, 9), None).tolist() == [False, False]
    assert watch.lapped_at == [0] and first.prefill.wall_s == 5
    assert {n: sample.wall_s for n, sample in first.decode.items()} == {1: 0, 3: 2}


# --- settings


def test_settings():
    full, *others = settings_of(["zoprune", "tome:0.5+zoprune"], [1, 0.25, 64], 32)
    assert full == Setting()
    assert [(s.method, s.keep) for s in others] == [
        ("zoprune", 0.25), ("zoprune", 64), ("tome:0.5+zoprune", 0.25), ("tome:0.5+zoprune", 64),
    ]  # fmt: skip
    assert [(s.method.name, s.keep) for s in others[2].compression.stages] == [("tome", 0.5), ("zoprune", 0.25)]
    assert {s.method for s in settings_of([], [0.5], 32)} == {"", *(m.name for m in list_methods())}


@pytest.mark.parametrize("methods", [["zoprun"], ["tome:x"], ["tome:2.5"], ["zoprune+divprune"]])
def test_settings_that_are_refused(methods):
    with pytest.raises(BadOption):
        settings_of(methods, [0.25], 32)


# --- a run of every method


@pytest.fixture(scope="module")
def result() -> Result:
    """Every method, and a stack."""
    settings = settings_of([], [0.25], 32) + settings_of(["tome:0.5+zoprune"], [0.5], 32)[1:]
    return run(small_vlm("llava_onevision"), settings, frames=[4], batches=[1], new_tokens=[1], repeats=1)


@pytest.fixture(scope="module")
def few() -> Result:
    """A method of every kind, in batches and several times."""
    settings = settings_of(["zoprune", "holitom", "fastv", "evit", "uniform", "tome:0.5+zoprune"], [0.25], 32)
    return run(small_vlm("llava_onevision"), settings, frames=[4], batches=[1, 2], new_tokens=[3, 1], repeats=2)


def test_every_method_is_measured(result):
    assert not result.refused
    names = [None, "tome:0.5+zoprune", *(m.name for m in list_methods())]
    assert sorted(map(str, names)) == sorted(str(point["method"]) for point in points(result))


def test_rows_cover_every_phase_in_turns(few):
    count = len(few.settings)
    for batch in (1, 2):
        rows = [row for row in few.rows if row["batch"] == batch]
        for repeat in (0, 1):
            of_repeat = [row for row in rows if row["repeat"] == repeat]
            for phase in ("read", "encode", "select", "prefill"):
                assert sorted(n for r in of_repeat if r["phase"] == phase for n in r["settings"]) == list(range(count))
            decoded = [(n, r["new_tokens"]) for r in of_repeat if r["phase"] == "decode" for n in r["settings"]]
            assert sorted(decoded) == [(n, length) for n in range(count) for length in (1, 3)]
        assert [row["repeat"] for row in rows] == sorted(row["repeat"] for row in rows)  # A B A B, not A A B B
    encoded = [row for row in few.rows if row["phase"] == "encode"]
    assert len(encoded) == 2 * 2 * 4  # plain, recorded, and two towers, for two batch sizes, twice
    assert all(row["wall_s"] >= 0 for row in few.rows)


def test_the_ledger_counts_visual_and_prompt_tokens(few):
    by_method = {(p["method"], p["batch"]): p for p in points(few)}
    full = by_method[None, 1]["tokens"]
    assert full == dict(visual_full=65, visual=65, visual_last_layer=65, prompt_full=129, prompt=129)
    assert by_method["zoprune", 2]["tokens"] == full | dict(visual=17, visual_last_layer=17, prompt=81)
    assert by_method["fastv", 2]["tokens"] == full | dict(visual_last_layer=17)
    assert by_method["tome:0.5+zoprune", 1]["tokens"]["visual"] == 17


def test_flops_follow_the_tokens(few):
    by_method = {(p["method"], p["batch"]): p["flops"] for p in points(few) if p["new_tokens"] == 3}
    language = presets.language_sizes(small_config("llava_onevision"))
    for batch in (1, 2):
        assert by_method[None, batch]["prefill"] == batch * flops.prefill_flops(language, 129)
        assert by_method["zoprune", batch]["prefill"] == batch * flops.prefill_flops(language, 81)
        assert by_method["fastv", batch]["prefill"] == batch * flops.prefill_flops(language, [129] * 2 + [81] * 3)
        assert by_method["zoprune", batch]["decode"] == batch * sum(flops.step_flops(language, 81 + i) for i in (0, 1))
        assert by_method["zoprune", batch]["encode"] == by_method[None, batch]["encode"]
        assert by_method["evit", batch]["encode"] < by_method[None, batch]["encode"]
    assert by_method[None, 1]["method"] == by_method["uniform", 1]["method"] == 0 < by_method["zoprune", 1]["method"]


def test_a_method_that_cannot_run_is_named(monkeypatch):
    def fn(tokens, num_keep, *, generator=None):
        raise BadOption("It needs a video.", hint="Give one.")

    picky = registry.Method(name="picky", fn=fn, title="A test")
    monkeypatch.setitem(registry._METHODS, "picky", picky)
    result = run(
        small_vlm("llava"), settings_of(["picky", "uniform", "tome"], [0.5], 32), frames=[2], batches=[1],
        new_tokens=[1], repeats=1,
    )  # fmt: skip
    assert result.refused == {"picky": "It needs a video. Give one."}
    assert [p["method"] for p in points(result)] == [None, "uniform", "tome"]
    qwen = run(
        small_vlm("qwen2_5_vl"), settings_of(["tome", "fastv"], [0.5], 32), frames=[2], batches=[1],
        new_tokens=[1], repeats=1,
    )  # fmt: skip
    assert list(qwen.refused) == ["tome"] and [p["method"] for p in points(qwen)] == [None, "fastv"]


# --- sums, on numbers made up


def made_up() -> Result:
    def facts(visual, encode, prefill, method, steps, cache):
        return Facts(
            visual_full=100, visual=visual, visual_last_layer=visual, prompt_full=164, prompt=visual + 64,
            flops={"encode": encode, "prefill": prefill, "method": method}, step_flops=steps, cache_bytes=cache,
        )  # fmt: skip

    def row(phase, numbers, repeat, wall_s, **more):
        peak = 1000 + 100 * len(phase)
        return {"frames": 8, "batch": 1, "repeat": repeat, "phase": phase, "settings": numbers, "wall_s": wall_s} | {
            "cpu_s": wall_s / 2, "peak_bytes": peak, **more,
        }  # fmt: skip

    rows = []
    for repeat, noise in enumerate((0.0, 90.0, 0.0)):  # the median takes no notice
        rows += [row("read", [0, 1], repeat, 1 + noise), row("encode", [0, 1], repeat, 4 + noise)]
        for number, times in enumerate([(0.0, 10.0, 3.0), (1.0, 3.0, 2.0)]):
            rows += [row(p, [number], repeat, s) for p, s in zip(("select", "prefill"), times[:2], strict=True)]
            rows.append(row("decode", [number], repeat, times[2], new_tokens=3))
    return Result(
        rows=rows,
        settings=[Setting(), Setting(method="zoprune", keep=0.25)],
        facts={(8, 1, 0): facts(100, 40, 80, 0, [5, 5], 100), (8, 1, 1): facts(25, 40, 20, 10, [4, 4], 25)},
        weight_bytes=50,
        in_use_bytes=1000,
    )


def test_sums():
    full, fewer = points(made_up())
    assert full["method"] is None and full["gain"]["prefill"] == {"speedup": 1, "ideal": 1, "eta": None}
    gain = fewer["gain"]
    assert gain["prefill"] == {"speedup": 10 / 4, "ideal": 4, "eta": pytest.approx(0.6 / 0.75)}  # choosing included
    assert gain["encode"]["eta"] is None and gain["select_share_of_full_prefill"] == 0.1
    assert gain["decode"] == {"speedup": 1.5, "ideal": 150 / 75}
    total = gain["total"]
    assert total["speedup"] == 18 / 11 and total["ideal"] == 130 / 68 and total["ideal_with_method"] == 130 / 78
    assert total["eta"] == pytest.approx((7 / 18) / (1 - 68 / 130))
    assert fewer["gain_cpu"]["prefill"]["eta"] == gain["prefill"]["eta"]
    assert fewer["seconds"]["read"] == {"median": 1, "min": 1, "max": 91, "cpu": 0.5}
    assert fewer["seconds"]["total"] == 11 and fewer["flops"]["decode"] == 8
    assert fewer["peak_bytes_above_weights"]["prefill"] == 700


def test_points_of_refused_methods_are_left_out():
    result = made_up()
    result.refused["zoprune"] = "It broke in the second repeat."
    assert [point["method"] for point in points(result)] == [None]


def test_growth_of_memory():
    def point(visual_full, peak):
        return {
            "method": "zoprune", "keep": 0.25, "batch": 1, "tokens": {"visual_full": visual_full},
            "peak_bytes_above_weights": {"select": peak, "prefill": peak - 1},
        }  # fmt: skip

    (row,) = growth([point(100, 10), point(200, 40), point(400, 160)])
    assert row["exponent"] == pytest.approx(2) and row["peak_bytes_above_weights"] == [10, 40, 160]
    assert growth([point(100, 10)]) == []


# --- no method makes memory grow with the square of the prompt


class LargestTensor(TorchDispatchMode):
    """The most numbers in any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                self.numbers = max(self.numbers, value.untyped_storage().nbytes() // value.element_size())
        return out


FRAMES = 64  # of 16 tokens: 1024 visual tokens
WIDEST = 48  # of the language model: its FFN


@pytest.fixture(scope="module")
def long_prompt(tmp_path_factory):
    vlm = small_vlm("llava_onevision")
    load = workload.Workload.write(vlm.model.config, FRAMES, 1, tmp_path_factory.mktemp("clip"))
    return vlm, load.inputs(load.read())


@pytest.fixture
def small_chunks(monkeypatch):
    """Work in chunks of a fixed size is no growth; chunks are made small, so that they do not hide any."""
    monkeypatch.setattr(attention_rows, "MAX_CHUNK_BYTES", 2**16)
    monkeypatch.setattr(towers, "MAX_CHUNK_BYTES", 2**16)
    monkeypatch.setattr(density_peaks, "MAX_CHUNK_BYTES", 2**16)
    monkeypatch.setattr(holitom_decoder, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(tower_view, "MAX_CACHED_BYTES", 2**16)
    monkeypatch.setattr(maxmin, "MAX_MATRIX_BYTES", 2**16)
    monkeypatch.setattr(maxmin, "MAX_AHEAD_BYTES", 2**16)
    monkeypatch.setattr(sensitivity, "MAX_ELEMENTS", 2**16)


def largest(vlm, inputs, stages) -> int:
    vlm.compress(stages)
    needs = {"question", *(vlm.compression.needs if stages else ())}
    with torch.no_grad(), LargestTensor() as seen:
        prepared = vlm.compress_inputs(inputs, questions=["What?"], needs=needs)
        vlm.model.generate(**prepared, max_new_tokens=1, do_sample=False)
    vlm.compress(None)
    return seen.numbers


@pytest.mark.parametrize("name", ["", *(m.name for m in list_methods())])
def test_nothing_grows_with_the_square_of_the_prompt(name, long_prompt, small_chunks):
    vlm, inputs = long_prompt
    stages = settings_of([name], [0.25], 32)[1].compression.stages if name else None
    square = inputs["input_ids"].shape[1] ** 2
    linear = inputs["input_ids"].shape[1] * 8 * WIDEST  # four patches a token, and some tensors hold several
    assert linear < square / 2
    assert largest(vlm, inputs, stages) <= linear


def test_a_square_would_be_seen(long_prompt, small_chunks, monkeypatch):
    def fn(tokens, num_keep, *, generator=None):
        likeness_NN = tokens.features @ tokens.features.T
        return Plan(likeness_NN.amax(1).topk(num_keep).indices.sort().values, len(tokens))

    monkeypatch.setitem(registry._METHODS, "square", registry.Method(name="square", fn=fn, title="A test"))
    vlm, inputs = long_prompt
    stages = settings_of(["square"], [0.25], 32)[1].compression.stages
    assert largest(vlm, inputs, stages) >= 1024**2


def test_one_large_picture_needs_no_map(small_chunks):
    query, key = torch.randn(2, 2, 600, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    layer = tower_view.TowerLayer(query=(query,), key=(key,), scale=0.5, num_prefix=0, to_tokens=lambda values: values)
    with LargestTensor() as seen:
        received_N = layer.received_attention()
    assert seen.numbers <= 2**16 // 4
    whole_N = (query @ key.transpose(-1, -2) * 0.5).softmax(-1).mean((0, 1))
    torch.testing.assert_close(received_N, whole_N)


class LiveProducts(TorchDispatchMode):
    """The most matrix products that are alive at once."""

    def __init__(self):
        super().__init__()
        self.known, self.most = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket is torch.ops.aten.mm:
            self.known = [ref for ref in self.known if not ref.expired()] + [StorageWeakRef(out.untyped_storage())]
            self.most = max(self.most, len(self.known))
        return out


def test_rows_of_the_next_picks_are_forgotten(small_chunks):
    unit_ND = maxmin.unit_rows(torch.randn(600, 8, generator=torch.Generator().manual_seed(0)))
    with LiveProducts() as live:
        maxmin.greedy_max_min(unit_ND, 599, torch.tensor([0]))
    assert live.most <= 2  # of 65 rows each, more than MAX_AHEAD_BYTES
