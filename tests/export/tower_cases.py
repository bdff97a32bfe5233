"""Tiny CLIP and SigLIP models of three libraries, and their exports, made once for all tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from torch import nn

from tests.pipeline.test_towers import _timm, _vision_config
from tokensieve.export.manifest import Manifest
from tokensieve.export.tower_runtime import OnnxTower
from tokensieve.export.towers import export_tower
from tokensieve.pipeline.adaptation.tca_stream import image_features
from tokensieve.pipeline.towers import compress_tower

SIDE = 24  # 36 patches


def open_clip_model():
    import open_clip

    vision = dict(image_size=SIDE, patch_size=4, width=24, layers=2, head_width=8)
    text = dict(context_length=8, vocab_size=50, width=16, heads=2, layers=1)
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


def transformers_model(kind, layers):
    import transformers

    text = getattr(transformers, f"{kind}TextConfig")(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
        max_position_embeddings=9, bos_token_id=1, eos_token_id=49, projection_dim=16, projection_size=24,
    )  # fmt: skip
    vision = _vision_config(kind, num_hidden_layers=layers)
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text, projection_dim=16)
    model = getattr(transformers, f"{kind}Model")(config)
    if kind == "Siglip":
        nn.init.constant_(model.logit_scale, 2.0)
        nn.init.constant_(model.logit_bias, -3.0)
    return model


BUILD = {
    "open_clip": open_clip_model,
    "clip": lambda: transformers_model("CLIP", 3),
    "siglip": lambda: transformers_model("Siglip", 2),
    "timm": lambda: _timm(depth=2, global_pool="map", reg_tokens=2, num_classes=16),
}


@cache
def _made(name: str) -> nn.Module:
    """Random weights large enough that attention is sharp and no branch is idle."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = BUILD[name]().eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5 * 1.5)
        elif "logit" not in key:
            parameter.add_(0.3 * torch.randn_like(parameter))
    torch.set_rng_state(state)
    return model


def make_model(name: str) -> nn.Module:
    return copy.deepcopy(_made(name))


@dataclass(frozen=True)
class Case:
    """What is exported of which model."""

    model: str
    method: str | None = None
    keep: float = 1.0
    options: dict = field(default_factory=dict)


CASES = {
    "plain": Case("siglip"),
    "tome": Case("timm", "tome", 0.4),
    "evit": Case("open_clip", "evit", 0.4),
    "tca": Case("clip", "tca", options={"drop_rate": 0.2, "blocks": (1,)}),
    "tca-paper": Case("siglip", "tca", 0.5, options={"variant": "paper", "blocks": (0, 1)}),
}


@dataclass(frozen=True)
class Exported:
    case: Case
    folder: object
    manifest: Manifest
    model: nn.Module
    tower: OnnxTower

    def reference(self, pixels, anchors=None):
        """The embedding by PyTorch, and with tca the path."""
        case = self.case
        if case.method is None:
            return [image_features(self.model, pixels)]
        with compress_tower(self.model, case.method, case.keep, **case.options) as handle, torch.no_grad():
            handle.stage.anchors = anchors
            out = [image_features(self.model, pixels)]
            return [*out, torch.stack(handle.stage.path, 1)] if case.method == "tca" else out


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """`exported(name)` gives the export of one of `CASES`."""
    root = tmp_path_factory.mktemp("towers")

    @cache
    def export(name: str) -> Exported:
        case, folder = CASES[name], root / name
        model = make_model(case.model)
        weights, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        manifest = export_tower(model, folder, method=case.method, keep=case.keep, **case.options)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert not any("forward" in vars(module) for module in model.modules())
        assert torch.equal(torch.get_rng_state(), random_state)
        return Exported(case, folder, manifest, model, OnnxTower.from_pretrained(folder, "cpu", threads=1))

    return export


def random_pixels(batch, seed=3):
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
