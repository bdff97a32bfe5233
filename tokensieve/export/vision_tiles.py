"""Encoders of LLaVA, LLaVA-OneVision and SmolVLM for a graph: square tiles through a CLIP or SigLIP tower.

The towers are run block by block here, because their own forwards collect outputs in a way that does not trace.
"""

# Shape legend: T tiles or frames, C colours, S patches of a tile (class token in front where there is one), V width of
#               the tower, P rows entering the projector, R rows a token is mixed of (TAPS), N candidate tokens, D width
#               of the language model, H heads, d width of a head

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokensieve.compression.tokens import identity
from tokensieve.errors import UnsupportedModel
from tokensieve.export.encoded import Encoded
from tokensieve.pipeline.families.base import num_class_tokens, two_layer_mlp
from tokensieve.pipeline.tower_recorder import parts_of

TAPS = 4  # rows that a token is mixed of, at most: bilinear resampling
TOWERS = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class Record:
    """What one layer of the tower looks at: `salience` `[T, S]` and mean keys `[T, S, d]` of its patches."""

    salience: Tensor
    keys: Tensor


class Tower(nn.Module):
    """Tiles `[T, C, height, width]` to the hidden states `[T, S, V]` that the projector reads, class token cut off.

    Args:
        embed: pixels to the states that enter the first block.
        blocks: in order; those behind the last one read are left out.
        layers: which states are read, 0 for the first block's input; several are put side by side.
        norm: applied to the last state, None for none.
        num_prefix: class tokens in front of the patches.
        record: whether to record VisionZip's ranking layer.
    """

    def __init__(
        self,
        embed: nn.Module,
        blocks: Sequence[nn.Module],
        layers: Sequence[int],
        *,
        norm: nn.Module | None,
        num_prefix: int,
        record: bool,
    ):
        super().__init__()
        self.recorded = len(blocks) - (2 if num_prefix else 1) if record else None
        self.embed, self.layers, self.num_prefix = embed, tuple(layers), num_prefix
        self.norm = nn.Identity() if norm is None else norm
        self.ranking = _Ranking(blocks[self.recorded], num_prefix) if record else None
        self.blocks = nn.ModuleList(blocks[: max(*layers, self.recorded or 0)])

    def forward(self, pixels: Tensor) -> tuple[Tensor, Record | None]:
        hidden_TSV = self.embed(pixels)
        states, record = {}, None
        for place in range(len(self.blocks) + 1):
            if place in self.layers:
                states[place] = hidden_TSV
            if place == self.recorded:
                record = self.ranking(hidden_TSV)
            if place < len(self.blocks):
                hidden_TSV = self.blocks[place](hidden_TSV, attention_mask=None)
        read = torch.cat([states[place] for place in self.layers], dim=-1)
        return self.norm(read[:, self.num_prefix :]), record


class _Ranking(nn.Module):
    """Salience and mean keys of one block; see `compression/tower_view.py`, whose numbers these are."""

    def __init__(self, block: nn.Module, num_prefix: int):
        super().__init__()
        norm, attention = parts_of(block)
        self.norm, self.query, self.key = norm, attention.q_proj, attention.k_proj
        self.num_heads, self.scale, self.num_prefix = attention.num_heads, attention.scale, num_prefix

    def forward(self, hidden_TSV: Tensor) -> Record:
        normed_TSV = self.norm(hidden_TSV)
        asking_TSV = normed_TSV[:, :1] if self.num_prefix else normed_TSV
        query_THQd, key_THSd = (
            part(x).float().unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part, x in ((self.query, asking_TSV), (self.key, normed_TSV))
        )
        weight_THQS = (query_THQd @ key_THSd.transpose(-1, -2) * self.scale).softmax(-1)
        return Record(weight_THQS.mean((1, 2))[:, self.num_prefix :], key_THSd.mean(1)[:, self.num_prefix :])


class _Pixels(nn.Module):
    """Embeddings of a CLIP or SigLIP tower, with the norm that CLIP has behind them."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.embeddings = tower.embeddings
        self.norm = getattr(tower, "pre_layrnorm", nn.Identity())

    def forward(self, pixels: Tensor) -> Tensor:
        return self.norm(self.embeddings(pixels))


class _FullTiles(nn.Module):
    """Embeddings of SmolVLM's tower for tiles without padding: the places of the patches are always the same."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        embeddings = tower.embeddings
        self.patches = embeddings.patch_embedding
        side = embeddings.num_patches_per_side
        places = []
        hook = embeddings.position_embedding.register_forward_hook(lambda _, args, __: places.append(args[0]))
        weight = self.patches.weight
        tile = torch.zeros(1, weight.shape[1], embeddings.image_size, embeddings.image_size, dtype=weight.dtype)
        try:
            embeddings(tile, torch.ones(1, side, side, dtype=torch.bool))
        finally:
            hook.remove()
        self.register_buffer("positions", embeddings.position_embedding.weight.detach()[places[0][0]])

    def forward(self, pixels: Tensor) -> Tensor:
        return self.patches(pixels.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2) + self.positions


