"""CLIP and SigLIP towers of transformers, alone, with a projection, in dual encoders and in VLMs.

Reads `layer_norm1`, `self_attn.{q,k,v,out}_proj`, `layer_norm2` and `mlp` of every layer (transformers 5.24). The
attention runs through `scaled_dot_product_attention` in the blocks that reduce, whatever `attn_implementation` says.
SigLIP's pooling head gets log sizes as an additive mask.
"""

# Shape legend: B images, N tokens, D width, H heads, d width of a head

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokensieve.errors import BadOption
from tokensieve.pipeline.towers.base import Tower, TowerBlock, TowerHandle, bias_multihead_attention

_HOMES = {
    "CLIPVisionModel": "transformers.models.clip.modeling_clip",
    "SiglipVisionModel": "transformers.models.siglip.modeling_siglip",
}


def tower_of(module: nn.Module) -> Tower | None:
    """The tower if `module` is a CLIP or SigLIP vision model of transformers, else None."""
    name = type(module).__name__
    if name not in _HOMES or type(module) is not getattr(sys.modules.get(_HOMES[name]), name, None):
        return None
    blocks = [_EncoderLayer(layer) for layer in module.encoder.layers]
    has_class_token = name == "CLIPVisionModel"

    def why_not() -> str:
        if torch.is_grad_enabled() and any(b.module.training and b.module.gradient_checkpointing for b in blocks):
            return "Gradient checkpointing would reduce a second time in the backward pass."
        return ""

    return Tower(
        module=module,
        blocks=blocks,
        num_prefix=int(has_class_token),
        has_class_token=has_class_token,
        why_not=why_not,
        patch_outputs=_patch_outputs,
        can_unmerge=True,
    )


class _EncoderLayer(TowerBlock):
    def __init__(self, layer: nn.Module):
        super().__init__(layer, layer.self_attn.scale)

    def norm(self, x: Tensor) -> Tensor:
        return self.module.layer_norm1(x)

    def heads(self, h_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.module.self_attn
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        return tuple(proj(h_BND).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for proj in projections)

    def attention_output(self, context_BHNd: Tensor, h_BND: Tensor) -> Tensor:
        return self.module.self_attn.out_proj(context_BHNd.transpose(1, 2).flatten(2))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.module.mlp(self.module.layer_norm2(x))

    def dropout(self) -> float:
        return self.module.self_attn.dropout


def _patch_outputs(handle: TowerHandle) -> list[Callable[[], None]]:
    undo = [handle.tower.register_forward_hook(_UnmergeOutputs(handle)).remove]
    head = getattr(handle.tower, "head", None)
    if handle.stage.proportional and head is not None:
        undo.append(bias_multihead_attention(handle, head.attention))
    return undo


class _UnmergeOutputs:
    """Forward hook on the tower: its outputs at full raster length while the handle unmerges."""

    def __init__(self, handle: TowerHandle):
        self.handle = handle

    def __call__(self, module: nn.Module, args: tuple, output):
        if not self.handle.unmerges:
            return None
        if isinstance(output, tuple):
            raise BadOption("Unmerged outputs need return_dict=True.")
        output.last_hidden_state = self.handle.trace.unmerge(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = tuple(
                state if state is None else self.handle.trace_after(i - 1).unmerge(state)
                for i, state in enumerate(output.hidden_states)
            )
        return output
