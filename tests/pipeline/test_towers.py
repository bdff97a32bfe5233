"""Reduction inside vision towers of open_clip, timm and transformers."""

import copy
import pickle
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.compression.test_tome import merged_by_loops
from tests.pipeline.tiny_families import make_inputs, make_model
from tokensieve.compression import get_method, list_methods
from tokensieve.compression.tower_stage import Reduced, TowerStage
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.towers import compress_tower, tower_macs
from tokensieve.pipeline.towers.base import received_attention
from tokensieve.pipeline.towers.compress import find_tower

timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")

METHODS = [m.name for m in list_methods("tower")]
SIDE, PATCH, DEPTH, WIDTH, HEADS = 24, 4, 4, 24, 3
PATCHES = (SIDE // PATCH) ** 2


@dataclass(frozen=True)
class Case:
    """A tiny model, its call on images, and the prefix tokens of its tower."""

    model: nn.Module
    call: object
    num_prefix: int = 1

    def __call__(self, images):
        return self.call(self.model, images)


def _open_clip(**changes):
    from open_clip.transformer import VisionTransformer

    options = dict(image_size=SIDE, patch_size=PATCH, width=WIDTH, layers=DEPTH, heads=HEADS, mlp_ratio=2)
    return VisionTransformer(**(options | dict(output_dim=16) | changes))


def _open_clip_model():
    vision = dict(image_size=SIDE, patch_size=PATCH, width=WIDTH, layers=DEPTH, head_width=8)
    text = dict(context_length=8, vocab_size=50, width=16, heads=2, layers=1)
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


@cache
def _timm_model():
    from open_clip.timm_model import TimmModel

    return TimmModel("vit_tiny_patch16_224", embed_dim=192, pool="map", proj="none")  # as its SigLIP models are


def _open_clip_trunk():
    model = _timm_model()
    model.trunk = _timm(global_pool="map", class_token=False, num_classes=0)
    return model


def _timm(**changes):
    options = dict(img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=5)
    return timm.models.vision_transformer.VisionTransformer(**(options | dict(mlp_ratio=2) | changes))


def _timm_gated():
    model = _timm()
    for block in model.blocks:
        block.attn.gate = nn.Linear(WIDTH, WIDTH)
    return model


class Scale(nn.Module):
    """Stands in for drop path, so that one that is left out shows."""

    def forward(self, x):
        return 0.8 * x


def _timm_everything():
    options = dict(init_values=0.5, qk_norm=True, reg_tokens=4, scale_attn_norm=True, pre_norm=True, attn_drop_rate=0.1)
    model = _timm(**options)
    for block in model.blocks:
        block.drop_path1, block.drop_path2, block.attn.proj_drop = Scale(), Scale(), Scale()
    return model


def _timm_distilled():
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(
        img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=5
    )


def _vision_config(kind, **changes):
    import transformers

    options = dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=DEPTH, num_attention_heads=HEADS)
    return getattr(transformers, f"{kind}VisionConfig")(
        **(options | dict(image_size=SIDE, patch_size=PATCH, projection_dim=16) | changes)
    )


