"""What tokensieve must know about a model family, as one small class a family.

A family turns the output of `get_image_features` / `get_video_features` into one `ItemLayout` per image or
video. Everything else (placeholders, masks, positions, containers) is the same for all and lives in
`pipeline/adapter.py`. To support a new family, subclass `Family` and decorate it with `@register_family`.
"""

# Shape legend: n visual tokens of an item, N of them candidates, D width of the language model,
#               P rows entering the projector, V width of the vision tower, T frames

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokensieve.compression import Projector, TwoLayerMLP
from tokensieve.errors import UnsupportedModel
from tokensieve.pipeline.tower_recorder import PatchMap


@dataclass(frozen=True, kw_only=True)
class ItemLayout:
    """One image or video as it leaves the encoder, in the order of its placeholders.

    Attributes:
        features: `[n, D]`, structural tokens included.
        grids: `(frames, height, width)` per raster block of the candidates.
        structural: `[n]` bool, tokens that are no candidates (learned newlines, class tokens), or None.
        crop: `[N]` tile of each candidate (0 = base view), or None for all zeros.
        times_s: `[T]` seconds of each token frame, or None.
        projector: projector and inputs of the candidates, or None.
        deepstack: one `[n, D]` tensor a layer for families that add features inside the decoder.
        patches: where the item is in the tower's batch.
    """

    features: Tensor
    grids: tuple[tuple[int, int, int], ...]
    structural: Tensor | None = None
    crop: Tensor | None = None
    times_s: Tensor | None = None
    projector: Projector | None = None
    deepstack: tuple[Tensor, ...] = ()
    patches: PatchMap | None = None


class Family:
    """Base of all families. `base` below is the model without its language-model head."""

    projector_path = "multi_modal_projector"
    tower_path = "vision_tower"
    join_frames = True  # a video given as images may be treated as one item
    forward_position_offset = 0  # what `forward` expects on top of what `generate` expects
    causal_prompt = True  # earlier tokens never look at later ones, so a cached prompt may grow
    causal_visual = True  # nor do the visual tokens of one image

    def tower(self, base: nn.Module, modality: str) -> nn.Module:
        """The vision tower that encodes this modality."""
        return base.get_submodule(self.tower_path)

    def tower_blocks(self, base: nn.Module, modality: str) -> nn.ModuleList:
        """Its transformer blocks, in order."""
        return self.tower(base, modality).encoder.layers

    def layouts(
        self, base: nn.Module, modality: str, out, inputs: Mapping[str, Tensor], seen: Tensor
    ) -> list[ItemLayout]:
        """Splits an encoder output into items.

        Args:
            base: the model without its head.
            modality: "image" or "video".
            out: what `get_{modality}_features` returned.
            inputs: the processor's output.
            seen: what entered the projector, as captured by a forward hook.
        """
        raise NotImplementedError


_FAMILIES: dict[str, type[Family]] = {}


def register_family(*model_types: str) -> Callable[[type[Family]], type[Family]]:
    """Class decorator: this family serves configs whose `model_type` is one of these."""

    def register(cls: type[Family]) -> type[Family]:
        for model_type in model_types:
            if model_type in _FAMILIES:
                raise ValueError(f"model_type {model_type!r} is already registered.")
            _FAMILIES[model_type] = cls
        return cls

    return register


def family_of(model_type: str) -> Family:
    """The family that serves a `model_type`.

    Raises:
        UnsupportedModel: none does; the message lists those that are supported.
    """
    if model_type not in _FAMILIES:
        raise UnsupportedModel(
            f"Models of type {model_type!r} are not supported; supported are {', '.join(list_families())}.",
            hint="Register one: see tokensieve/pipeline/families/base.py.",
        )
    return _FAMILIES[model_type]()


def list_families() -> list[str]:
    """All supported values of `config.model_type`."""
    return sorted(_FAMILIES)


def square(num_tokens: int) -> tuple[int, int, int]:
    """`(1, s, s)` for a square raster of `num_tokens`."""
    side = round(num_tokens**0.5)
    if side * side != num_tokens:
        raise UnsupportedModel(f"Expected a square raster of visual tokens, got {num_tokens}.")
    return (1, side, side)


def num_class_tokens(base: nn.Module) -> int:
    """Tokens that the model cuts off in front of the tower's patches: 1 for CLIP towers, 0 for SigLIP."""
    return int(getattr(base.config, "vision_feature_select_strategy", "full") == "default")


def two_layer_mlp(module: nn.Module) -> TwoLayerMLP | None:
    """The weights of a `linear_1 -> act -> linear_2` projector, or None if it has another shape."""
    children = dict(module.named_children())
    if list(children) != ["linear_1", "act", "linear_2"]:
        return None
    first, last = children["linear_1"], children["linear_2"]
    return TwoLayerMLP(w1=first.weight, b1=first.bias, w2=last.weight, act=children["act"])


def frame_times(inputs: Mapping[str, Tensor], key: str, index: int, num_frames: int) -> Tensor | None:
    """Seconds of each token frame from a per-video spacing such as `second_per_grid_ts`, if it was given."""
    spacing = inputs.get(key)
    if spacing is None:
        return None
    return torch.arange(num_frames) * float(spacing[index])
