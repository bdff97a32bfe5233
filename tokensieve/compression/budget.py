"""A budget is one argument: `keep`. The functions live in `tokensieve.budget`, which needs no torch."""

from tokensieve.budget import check_keep, num_to_keep

__all__ = ["check_keep", "num_to_keep"]
