"""Graphs choose what the registered methods choose, one file for any number of tokens, frames, tiles and kept."""

import dataclasses
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from tests.compression.helpers import as_two_layer, projected, random_inputs, random_tower
from tests.export.selector_graphs import Selectors, export, inputs_of, run
from tests.pipeline.tiny_families import make_model
from tokensieve.compression import TwoLayerMLP, apply_plan, get_method
from tokensieve.compression.score_diversity import relative_score, select_by_score
from tokensieve.compression.sensitivity import draw_directions, gain_closed_form
from tokensieve.compression.visionzip import scores_and_keys
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export.encoded import Encoded
from tokensieve.export.maxmin_graph import relative_scores
from tokensieve.export.selectors import make_selector
from tokensieve.export.sensitivity_graph import ClosedForm, Flat, Probing, make_sensitivity
from tokensieve.pipeline.stages import Stage
from tokensieve.pipeline.vlm import VLM
from tokensieve.policies import LightScorer

IMAGE, VIDEO, VIEWS = ((1, 5, 6),), ((4, 4, 6),), ((1, 4, 5), (1, 6, 10))
CLOSE = {"rtol": 0, "atol": 1e-5}


class Projector(nn.Module):
    """A two-layer MLP without a bias, so that a row of zeros stays one."""

    def __init__(self, seed=0):
        super().__init__()
        self.linear_1, self.act, self.linear_2 = nn.Linear(16, 24, bias=False), nn.GELU(), nn.Linear(24, 32, bias=False)
        for i, layer in enumerate((self.linear_1, self.linear_2)):
            layer.weight.data = random_inputs(layer.out_features, layer.in_features, seed=seed + i) / 4

    def forward(self, x):
        return self.linear_2(self.act(self.linear_1(x)))

    def __getitem__(self, i):
        return (self.linear_1, self.act, self.linear_2)[i]


PROJECTOR = Projector().requires_grad_(False)
MODEL = SimpleNamespace(adapter=SimpleNamespace(projector=PROJECTOR), compression=None)


def video(grids, seed=1, crop=None, change=None, **evidence):
    """Random tokens of these rasters; `change` alters what enters the projector."""
    inputs = random_inputs(sum(map(math.prod, grids)), seed=seed)
    if change is not None:
        change(inputs.view(*grids[0], -1) if len(grids) == 1 else inputs)
    return projected(inputs, PROJECTOR, grids=grids, crop=crop, **evidence)


def still(x_ThwV):
    x_ThwV[1:] = x_ThwV[:1]


def copies(x_ThwV):
    x_ThwV[1:, ::2] = x_ThwV[:1, ::2]
    x_ThwV[2, :, 1::3] = x_ThwV[2, :1, :1]


def zeros(x_ThwV):
    x_ThwV[1:3, :, ::2] = 0


def torn_crop():
    """Tile 0 first, then four tiles whose tokens are mixed, one of them without a token."""
    tiles = torch.tensor([1] * 18 + [3] * 3 + [4] * 39)
    return torch.cat([torch.zeros(20, dtype=torch.int64), tiles[random_inputs(60, 1)[:, 0].argsort()]])


CASES = {
    "video": lambda: video(VIDEO),
    "other video": lambda: video(((3, 5, 5),), seed=2),
    "many frames": lambda: video(((11, 2, 2),), seed=3),
    "one place": lambda: video(((5, 1, 1),), seed=4),
    "image": lambda: video(IMAGE, seed=5),
    "views": lambda: video(VIEWS, seed=6, crop=torn_crop()),
    "tiles": lambda: video(((1, 3, 3),) * 5, seed=7, crop=torch.tensor([1, 2, 3, 4, 0]).repeat_interleave(9)),
    "still": lambda: video(VIDEO, seed=8, change=still),
    "copies": lambda: video(VIDEO, seed=9, change=copies),
    "zeros": lambda: video(VIDEO, seed=10, change=zeros),
    "more than a chunk": lambda: video(((3, 9, 7),), seed=11, change=copies),
}


