"""CaCoVID: Contribution-aware Token Compression for Efficient Video Understanding via Reinforcement Learning.

Ma, Zhou, Wang, Chen, Yang, Song, Zheng. https://arxiv.org/abs/2602.01649 (AAAI 2026)

Selection by a trained policy, which gives logits (drop, keep) per token and per frame. T frames of n tokens:

    s_i, f_j  keep-logit minus drop-logit of token i, of frame j
    shares    q = clip(softmax(3 f / max|f|), 1 / 2T, cap / (T keep)), scaled to sum to 1
    quotas    c_j = clip(round(q_j round(imp keep n T)), 1, int(imp n cap)); while their sum is above
              floor(imp keep n T) the largest loses 1, while it is below the smallest gains 1
    keep      the c_j highest s_i of every frame, and of the others those at ranks round(linspace(0, M - 1, ...)),
              M of them, up to floor(keep T n) in all

With the defaults (imp = 0.5, cap = 1.5 keep) half of the budget is this even coverage. How the policy is trained is
another matter; this module takes one as it is. A policy without frame logits (ours) selects by `systematic`: what its
scores leave open is spread evenly over the whole video.

What differs from the official code (LivingFutureLab/CaCoVID; written from the description):
- The budget is a count and met exactly; products are exact, where `floor` of floats may lose a token.
- Frames with equal logits get equal shares (there: 0 / 0). A quota never exceeds its frame (there: with imp = 1 and a
  cap above 1 too few tokens are returned), and a cap that leaves no token a frame counts as one token.
- Tokens are ordered by s itself, equal ones by index (there: by softmax(0.001 s), an unstable sort, which ties
  differences below about 1e-4).
- Ranks are computed in float64, so no two coincide.
"""

# Shape legend: T frames, n tokens a frame, N = T * n tokens, M tokens not chosen for importance, K kept

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

import torch
from torch import Tensor

from tokensieve.compression.plan import Plan
from tokensieve.compression.registry import register_method
from tokensieve.compression.systematic import systematic_subset
from tokensieve.compression.tokens import VisualTokens
from tokensieve.errors import BadOption

IMPORTANCE = 0.5
CAP_OF_KEEP = Fraction(3, 2)  # exact with an exact `keep`
SHARPNESS = 3.0
EQUAL_FRAMES = 1e-12  # greatest |f| that counts as 0

