"""Compression methods as parts of a vision graph: each chooses what the registered method of its name chooses.

One graph serves every number of tokens, budget, frames and tiles: all of these are lengths of inputs. What a graph
cannot know from its inputs' shapes comes from `export/geometry.py`.
"""

# Shape legend: N candidate tokens, K kept, P rows entering the projector, D width of the language model, M text tokens

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokensieve.compression.cacovid import check_shares
from tokensieve.compression.evs import FIRST_FRAME_SCORE
from tokensieve.compression.maxmin import SAME, unit_rows
from tokensieve.compression.visionzip import DOMINANT_SHARE, check_dominant
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export.encoded import Encoded
from tokensieve.export.graph_scorers import CacovidGraph, LightGraph, graph_scorer
from tokensieve.export.maxmin_graph import isolation, max_min_picks, relative_scores
from tokensieve.export.policy_graph import frame_quotas, quota_sample, systematic_sample
from tokensieve.export.ranking import highest_k
from tokensieve.export.sensitivity_graph import make_sensitivity
from tokensieve.export.visionzip_graph import merged, zip_views
from tokensieve.pipeline.stages import Stage
from tokensieve.pipeline.vlm import VLM

Inputs = Mapping[str, Tensor]


class Selector(nn.Module):
    """Base of all selectors; `forward(encoded, inputs)` gives `(features [K, D], kept [K] int64, rising)`.

    Attributes:
        needs: names of the graph inputs that it reads, in order; see `export/geometry.py`.
        records: whether it reads `Encoded.salience` and `Encoded.keys`.
    """

    needs: tuple[str, ...] = ("budget",)
    records = False

    def forward(self, encoded: Encoded, inputs: Inputs) -> tuple[Tensor, Tensor]:
        kept_K = self.kept(encoded, inputs)
        return encoded.features.index_select(0, kept_K), kept_K

    def kept(self, encoded: Encoded, inputs: Inputs) -> Tensor:
        """`[K]` int64, rising."""
        raise NotImplementedError


class Uniform(Selector):
    """`compression/uniform.py`."""

    def kept(self, encoded, inputs):
        num_tokens, num_keep = encoded.features.shape[0], inputs["budget"].shape[0]
        return (2 * torch.arange(num_keep) + 1) * num_tokens // (2 * num_keep)


class Evs(Selector):
    """`compression/evs.py`."""

    needs = ("neighbours", "budget")

    def kept(self, encoded, inputs):
        before_N = inputs["neighbours"][:, 0]
        change_N = 1 - F.cosine_similarity(encoded.features, encoded.features.index_select(0, before_N), dim=-1)
        change_N = torch.where(change_N > SAME, change_N, 0.0)
        first_frame_N = before_N == torch.arange(encoded.features.shape[0])
        return highest_k(torch.where(first_frame_N, FIRST_FRAME_SCORE, change_N), inputs["budget"])


class DivPrune(Selector):
    """`compression/divprune.py`."""

    def kept(self, encoded, inputs):
        unit_ND = unit_rows(encoded.features)
        first_1 = isolation(unit_ND).argmax(0, keepdim=True)
        one_N = torch.ones_like(unit_ND[:, 0])
        in_one_tile_N = torch.zeros_like(one_N, dtype=torch.int64)
        return max_min_picks(unit_ND, one_N, in_one_tile_N, inputs["budget"] * 0, first_1).sort().values


class ScoreDiversity(Selector):
    """`compression/score_diversity.py`, on a score that subclasses give."""

    needs = ("tile", "tiles", "budget")

    def kept(self, encoded, inputs):
        tile_N = inputs["tile"]
        weight_N = relative_scores(self.score(encoded), tile_N, inputs["tiles"].shape[0])
        return max_min_picks(unit_rows(encoded.features), weight_N, tile_N, inputs["budget"]).sort().values

    def score(self, encoded: Encoded) -> Tensor:
        """`[N]` float32."""
        raise NotImplementedError


class NormDiversity(ScoreDiversity):
    """`compression/norm_diversity.py`."""

    def score(self, encoded):
        return encoded.features.norm(dim=-1)


