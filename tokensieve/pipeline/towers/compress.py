"""`compress_tower`: finds the vision tower in a model of any library and reduces it."""

from __future__ import annotations

from torch import nn

from tokensieve.compression.budget import check_keep
from tokensieve.compression.registry import get_method
from tokensieve.compression.tower_stage import TowerStage
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.towers import open_clip_towers, timm_towers, transformers_towers
from tokensieve.pipeline.towers.base import Tower, TowerHandle

SUPPORTED = (
    "Supported: CLIPVisionModel and SiglipVisionModel of transformers (alone, with a projection, in CLIPModel, "
    "SiglipModel and VLMs), open_clip's built-in VisionTransformer, timm's VisionTransformer (alone or in open_clip). "
    "Not supported: rotary towers (EVA, DINOv3), SigLIP 2 with packed patches, windowed towers (Qwen2.5-VL)."
)


def compress_tower(
    model: nn.Module,
    method: str | TowerStage,
    keep: float | int = 0.5,
    *,
    last_block: int | None = None,
    unmerge: bool = False,
    **options,
) -> TowerHandle:
    """Reduces the tokens inside the vision tower of `model`, until `remove()` is called on the handle.

        >>> with compress_tower(clip, "tome", keep=0.5) as handle:
        ...     features = clip.encode_image(images)

    Args:
        model: the tower itself, or anything that holds exactly one.
        method: name of a registered method that works in the tower, or a stage of your own.
        keep: patch tokens left at the end, a share in (0, 1] or a number.
        last_block: the last block that may reduce, from 0 or, if negative, from the end. By default the block that
            the model's `vision_feature_layer` reads (LLaVA reads the last but one), else the last.
        unmerge: transformers towers give `last_hidden_state` and `hidden_states` at full raster length, every patch
            with the value of the token that owns it (zeros if it was dropped), so that pooling, packing and
            projectors of a VLM run as ever. Also for a while: `with handle.unmerged():`.
        options: of the method.

    Raises:
        BadOption: bad method, budget or option; `model` holds several towers; the tower is compressed already.
        UnsupportedModel: there is no tower of a supported kind.
    """
    check_keep(keep)
    stage = _stage(method, options)
    tower = find_tower(model)
    num_blocks = len(tower.blocks)
    if last_block is None:
        last_block = last_block_read(model, num_blocks)
    if not -num_blocks <= last_block < num_blocks:
        raise BadOption(f"last_block must be one of the tower's {num_blocks} blocks, got {last_block}.")
    return TowerHandle(tower, stage, keep, last_block % num_blocks + 1, unmerge)


def find_tower(model: nn.Module) -> Tower:
    """The one supported vision tower in `model`.

    Raises:
        BadOption: there are several.
        UnsupportedModel: there is none, or it has a part that is not handled.
    """
    towers = {}
    for name, module in model.named_modules():
        for library in (transformers_towers, open_clip_towers, timm_towers):
            if (tower := library.tower_of(module)) is not None:
                towers[name] = tower
    if not towers:
        raise UnsupportedModel(
            f"There is no vision tower in {type(model).__name__} that can be reduced.", hint=SUPPORTED
        )
    if len(towers) > 1:
        raise BadOption(
            f"{type(model).__name__} has {len(towers)} vision towers: {', '.join(towers)}.",
            hint="Pass one of them, as model.get_submodule(name).",
        )
    return next(iter(towers.values()))


def _stage(method: str | TowerStage, options: dict[str, object]) -> TowerStage:
    if isinstance(method, TowerStage):
        if options:
            raise BadOption(f"A stage has its options already, got {sorted(options)} as well.")
        return method
    registered = get_method(method)
    if registered.place != "tower":
        raise BadOption(
            f"{method!r} works in the {registered.place}, not in the vision tower.", hint="Use VLM.compress for it."
        )
    registered.check_options(options)
    return registered.fn(**options)


def last_block_read(model: nn.Module, num_blocks: int) -> int:
    """The block after which a VLM reads: `vision_feature_layer` counts the input of the first block as state 0."""
    layers = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    if layers is None:
        return num_blocks - 1
    layers = [layers] if isinstance(layers, int) else layers
    return max(0, *(layer % (num_blocks + 1) - 1 for layer in layers))
