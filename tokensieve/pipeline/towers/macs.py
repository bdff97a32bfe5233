"""Multiply-accumulates of a vision tower whose blocks see different numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

LAYER_NORM_MACS = 5  # per element, as fvcore counts them; "GFLOPs" of papers on CLIP are often such counts


def tower_macs(
    tokens_per_block: Sequence[int],
    *,
    width: int,
    patch_size: int,
    mlp_width: int | None = None,
    num_prefix: int = 1,
    extra_tokens: Sequence[int] = (),
    out_width: int = 0,
    pre_norm: bool = True,
) -> int:
    """Multiply-accumulates for one image: patch convolution, linear layers, attention products and norms.

    `tower_macs([197] * 13, width=768, patch_size=16)` is CLIP ViT-B/16: 17.58e9.

    Args:
        tokens_per_block: tokens that enter the first block, then those that leave each block, prefix included, as
            in `TowerTrace.tokens_per_block`. The attention of a block runs on what enters, its MLP on what leaves.
        width: D of the tower.
        patch_size: side of a patch, of 3 colours.
        mlp_width: hidden width of the MLP; None for 4 D.
        num_prefix: tokens that do not come from the patch convolution.
        extra_tokens: per block, tokens that only its attention sees (TCA's anchor).
        out_width: width of the projection of the class token; 0 for none.
        pre_norm: whether there is a norm before the first block (CLIP).
    """
    mlp_width = 4 * width if mlp_width is None else mlp_width
    first = tokens_per_block[0]
    total = (first - num_prefix) * 3 * patch_size**2 * width
    total += LAYER_NORM_MACS * width * (first * pre_norm + 1) + width * out_width
    for block, (enter, leave) in enumerate(pairwise(tokens_per_block)):
        seen = enter + (extra_tokens[block] if block < len(extra_tokens) else 0)
        total += 4 * seen * width**2 + 2 * seen**2 * width + LAYER_NORM_MACS * seen * width
        total += 2 * leave * width * mlp_width + LAYER_NORM_MACS * leave * width
    return total
