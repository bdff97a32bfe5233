"""What a method inside the language model is: at which layers it drops visual tokens, and what it looks at there.

A decoder method is a `DecoderStage`, an object without a model: `steps` says when it acts, `select` makes a `Plan`
for the visual tokens of one prompt. `tokensieve.pipeline.decoder_hooks` runs it in a transformers model, computes the
few attention rows it asks for, and keeps the books (cache, masks, positions).

During the forward of a prompt:

    raters(visual, text)             once, at the entry of layer 0, if a step asks for "raters"
    select(step, tokens) -> Plan     at the entry of every layer that has a step, for every prompt of the batch

and, for methods that choose anew for every generated token, `select_at_decode`.

A budget is counted over all visual tokens of one prompt that reach the language model and that a method may drop
(learned newlines and class tokens always stay): `num_keep` of them are left after the last step.
"""

# Shape legend: N visual tokens of a prompt still there, H heads, D width, M text tokens

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokensieve.compression.plan import Plan
from tokensieve.errors import BadOption

LOOKS = ("previous", "next")
QUERIES = ("last", "question", "raters", "all")
OVER_QUERIES = ("mean", "max")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One moment at which tokens are dropped: the entry of decoder layer `layer`, counted from 0.

    Attributes:
        layer: the first layer that runs without the dropped tokens.
        phase: which of the method's steps it is, for `select`.
        looks: whose attention `DecoderTokens.attention` gives: "previous" (the layer that has just run) or "next"
            (the one about to run, computed from its own norm, projections and rotary).
        queries: which rows: "last" token of the prompt, "question" (text after the last visual token), "raters" (those
            of the question that `raters` chose), "all" tokens.
        over_queries: "mean" or "max" over these rows.
        cut_cache: also takes the dropped tokens out of the key-value cache of the layers before.
    """

    layer: int
    phase: int = 0
    looks: str = "previous"
    queries: str = "last"
    over_queries: str = "mean"
    cut_cache: bool = False

    def __post_init__(self) -> None:
        if self.looks not in LOOKS or self.queries not in QUERIES or self.over_queries not in OVER_QUERIES:
            raise ValueError(f"Step has a word that is not one of {LOOKS}, {QUERIES}, {OVER_QUERIES}: {self}.")
        if self.layer < (self.looks == "previous"):
            raise ValueError(f"No layer runs before layer 0: {self}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Raster:
    """Where the tokens stood in images and videos.

    Attributes:
        block: `[N]` int64, which raster of the prompt (videos and images count on; the two views of an any-resolution
            image are two).
        frame: `[N]` int64, frame within the block.
        place: `[N]` int64, place within the frame.
    """

    block: Tensor
    frame: Tensor
    place: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderTokens:
    """The visual tokens of one prompt at one step.

    Attributes:
        hidden: `[N, D]`, hidden states entering the layer.
        attention: a function that computes `[H, N]` float32: attention probability from the step's queries to every
            visual token, mean or maximum over these queries. It costs one key projection, so call it only if needed.
        raster: where the tokens stood, or None if the model was given raw pixels.
        num_first: how many visual tokens the prompt had before the first step.
        num_keep: how many are to be left after the last step.
        counts: how many there were in every layer that has run.
        num_layers: of the language model.
        memory: a dict that lives as long as this prompt's forward, for what one step must tell the next.
    """

    hidden: Tensor
    attention: Callable[[], Tensor]
    raster: Raster | None
    num_first: int
    num_keep: int
    counts: tuple[int, ...] = ()
    num_layers: int = 1
    memory: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.hidden)


class DecoderStage:
    """Base of the methods inside the language model: overwrite what the method does.

    Attributes:
        needs_frames: whether `DecoderTokens.raster` must be there.
        decode_layer: for methods that choose visual keys anew for every generated token: the first layer that sees
            only the chosen ones (they look at the attention of the layer before); None for all others.
    """

    needs_frames: bool = False

    def decode_layer(self, num_layers: int) -> int | None:
        """First layer in which `select_at_decode` hides keys, or None."""
        return None

    def steps(self, num_layers: int) -> tuple[Step, ...]:
        """The steps in a language model of `num_layers` layers, at most one a layer, in rising order.

        Raises:
            BadOption: a layer that the model does not have.
        """
        return ()

    def raters(self, visual: Tensor, text: Tensor) -> Tensor:
        """`[M]` bool, which text tokens of the question judge; from embeddings `[N, D]` and `[M, D]`."""
        return torch.ones(len(text), dtype=torch.bool, device=text.device)

    def select(self, step: Step, tokens: DecoderTokens) -> Plan:
        """What is left of the tokens, in reading order."""
        raise NotImplementedError

    def select_at_decode(self, attention: Tensor, num_keep: int, before: Chosen | None) -> Chosen:
        """Visual keys for one generated token; only asked where `decode_layer` is not None.

        Args:
            attention: `[N]` float32, from the token to every visual key, mean over heads.
            num_keep: keys to choose.
            before: what was chosen for the token before, None for the first.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """Visual keys chosen for one generated token.

    Attributes:
        kept: `[N]` bool.
        attention: `[N]` float32, what the choice was made from.
    """

    kept: Tensor
    attention: Tensor


def keep_best(score: Tensor, num_keep: int) -> Plan:
    """The `num_keep` highest of `[N]` scores, in reading order; of equal ones the first."""
    order_N = score.sort(descending=True, stable=True).indices
    return Plan(order_N[:num_keep].sort().values, len(score))


def checked_layer(layer: int | None, default: int, lowest: int, highest: int, name: str = "layer") -> int:
    """`layer`, or for None the default moved into [lowest, highest].

    Raises:
        BadOption: `layer` is not a whole number in that range.
    """
    if highest < lowest:
        raise BadOption(f"The language model has too few layers for {name} >= {lowest}.")
    if layer is None:
        return min(max(default, lowest), highest)
    check_whole(layer, name, lowest)
    if layer > highest:
        raise BadOption(f"{name} must be from {lowest} to {highest} in this model, got {layer}.")
    return layer


def check_whole(value: int, name: str, lowest: int) -> int:
    """`value` if it is a whole number from `lowest` up.

    Raises:
        BadOption: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise BadOption(f"{name} must be a whole number from {lowest} up, got {value!r}.")
    return value


def check_number(value: float, name: str, low: float, high: float) -> float:
    """`value` if it is a number in [low, high].

    Raises:
        BadOption: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadOption(f"{name} must be a number from {low} to {high}, got {value!r}.")
    return float(value)