Policy = Callable[[VisualTokens], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Selection:
    """What `select_by_policy` chose.

    Attributes:
        kept: `[K]` int64, rising.
        important: `[N]` bool, the tokens chosen by their logits; the other kept ones are coverage.
        quotas: how many of each frame were chosen by their logits.
    """

    kept: Tensor
    important: Tensor
    quotas: list[int]


@register_method(
    "cacovid",
    title="Contribution-aware Token Compression for Efficient Video Understanding via Reinforcement Learning",
    url="https://arxiv.org/abs/2602.01649",
    needs=("features", "frames", "policy"),
    licence="none at the root (Apache-2.0 in src/r1-v)",
    differs="Exactly the budget; guards against equal frame logits, quotas above a frame and unstable ties.",
)
def cacovid(
    tokens: VisualTokens,
    num_keep: int,
    *,
    generator: torch.Generator | None = None,
    policy: Policy | None = None,
    importance: float | None = None,
    frame_cap: float | None = None,
) -> Plan:
    """Keeps what a trained policy holds useful, and an even sample of the rest. Deterministic: no `generator` is used.

    An image, with all its views, is one frame.

    Args:
        tokens: the candidates.
        num_keep: how many stay.
        policy: a callable `(tokens) -> (token_logits [N, 2], frame_logits [T, 2])`, drop first, keep second. Frame
            logits may be None: then tokens of the whole video are sampled systematically by their logits (ours).
        importance: share of the budget that the policy decides on, in (0, 1]; the rest is even coverage. None for
            0.5. Needs frame logits.
        frame_cap: above 0; the policy chooses about `importance * n * frame_cap` of a frame's n tokens at most. None
            for 1.5 times the share of all tokens that is kept. Needs frame logits.

    Raises:
        BadOption: there is no policy, its logits have the wrong shape or are NaN, or an option is out of range.
    """
    if not callable(policy):
        raise BadOption(
            f"'cacovid' needs a trained policy, got policy={policy!r}.",
            hint="Pass policy=, a callable (tokens) -> (token_logits, frame_logits); `tokensieve train cacovid` is to "
            "train one.",
        )
    token_logits_N2, frame_logits_T2 = policy(tokens)
    _check_logits("token", token_logits_N2, len(tokens))
    check_shares(importance, frame_cap, has_frame_logits=frame_logits_T2 is not None)
    if frame_logits_T2 is None:
        kept = systematic_subset(token_logits_N2.float().diff(dim=1)[:, 0], num_keep)
        return Plan(kept.to(tokens.features.device), len(tokens))
    _check_logits("frame", frame_logits_T2, tokens.grids[0][0] if len(tokens.grids) == 1 else 1)
    importance = IMPORTANCE if importance is None else importance
    keep = Fraction(num_keep, len(tokens))
    chosen = select_by_policy(token_logits_N2, frame_logits_T2, keep, importance=importance, frame_cap=frame_cap)
    return Plan(chosen.kept.to(tokens.features.device), len(tokens))


def select_by_policy(
    token_logits_N2: Tensor,
    frame_logits_T2: Tensor,
    keep: float | Fraction,
    *,
    importance: float = IMPORTANCE,
    frame_cap: float | None = None,
) -> Selection:
    """Exactly `floor(keep * T * n)` tokens of T frames of n tokens.

    Args:
        token_logits_N2: (drop, keep) per token, frame by frame.
        frame_logits_T2: (drop, keep) per frame.
        keep: share of all tokens in (0, 1]; a `Fraction` keeps the count exact, a float is multiplied as the official
            code does.
        importance, frame_cap: as in `cacovid`.

    Raises:
        BadOption: an option is out of range.
    """
    check_shares(importance, frame_cap)
    if isinstance(keep, Fraction):
        importance = Fraction(float(importance))
    num_frames, num_places = len(frame_logits_T2), len(token_logits_N2) // len(frame_logits_T2)
    cap = CAP_OF_KEEP * keep if frame_cap is None else frame_cap
    quotas = frame_quotas(frame_logits_T2, num_places, keep, importance, cap)

    score_Tn = token_logits_N2.float().diff(dim=1).view(num_frames, num_places)
    rank_Tn = score_Tn.sort(dim=1, descending=True, stable=True).indices.argsort(1)
    important_N = (rank_Tn < torch.tensor(quotas, device=score_Tn.device)[:, None]).flatten()
    others_M = (~important_N).nonzero()[:, 0]
    num_coverage = math.floor(keep * num_frames * num_places) - sum(quotas)
    ranks = torch.linspace(0, len(others_M) - 1, num_coverage, dtype=torch.float64).round().long()
    kept_N = important_N.clone()
    kept_N[others_M[ranks.to(others_M.device)]] = True
    return Selection(kept_N.nonzero()[:, 0], important_N, quotas)


def frame_quotas(
    frame_logits_T2: Tensor, num_places: int, keep: float | Fraction, importance: float, cap: float
) -> list[int]:
    """How many tokens of each frame are chosen by their logits: `floor(importance * keep * n * T)` in all."""
    num_frames = len(frame_logits_T2)
    total = importance * keep * num_places * num_frames
    most = min(num_places, max(1, int(importance * num_places * cap)))
    frame_T = frame_logits_T2.float().diff(dim=1)[:, 0].cpu()
    frame_T = SHARPNESS * frame_T / frame_T.abs().amax().clamp(min=EQUAL_FRAMES)
    share_T = frame_T.softmax(0).clamp(1 / (2 * num_frames), float(cap / (num_frames * keep)))
    share_T = share_T / share_T.sum()
    quotas = (share_T * round(total)).round().clamp(1, most).long().tolist()
    while sum(quotas) > math.floor(total):
        quotas[quotas.index(max(quotas))] -= 1
    while sum(quotas) < math.floor(total):
        quotas[quotas.index(min(quotas))] += 1
    return quotas


def check_shares(importance: float | None, frame_cap: float | None, has_frame_logits: bool = True) -> None:
    """Raises BadOption unless the options of `cacovid` with these names are None or in range, and of use."""
    if not has_frame_logits and (importance is not None or frame_cap is not None):
        raise BadOption("importance and frame_cap share a budget over frames, and this policy has no frame logits.")
    if importance is not None:
        _check_share("importance", importance, most=1)
    if frame_cap is not None:
        _check_share("frame_cap", frame_cap, most=math.inf)


def _check_logits(name: str, logits: Tensor, count: int) -> None:
    if logits.shape != (count, 2) or not logits.isfinite().all():
        raise BadOption(
            f"The policy must give {name} logits of shape ({count}, 2), all finite; got {tuple(logits.shape)}"
            f"{' with NaN or infinite values' if logits.shape == (count, 2) else ''}."
        )


def _check_share(name: str, value: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= most or math.isinf(value):
        allowed = "in (0, 1]" if most == 1 else "a finite number above 0"
        raise BadOption(f"{name} must be {allowed}, got {value!r}.")
