"""Behaviour tokens: what an agent does over many steps as a few tokens of a language model (OmniJARVIS).

A trunk of frames becomes a code of d digits, the code d tokens of an extended vocabulary; a small policy turns the code
back into actions, one per frame. There is no official code: this is an independent implementation from the paper.

Names are imported on first use.
"""

from __future__ import annotations

from tokensieve.lazy_names import lazy_names

_HOMES = {
    "FSQ": "tokensieve.vla.fsq",
    "BehaviourVocabulary": "tokensieve.vla.vocabulary",
    "add_behaviour_tokens": "tokensieve.vla.vocabulary",
    "SubTask": "tokensieve.vla.packing",
    "Packed": "tokensieve.vla.packing",
    "Packer": "tokensieve.vla.packing",
    "collate": "tokensieve.vla.packing",
    "BehaviourConstraint": "tokensieve.vla.constrained",
    "BehaviourConfig": "tokensieve.vla.config",
    "num_plans": "tokensieve.vla.config",
    "Trunks": "tokensieve.vla.trunks",
    "cut_trunks": "tokensieve.vla.trunks",
    "join_trunks": "tokensieve.vla.trunks",
    "BehaviourEncoder": "tokensieve.vla.encoder",
    "PolicyDecoder": "tokensieve.vla.decoder",
    "History": "tokensieve.vla.decoder",
    "BehaviourTokeniser": "tokensieve.vla.tokeniser",
    "cloning_loss": "tokensieve.vla.tokeniser",
    "action_accuracy": "tokensieve.vla.tokeniser",
    "BehaviourModule": "tokensieve.vla.module",
    "words_of": "tokensieve.vla.words",
    "Planned": "tokensieve.vla.planner_config",
    "Memory": "tokensieve.vla.memory",
    "PlannerConfig": "tokensieve.vla.planner_config",
    "BehaviourPlanner": "tokensieve.vla.planner_config",
    "Planner": "tokensieve.vla.planner",
    "VLMPlanner": "tokensieve.vla.vlm_planner",
    "PlannerModule": "tokensieve.vla.planner_module",
    "CloningConfig": "tokensieve.vla.cloning",
    "CloningPolicy": "tokensieve.vla.cloning",
    "CloningModule": "tokensieve.vla.cloning",
    "Windows": "tokensieve.vla.windows",
    "Training": "tokensieve.vla.recipe",
    "babyai_config": "tokensieve.vla.recipe",
    "train_tokeniser": "tokensieve.vla.recipe",
    "train_planner": "tokensieve.vla.recipe",
    "train_cloning": "tokensieve.vla.recipe",
    "RandomAgent": "tokensieve.vla.agents",
    "CloningAgent": "tokensieve.vla.agents",
    "BehaviourAgent": "tokensieve.vla.agents",
    "EpisodeTrace": "tokensieve.vla.rollout",
    "roll_out": "tokensieve.vla.rollout",
    "summarise": "tokensieve.vla.rollout",
    "wilson": "tokensieve.pipeline.evaluation.statistics",
    "named_cells": "tokensieve.vla.targets",
    "draw_episode": "tokensieve.vla.episode_video",
    "write_episodes_video": "tokensieve.vla.episode_video",
    "ActionTokeniser": "tokensieve.vla.action_tokens",
    "CountDown": "tokensieve.vla.action_tokens",
    "QuantileScale": "tokensieve.vla.action_tokens",
    "BinnedActions": "tokensieve.vla.binned_actions",
    "FastActions": "tokensieve.vla.fast_actions",
    "ResidualVQActions": "tokensieve.vla.residual_vq_actions",
}

__all__ = sorted(_HOMES)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