def plan_of(method, tokens, keep, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # evs on an image
        return get_method(method)(tokens, keep, **options)


def session_of(stages, example, path, mlp=None, **more):
    """A session of several selectors, named by method, or by method and a word."""
    selectors = {name: make_selector(MODEL, stage) for name, stage in stages.items()}
    module = Selectors(selectors, PROJECTOR, mlp)
    return export(
        module, inputs_of(example, {name: (0.3, stage.options) for name, stage in stages.items()}, **more), path
    )


# --- methods that look at tokens alone

PLAIN = ("uniform", "evs", "divprune", "norm-diversity", "zoprune")


@pytest.fixture(scope="module")
def plain_session(tmp_path_factory):
    stages = {name: Stage(name) for name in PLAIN}
    example = video(VIDEO, crop=torch.arange(96) // 50)
    return session_of(stages, example, tmp_path_factory.mktemp("plain") / "graph.onnx", as_two_layer(PROJECTOR))


@pytest.mark.parametrize("keep", ["one", 0.1, 0.25, 0.5, "all but one", 1.0])
@pytest.mark.parametrize("case", CASES)
def test_graphs_choose_what_methods_choose(plain_session, case, keep):
    tokens = CASES[case]()
    keep = {"one": 1 / len(tokens), "all but one": len(tokens) - 1}.get(keep, keep)
    outputs = run(plain_session, inputs_of(tokens, {name: (keep, {}) for name in PLAIN}))
    plans = {name: plan_of(name, tokens, keep) for name in PLAIN}
    kept = dict(zip(PLAIN, outputs[1::2], strict=True))
    assert [name for name in PLAIN if kept[name].tolist() != plans[name].kept.tolist()] == []
    for name, features in zip(PLAIN, outputs[::2], strict=True):
        np.testing.assert_allclose(features, tokens.features[plans[name].kept].numpy(), **CLOSE, err_msg=name)


def test_scores_are_scaled_tile_by_tile_and_flat_ones_count_as_one():
    tile_N = torch.tensor([0, 2, 1, 2, 0, 1, 0, 2, 2])
    score_N = random_inputs(9, 1)[:, 0].abs()
    score_N[tile_N == 1] = torch.tensor([3.0, 3.0001])  # equal up to rounding
    scaled_N = relative_scores(score_N, tile_N, 4)
    for tile in range(3):
        assert torch.equal(scaled_N[tile_N == tile], relative_score(score_N[tile_N == tile]))
    assert scaled_N[tile_N == 1].tolist() == [1, 1]


# --- sensitivity


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "silu", "relu", "gelu_python", "gelu_new"])
def test_closed_form_knows_the_derivative(name):
    mlp = TwoLayerMLP(
        w1=random_inputs(24, 16, 1), b1=random_inputs(24, 1, 2)[:, 0], w2=random_inputs(32, 24, 3), act=ACT2FN[name]
    )
    rows = random_inputs(40, 16, 4)
    encoded = Encoded(features=rows, rows=rows, project=None, mlp=mlp)
    torch.testing.assert_close(ClosedForm(mlp)(encoded), gain_closed_form(mlp, rows), rtol=1e-5, atol=0)


def test_an_unknown_activation_is_refused():
    with pytest.raises(UnsupportedModel, match="Mish"):
        ClosedForm(dataclasses.replace(as_two_layer(PROJECTOR), act=nn.Mish()))


def test_the_estimator_follows_the_projector():
    qwen, smol = VLM(make_model("qwen2_5_vl")), VLM(make_model("smolvlm"))
    probing = make_sensitivity(qwen, {})
    assert isinstance(probing, Probing)
    width = qwen.model.config.vision_config.hidden_size
    assert torch.equal(probing.bank_MV, draw_directions(64, width, torch.Generator().manual_seed(0)))
    qwen.compress("zoprune", seed=5, num_directions=3, step=0.5)
    probing = make_sensitivity(qwen, qwen.compression.at("projector").options)
    assert torch.equal(probing.bank_MV, draw_directions(3, width, torch.Generator().manual_seed(5)))
    assert probing.step == 0.5
    assert isinstance(make_sensitivity(smol, {}), Flat)
    assert isinstance(make_sensitivity(MODEL, {}), ClosedForm) and isinstance(
        make_sensitivity(MODEL, {"estimator": "zo"}), Probing
    )
    with pytest.raises(BadOption, match="two-layer"):
        make_sensitivity(qwen, {"estimator": "exact"})
    with pytest.raises(BadOption, match="estimator"):
        make_sensitivity(MODEL, {"estimator": "best"})


def test_a_linear_projector_leaves_diversity_alone():
    tokens = projected(random_inputs(60), nn.Linear(16, 32), grids=((1, 6, 10),), with_mlp=False)
    assert plan_of("zoprune", tokens, 0.3).kept.tolist() == select_by_score(tokens, torch.ones(60), 18).kept.tolist()


# --- probing and VisionZip


