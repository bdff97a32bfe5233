"""Which tokens stay: one paper, one file, a pure function on tensors that returns a Plan."""

# Importing a method's module registers it.
from tokensieve.compression import (  # noqa: F401
    cacovid,
    cdpruner,
    divprune,
    dycoke,
    dycoke_decoder,
    evit,
    evs,
    fastv,
    fastvid,
    framefusion,
    holitom,
    holitom_decoder,
    norm_diversity,
    prumerge,
    prunevid,
    prunevid_decoder,
    pyramiddrop,
    random_subset,
    sparsevlm,
    tca,
    tome,
    uniform,
    vidcom2,
    visionzip,
    zoprune,
)
from tokensieve.compression.budget import check_keep, num_to_keep
from tokensieve.compression.plan import Merge, Plan, apply_plan, keep_all, merge_plan
from tokensieve.compression.registry import Method, get_method, list_methods, register_method
from tokensieve.compression.tokens import Projector, Question, TwoLayerMLP, VisualTokens, in_dtype_of_input
from tokensieve.compression.tower_view import TowerLayer, TowerView

__all__ = [
    "Merge",
    "Method",
    "Plan",
    "Projector",
    "Question",
    "TowerLayer",
    "TowerView",
    "TwoLayerMLP",
    "VisualTokens",
    "apply_plan",
    "check_keep",
    "get_method",
    "in_dtype_of_input",
    "keep_all",
    "list_methods",
    "merge_plan",
    "num_to_keep",
    "register_method",
]
