"""The model families tokensieve knows, one small class each; importing this package registers them all."""

from tokensieve.pipeline.families import anyres, llava, qwen, tiles  # noqa: F401  (registration)
from tokensieve.pipeline.families.base import Family, ItemLayout, family_of, list_families, register_family

__all__ = ["Family", "ItemLayout", "family_of", "list_families", "register_family"]