class ZooPrune(ScoreDiversity):
    """`compression/zoprune.py`.

    Args:
        sensitivity: from `Encoded` to the sensitivity of every projector row, `[P]`.
    """

    def __init__(self, sensitivity: nn.Module):
        super().__init__()
        self.sensitivity = sensitivity

    def score(self, encoded):
        return encoded.to_tokens(self.sensitivity(encoded))


class Cacovid(Selector):
    """`compression/cacovid.py`.

    Args:
        scorer: of `export/graph_scorers.py`.
        frame_cap: the option of that name; `importance` comes in with the input `quota`.
    """

    def __init__(self, scorer: LightGraph | CacovidGraph, frame_cap: float | None = None):
        super().__init__()
        self.scorer, self.frame_cap = scorer, frame_cap
        self.needs = (*scorer.needs, "budget", *(("quota",) if scorer.has_frame_head else ()))

    def kept(self, encoded, inputs):
        token_N2, frame_T2 = self.scorer(encoded.features, inputs)
        score_N, budget_K = token_N2[:, 1] - token_N2[:, 0], inputs["budget"]
        if frame_T2 is None:
            return systematic_sample(score_N, budget_K)
        score_T = frame_T2[:, 1] - frame_T2[:, 0]
        quota_T = frame_quotas(score_T, inputs["quota"], budget_K, score_N.shape[0], self.frame_cap)
        return quota_sample(score_N, quota_T, budget_K)


class VisionZip(Selector):
    """`compression/visionzip.py`, sinks as all other tokens."""

    needs = ("view_index", "views", "budget")
    records = True

    def forward(self, encoded, inputs):
        budget_K = inputs["budget"]
        kept_K, *into = zip_views(encoded.salience, encoded.keys, inputs["view_index"], inputs["views"], budget_K)
        if encoded.one_row_per_token:
            return encoded.project(merged(encoded.rows, *into, budget_K)), kept_K
        return merged(encoded.features, *into, budget_K), kept_K


def _zoprune(vlm: VLM, stage: Stage) -> Selector:
    return ZooPrune(make_sensitivity(vlm, stage.options))


def _cacovid(vlm: VLM, stage: Stage) -> Selector:
    policy = stage.options.get("policy")
    if policy is None:
        raise BadOption("'cacovid' needs a trained policy.", hint="Give policy=, a folder or hub id.")
    scorer = graph_scorer(policy)
    importance, frame_cap = stage.options.get("importance"), stage.options.get("frame_cap")
    check_shares(importance, frame_cap, scorer.has_frame_head)
    return Cacovid(scorer, frame_cap)


def _visionzip(vlm: VLM, stage: Stage) -> Selector:
    check_dominant(stage.options.get("dominant", DOMINANT_SHARE))
    if stage.options.get("sinks", "off") != "off":
        raise UnsupportedModel(
            f"'visionzip' can be exported with sinks='off' only, got {stage.options['sinks']!r}.",
            hint="Run the model with PyTorch to guard sinks.",
        )
    return VisionZip()


_MAKERS = {
    "cacovid": _cacovid,
    "divprune": lambda vlm, stage: DivPrune(),
    "evs": lambda vlm, stage: Evs(),
    "norm-diversity": lambda vlm, stage: NormDiversity(),
    "uniform": lambda vlm, stage: Uniform(),
    "visionzip": _visionzip,
    "zoprune": _zoprune,
}


def make_selector(vlm: VLM, stage: Stage) -> Selector:
    """The graph form of a stage's method.

    Args:
        vlm: the model it is exported with; its weights are used, not copied.
        stage: method and options; the budget is an input of the graph.

    Raises:
        BadOption: an option is out of range.
        UnsupportedModel: this method, or one of its options, cannot be exported.
    """
    name = stage.method.name
    if name not in _MAKERS:
        raise UnsupportedModel(
            f"The method {name!r} cannot be exported; {', '.join(sorted(_MAKERS))} can.",
            hint="Choose one of these, or run the model with PyTorch.",
        )
    return _MAKERS[name](vlm, stage).eval()
