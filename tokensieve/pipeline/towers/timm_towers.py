"""timm's `VisionTransformer` (ViT, DeiT, CLIP, SigLIP, DINOv2 with registers ...), alone or as an open_clip trunk.

Handles `Block` with `Attention`: LayerScale, drop path, query and key norms, scale norms, gates, registers, no class
token (timm 1.0.31). Average pooling weighs by size, the map pooling head gets log sizes.
"""

# Shape legend: B images, N tokens, D width, H heads, d width of a head

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokensieve.errors import UnsupportedModel
from tokensieve.pipeline.towers.base import SizeBias, Tower, TowerBlock, TowerHandle, replace_method, weighted_mean


def tower_of(module: nn.Module) -> Tower | None:
    """The tower if `module` is a `VisionTransformer` of timm, else None.

    Raises:
        UnsupportedModel: it is, with a part that is not handled.
    """
    library = sys.modules.get("timm.models.vision_transformer")
    if library is None or not isinstance(module, library.VisionTransformer):
        return None
    from timm.layers import Attention, AttentionPoolLatent

    for block in module.blocks:
        if type(block) is not library.Block or type(block.attn) is not Attention:
            raise UnsupportedModel(
                f"This timm tower has a {type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}.",
                hint="Handled are `Block`s with `Attention`: no parallel, post-norm or differential blocks.",
            )
    pool = module.attn_pool
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        raise UnsupportedModel(
            f"The pooling head {type(pool).__name__} of this timm tower is not handled.",
            hint="Handled is AttentionPoolLatent without positions.",
        )

    def why_not() -> str:
        if torch.is_grad_enabled() and module.grad_checkpointing:
            return "Gradient checkpointing would reduce a second time in the backward pass."
        if module.training and not isinstance(module.patch_drop, nn.Identity):
            return "Patch dropout is on, so that nobody knows which patch is which."
        return ""

    return Tower(
        module=module,
        blocks=[_Block(block) for block in module.blocks],
        num_prefix=module.num_prefix_tokens,
        has_class_token=module.cls_token is not None,
        why_not=why_not,
        patch_outputs=_patch_outputs,
    )


class _Block(TowerBlock):
    def __init__(self, block: nn.Module):
        super().__init__(block, block.attn.scale)

    def norm(self, x: Tensor) -> Tensor:
        return self.module.norm1(x)

    def heads(self, h_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.module.attn
        query, key, value = attn.qkv(h_BND).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return attn.q_norm(query), attn.k_norm(key), value

    def attention_output(self, context_BHNd: Tensor, h_BND: Tensor) -> Tensor:
        attn = self.module.attn
        out = attn.norm(context_BHNd.transpose(1, 2).flatten(2))
        gate = getattr(attn, "gate", None)  # older timm has none
        if gate is not None:
            out = out * gate(h_BND).sigmoid()
        return self.module.drop_path1(self.module.ls1(attn.proj_drop(attn.proj(out))))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.module.drop_path2(self.module.ls2(self.module.mlp(self.module.norm2(x))))

    def dropout(self) -> float:
        return self.module.attn.attn_drop.p


def _patch_outputs(handle: TowerHandle) -> list[Callable[[], None]]:
    tower = handle.tower
    if tower.attn_pool is not None:
        if not handle.stage.proportional:
            return []
        hook = SizeBias(handle, lambda args: args[0], lambda bias, args: bias)
        return [tower.attn_pool.register_forward_pre_hook(hook, with_kwargs=True).remove]
    if handle.stage.averages:
        return [replace_method(tower, "pool", _WeightedPool(handle, tower.pool))]
    return []


class _WeightedPool:
    """Stands in for `pool`: means over tokens are weighted by size."""

    def __init__(self, handle: TowerHandle, own: Callable):
        self.handle = handle
        self.own = own

    def __call__(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        tower, size_BN = self.handle.tower, self.handle.sizes()
        kind = tower.global_pool if pool_type is None else pool_type
        if size_BN is None or kind not in ("avg", "avgmax"):
            return self.own(x, pool_type)
        first = 0 if tower.pool_include_prefix else tower.num_prefix_tokens
        mean = weighted_mean(x[:, first:], size_BN[:, first:])
        return mean if kind == "avg" else (mean + x[:, first:].amax(1)) / 2
