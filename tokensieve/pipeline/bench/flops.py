"""The arithmetic a model has to do, from its sizes alone: what a shorter prompt could save at best.

FLOPs, two for a multiply-add. A language model of L layers, width d, query width q, key-value width v, gated FFN of
inner width m and vocabulary V on S tokens:

    linear     2 S L (2 d q + 2 d v + 3 d m)
    attention  2 S^2 q L     (a causal kernel; twice that if the masked half is computed as well)
    head       2 d V         (the last position only)

A vision tower on a picture of N tokens, in each block 2 N (4 d d + 2 d m) + 4 N W d, where every token looks at W of
them (N without windows), and half the FFN again if it is gated. Norms, activations and softmax are left out.

A token of the answer needs few FLOPs and many bytes: all weights, and the keys and values of what stands before it.
"""

# Shape legend: S tokens of a prompt, N tokens of a picture, L layers

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class Language:
    """Sizes of a language model: layers, width, width of all queries, of all keys, of the gated FFN, vocabulary."""

    layers: int
    width: int
    query_width: int
    key_width: int
    inner: int
    vocabulary: int

    @property
    def per_token(self) -> int:
        """FLOPs of the linear layers of one layer for one token."""
        d = self.width
        return 2 * (2 * d * self.query_width + 2 * d * self.key_width + 3 * d * self.inner)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Sizes of a vision tower and its projector; pictures go through it one by one.

    Attributes:
        blocks, width, inner: of the tower.
        gated: whether its FFN has a gate.
        patches: of one picture.
        num_prefix: tokens in front that are no patches.
        patch_values: numbers a patch is made of.
        looks_at: how many tokens each token looks at on average, for each block; None for all that are there.
        projector: `(rows, widths)`: rows of one picture, and the widths they are taken through.
    """

    blocks: int
    width: int
    inner: int
    gated: bool
    patches: int
    num_prefix: int
    patch_values: int
    looks_at: tuple[float, ...] | None
    projector: tuple[int, tuple[int, ...]]


def linear_flops(rows: int, *widths: int) -> int:
    """A chain of linear layers over `rows`: `linear_flops(576, 1024, 4096, 4096)` is LLaVA-1.5's projector."""
    return 2 * rows * sum(a * b for a, b in pairwise(widths))


def prefill_flops(of: Language, tokens: int | Sequence[int], *, causal: bool = True) -> int:
    """One prompt up to its first new token.

    Args:
        of: the language model.
        tokens: S, or the tokens that each layer runs with.
        causal: whether attention skips the masked half.
    """
    per_layer = [tokens] * of.layers if isinstance(tokens, int) else tokens
    pairs = (2 if causal else 4) * of.query_width
    return sum(s * of.per_token + pairs * s * s for s in per_layer) + linear_flops(1, of.width, of.vocabulary)


def step_flops(of: Language, before: int | Sequence[int]) -> int:
    """One more token behind `before` others (or as many in each layer)."""
    per_layer = [before] * of.layers if isinstance(before, int) else before
    return sum(of.per_token + 4 * of.query_width * (s + 1) for s in per_layer) + linear_flops(
        1, of.width, of.vocabulary
    )


def cache_bytes(of: Language, tokens: int | Sequence[int], bytes_per_number: int = 2) -> int:
    """Keys and values of `tokens` (or of as many in each layer)."""
    total = tokens * of.layers if isinstance(tokens, int) else sum(tokens)
    return 2 * of.key_width * bytes_per_number * total


def tower_flops(of: Encoder, tokens_per_block: Sequence[int] | None = None) -> int:
    """The blocks of the tower for one picture.

    Args:
        of: the encoder.
        tokens_per_block: `[blocks + 1]`, tokens that enter the first block and that leave each, prefix included;
            None for a tower that keeps them all. A block's attention runs on what enters, its FFN on what leaves.
    """
    if tokens_per_block is None:
        tokens_per_block = [of.num_prefix + of.patches] * (of.blocks + 1)
    total = 0
    for block, (enter, leave) in enumerate(pairwise(tokens_per_block)):
        looks_at = enter if of.looks_at is None else of.looks_at[block]
        total += linear_flops(enter, of.width, 4 * of.width) + 4 * enter * looks_at * of.width
        total += (3 if of.gated else 2) * linear_flops(leave, of.width, of.inner)
    return round(total)


def encoder_flops(of: Encoder, pictures: int, tokens_per_block: Sequence[int] | None = None) -> int:
    """Patch embedding, tower and projector for `pictures`; `tokens_per_block` as in `tower_flops`."""
    rows, widths = of.projector
    embedding = linear_flops(of.patches, of.patch_values, of.width)
    return pictures * (embedding + tower_flops(of, tokens_per_block) + linear_flops(rows, *widths))


def saved(full_s: float, compressed_s: float, full_flops: float, compressed_flops: float) -> float | None:
    """`eta`, the fraction of the ideal saving that was achieved: 1 if every FLOP left out became time.

    `(t_full - t_comp) / (t_full * (1 - F_comp / F_full))`; above 1 overheads went as well, below 0 it became slower.
    None where nothing was left out.
    """
    left_out = 1 - compressed_flops / full_flops
    return None if left_out <= 0 else (full_s - compressed_s) / (full_s * left_out)
