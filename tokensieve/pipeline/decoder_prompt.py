"""The visual tokens of a batch of prompts as a method inside the language model counts them."""

# Shape legend: B prompts, S tokens of the full prompt, N visual tokens that may be dropped, R text tokens

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.compression.decoder_stage import Raster
from tokensieve.errors import BadOption
from tokensieve.pipeline.adapter import MODALITIES, KeptRaster


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """One row of a batch.

    Attributes:
        candidates: `[N]` int64, columns of the visual tokens that a method may drop.
        num_structural: visual tokens that always stay.
        raster: where the candidates stood, or None if unknown.
        question: `[R]` int64, columns of the text after the last visual token; empty if there are no visual tokens.
    """

    candidates: Tensor
    num_structural: int
    raster: Raster | None
    question: Tensor


def read_prompts(input_ids: Tensor, valid_BS: Tensor, config, encoded: Mapping[str, object]) -> list[Prompt]:
    """Finds the placeholders of every prompt, and where they stood if the encoder's output says so.

    Args:
        input_ids: `[B, S]`.
        valid_BS: bool, False at padding.
        config: the model's, for the placeholder ids.
        encoded: `mm_encoder_outputs`; outputs made by `VLMAdapter.emit` carry `kept_rasters`.

    Raises:
        BadOption: a prompt ends with a visual token.
    """
    # 0 = text, else 1 + the modality's place in MODALITIES
    kind_BS = torch.zeros_like(input_ids)
    for number, modality in enumerate(MODALITIES, start=1):
        placeholder = getattr(config, f"{modality}_token_id", None)
        if placeholder is not None:
            kind_BS[input_ids == placeholder] = number
    rasters = {
        number: _rasters_of_rows(getattr(encoded.get(modality), "kept_rasters", None), kind_BS == number)
        for number, modality in enumerate(MODALITIES, start=1)
    }
    return [_read(row, kind_BS[row], valid_BS[row], rasters) for row in range(len(input_ids))]


def _read(row: int, kind_S: Tensor, valid_S: Tensor, rasters) -> Prompt:
    visual_V = kind_S.nonzero()[:, 0]
    text_R = (valid_S & (kind_S == 0)).nonzero()[:, 0]
    if len(visual_V) == 0:
        return Prompt(candidates=visual_V, num_structural=0, raster=None, question=text_R[:0])
    question_R = text_R[text_R > visual_V[-1]]
    if len(question_R) == 0:
        raise BadOption(
            "A prompt ends with a visual token, but methods inside the language model judge by the text after it.",
            hint="Put the question after the images, and do not prefill in chunks (prefill_chunk_size).",
        )
    token_S = torch.zeros_like(kind_S)
    where_S3 = kind_S.new_zeros(len(kind_S), 3)
    known, num_blocks = True, 0
    for number in kind_S[visual_V].unique().tolist():
        items = rasters[number]
        if items is None:
            known = False
            continue
        token_S[kind_S == number] = torch.cat([item.token for item in items[row]]).to(token_S.device)
        parts = []
        for item in items[row]:
            parts.append(_where(item, num_blocks).to(where_S3.device))
            num_blocks += len(item.grids)
        where_S3[kind_S == number] = torch.cat(parts)
    candidates = visual_V[token_S[visual_V] >= 0]
    block, frame, place = where_S3[candidates].unbind(-1)
    return Prompt(
        candidates=candidates,
        num_structural=len(visual_V) - len(candidates),
        raster=Raster(block=block, frame=frame, place=place) if known else None,
        question=question_R,
    )


def _rasters_of_rows(kept: tuple[KeptRaster, ...] | None, is_kind_BS: Tensor) -> list[list[KeptRaster]] | None:
    """The items of every row. Beams and several returned sequences repeat each prompt in rows one after the other."""
    if kept is None:
        return None
    num_tokens = sum(len(item.token) for item in kept)
    repeats = int(is_kind_BS.sum()) // max(1, num_tokens)
    rows = [[item for item in kept if item.row == row // max(1, repeats)] for row in range(len(is_kind_BS))]
    if [sum(len(item.token) for item in items) for items in rows] != is_kind_BS.sum(-1).tolist():
        raise BadOption(
            "The visual tokens of the prompt are not those that it was prepared with.",
            hint="Pass what VLM.prepare or compress_inputs returned as it is.",
        )
    return rows


def _where(item: KeptRaster, first_block: int) -> Tensor:
    """`[k, 3]`: block, frame and place of every token of an item; zeros for structural tokens."""
    sizes = torch.tensor([t * h * w for t, h, w in item.grids])
    per_frame = torch.tensor([h * w for _, h, w in item.grids])
    token = item.token.cpu().clamp(min=0)
    block = torch.searchsorted(sizes.cumsum(0), token, right=True)
    inside = token - (sizes.cumsum(0) - sizes)[block]
    return torch.stack([first_block + block, inside // per_frame[block], inside % per_frame[block]], dim=-1)