def with_tower(grids, seed=1, crop=None, copied=False):
    """Tokens with what VisionZip ranks by; with copies, a picture has five different keys."""
    num_frames = grids[0][0] if len(grids) == 1 else 1
    tower = random_tower(groups=num_frames, patches=sum(map(math.prod, grids)) // num_frames, seed=seed)
    for key_HSd in tower.layers[-2].key if copied else ():
        key_HSd[:] = key_HSd[:, torch.arange(key_HSd.shape[1]) % 5]
    return video(grids, seed=seed, crop=crop, tower=tower)


def recorded(tokens):
    score_N, key_Nd = scores_and_keys(tokens.tower)
    return {"salience": score_N.numpy(), "keys": key_Nd.numpy()}


@pytest.fixture(scope="module")
def zip_session(tmp_path_factory):
    stages = {"zoprune": Stage("zoprune", estimator="zo", num_directions=5), "visionzip": Stage("visionzip")}
    example = with_tower(VIDEO, crop=torch.arange(96) // 50)
    return session_of(stages, example, tmp_path_factory.mktemp("zip") / "graph.onnx", **recorded(example))


ZIP_CASES = {
    "video": lambda: with_tower(VIDEO),
    "other video": lambda: with_tower(((3, 5, 5),), seed=2),
    "image": lambda: with_tower(IMAGE, seed=3),
    "views": lambda: with_tower(VIEWS, seed=4, crop=torn_crop()),
    "copies": lambda: with_tower(VIDEO, seed=5, copied=True),
    "views with copies": lambda: with_tower(VIEWS, seed=6, crop=torn_crop(), copied=True),
    "more than a chunk": lambda: with_tower(((3, 9, 7),), seed=7, copied=True),
}


@pytest.mark.parametrize("keep, dominant", [(2, None), (0.1, None), (0.25, None), (0.5, 0.3), (0.5, 1), (1.0, None)])
@pytest.mark.parametrize("case", ZIP_CASES)
def test_visionzip_merges_what_the_method_merges(zip_session, case, keep, dominant):
    tokens = ZIP_CASES[case]()
    options = {} if dominant is None else {"dominant": dominant}
    inputs = inputs_of(tokens, {"zoprune": (keep, {}), "visionzip": (keep, options)}, **recorded(tokens))
    _, probed, features, kept = run(zip_session, inputs)
    plan = plan_of("visionzip", tokens, keep, **options)
    assert kept.tolist() == plan.kept.tolist()
    merged = tokens.projector.fn(apply_plan(plan, tokens.projector.inputs))
    np.testing.assert_allclose(features, merged.numpy(), **CLOSE)
    assert probed.tolist() == plan_of("zoprune", tokens, keep, estimator="zo", num_directions=5).kept.tolist()


def test_visionzip_merges_features_where_rows_are_no_tokens():
    tokens = with_tower(VIDEO)
    selector = make_selector(MODEL, Stage("visionzip"))
    inputs = {name: torch.from_numpy(x) for name, x in inputs_of(tokens, {"visionzip": (0.25, {})}).items()}
    inputs = {name.removeprefix("visionzip."): x for name, x in inputs.items()}
    rows = torch.zeros(7, 16)
    record = dict(zip(("salience", "keys"), scores_and_keys(tokens.tower), strict=True))
    encoded = Encoded(features=tokens.features, rows=rows, project=None, to_tokens=lambda x: x[:1], **record)
    features, kept = selector(encoded, inputs)
    plan = plan_of("visionzip", tokens, 0.25)
    assert torch.equal(kept, plan.kept)
    torch.testing.assert_close(features, apply_plan(plan, tokens.features), **CLOSE)


# --- what is refused


@pytest.mark.parametrize(
    "stage, error, words",
    [
        (Stage("fastv", layer=2), UnsupportedModel, "'fastv' cannot be exported; cacovid, divprune"),
        (Stage("visionzip", sinks="protect"), UnsupportedModel, "sinks"),
        (Stage("visionzip", dominant=0), BadOption, "dominant"),
        (Stage("cacovid"), BadOption, "policy"),
        (Stage("cacovid", policy=lambda tokens: None), UnsupportedModel, "function"),
        (Stage("cacovid", policy=LightScorer(32, width=8, frame_head=False), importance=0.5), BadOption, "no frame"),
        (Stage("cacovid", policy=LightScorer(32, width=8), importance=2), BadOption, "importance"),
        (Stage("cacovid", policy=LightScorer(32, width=8), frame_cap=0), BadOption, "frame_cap"),
    ],
)
def test_refusals(stage, error, words):
    with pytest.raises(error, match=words):
        make_selector(MODEL, stage)
