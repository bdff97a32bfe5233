"""A scorer of our own with a few hundred thousand parameters, for those who cannot afford a decoder layer.

Everything happens at a width of 64 or so, W. Tokens are projected down first; no token attends to another, so nothing
grows with N^2:

    x_i    W_v rms(feature_i) + W_p fourier(frame, row, column), each scaled to (0, 1) in its raster
    q_m    W_q rms(embedding_m), plus a linear map of it and its two neighbours: words and short phrases
    block  x += attention of x over the q_m and one learned "nothing" (question-aware scorers only)
           x += MLP(x, mean of its frame, mean of all, differences to the same place in the frame before and after and
                to the mean of its four neighbours)
    Z_tok  MLP(x_i);  Z_frm  MLP(mean of x over the frame): (drop, keep)

`rms(v) = v / root mean square of v`, so features need no scale. It reads what the language model would read and
nothing of its weights. There is no paper.
"""

# Shape legend: B videos of one raster, N visual tokens, T frames, h, w rows and columns, M text tokens, D width of the
#               language model, W width of the scorer, H heads

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokensieve.compression import VisualTokens
from tokensieve.errors import BadOption
from tokensieve.policies.checkpoint import SavedPolicy, register_policy, seeded_init
from tokensieve.policies.inputs import check_tokens, count_frames, pad_rows
from tokensieve.policies.subsets import check_count

WIDTH, NUM_BLOCKS, NUM_HEADS = 64, 2, 4
MAX_BLOCKS = 64
NUM_FREQUENCIES = 6
NUM_CONTEXT = 5  # frame, all, before, after, around

Grids = tuple[tuple[int, int, int], ...]


@register_policy("light-scorer")
class LightScorer(SavedPolicy):
    """Our light scorer: `(tokens) -> (token_logits [N, 2], frame_logits [T, 2] or None)`, float32, drop first.

    Args:
        width_in: D, width of the language model.
        width: W.
        num_blocks: how many blocks, at most 64.
        num_heads: heads of the attention over the question; they divide `width`.
        question_aware: whether the question is read; without it the same tokens stay whatever is asked.
        frame_head: whether frames get logits; without it, None, and all tokens of a video are ranked together.
        seed: of the first weights.

    Raises:
        BadOption: an option is not as above.
    """

    def __init__(
        self,
        width_in: int,
        *,
        width: int = WIDTH,
        num_blocks: int = NUM_BLOCKS,
        num_heads: int = NUM_HEADS,
        question_aware: bool = True,
        frame_head: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        counts = {"width_in": width_in, "width": width, "num_blocks": num_blocks, "num_heads": num_heads}
        for name, value in counts.items():
            check_count(name, value)
        if num_blocks > MAX_BLOCKS:
            raise BadOption(f"num_blocks must be at most {MAX_BLOCKS}, got {num_blocks}.")
        if width % num_heads:
            raise BadOption(f"num_heads must divide the width, got {num_heads} heads and a width of {width}.")
        for name, value in (("question_aware", question_aware), ("frame_head", frame_head)):
            if not isinstance(value, bool):
                raise BadOption(f"{name} must be True or False, got {value!r}.")
        self._options = counts | {"question_aware": question_aware, "frame_head": frame_head}
        self.question_aware = question_aware
        with seeded_init(seed):
            self.look = nn.Linear(width_in, width)
            self.place = nn.Linear(3 * 2 * NUM_FREQUENCIES, width, bias=False)
            self.read = nn.Linear(width_in, width) if question_aware else None
            self.phrase = nn.Linear(3 * width, width) if question_aware else None
            self.blocks = nn.ModuleList(
                [_Block(width, num_heads if question_aware else None) for _ in range(num_blocks)]
            )
            self.token_head = _head(width)
            self.frame_head = _head(width) if frame_head else None

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be recorded for it, beside the tokens themselves."""
        return ("question",) if self.question_aware else ()

    def options(self) -> dict[str, object]:
        return dict(self._options)

    def forward(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        """`([N, 2], [T, 2])` logits of one video or image; gradients are recorded if they are on.

        Raises:
            BadOption: features or question are missing or have another width.
        """
        return self.forward_batch([tokens])[0]

    def forward_batch(self, batch: Sequence[VisualTokens]) -> list[tuple[Tensor, Tensor]]:
        """What `forward` gives for each; videos of one raster go in one pass, whatever the length of the questions."""
        for tokens in batch:
            check_tokens(tokens, self.look.in_features, self.question_aware)
        results: dict[int, tuple[Tensor, Tensor]] = {}
        for grids in dict.fromkeys(tokens.grids for tokens in batch):
            rows = [i for i, tokens in enumerate(batch) if tokens.grids == grids]
            features_BND = torch.stack([batch[i].features for i in rows])
            text = pad_rows([batch[i].question.embeds for i in rows]) if self.question_aware else (None, None)
            token_BN2, frame_BT2 = self.logits(features_BND, grids, count_frames(batch[rows[0]]), *text)
            frames = [None] * len(rows) if frame_BT2 is None else frame_BT2
            results |= dict(zip(rows, zip(token_BN2, frames, strict=True), strict=True))
        return [results[i] for i in range(len(batch))]

    def logits(
        self,
        features_BND: Tensor,
        grids: Grids,
        num_frames: int,
        text_BMD: Tensor | None = None,
        text_mask_BM: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`([B, N, 2], [B, T, 2])` logits of videos of one raster. Shapes depend on shapes only, so it can be exported.

        Args:
            features_BND: what the language model would receive.
            grids: `(frames, height, width)` per raster block, as in `VisualTokens`.
            num_frames: T; 1 for an image, whatever its blocks.
            text_BMD: embeddings of the prompt's text, for question-aware scorers.
            text_mask_BM: `[B, M]` bool, False at padding; None where there is none.
        """
        own = self.look.weight  # its device and dtype
        x_BNW = _see(self.look, features_BND) + self.place(_fourier(grids, own.device).to(own))
        text_BMW = allowed = None
        if self.question_aware:
            text_mask_BM = (
                torch.ones(text_BMD.shape[:2], dtype=torch.bool, device=own.device)
                if text_mask_BM is None
                else text_mask_BM.to(own.device)
            )
            text_BMW = _see(self.read, text_BMD) * text_mask_BM[..., None].to(own)
            word_BMW = F.silu(text_BMW)
            neighbours = F.pad(word_BMW, (0, 0, 1, 0))[:, :-1], F.pad(word_BMW, (0, 0, 0, 1))[:, 1:]
            text_BMW = text_BMW + self.phrase(torch.cat([word_BMW, *neighbours], -1))
            allowed = F.pad(text_mask_BM, (1, 0), value=True)[:, None, None, :]  # nothing comes first
        for block in self.blocks:
            x_BNW = block(x_BNW, grids, num_frames, text_BMW, allowed)
        token_BN2 = self.token_head(x_BNW).float()
        if self.frame_head is None:
            return token_BN2, None
        return token_BN2, self.frame_head(x_BNW.unflatten(1, (num_frames, -1)).mean(2)).float()


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int | None):
        super().__init__()
        self.ask = _Ask(width, num_heads) if num_heads else None
        self.norm = nn.RMSNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear((1 + NUM_CONTEXT) * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x_BNW, grids: Grids, num_frames: int, text_BMW, allowed):
        if self.ask is not None:
            x_BNW = x_BNW + self.ask(x_BNW, text_BMW, allowed)
        normed_BNW = self.norm(x_BNW)
        return x_BNW + self.mlp(torch.cat([normed_BNW, *_context(normed_BNW, grids, num_frames)], -1))


