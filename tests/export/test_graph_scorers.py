"""Policies in graphs: their logits, and what is chosen by them."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Qwen2Config

from tests.compression.helpers import projected, random_inputs, random_mlp
from tests.export.selector_graphs import Selectors, export, inputs_of, run
from tokensieve.compression import Question, get_method
from tokensieve.compression.cacovid import select_by_policy
from tokensieve.compression.systematic import systematic_subset
from tokensieve.errors import UnsupportedModel
from tokensieve.export.geometry import budget_inputs
from tokensieve.export.graph_scorers import graph_scorer
from tokensieve.export.policy_graph import frame_quotas, quota_sample, systematic_sample
from tokensieve.export.selectors import make_selector
from tokensieve.pipeline.stages import Stage
from tokensieve.policies import LightScorer, PolicyScorer

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PROJECTOR = random_mlp()
CONFIG = Qwen2Config(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=9,
    num_hidden_layers=1,
)


def sharp(policy):
    """First weights made larger, so that logits differ."""
    for module in policy.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= 2
    return policy.requires_grad_(False)


SCORERS = {
    "light": sharp(LightScorer(32, width=16, question_aware=False, frame_head=False)),
    "asking": sharp(LightScorer(32, width=16)),
    "cacovid": sharp(PolicyScorer(CONFIG)),
    "causal": sharp(PolicyScorer(CONFIG, "causal", seed=1)),
}
STAGES = {  # of selectors with these policies
    "cacovid light": Stage("cacovid", policy=SCORERS["light"]),
    "cacovid asking": Stage("cacovid", policy=SCORERS["asking"], importance=0.3, frame_cap=0.9),
}


def video(grids=((4, 4, 6),), num_text=6, num_before=2, seed=1):
    tokens = projected(random_inputs(sum(map(math.prod, grids)), seed=seed), PROJECTOR, grids=grids)
    text = random_inputs(num_text, 32, seed + 50)
    return dataclasses.replace(tokens, question=Question(embeds=text, num_before=num_before))


def all_inputs(tokens, keep):
    budgets = {name: (keep, stage.options) for name, stage in STAGES.items()}
    question = {
        "question": tokens.question.embeds.numpy(),
        "num_before": np.array([tokens.question.num_before], dtype=np.int64),
    }
    return inputs_of(tokens, budgets, **question)


class Scorers(Selectors):
    """Selectors, and the logits of scorers behind their outputs."""

    def __init__(self, selectors, scorers, projector):
        super().__init__(selectors, projector)
        self.scorers = nn.ModuleDict(scorers)
        self.inputs += [need for each in scorers.values() for need in each.needs if need not in self.inputs]
        self.inputs = list(dict.fromkeys(self.inputs))

    def forward(self, *tensors):
        inputs = dict(zip(self.inputs, tensors, strict=True))
        features_ND = self.projector(inputs["rows"])
        logits = [x for each in self.scorers.values() for x in each(features_ND, inputs) if x is not None]
        return (*super().forward(*tensors), *logits)


@pytest.fixture(scope="module")
def scorer_session(tmp_path_factory):
    selectors = {name: make_selector(None, stage) for name, stage in STAGES.items()}
    scorers = {name: graph_scorer(policy) for name, policy in SCORERS.items()}
    path = tmp_path_factory.mktemp("scorers") / "graph.onnx"
    return export(Scorers(selectors, scorers, PROJECTOR), all_inputs(video(), 0.3), path)


@pytest.mark.parametrize(
    "grids, num_text, num_before",
    [
        (((4, 4, 6),), 6, 2),
        (((3, 5, 5),), 1, 0),
        (((8, 3, 2),), 1, 1),
        (((1, 5, 6),), 9, 9),
        (((1, 4, 5), (1, 6, 10)), 5, 3),
        (((5, 1, 1),), 4, 0),
    ],
)
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 1.0])
def test_graphs_give_the_logits_and_the_choice(scorer_session, grids, num_text, num_before, keep):
    tokens = video(grids, num_text, num_before, seed=num_text)
    outputs = iter(run(scorer_session, all_inputs(tokens, keep)))
    for name, stage in STAGES.items():
        features, kept = next(outputs), next(outputs)
        plan = get_method("cacovid")(tokens, keep, **stage.options)
        assert kept.tolist() == plan.kept.tolist(), name
        np.testing.assert_allclose(features, tokens.features[plan.kept].numpy(), **CLOSE)
    for name, policy in SCORERS.items():
        for logits in policy(tokens):
            if logits is not None:
                np.testing.assert_allclose(next(outputs), logits.numpy(), **CLOSE, err_msg=name)


def test_policies_in_half_precision_stay_as_they_are():
    policy = LightScorer(32, width=8).half()
    scorer = graph_scorer(policy)
    assert policy.look.weight.dtype == torch.float16
    assert {weight.dtype for weight in scorer.policy.parameters()} == {torch.float32}


def test_other_policies_are_refused():
    with pytest.raises(UnsupportedModel, match="Linear"):
        graph_scorer(nn.Linear(2, 2))


# --- selection by logits


class Choices(nn.Module):
    """Scores to the systematic sample, the quotas and the sample by quotas."""

    inputs = ("tokens", "frames", "budget", "quota")

    def forward(self, *tensors):
        score_N, score_T, budget_K, quota_3 = tensors
        quota_T = frame_quotas(score_T, quota_3, budget_K, score_N.shape[0], cap=None)
        return systematic_sample(score_N, budget_K), quota_T, quota_sample(score_N, quota_T, budget_K)


def choice_inputs(num_frames, num_places, num_keep, seed, importance=None, sharpness=2.0, ties=False):
    score_N = sharpness * random_inputs(num_frames * num_places, 1, seed)[:, 0]
    score_T = random_inputs(num_frames, 1, seed + 1)[:, 0]
    if ties:
        score_N, score_T = score_N.round(), score_T.round()
    grids, options = ((num_frames, num_places, 1),), {"importance": importance}
    own = budget_inputs("cacovid", num_keep, grids, np.zeros(len(score_N)), options)
    return {"tokens": score_N.numpy(), "frames": score_T.numpy(), **own}


@pytest.fixture(scope="module")
def choice_session(tmp_path_factory):
    return export(Choices(), choice_inputs(4, 6, 5, 1), tmp_path_factory.mktemp("choice") / "graph.onnx")


@pytest.mark.parametrize("sharpness, ties", [(0.1, False), (2.0, False), (8.0, False), (2.0, True), (0.0, True)])
@pytest.mark.parametrize("importance", [None, 0.3, 1.0])
def test_choices_by_random_scores(choice_session, importance, sharpness, ties):
    generator = np.random.default_rng(3)
    for seed in range(15):
        num_frames, num_places = generator.integers(1, 13), generator.integers(1, 30)
        num_tokens = int(num_frames * num_places)
        num_keep = int(generator.integers(1, num_tokens + 1))
        inputs = choice_inputs(num_frames, num_places, num_keep, seed, importance, sharpness, ties)
        sampled, quotas, kept = run(choice_session, inputs)
        token_N, frame_T = torch.from_numpy(inputs["tokens"]), torch.from_numpy(inputs["frames"])
        chosen = select_by_policy(
            torch.stack([0 * token_N, token_N], 1),
            torch.stack([0 * frame_T, frame_T], 1),
            Fraction(num_keep, num_tokens),
            importance=0.5 if importance is None else importance,
        )
        assert sampled.tolist() == systematic_subset(token_N, num_keep).tolist()
        assert quotas.tolist() == chosen.quotas
        assert kept.tolist() == chosen.kept.tolist()
