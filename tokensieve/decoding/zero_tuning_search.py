"""Which heads to tune and by how much: the search of ZeroTuning (arXiv 2505.11739).

1. Profile: set gamma to a probe (2) in one head of all layers and see how the score changes. A head is up-effective if
   it rises, down-effective if it falls.
2. Take the kind that more heads belong to, and of it the heads with the largest effect.
3. Try gammas on these heads together and keep the best; 1 is always among them.

The score is accuracy on labelled prompts, or, without labels, minus the mean entropy of the first answer token
(INFERRED: the paper minimises the entropy of the output, and its released code has no such mode).
"""

# Shape legend: B prompts of a batch, N layers, H query heads, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokensieve.decoding.session import DecodeSession
from tokensieve.decoding.zero_tuning import ZeroTuning, attention_modules
from tokensieve.errors import BadOption

GAMMAS = (0.3, 0.5, 0.7, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)  # the values of the released runs and 0.7


@dataclass(frozen=True, kw_only=True, eq=False)
class GammaSearch:
    """What `search_gamma` found.

    Attributes:
        gamma: `[N, H]`, for `ZeroTuning`.
        heads: head indices that are tuned; none if no head changed the score.
        effects: `[H]`, change of the score with the probe in this head.
        scores: of every gamma tried on the chosen heads, 1 included.
        best: the gamma with the highest score; 1 if none was better.
    """

    gamma: Tensor
    heads: tuple[int, ...]
    effects: Tensor
    scores: dict[float, float]
    best: float


def search_gamma(
    model: nn.Module,
    score: Callable[[], float],
    *,
    gammas: Sequence[float] = GAMMAS,
    head_share: float = 0.5,
    probe: float = 2.0,
    layers: Sequence[int] | None = None,
    sink: int | Sequence[int] = 0,
) -> GammaSearch:
    """Finds heads and a gamma. Runs `score` 1 + H + len(gammas) times; the model is left as it was.

    Args:
        model: see `ZeroTuning`.
        score: higher is better; called with the model tuned. See `first_token_accuracy` and `answer_entropy`.
        gammas: to try beside 1. Classification liked more than 1, question answering often less.
        head_share: of all heads, how many at most are tuned; 0.4 to 0.7 did best.
        probe: the gamma of the profile.
        layers: which to tune; all if left out. The first two thirds do most.
        sink: see `ZeroTuning`; a list goes with a score that runs one batch of as many prompts.

    Raises:
        BadOption: a share outside (0, 1], no layers or unknown ones, or a gamma that is not above 0.

    Example:
        >>> found = search_gamma(model, lambda: -answer_entropy(model, batches))
        >>> with ZeroTuning(model, found.gamma):
        ...     model.generate(**inputs)
    """
    num_layers = len(attention_modules(model.get_decoder()))
    num_heads = model.get_decoder().config.num_attention_heads
    chosen = list(range(num_layers)) if layers is None else sorted(set(layers))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < num_layers:
        raise BadOption(f"layers must be among 0 to {num_layers - 1}, got {layers!r}.")
    if not 0 < head_share <= 1:
        raise BadOption(f"head_share must be above 0 and at most 1, got {head_share!r}.")

    def scored(heads: Iterable[int], gamma: float) -> tuple[float, Tensor]:
        gamma_NH = torch.ones(num_layers, num_heads)
        gamma_NH[torch.tensor(chosen)[:, None], torch.tensor(list(heads), dtype=torch.long)] = gamma
        with ZeroTuning(model, gamma_NH, sink):
            return float(score()), gamma_NH

    baseline, untouched_NH = scored((), 1.0)
    effect_H = torch.tensor([scored((head,), probe)[0] - baseline for head in range(num_heads)])
    heads = dominant_heads(effect_H, head_share)
    scores, found = {1.0: baseline}, {1.0: untouched_NH}
    for gamma in gammas if heads else ():
        if gamma != 1:
            scores[gamma], found[gamma] = scored(heads, gamma)
    best = max(scores, key=lambda gamma: (scores[gamma], gamma == 1))
    return GammaSearch(gamma=found[best], heads=heads, effects=effect_H, scores=scores, best=best)


def dominant_heads(effect_H: Tensor, share: float) -> tuple[int, ...]:
    """The heads of the larger kind, up- or down-effective, at most `share` of all, the most effective kept.

    Equal numbers of both kinds count as up; heads without any effect are of no kind.
    """
    up, down = int((effect_H > 0).sum()), int((effect_H < 0).sum())
    signed_H = effect_H if up >= down else -effect_H
    num = min(max(up, down), max(1, int(share * len(effect_H))))
    order = signed_H.sort(descending=True, stable=True).indices
    return tuple(sorted(order[:num].tolist()))


def answer_entropy(model: nn.Module, batches: Iterable[Mapping[str, object]]) -> float:
    """Mean entropy, in nats, of the first answer token's distribution over all prompts.

    Args:
        model: tuned or not.
        batches: arguments of `generate`, one mapping a batch.
    """
    entropies = [torch.special.entr(_first_logits(model, b).softmax(-1)).sum(-1) for b in batches]
    return float(torch.cat(entropies).mean())


def first_token_accuracy(model: nn.Module, batches: Iterable[Mapping[str, object]], labels: Iterable[Tensor]) -> float:
    """Share of prompts whose likeliest first answer token is the label.

    Args:
        model: tuned or not.
        batches: as in `answer_entropy`.
        labels: `[B]` token ids for every batch.

    Raises:
        ValueError: more batches than labels, or the other way round.
    """
    hits = [_first_logits(model, b).argmax(-1).cpu() == want.cpu() for b, want in zip(batches, labels, strict=True)]
    return float(torch.cat(hits).float().mean())


def _first_logits(model: nn.Module, batch: Mapping[str, object]) -> Tensor:
    return DecodeSession(model).prefill(**batch)
