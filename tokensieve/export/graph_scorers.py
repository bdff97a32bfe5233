"""Trained policies for a graph: the same weights and numbers, with rasters as inputs instead of Python numbers.

The modules of a policy are used as they are, only what surrounds them is written anew.
"""

# Shape legend: N visual tokens, T frames, n tokens of a frame, M text tokens, S = N + M, D width of the language model,
#               W width of the scorer

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokensieve.errors import UnsupportedModel
from tokensieve.policies.light_scorer import NUM_FREQUENCIES, LightScorer, _see
from tokensieve.policies.scorer import PolicyScorer

Inputs = Mapping[str, Tensor]
Logits = tuple[Tensor, Tensor | None]


class LightGraph(nn.Module):
    """A `LightScorer`; `forward(features_ND, inputs)` gives logits `[N, 2]` and, with a frame head, `[T, 2]`.

    Attributes:
        needs: names of the graph inputs it reads, in order.
        has_frame_head: whether frames get logits.
    """

    def __init__(self, policy: LightScorer):
        super().__init__()
        self.policy, self.has_frame_head = policy, policy.frame_head is not None
        self.needs = ("frames", "place", "neighbours", *(("question",) if policy.question_aware else ()))

    def forward(self, features_ND: Tensor, inputs: Inputs) -> Logits:
        policy, num_frames = self.policy, inputs["frames"].shape[0]
        x_NW = _see(policy.look, features_ND) + policy.place(_fourier(inputs["place"]))
        text_MW = self._read(inputs["question"]) if policy.question_aware else None
        for block in policy.blocks:
            if block.ask is not None:
                # Without a mask: one question, no padding.
                x_NW = x_NW + block.ask(x_NW[None], text_MW[None], None)[0]
            normed_NW = block.norm(x_NW)
            context = _context(normed_NW, inputs["neighbours"], num_frames)
            x_NW = x_NW + block.mlp(torch.cat([normed_NW, *context], dim=-1))
        frame_T2 = None if policy.frame_head is None else policy.frame_head(_frame_means(x_NW, num_frames))
        return policy.token_head(x_NW), frame_T2

    def _read(self, question_MD: Tensor) -> Tensor:
        text_MW = _see(self.policy.read, question_MD)
        word_MW = F.silu(text_MW)
        before_MW, after_MW = F.pad(word_MW, (0, 0, 1, 0))[:-1], F.pad(word_MW, (0, 0, 0, 1))[1:]
        return text_MW + self.policy.phrase(torch.cat([word_MW, before_MW, after_MW], dim=-1))


class CacovidGraph(nn.Module):
    """CaCoVID's `PolicyScorer`; `forward(features_ND, inputs)` gives logits `[N, 2]` and `[T, 2]`.

    Visual tokens stand first and text behind, at the positions that the prompt gives them: attention does not care for
    the order.

    Attributes:
        needs: names of the graph inputs it reads, in order; `num_before` is `[1]` int64, how many of the M text tokens
            stand before the visual ones.
        has_frame_head: True.
    """

    needs = ("frames", "question", "num_before")
    has_frame_head = True

    def __init__(self, policy: PolicyScorer):
        super().__init__()
        self.policy = policy

    def forward(self, features_ND: Tensor, inputs: Inputs) -> Logits:
        policy, question_MD, num_before_1 = self.policy, inputs["question"], inputs["num_before"]
        num_tokens, num_text = features_ND.shape[0], question_MD.shape[0]
        text_M = torch.arange(num_text)
        text_place_M = torch.where(text_M < num_before_1, text_M, text_M + num_tokens)
        place_S = torch.cat([torch.arange(num_tokens) + num_before_1, text_place_M])
        allowed = None
        if policy.attention == "causal":
            allowed = (place_S <= place_S[:, None])[None, None]
        embeds_1SD = torch.cat([features_ND, question_MD])[None]
        rotation = policy._cos_sin(embeds_1SD, place_S[None])
        out = policy.layers[0](embeds_1SD, attention_mask=allowed, position_embeddings=rotation)
        hidden_ND = (out[0] if isinstance(out, tuple) else out)[0, :num_tokens]
        mean_TD = _frame_means(hidden_ND, inputs["frames"].shape[0])
        return policy.token_compress(policy.layernorm(hidden_ND)), policy.frame_compress(policy.layernorm(mean_TD))


def graph_scorer(policy: object) -> LightGraph | CacovidGraph:
    """The graph form of a trained policy, in float32. The policy itself stays as it is.

    Raises:
        UnsupportedModel: it is no `LightScorer` and no `PolicyScorer`.
    """
    forms = {LightScorer: LightGraph, PolicyScorer: CacovidGraph}
    form = next((form for kind, form in forms.items() if isinstance(policy, kind)), None)
    if form is None:
        raise UnsupportedModel(
            f"A policy of type {type(policy).__name__} cannot be exported; LightScorer and PolicyScorer can.",
            hint="Train one with `tokensieve train distil`.",
        )
    half = next(policy.parameters()).dtype != torch.float32
    return form(copy.deepcopy(policy).float() if half else policy)


def _frame_means(x_NW: Tensor, num_frames: int) -> Tensor:
    """`[T, W]`."""
    return x_NW.reshape(num_frames, -1, x_NW.shape[-1]).mean(1)


def _fourier(place_N3: Tensor) -> Tensor:
    """`[N, 3 * 2 * NUM_FREQUENCIES]`: sines and cosines of where each token stands in its raster block."""
    angles = (place_N3[..., None] * (math.pi * 2 ** torch.arange(NUM_FREQUENCIES))).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _context(x_NW: Tensor, neighbours_N6: Tensor, num_frames: int) -> list[Tensor]:
    """What surrounds every token: its frame, all, the frames before and after, the four places around."""
    num_tokens = x_NW.shape[0]
    frame_N = torch.arange(num_tokens) // (num_tokens // num_frames)
    before, after, *around = (x_NW.index_select(0, neighbours_N6[:, i]) for i in range(6))
    return [
        _frame_means(x_NW, num_frames).index_select(0, frame_N),
        x_NW.mean(0, keepdim=True).expand_as(x_NW),
        before - x_NW,
        after - x_NW,
        sum(around) / 4 - x_NW,
    ]