class TileEncoder(nn.Module):
    """Tiles to `Encoded`. Subclasses say how patches become rows and rows become tokens.

    Attributes:
        pixel_inputs: the graph inputs it reads.
        newline: `[D]`, the structural token of LLaVA-OneVision; None elsewhere.
        rows_per_tile: projector rows of one tile.
    """

    pixel_inputs: tuple[str, ...] = ("pixel_values",)

    def __init__(self, tower: Tower, projector: nn.Module, rows_per_tile: int, newline: Tensor | None = None):
        super().__init__()
        self.tower, self.projector, self.rows_per_tile = tower, projector, rows_per_tile
        self.register_buffer("newline", newline)
        # Methods probe in float32, with the same weights.
        self.probe = projector if _dtype(projector) == torch.float32 else copy.deepcopy(projector).float()

    def forward(self, inputs: Mapping[str, Tensor]) -> Encoded:
        state_TSV, record = self.tower(inputs["pixel_values"])
        rows_PV = self.join(state_TSV).flatten(0, 1)
        to_tokens = self.packing(inputs)
        found = {}
        if record is not None:
            salience_P, keys_Pd = self.joined_mean(record.salience[..., None])[:, 0], self.joined_mean(record.keys)
            found = {"salience": to_tokens(salience_P), "keys": to_tokens(keys_Pd)}
        return Encoded(
            features=to_tokens(self.projector(rows_PV).float()),
            rows=rows_PV.float(),
            project=self.probe,
            to_tokens=to_tokens,
            mlp=two_layer_mlp(self.probe),
            **found,
        )

    def join(self, state_TSV: Tensor) -> Tensor:
        """What enters the projector, `[T, rows of a tile, V]`."""
        return state_TSV

    def joined_mean(self, values_TSC: Tensor) -> Tensor:
        """`[P, C]`: patches that share a row are averaged."""
        return values_TSC.flatten(0, 1)

    def packing(self, inputs: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """Numbers of projector rows to numbers of candidates."""
        return identity


class PackedEncoder(TileEncoder):
    """LLaVA-OneVision: tokens are mixed of rows, `rows` and `weights` `[N, R]`; a newline comes along."""

    pixel_inputs = ("pixel_values", "rows", "weights")

    def packing(self, inputs):
        rows_NR, weights_NR = inputs["rows"], inputs["weights"]

        def to_tokens(values: Tensor) -> Tensor:
            columns_PC = values if values.ndim > 1 else values[:, None]
            # One after the other: all rows of all tokens at once would take TAPS times the memory.
            mixed_NC = sum(weights_NR[:, i, None] * columns_PC[rows_NR[:, i]] for i in range(TAPS))
            return mixed_NC if values.ndim > 1 else mixed_NC[:, 0]

        return to_tokens


class ShuffledEncoder(TileEncoder):
    """SmolVLM: squares of patches are put side by side and projected."""

    def __init__(self, tower: Tower, connector: nn.Module, rows_per_tile: int):
        super().__init__(tower, connector.modality_projection, rows_per_tile)
        self.shuffle, self.scale = connector.pixel_shuffle, connector.scale_factor

    def join(self, state_TSV):
        return self.shuffle(state_TSV, self.scale)

    def joined_mean(self, values_TSC):
        return self.shuffle(values_TSC, self.scale).unflatten(-1, (self.scale**2, -1)).mean(-2).flatten(0, 1)


def llava_encoder(model: nn.Module, record: bool) -> TileEncoder:
    """Of LLaVA and, with packing, of LLaVA-OneVision.

    Raises:
        UnsupportedModel: a tower of another kind, or patches that form no square.
    """
    base, config = model.model, model.config
    tower = base.vision_tower
    if tower.config.model_type not in TOWERS:
        raise UnsupportedModel(
            f"Vision towers of type {tower.config.model_type!r} cannot be exported; {', '.join(TOWERS)} can."
        )
    num_prefix = num_class_tokens(base)
    blocks = list(tower.encoder.layers)
    rows = tower.embeddings.num_positions - num_prefix
    if rows != (config.vision_config.image_size // config.vision_config.patch_size) ** 2:
        raise UnsupportedModel(
            f"{config.vision_feature_select_strategy!r} as vision_feature_select_strategy leaves {rows} visual tokens "
            "a tile, which form no square."
        )
    chosen = config.vision_feature_layer
    layers = [i % (len(blocks) + 1) for i in ([chosen] if isinstance(chosen, int) else chosen)]
    made = Tower(_Pixels(tower), blocks, layers, norm=None, num_prefix=num_prefix, record=record)
    newline = getattr(base, "image_newline", None)
    if newline is None:
        return TileEncoder(made, base.multi_modal_projector, rows)
    return PackedEncoder(made, base.multi_modal_projector, rows, newline.detach())


def smolvlm_encoder(model: nn.Module, record: bool) -> TileEncoder:
    """Of SmolVLM, for tiles that fill their square."""
    base = model.model
    tower, connector = base.vision_model, base.connector
    blocks = list(tower.encoder.layers)
    made = Tower(_FullTiles(tower), blocks, [len(blocks)], norm=tower.post_layernorm, num_prefix=0, record=record)
    return ShuffledEncoder(made, connector, tower.embeddings.num_patches // connector.scale_factor**2)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
