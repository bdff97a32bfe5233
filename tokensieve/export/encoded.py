"""What the vision graph hands to a selector: one image or video as it leaves the encoder."""

# Shape legend: N candidate tokens, P rows entering the projector, G patches a row joins, D width of the language model,
#               V width of the vision tower, d width of a head, C channels

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tokensieve.compression import TwoLayerMLP
from tokensieve.compression.tokens import identity


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The graph's side of `VisualTokens`; rasters come as graph inputs, because their sizes are dynamic.

    Attributes:
        features: `[N, D]`.
        rows: `[P, V]` or `[P, G, V]`, what entered the projector.
        project: the projector, `[..., P, V]` (or `[..., P, G, V]`) to `[..., P, D]`, in float32.
        to_tokens: carries numbers per projector row, `[P]` or `[P, C]`, to numbers per candidate.
        mlp: the projector's weights where it is a two-layer MLP.
        salience: `[N]` attention that each candidate is paid in the layer that VisionZip ranks by, where recorded.
        keys: `[N, d]` mean keys of that layer, where recorded.
    """

    features: Tensor
    rows: Tensor
    project: Callable[[Tensor], Tensor]
    to_tokens: Callable[[Tensor], Tensor] = identity
    mlp: TwoLayerMLP | None = None
    salience: Tensor | None = None
    keys: Tensor | None = None

    @property
    def one_row_per_token(self) -> bool:
        """Whether row i of the projector is candidate i, so that merging may happen before it."""
        return self.to_tokens is identity