def _transformers(name, **changes):
    import transformers

    kind = "CLIP" if name.startswith("CLIP") else "Siglip"
    config = _vision_config(kind, **changes)
    if name.endswith("VisionModel") or name.endswith("Projection"):
        return getattr(transformers, name)(config)
    text = getattr(transformers, f"{kind}TextConfig")(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    return getattr(transformers, name)(
        getattr(transformers, f"{kind}Config")(vision_config=config, text_config=text, projection_dim=16)
    )


def plainly(model, images):
    return model(images)


def pooled(model, images):
    return model(images).pooler_output


def image_features(model, images):
    return model.get_image_features(images).pooler_output


CASES = {
    "open_clip": (_open_clip, plainly, 1),
    "open_clip-layerscale": (lambda: _open_clip(ls_init_value=0.5), plainly, 1),
    "open_clip-custom": (
        lambda: _open_clip(qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True),
        plainly,
        1,
    ),
    "open_clip-avg": (lambda: _open_clip(pool_type="avg", final_ln_after_pool=True), plainly, 1),
    "open_clip-attentional": (
        lambda: _open_clip(attentional_pool=True, attn_pooler_queries=6, attn_pooler_heads=2),
        plainly,
        1,
    ),
    "open_clip-clip": (_open_clip_model, lambda model, images: model.encode_image(images), 1),
    "open_clip-trunk": (_open_clip_trunk, plainly, 0),
    "timm": (_timm, plainly, 1),
    "timm-everything": (_timm_everything, plainly, 5),
    "timm-gated": (_timm_gated, plainly, 1),
    "timm-avg": (lambda: _timm(global_pool="avg", reg_tokens=1), plainly, 2),
    "timm-avgmax": (lambda: _timm(global_pool="avgmax", class_token=False), plainly, 0),
    "timm-map": (lambda: _timm(global_pool="map", class_token=False), plainly, 0),
    "timm-map-registers": (lambda: _timm(global_pool="map", reg_tokens=2), plainly, 3),
    "timm-map-prefix": (lambda: _timm(global_pool="map", pool_include_prefix=True), plainly, 1),
    "timm-distilled": (_timm_distilled, plainly, 2),
    "clip": (lambda: _transformers("CLIPVisionModel"), pooled, 1),
    "clip-projection": (
        lambda: _transformers("CLIPVisionModelWithProjection"),
        lambda model, images: model(images).image_embeds,
        1,
    ),
    "clip-dual": (lambda: _transformers("CLIPModel"), image_features, 1),
    "siglip": (lambda: _transformers("SiglipVisionModel"), pooled, 0),
    "siglip-dual": (lambda: _transformers("SiglipModel"), image_features, 0),
}


def make_case(name, seed=0):
    """Random weights large enough that attention is sharp and no branch is idle."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    build, call, num_prefix = CASES[name]
    model = build().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 and "weight" in key:  # norms; LayerScale and biases below
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif parameter.ndim == 1 and "logit" not in key:
                parameter.copy_(0.3 * torch.randn_like(parameter) + ("gamma" in key))
            elif parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5 * 1.5)
    torch.set_rng_state(state)
    return Case(model, call, num_prefix)


def images(batch=3, seed=3):
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


class Watch(TowerStage):
    """Acts everywhere and changes nothing, so that every block runs through our attention."""

    needs = frozenset({"attention", "keys"})

    def __init__(self):
        self.views, self.outputs, self.begun = [], [], []

    def begin(self, **facts):
        self.begun.append(facts)
        self.views, self.outputs = [], []

    def acts_in(self, block):
        return True

    def reduce(self, x, view):
        self.views.append(view)
        return None

    def after_block(self, block, x):
        self.outputs.append(x)


class Keep(Watch):
    """Drops all but the first `counts[block]` patches in those blocks, and looks on in block 2."""

    def __init__(self, counts, proportional=False):
        super().__init__()
        self.counts, self.proportional = counts, proportional

    def acts_in(self, block):
        return block in self.counts or block == 2

    def reduce(self, x, view):
        self.views.append(view)
        if view.index not in self.counts:
            return None
        batch, num_tokens = x.shape[:2]
        left = view.num_prefix + self.counts[view.index]
        own = torch.arange(num_tokens).expand(batch, -1)
        return Reduced(
            x=x[:, :left],
            size=1.0 + own[:, :left],  # any numbers, to see them again in the attention
            target=torch.where(own < left, own, -1),
            anchor=own[:, :left],
        )


# --- nothing to do means nothing changes


@pytest.mark.parametrize("name", CASES)
def test_our_attention_equals_the_librarys_own(name):
    case = make_case(name)
    with torch.no_grad():
        plain = case(images())
        with compress_tower(case.model, Watch()):
            watched = case(images())
    assert plain.std() > 1e-2
    torch.testing.assert_close(watched, plain, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_keeping_all_is_the_plain_model_bit_by_bit(name, method):
    case = make_case(name)
    with torch.no_grad():
        plain = case(images())
        with compress_tower(case.model, method, keep=1) as handle:
            assert torch.equal(case(images()), plain)
            assert handle.trace.anchor_mask().all()
        with compress_tower(case.model, method, keep=0.25):
            assert not torch.equal(case(images()), plain)
        assert torch.equal(case(images()), plain)


@pytest.mark.parametrize("name", ["open_clip-avg", "timm-map", "siglip", "timm-avg", "clip", "open_clip-attentional"])
def test_removal_leaves_no_trace(name):
    model = make_case(name).model

    def facts():
        hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
        own = [sorted(m.__dict__) for m in model.modules()]
        return repr(model), list(model.state_dict()), hooks, own, [m.forward for m in model.modules()]

    before = facts()
    handle = compress_tower(model, "tome", keep=0.5)
    assert repr(model) == before[0] and list(model.state_dict()) == before[1] and facts()[4] != before[4]
    handle.remove()
    handle.remove()
    assert facts() == before


# --- what a reduced tower computes


@pytest.mark.parametrize("keep, left", [(0.25, 9), (35, 35)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_the_budget_is_met_and_the_books_balance(name, method, keep, left):
    case = make_case(name)
    with compress_tower(case.model, method, keep=keep) as handle, torch.no_grad():
        features = case(images())
    trace = handle.trace
    assert features.isfinite().all()
    if get_method(method).output_length != "exact":
        assert trace.anchor.shape[1] <= left
        left = trace.anchor.shape[1]
    assert trace.anchor.shape == trace.size.shape == (3, left)
    assert trace.tokens_per_block[0] == case.num_prefix + PATCHES
    assert trace.tokens_per_block[-1] == case.num_prefix + left
    assert (trace.size.sum(1) == PATCHES).all()
    assert (trace.anchor_mask().sum(1) == left).all()
    for row in range(3):
        assert torch.equal(trace.size[row], torch.bincount(trace.owner[row], minlength=left).float())
        assert torch.equal(trace.owner[row][trace.anchor[row]], torch.arange(left))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_a_batch_equals_its_images_one_by_one(name, method):
    case = make_case(name)
    with compress_tower(case.model, method, keep=0.4) as handle, torch.no_grad():
        together, owner = case(images()), handle.trace.owner
        for i in range(3):
            torch.testing.assert_close(case(images()[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)
            assert torch.equal(handle.trace.owner, owner[i : i + 1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_half_precision_gradients_and_random_state(name, method):
    case = make_case(name)
    state = torch.get_rng_state()
    with compress_tower(case.model, method, keep=0.4):
        pixels = images().requires_grad_()
        case(pixels).square().sum().backward()
        assert pixels.grad.isfinite().all() and (pixels.grad.flatten(1).abs().sum(1) > 0).all()
        case.model.bfloat16()
        with torch.no_grad():
            out = case(images().bfloat16())
        assert out.dtype == torch.bfloat16 and out.isfinite().all()
    assert torch.equal(torch.get_rng_state(), state)


def test_training_mode_applies_the_dropout_of_the_library():
    case = make_case("timm-everything")
    case.model.train()
    torch.manual_seed(0)
    with compress_tower(case.model, "tome", keep=0.4):
        first, second = case(images()), case(images())
    assert not torch.equal(first, second)


# --- one block against an eager reference, library by library


def _split_heads(x_BND, heads):
    return x_BND.unflatten(-1, (heads, -1)).transpose(1, 2)


def open_clip_half(block, x, bias):
    """x after attention and residual, weights `[B, H, N, N]`, keys `[B, H, N, d]`, from the library's own parts."""
    h = block.ln_1(x)
    mask = None if bias is None else bias.expand(-1, HEADS, h.shape[1], -1).flatten(0, 1)
    out, weights = block.attn(h, h, h, need_weights=True, average_attn_weights=False, attn_mask=mask)
    own_keys = F.linear(h, block.attn.in_proj_weight[WIDTH : 2 * WIDTH], block.attn.in_proj_bias[WIDTH : 2 * WIDTH])
    return x + block.ls_1(out), weights, _split_heads(own_keys, HEADS)


def timm_half(block, x, bias):
    attn, weights, keys = block.attn, [], []
    attn.fused_attn = False
    hooks = [
        attn.attn_drop.register_forward_hook(lambda _, args, __: weights.append(args[0])),
        attn.k_norm.register_forward_hook(lambda _, __, out: keys.append(out)),
    ]
    out = attn(block.norm1(x), attn_mask=bias)
    [hook.remove() for hook in hooks]
    attn.fused_attn = True
    return x + block.drop_path1(block.ls1(out)), weights[0], keys[0]


def transformers_half(block, x, bias):
    attn = block.self_attn
    attn.config._attn_implementation = "eager"
    h = block.layer_norm1(x)
    out, weights = attn(h, attention_mask=bias)
    return x + out, weights, _split_heads(attn.k_proj(h), HEADS)


def own_mlp(block, x):
    for norm, scale in (("ln_2", "ls_2"), ("norm2", "ls2"), ("layer_norm2", "")):
        if hasattr(block, norm):
            out = block.mlp(getattr(block, norm)(x))
            out = getattr(block, scale)(out) if scale else out
            return x + (block.drop_path2(out) if hasattr(block, "drop_path2") else out)


REFERENCES = {
    "open_clip": open_clip_half,
    "open_clip-layerscale": open_clip_half,
    "timm": timm_half,
    "timm-everything": timm_half,
    "timm-gated": timm_half,
    "timm-map": timm_half,
    "clip": transformers_half,
    "siglip": transformers_half,
}


def blocks_of(model):
    tower = find_tower(model)
    return [block.module for block in tower.blocks]


def inputs_of_block(case, block):
    """What enters the block in the plain model."""
    seen = []
    hook = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    case(images())
    hook.remove()
    return seen[0]


def outputs_of_blocks(case):
    """What the blocks give, as the model is now."""
    outputs = []
    hooks = [b.register_forward_hook(lambda _, __, out: outputs.append(out)) for b in blocks_of(case.model)]
    case(images())
    [hook.remove() for hook in hooks]
    return outputs


def salience(weights_BHNN, num_prefix):
    return weights_BHNN.mean(1)[:, 0] if num_prefix else weights_BHNN.mean((1, 2))


@pytest.mark.parametrize("name", REFERENCES)
@torch.no_grad()
def test_the_view_shows_the_librarys_attention_and_keys(name):
    case = make_case(name)
    stage = Watch()
    with compress_tower(case.model, stage):
        case(images())
    for index, block in enumerate(blocks_of(case.model)):
        _, weights, keys = REFERENCES[name](block, inputs_of_block(case, block), None)
        view = stage.views[index]
        torch.testing.assert_close(view.class_attention, salience(weights, case.num_prefix), rtol=1e-4, atol=1e-6)
        per_head = weights[:, :, 0] if case.num_prefix else weights.mean(2)
        torch.testing.assert_close(view.head_attention, per_head, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(view.keys, keys.mean(1), rtol=1e-4, atol=1e-5)
        assert (view.index, view.num_blocks, view.num_prefix) == (index, DEPTH, case.num_prefix)


@pytest.mark.parametrize("name", REFERENCES)
@torch.no_grad()
def test_tome_equals_a_reference_in_loops(name):
    """Block 1 merges; block 2 attends in proportion to the sizes and merges again."""
    case = make_case(name)
    blocks, half = blocks_of(case.model), REFERENCES[name]
    with compress_tower(case.model, "tome", r=[0, 7, 5]):
        outputs = outputs_of_blocks(case)
    x = inputs_of_block(case, blocks[1])
    size = torch.ones(x.shape[:2])
    for i, r in ((1, 7), (2, 5), (3, 0)):
        bias = size.log()[:, None, None] if i > 1 else None
        x, _, keys = half(blocks[i], x, bias)
        if r:
            merged = [merged_by_loops(x[b], size[b], keys[b].mean(0), r, case.num_prefix) for b in range(3)]
            x, size = torch.stack([m[0] for m in merged]), torch.stack([m[1] for m in merged])
        x = own_mlp(blocks[i], x)
        torch.testing.assert_close(outputs[i], x, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", REFERENCES)
@torch.no_grad()
def test_evit_equals_a_reference_in_loops(name):
    case = make_case(name)
    blocks, half, prefix = blocks_of(case.model), REFERENCES[name], case.num_prefix
    with compress_tower(case.model, "evit", keep_rate=0.6, blocks=[1, 2]):
        outputs = outputs_of_blocks(case)
    x = inputs_of_block(case, blocks[1])
    for i, kept in ((1, 22), (2, 14)):  # of 36: ceil(21.6), and of 22 + 1: ceil(13.8)
        x, weights, _ = half(blocks[i], x, None)
        score = salience(weights, prefix)
        rows = []
        for b in range(3):
            ranked = sorted(range(prefix, x.shape[1]), key=lambda j, b=b: -float(score[b, j]))
            fused = sum(score[b, j] * x[b, j] for j in ranked[kept:])
            rows.append(torch.stack([*x[b, :prefix], *(x[b, j] for j in ranked[:kept]), fused]))
        x = own_mlp(blocks[i], torch.stack(rows))
        torch.testing.assert_close(outputs[i], x, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_attention_received_is_the_column_mean_however_it_is_chunked(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, n, 5, generator=generator) for n in (11, 13))
    bias = torch.rand(2, 1, 1, 13, generator=generator)
    whole = (query @ key.transpose(-1, -2) * 0.7 + bias).softmax(-1).mean(2)
    torch.testing.assert_close(received_attention(query, key, 0.7, bias), whole)
    monkeypatch.setattr("tokensieve.pipeline.towers.base.MAX_CHUNK_BYTES", 4 * 2 * 3 * 13 * 4)
    torch.testing.assert_close(received_attention(query, key, 0.7, bias), whole)


# --- pooling


@pytest.mark.parametrize("name", ["open_clip-avg", "timm-avg", "timm-avgmax"])
@torch.no_grad()
def test_average_pooling_weighs_by_size(name):
    """The spread tokens hold every patch once, so that the plain mean is right for them."""
    case = make_case(name)
    tower, last = case.model, []
    blocks_of(tower)[-1].register_forward_hook(lambda _, __, out: last.append(out))
    with compress_tower(tower, "tome", keep=0.3) as handle:
        features = case(images())
    spread = handle.trace.unmerge(last[0])
    if name == "open_clip-avg":
        expected = tower._pool(spread)[0] @ tower.proj
    else:
        expected = tower.forward_head(tower.norm(spread))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["timm-map", "timm-map-registers", "timm-map-prefix", "siglip", "open_clip-attentional", "open_clip-trunk"]
)
@torch.no_grad()
def test_pooling_heads_attend_in_proportion_to_size(name):
    """A token of size s in the head equals s copies of it: the spread tokens through the plain head."""
    case = make_case(name)
    tower = find_tower(case.model).module
    last = []
    blocks_of(case.model)[-1].register_forward_hook(lambda _, __, out: last.append(out))
    with compress_tower(case.model, "tome", keep=0.3) as handle:
        features = case(images())
    spread = handle.trace.unmerge(last[0])
    if name == "siglip":
        expected = tower.head(tower.post_layernorm(spread))
    elif name.startswith("open_clip-att"):
        expected = tower._pool(spread)[0] @ tower.proj
    else:
        expected = tower.forward_head(tower.norm(spread))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timm-map", "siglip", "open_clip-avg"])
@torch.no_grad()
def test_evit_leaves_pooling_alone(name):
    """Its fused token is no average."""
    case = make_case(name)
    tower = find_tower(case.model).module
    last = []
    blocks_of(case.model)[-1].register_forward_hook(lambda _, __, out: last.append(out))
    with compress_tower(case.model, "evit", keep=0.3):
        features = case(images())
    heads = {
        "siglip": lambda x: tower.head(tower.post_layernorm(x)),
        "timm-map": lambda x: tower.forward_head(tower.norm(x)),
        "open_clip-avg": lambda x: tower._pool(x)[0] @ tower.proj,
    }
    torch.testing.assert_close(features, heads[name](last[0]))


# --- the same weights in three libraries


def copy_of_open_clip(source, library):
    """The weights of an open_clip tower in a CLIPVisionModelWithProjection or in a timm model."""
    state = source.state_dict()
    if library == "timm":
        target = _timm(num_classes=16, pre_norm=True)
        target.head = nn.Linear(WIDTH, 16, bias=False)
        names = {
            "cls_token": state["class_embedding"][None, None],
            "pos_embed": state["positional_embedding"][None],
            "patch_embed.proj.weight": state["conv1.weight"],
            "norm": "ln_post",
            "norm_pre": "ln_pre",
            "head.weight": state["proj"].T,
        }
        parts = {"norm1": "ln_1", "norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
        parts |= {"attn.proj": "attn.out_proj"}
        block = "blocks"
    else:
        target = _transformers("CLIPVisionModelWithProjection", hidden_act="gelu")
        names = {
            "vision_model.embeddings.class_embedding": state["class_embedding"],
            "vision_model.embeddings.position_embedding.weight": state["positional_embedding"],
            "vision_model.embeddings.patch_embedding.weight": state["conv1.weight"],
            "vision_model.pre_layrnorm": "ln_pre",
            "vision_model.post_layernorm": "ln_post",
            "visual_projection.weight": state["proj"].T,
        }
        parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
        parts |= {"self_attn.out_proj": "attn.out_proj"}
        block = "vision_model.encoder.layers"
    new = {}
    for to, value in names.items():
        if isinstance(value, str):
            new |= {f"{to}.{end}": state[f"{value}.{end}"] for end in ("weight", "bias")}
        else:
            new[to] = value
    for i in range(DEPTH):
        for to, old in parts.items():
            for end in ("weight", "bias"):
                new[f"{block}.{i}.{to}.{end}"] = state[f"transformer.resblocks.{i}.{old}.{end}"]
        for end in ("weight", "bias"):
            packed = state[f"transformer.resblocks.{i}.attn.in_proj_{end}"]
            if library == "timm":
                new[f"{block}.{i}.attn.qkv.{end}"] = packed
            else:
                for letter, part in zip("qkv", packed.chunk(3), strict=True):
                    new[f"{block}.{i}.self_attn.{letter}_proj.{end}"] = part
    missing = target.load_state_dict(new, strict=False)
    assert not missing.unexpected_keys and not missing.missing_keys
    for norm in target.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = 1e-5
    return target.eval()


@pytest.mark.parametrize("options", [("tome", {"keep": 0.4}), ("evit", {"keep": 0.4}), ("tome", {"r": (5, -1.0)})])
@pytest.mark.parametrize("library", ["timm", "transformers"])
@torch.no_grad()
def test_equal_weights_give_equal_reduced_features_in_every_library(library, options):
    source = make_case("open_clip").model
    target = copy_of_open_clip(source, library)
    results = []
    for model in (source, target):
        with compress_tower(model, options[0], **options[1]) as handle:
            out = model(images())
            results.append((out if isinstance(out, torch.Tensor) else out.image_embeds, handle.trace.owner))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(results[0][1], results[1][1])


# --- what a stage is told and may do


@torch.no_grad()
def test_a_stage_is_told_what_happens():
    case, stage = make_case("timm-everything"), Watch()
    with compress_tower(case.model, stage, keep=0.3, last_block=-2):
        case(images())
        outputs = stage.outputs
        case(images(2))
    facts = dict(num_tokens=PATCHES + 5, num_prefix=5, num_blocks=DEPTH - 1, keep=0.3)
    assert stage.begun == [facts | {"batch": 3}, facts | {"batch": 2}]
    assert len(stage.views) == DEPTH - 1 and len(stage.outputs) == DEPTH
    plain = [inputs_of_block(case, block) for block in blocks_of(case.model)[1:]]
    for ours, own in zip(outputs, plain, strict=False):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


class WithExtras(Watch):
    """Extra tokens in block 2 only."""

    def __init__(self, extra, proportional=False):
        super().__init__()
        self.extra = extra
        self.proportional = proportional

    def acts_in(self, block):
        return block == 2

    def extra_tokens(self, block, x):
        return self.extra


@pytest.mark.parametrize("name", REFERENCES)
@torch.no_grad()
def test_extra_tokens_are_seen_and_thrown_away(name):
    case = make_case(name)
    extra = torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(5))
    stage = WithExtras(extra)
    with compress_tower(case.model, stage):
        case(images())
    block = blocks_of(case.model)[2]
    x = torch.cat([extra, inputs_of_block(case, block)], dim=1)
    y, weights, keys = REFERENCES[name](block, x, None)
    torch.testing.assert_close(stage.outputs[2], own_mlp(block, y)[:, 2:], rtol=1e-4, atol=1e-5)
    attention = weights.mean(1)[:, 2, 2:] if case.num_prefix else weights[:, :, 2:, 2:].mean((1, 2))
    torch.testing.assert_close(stage.views[0].class_attention, attention, rtol=1e-4, atol=1e-6)
    assert (attention.sum(1) < 1).all()
    torch.testing.assert_close(stage.views[0].keys, keys.mean(1)[:, 2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("proportional", [True, False])
@torch.no_grad()
def test_sizes_enter_later_attention_only_if_the_stage_says_so(proportional):
    case, stage = make_case("clip"), Keep({1: 10}, proportional)
    blocks = blocks_of(case.model)
    with compress_tower(case.model, stage):
        case(images())
    sizes = 1.0 + torch.arange(11).expand(3, -1)
    bias = sizes.log()[:, None, None] if proportional else None
    x, weights, _ = transformers_half(blocks[2], stage.outputs[1], bias)
    torch.testing.assert_close(stage.outputs[2], own_mlp(blocks[2], x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stage.views[1].class_attention, weights.mean(1)[:, 0], rtol=1e-4, atol=1e-6)
    assert torch.equal(stage.views[1].size, sizes)


@torch.no_grad()
def test_a_scale_of_its_own_is_respected():
    for name, part in (("clip", "self_attn"), ("timm", "attn")):
        case = make_case(name)
        before = case(images())
        for block in blocks_of(case.model):
            attn = getattr(block, part)
            attn.scale, attn.fused_attn = 0.1, False  # timm's fused attention has no other scale
        plain = case(images())
        with compress_tower(case.model, Watch()):
            torch.testing.assert_close(case(images()), plain, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(plain, before, atol=1e-3)


# --- the trace


@pytest.mark.parametrize("name", ["clip", "siglip"])
@torch.no_grad()
def test_the_trace_follows_drops_block_by_block(name):
    case, stage = make_case(name), Keep({1: 10, 3: 4})
    prefix = case.num_prefix
    with compress_tower(case.model, stage) as handle:
        case(images())
    assert handle.trace.tokens_per_block == tuple(n + prefix for n in (36, 36, 10, 10, 4))
    assert handle.trace.owner[0].tolist() == [*range(4), *[-1] * 32]
    assert handle.trace_after(0).tokens_per_block == (36 + prefix,) * 2 and handle.trace_after(0).anchor_mask().all()
    trace = handle.trace_after(2)
    assert trace.owner[0].tolist() == [*range(10), *[-1] * 26]
    values = torch.randn(3, prefix + 10, 2)
    full = trace.unmerge(values)
    assert full.shape == (3, prefix + 36, 2)
    assert torch.equal(full[:, : prefix + 10], values) and (full[:, prefix + 10 :] == 0).all()
    with pytest.raises(ValueError, match=f"{prefix} \\+ 10 tokens, got 12 rows"):
        trace.unmerge(torch.zeros(3, 12, 2))


@torch.no_grad()
def test_unmerging_gives_every_patch_the_row_of_its_owner():
    case = make_case("timm-everything")
    with compress_tower(case.model, "tome", keep=0.3) as handle:
        case(images())
    trace = handle.trace
    rows = torch.randn(3, 5 + trace.anchor.shape[1], 4)
    full = trace.unmerge(rows)
    for b in range(3):
        assert torch.equal(full[b, :5], rows[b, :5])
        for patch in range(PATCHES):
            assert torch.equal(full[b, 5 + patch], rows[b, 5 + trace.owner[b, patch]])
    for b in range(3):  # what was merged is the owner's: an anchor owns itself
        assert torch.equal(full[b, 5 + trace.anchor[b]], rows[b, 5:])


# --- VLMs


def vision_features(model, inputs):
    if "pixel_values_videos" in inputs:
        return model.model.get_video_features(inputs["pixel_values_videos"], return_dict=True).pooler_output
    extra = {"image_sizes": inputs["image_sizes"]} if "image_sizes" in inputs else {}
    return model.model.get_image_features(inputs["pixel_values"], return_dict=True, **extra).pooler_output


VLMS = ["llava", "llava_next", "llava_next_video", "llava_onevision-image", "llava_onevision-video", "paligemma"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", VLMS)
@torch.no_grad()
def test_a_vlm_runs_on_unmerged_features(family, method):
    model, inputs = make_model(family), make_inputs(family, 1)
    plain = torch.cat([f.flatten(0, -2) for f in vision_features(model, inputs)])
    with compress_tower(model, method, keep=1, unmerge=True):
        assert torch.equal(torch.cat([f.flatten(0, -2) for f in vision_features(model, inputs)]), plain)
    with compress_tower(model, method, keep=0.5) as handle:
        with handle.unmerged():
            reduced = torch.cat([f.flatten(0, -2) for f in vision_features(model, inputs)])
        assert reduced.shape == plain.shape and not torch.allclose(reduced, plain, atol=1e-4)
        assert 6 <= handle.trace.anchor.shape[1] <= 8
        with handle.unmerged():
            logits = model(**inputs).logits
    assert logits.isfinite().all()
    assert torch.equal(torch.cat([f.flatten(0, -2) for f in vision_features(model, inputs)]), plain)


@torch.no_grad()
def test_llava_reads_the_last_block_but_one_so_the_budget_is_met_there():
    model, inputs = make_model("llava"), make_inputs("llava", 1)
    tower = model.model.vision_tower
    with compress_tower(model, "tome", keep=0.5) as handle:
        assert handle.num_blocks == 1  # of two
        raw = tower(inputs["pixel_values"], output_hidden_states=True)
        assert [state.shape[1] for state in raw.hidden_states] == [17, 9, 9]
        with handle.unmerged():
            full = tower(inputs["pixel_values"], output_hidden_states=True)
        assert [state.shape[1] for state in full.hidden_states] == [17, 17, 17]
        assert torch.equal(full.hidden_states[0], raw.hidden_states[0])
        assert torch.equal(full.hidden_states[1], handle.trace_after(0).unmerge(raw.hidden_states[1]))
        assert torch.equal(full.last_hidden_state, handle.trace.unmerge(raw.last_hidden_state))
        with handle.unmerged(), pytest.raises(BadOption, match="return_dict"):
            tower(inputs["pixel_values"], return_dict=False)
    with compress_tower(tower, "tome", keep=0.5) as handle:
        assert handle.num_blocks == 2


def test_layers_a_vlm_reads():
    model = make_model("llava")
    for layers, num_blocks in ((-1, 2), (-2, 1), (1, 1), (2, 2), ([-2, -1], 2), ([1], 1), (-3, 1)):
        model.config.vision_feature_layer = layers
        with compress_tower(model, "evit", keep=0.5) as handle:
            assert handle.num_blocks == num_blocks


# --- what is refused


def test_a_model_without_a_tower_is_refused():
    with pytest.raises(UnsupportedModel, match="no vision tower in Linear.*CLIPVisionModel.*timm"):
        compress_tower(nn.Linear(2, 2), "tome")


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: _timm(block_fn=timm.models.vision_transformer.ParallelScalingBlock), "ParallelScalingBlock"),
        (lambda: _timm(block_fn=timm.models.vision_transformer.ResPostBlock), "ResPostBlock"),
        (lambda: _timm(attn_layer="diff"), "DiffAttention"),
        (lambda: _open_clip(scaled_cosine_attn=True), "CustomResidualAttentionBlock"),
        (lambda: _open_clip(attentional_pool="parallel", attn_pooler_heads=2), "attentional pools"),
        (
            lambda: timm.models.eva.Eva(img_size=SIDE, patch_size=PATCH, embed_dim=24, depth=1, num_heads=3),
            "no vision tower in Eva",
        ),
    ],
)
def test_parts_that_are_not_handled_are_refused(build, words):
    with pytest.raises(UnsupportedModel, match=words):
        compress_tower(build(), "tome")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "internvl"])
def test_vlms_with_other_towers_are_refused(family):
    with pytest.raises(UnsupportedModel, match="no vision tower"):
        compress_tower(make_model(family), "tome")


def test_two_towers_must_be_told_apart():
    model = make_model("video_llava")
    with pytest.raises(BadOption, match="2 vision towers: model.video_tower, model.image_tower"):
        compress_tower(model, "tome")
    compress_tower(model.get_submodule("model.video_tower"), "tome").remove()


def test_compressing_twice_is_refused_and_harmless():
    case = make_case("clip")
    plain = case(images())
    with compress_tower(case.model, "tome", keep=0.5):
        reduced = case(images())
        with pytest.raises(BadOption, match="compressed already.*remove"):
            compress_tower(case.model, "evit")
        assert torch.equal(case(images()), reduced)
    assert torch.equal(case(images()), plain)


def test_a_forward_replaced_by_others_is_refused_and_nothing_is_left_behind():
    case = make_case("clip")
    blocks = blocks_of(case.model)
    blocks[2].forward = blocks[2].forward
    with pytest.raises(UnsupportedModel, match="CLIPEncoderLayer.forward was replaced.*accelerate"):
        compress_tower(case.model, "tome")
    assert "forward" not in blocks[0].__dict__ and "forward" in blocks[2].__dict__


@pytest.mark.parametrize("name", ["clip", "timm-map", "open_clip-avg"])
def test_copies_and_pickles_are_refused(name):
    model = make_case(name).model
    with compress_tower(model, "tome"):
        for attempt in (copy.deepcopy, pickle.dumps):
            with pytest.raises(BadOption, match="cannot be copied or pickled.*handle.remove"):
                attempt(model)
    copy.deepcopy(model)


@pytest.mark.parametrize("name", ["clip", "siglip", "timm", "open_clip"])
def test_gradient_checkpointing_is_refused_where_it_would_run(name):
    case = make_case(name)
    case.model.train()
    if name in ("clip", "siglip"):
        case.model.activation_checkpointing_enable()
    else:
        case.model.set_grad_checkpointing(True)
    with compress_tower(case.model, "tome"):
        with pytest.raises(BadOption, match="Gradient checkpointing"):
            case(images())
        with torch.no_grad():
            assert case(images()).isfinite().all()


def test_patch_dropout_is_refused_where_it_would_run():
    for model in (_timm(patch_drop_rate=0.5), _open_clip(patch_dropout=0.5)):
        with compress_tower(model, "tome"):
            model.eval()
            model(images())
            model.train()
            with pytest.raises(BadOption, match="Patch dropout"):
                model(images())


def test_masks_are_refused():
    model = make_case("timm").model
    with compress_tower(model, "tome"):
        for options in ({"attn_mask": torch.zeros(37, 37)}, {"is_causal": True}):
            with pytest.raises(BadOption, match="no attention mask"):
                model(images(), **options)


def test_blocks_run_alone_are_refused():
    case = make_case("clip")
    block = blocks_of(case.model)[1]
    with compress_tower(case.model, "tome", keep=0.5) as handle:
        with pytest.raises(BadOption, match="No image went through"):
            _ = handle.trace
        with pytest.raises(BadOption, match="Run the tower as a whole"):
            block(torch.zeros(1, 37, WIDTH), None)
        case(images())
        with pytest.raises(BadOption, match="Block 1 got 37 tokens"):
            block(torch.zeros(1, 37, WIDTH), None)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "nope"}, "no method 'nope'"),
        ({"method": "divprune"}, "works in the projector"),
        ({"keep": 0}, "keep must be"),
        ({"rr": 3}, "no option 'rr'"),
        ({"r": -1}, "r must be"),
        ({"last_block": 4}, "last_block must be one of the tower's 4 blocks"),
        ({"last_block": -5}, "last_block must be"),
    ],
)
def test_bad_arguments_are_refused(options, words):
    model = make_case("clip").model
    with pytest.raises(BadOption, match=words):
        compress_tower(model, **({"method": "tome"} | options))
    assert "forward" not in blocks_of(model)[0].__dict__


