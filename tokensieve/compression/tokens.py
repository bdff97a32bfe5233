"""What a compression method looks at: the visual tokens of one image or video."""

# Shape legend: N visual tokens, D width of the language model, P rows entering the projector,
#               V width of the vision tower, H hidden width of the projector, T frames, M text tokens, C channels

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, nn
from torch.func import functional_call

from tokensieve.compression.tower_view import TowerView


@dataclass(frozen=True, kw_only=True, eq=False)
class TwoLayerMLP:
    """Weights of a projector `w2 @ act(w1 @ x + b1) + b2`, for methods with a closed form.

    Give the model's own weight tensors, in any dtype, not copies: what is computed from them is kept for
    as long as they live. `act` works elementwise.
    """

    w1: Tensor  # [H, V]
    b1: Tensor | None  # [H]
    w2: Tensor  # [D, H]
    act: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if self.w1.ndim != 2 or self.w2.ndim != 2 or self.w1.shape[0] != self.w2.shape[1]:
            raise ValueError(
                f"TwoLayerMLP needs w1 [H, V] and w2 [D, H], got {tuple(self.w1.shape)} and {tuple(self.w2.shape)}."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Projector:
    """The map from the vision tower to the language model, with the rows that entered it.

    `inputs` is `[P, V]`, or `[P, G, V]` where the projector joins G neighbouring patches into one
    token. `fn` maps `[..., P, V]` (or `[..., P, G, V]`) to `[..., P, D]` and computes in the dtype of
    its argument, because methods probe in float32 whatever the model's dtype (`in_dtype_of_input` makes
    such a function of a module). `to_tokens` carries numbers per projector row, `[P]` or `[P, C]`, to
    numbers per visual token, `[N]` or `[N, C]`; it is the identity (`one_row_per_token`) unless tokens are
    pooled, re-ordered or re-packed after projection.
    """

    inputs: Tensor
    fn: Callable[[Tensor], Tensor]
    to_tokens: Callable[[Tensor], Tensor]
    mlp: TwoLayerMLP | None = None

    @property
    def one_row_per_token(self) -> bool:
        """Whether row i of the projector is visual token i, so that merging may happen before it."""
        return self.to_tokens is identity


def identity(values: Tensor) -> Tensor:
    """`to_tokens` of families whose projector rows are the visual tokens."""
    return values


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """What was asked: the text, where it is known, and the embeddings of the prompt's text tokens.

    `embeds` is `[M, D]`, the language model's own input embeddings of the M text tokens of the prompt in reading
    order (special tokens and placeholders left out), so they live in the space of `VisualTokens.features`.
    `num_before` of the M stand before the item that the question is kept with, the others after its first token.
    """

    embeds: Tensor
    text: str | None = None
    num_before: int = 0


def in_dtype_of_input(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """`module` as a function that computes in the dtype of its argument.

    Weights of another dtype are cast for the length of a call; the module stays as it is.
    """

    def fn(x: Tensor) -> Tensor:
        weights = {
            name: weight.to(x.dtype) if weight.is_floating_point() else weight
            for name, weight in chain(module.named_parameters(), module.named_buffers())
        }
        return functional_call(module, weights, (x,))

    return fn


@dataclass(frozen=True, kw_only=True, eq=False)
class VisualTokens:
    """The candidate tokens of one image or one video, in the order the language model reads them.

    Structural tokens (the learned newlines of LLaVA-NeXT, the closing newline of LLaVA-OneVision) are
    not candidates: the model adapter sets them aside and always keeps them, outside the budget.

    Attributes:
        features: `[N, D]`, what the language model would receive.
        grids: one `(frames, height, width)` in tokens per raster block; their products add up to N.
            A video is one block, an image `(1, h, w)`, an any-resolution image two blocks: the
            base view and the high-resolution view.
        crop: `[N]` int64, which tile of an any-resolution image a token came from (0 = base view);
            zeros for videos and plain images.
        times_s: `[T]` seconds of each token frame of a video, or None.
        projector: the projector and its inputs, or None where the family hides them.
        tower: queries, keys and hidden states of the vision tower's last layers, or None: they are recorded only
            for methods that need "tower".
        question: what was asked, or None: it is recorded only for methods that need "question".
    """

    features: Tensor
    grids: tuple[tuple[int, int, int], ...]
    crop: Tensor
    times_s: Tensor | None = None
    projector: Projector | None = None
    tower: TowerView | None = None
    question: Question | None = None

    def __post_init__(self) -> None:
        covered = sum(t * h * w for t, h, w in self.grids)
        if self.features.ndim != 2 or self.features.shape[0] != covered or self.crop.shape != (covered,):
            raise ValueError(
                f"VisualTokens do not agree: features {tuple(self.features.shape)}, grids {self.grids} "
                f"(= {covered} tokens), crop {tuple(self.crop.shape)}."
            )

    def __len__(self) -> int:
        return self.features.shape[0]
