"""The built-in vision transformer of open_clip (`model.visual`; timm trunks are in `timm_towers`).

Handles `ResidualAttentionBlock` and `CustomResidualAttentionBlock` with LayerScale, query and key norms, scaled heads
and inner norms (open_clip 3.3). Average pooling weighs by size, attentional pooling gets log sizes.
"""

# Shape legend: B images, N tokens, D width, H heads, d width of a head

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokensieve.errors import UnsupportedModel
from tokensieve.pipeline.towers.base import (
    Tower,
    TowerBlock,
    TowerHandle,
    bias_multihead_attention,
    replace_method,
    weighted_mean,
)


def tower_of(module: nn.Module) -> Tower | None:
    """The tower if `module` is open_clip's own vision transformer, else None.

    Raises:
        UnsupportedModel: it is, with a part that is not handled.
    """
    library = sys.modules.get("open_clip.transformer")
    if library is None or type(module) is not library.VisionTransformer:
        return None
    if module.attn_pool is not None and module.attn_pool_contrastive is not None:
        raise UnsupportedModel("Two attentional pools in one open_clip tower (CoCa v2 style) are not handled.")
    blocks = []
    for block in module.transformer.resblocks:
        if type(block) is library.ResidualAttentionBlock and block.attn.batch_first:
            blocks.append(_DefaultBlock(block))
        elif type(block) is library.CustomResidualAttentionBlock and block.attn.logit_scale is None:
            blocks.append(_CustomBlock(block))
        else:
            raise UnsupportedModel(
                f"This open_clip tower has a {type(block).__name__} that is not handled.",
                hint="Handled are batch-first blocks without scaled cosine attention.",
            )

    def why_not() -> str:
        if torch.is_grad_enabled() and module.transformer.grad_checkpointing:
            return "Gradient checkpointing would reduce a second time in the backward pass."
        if module.training and not isinstance(module.patch_dropout, nn.Identity):
            return "Patch dropout is on, so that nobody knows which patch is which."
        return ""

    return Tower(
        module=module, blocks=blocks, num_prefix=1, has_class_token=True, why_not=why_not, patch_outputs=_patch_outputs
    )


class _Block(TowerBlock):
    def norm(self, x: Tensor) -> Tensor:
        return self.module.ln_1(x)

    def heads(self, h_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.module.attn
        packed = F.linear(h_BND, attn.in_proj_weight, attn.in_proj_bias)
        query, key, value = packed.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.module.ls_2(self.module.mlp(self.module.ln_2(x)))


class _DefaultBlock(_Block):
    def __init__(self, block: nn.Module):
        super().__init__(block, block.attn.head_dim**-0.5)

    def attention_output(self, context_BHNd: Tensor, h_BND: Tensor) -> Tensor:
        return self.module.ls_1(self.module.attn.out_proj(context_BHNd.transpose(1, 2).flatten(2)))

    def dropout(self) -> float:
        return self.module.attn.dropout


class _CustomBlock(_Block):
    def __init__(self, block: nn.Module):
        super().__init__(block, block.attn.scale)

    def heads(self, h_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().heads(h_BND)
        return self.module.attn.ln_q(query), self.module.attn.ln_k(key), value

    def attention_output(self, context_BHNd: Tensor, h_BND: Tensor) -> Tensor:
        attn = self.module.attn
        if attn.head_scale is not None:
            context_BHNd = context_BHNd * attn.head_scale
        out = attn.out_drop(attn.out_proj(attn.ln_inner(context_BHNd.transpose(1, 2).flatten(2))))
        return self.module.ls_1(self.module.ln_attn(out))

    def dropout(self) -> float:
        return self.module.attn.attn_drop.p


def _patch_outputs(handle: TowerHandle) -> list[Callable[[], None]]:
    tower = handle.tower
    if tower.attn_pool is not None:
        return [bias_multihead_attention(handle, tower.attn_pool.attn)] if handle.stage.proportional else []
    if tower.pool_type == "avg" and handle.stage.averages:
        return [replace_method(tower, "_global_pool", _WeightedPool(handle, tower._global_pool))]
    return []


class _WeightedPool:
    """Stands in for `_global_pool`: the mean over patches, weighted by size."""

    def __init__(self, handle: TowerHandle, own: Callable):
        self.handle = handle
        self.own = own

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if (size_BN := self.handle.sizes()) is None:
            return self.own(x)
        return weighted_mean(x[:, 1:], size_BN[:, 1:]), x[:, 1:]