def test_a_stage_takes_no_options():
    with pytest.raises(BadOption, match="has its options already"):
        compress_tower(make_case("clip").model, Watch(), r=3)


def test_unmerging_needs_a_transformers_tower():
    model = make_case("timm").model
    with pytest.raises(BadOption, match="VisionTransformer cannot give its outputs"):
        compress_tower(model, "tome", unmerge=True)
    with compress_tower(model, "tome") as handle, pytest.raises(BadOption, match="handle.trace.unmerge"):
        with handle.unmerged():
            pass


def test_a_compiled_model_reduces_too():
    case = make_case("timm-avg")
    with compress_tower(case.model, "tome", keep=0.4) as handle, torch.no_grad():
        expected, owner = case(images()), handle.trace.owner
        compiled = torch.compile(case.model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images()), expected)
        assert torch.equal(handle.trace.owner, owner)


# --- cost


def counts(a, b, c):
    return [*[197] * 4, *[a] * 3, *[b] * 3, *[c] * 3]


@pytest.mark.parametrize(
    "tokens, anchors, gmacs",
    [
        ([197] * 13, (), 17.582),
        (counts(182, 167, 155), (), 15.710),
        (counts(182, 167, 155), (3, 6, 9), 15.72),
        (counts(143, 104, 77), (), 11.88),
        (counts(140, 101, 74), (), 11.683),
        (counts(140, 101, 74), (3, 6, 9), 11.69),
        (counts(98, 53, 29), (), 8.826),
        (counts(179, 163, 148), (), 15.412),
        (counts(140, 100, 72), (), 11.62),
    ],
)
def test_macs_of_clip_vit_b16_match_public_counts(tokens, anchors, gmacs):
    extra = [int(block in anchors) for block in range(12)]
    counted = tower_macs(tokens, width=768, patch_size=16, out_width=512, extra_tokens=extra) / 1e9
    assert counted == pytest.approx(gmacs, abs=0.0051 if gmacs * 100 == round(gmacs * 100) else 0.00051)
