"""CDPruner: Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs.

Zhang, Liu, Li, Lu, Zhang, Pan, She, Zhang. https://arxiv.org/abs/2506.10967 (NeurIPS 2025)

    r_i   relevance of token i to the question: with `clip`, minus the mean cosine in CLIP's joint space
    q_i   (r_i - min r + 1e-6) / (max r - min r)
    L_ij  q_i cos(z_i, z_j) q_j of the projected tokens z
    keep  the set S with the largest det L_S, greedily (MAP of a determinantal point process):
          j = argmax d2;  e = (L_j - sum_s c_s[j] c_s) / sqrt(d2[j]);  d2 -= e^2;  c_S = e     from d2_i = L_ii

What differs from the official code (Theia-4869/CDPruner; written from the description):
- Without `clip`, relevance is the mean cosine between a projected token and the language model's embeddings of the
  prompt's text, with a plus sign. This is ours and not the paper's: it needs no CLIP and works with any tower.
- min and max run over the item (one image or one video), not over the whole batch, so a picture is pruned alike in any
  company. Relevance that is equal up to rounding counts as 1 (there: divided by zero).
- Once no token adds to the determinant (more tokens than dimensions, copies), the most relevant of the others are
  taken. No N x N matrix above 1024 tokens. All in float32.
- Every frame of a video and every tile of an image is selected from alone, with an equal share of the budget, as in
  the official settings for video (so many tokens a frame).
- Long questions: segments of 75 tokens between CLIP's start and end tokens (INFERRED: the card says 77 in all).
"""

# Shape legend: N visual tokens, n those of one picture, K kept, D width

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.compression.clip_relevance import ClipText
from tokensieve.compression.maxmin import SAME, distance_rows, unit_rows
from tokensieve.compression.plan import Plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.tokens import VisualTokens
from tokensieve.compression.views import split_views
from tokensieve.errors import BadOption

# A token adds nothing if this or less of its own L_ii is left: float32 loses about that much over a thousand picks.
EXHAUSTED = 1e-5


@register_method(
    "cdpruner",
    title="Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
    url="https://arxiv.org/abs/2506.10967",
    needs=("features", "question"),
    licence="Apache-2.0",
    differs="Without clip= relevance comes from the language model's own embeddings (ours); min-max per image or "
    "video; an exhausted kernel is filled up by relevance.",
)
def cdpruner(
    tokens: VisualTokens,
    num_keep: int,
    *,
    generator: torch.Generator | None = None,
    clip: ClipText | None = None,
) -> Plan:
    """Keeps relevant tokens that differ from each other. Deterministic: `generator` is not used.

    Args:
        tokens: the candidates; `tokens.question` must be there.
        num_keep: how many stay.
        clip: a `ClipText`, for the paper's relevance; it needs `tokens.tower` and the question's text besides. None
            compares tokens with the embeddings of the prompt.

    Raises:
        BadOption: `clip` is something else, or what it needs is missing; the prompt has no text; relevance is NaN.
        UnsupportedModel: the vision tower is not that of `clip`.
    """
    if clip is not None and not isinstance(clip, ClipText):
        raise BadOption(
            f"clip must be a ClipText, got {type(clip).__name__}.",
            hint="Make one: tokensieve.compression.clip_relevance.ClipText(clip_model, tokenizer).",
        )
    relevance_N = embedding_relevance(tokens) if clip is None else clip.relevance(tokens)
    if not relevance_N.isfinite().all():
        raise BadOption(
            "The relevance of some tokens is NaN or infinite, so there is no best set.",
            hint="Check the weights and dtype of the models that gave the embeddings.",
        )
    relevance_N = scaled_relevance(relevance_N)
    kept = []
    for member_n, share in split_views(tokens, num_keep):
        order_K = greedy_map(unit_rows(tokens.features[member_n]), relevance_N[member_n], share)
        kept.append(member_n[order_K])
    return Plan(torch.cat(kept).sort().values, len(tokens))


def embedding_relevance(tokens: VisualTokens) -> Tensor:
    """`[N]` float32: mean cosine of every visual token with the embeddings of the prompt's text.

    Raises:
        BadOption: the prompt has no text.
    """
    embeds_MD = tokens.question.embeds
    if not len(embeds_MD):
        raise BadOption("'cdpruner' compares tokens with the question, and this prompt has no text.")
    return unit_rows(tokens.features) @ unit_rows(embeds_MD).mean(0).to(tokens.features.device)


def scaled_relevance(relevance_N: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """`[N]` float32 above 0, up to about 1: relevance min-max scaled; all ones where it is equal up to rounding.

    Args:
        relevance_N: cosines or their like.
        low, high: what to take for the least and the greatest value (those of a whole batch, in the official code);
            None for those of `relevance_N`.
    """
    relevance_N = relevance_N.float()
    low = relevance_N.amin() if low is None else low
    high = relevance_N.amax() if high is None else high
    scaled_N = (relevance_N - low + 1e-6) / (high - low).clamp(min=SAME)
    return torch.where(high - low <= SAME, torch.ones_like(scaled_N), scaled_N)


def greedy_map(unit_ND: Tensor, relevance_N: Tensor, num_keep: int) -> Tensor:
    """`[K]` distinct indices in the order they are picked: each adds most to the determinant of the kernel.

    Equal gains go to the lowest index. The loop never reads a value back from a GPU.

    Args:
        unit_ND: float32 rows of length 1 (or 0: such a token adds nothing).
        relevance_N: float32, above 0.
        num_keep: how many to pick.
    """
    distances_to = distance_rows(unit_ND)
    own_N = relevance_N.square()
    gain_N = own_N * unit_ND.square().sum(-1)  # L_ii, less what the picks explain of it
    c_KN = unit_ND.new_empty(num_keep, len(unit_ND))
    order_K = torch.empty(num_keep, dtype=torch.int64, device=unit_ND.device)
    taken_N = torch.zeros(len(unit_ND), dtype=torch.bool, device=unit_ND.device)
    for i in range(num_keep):
        value_N = torch.where(gain_N > EXHAUSTED * own_N, gain_N, -1 / own_N).masked_fill(taken_N, -torch.inf)
        pick_1 = value_N.argmax(0, keepdim=True)
        order_K[i : i + 1] = pick_1
        taken_N.index_fill_(0, pick_1, True)
        kernel_N = relevance_N[pick_1] * relevance_N * (1 - distances_to(pick_1, value_N))
        explained_N = c_KN[:i].index_select(1, pick_1)[:, 0] @ c_KN[:i]
        c_KN[i] = (kernel_N - explained_N) / torch.maximum(gain_N, EXHAUSTED * own_N)[pick_1].sqrt()
        gain_N = gain_N - c_KN[i].square()
    return order_K
