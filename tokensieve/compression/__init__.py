"""Which tokens stay: one paper, one file, a pure function on tensors that returns a Plan."""

from tokensieve.compression.budget import check_keep, num_to_keep
from tokensieve.compression.plan import Plan, apply_plan, keep_all
from tokensieve.compression.registry import Method, get_method, list_methods, register_method
from tokensieve.compression.tokens import Projector, TwoLayerMLP, VisualTokens

__all__ = [
    "Method", "Plan", "Projector", "TwoLayerMLP", "VisualTokens", "apply_plan", "check_keep", "get_method",
    "keep_all", "list_methods", "num_to_keep", "register_method",
]