class _Ask(nn.Module):
    """Attention of every visual token over the question's tokens and one learned token that says nothing."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm, self.text_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.nothing = nn.Parameter(torch.randn(width))

    def forward(self, x_BNW: Tensor, text_BMW: Tensor, allowed: Tensor) -> Tensor:
        text_BMW = torch.cat([self.nothing.expand(len(text_BMW), 1, -1), text_BMW], 1)
        key_BMW, value_BMW = self.key_value(self.text_norm(text_BMW)).chunk(2, -1)
        query_BNW = self.query(self.norm(x_BNW))
        heads = [y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (query_BNW, key_BMW, value_BMW)]
        return self.out(F.scaled_dot_product_attention(*heads, attn_mask=allowed).transpose(1, 2).flatten(2))


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.RMSNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))


def _see(linear: nn.Linear, x: Tensor) -> Tensor:
    """`linear(rms(x))` in the layer's device and dtype; scaled afterwards, where rows are shorter."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = (norm.square() / x.shape[-1] + 1e-6).rsqrt()
    own = linear.weight
    return F.linear(x.to(own), own) * scale.to(own) + linear.bias


def _fourier(grids: Grids, device: torch.device) -> Tensor:
    """`[N, 3 * 2 * NUM_FREQUENCIES]`: sines and cosines of where each token stands in its raster block."""
    places = [
        torch.cartesian_prod(*((torch.arange(size, device=device) + 0.5) / size for size in grid)).view(-1, 3)
        for grid in grids
    ]
    frequencies = math.pi * 2 ** torch.arange(NUM_FREQUENCIES, device=device)
    angles = (torch.cat(places)[..., None] * frequencies).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], -1)


def _context(x_BNW: Tensor, grids: Grids, num_frames: int) -> list[Tensor]:
    """`NUM_CONTEXT` tensors `[B, N, W]`: what surrounds every token."""
    frame_BNW = x_BNW.unflatten(1, (num_frames, -1)).mean(2, keepdim=True)
    frame_BNW = frame_BNW.expand(-1, -1, x_BNW.shape[1] // num_frames, -1).flatten(1, 2)
    all_BNW = x_BNW.mean(1, keepdim=True).expand_as(x_BNW)
    nearby: list[tuple[Tensor, ...]] = []
    for part_BNW, (frames, height, width) in zip(x_BNW.split([t * h * w for t, h, w in grids], 1), grids, strict=True):
        x_BThwW = part_BNW.unflatten(1, (frames, height, width))
        before, after = _shift(x_BThwW, 1, -1), _shift(x_BThwW, 1, 1)
        around = sum(_shift(x_BThwW, axis, step) for axis in (2, 3) for step in (-1, 1)) / 4
        nearby.append(tuple((other - x_BThwW).flatten(1, 3) for other in (before, after, around)))
    return [frame_BNW, all_BNW, *(torch.cat(parts, 1) for parts in zip(*nearby, strict=True))]


def _shift(x: Tensor, axis: int, step: int) -> Tensor:
    """`x` with every place holding what its neighbour holds; at the border, what it holds itself."""
    length = x.shape[axis]
    if step < 0:
        return torch.cat([x.narrow(axis, 0, 1), x.narrow(axis, 0, length - 1)], axis)
    return torch.cat([x.narrow(axis, 1, length - 1), x.narrow(axis, length - 1, 1)], axis)
