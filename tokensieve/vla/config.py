"""The options of a behaviour tokeniser, which its checkpoint carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokensieve.errors import BadOption
from tokensieve.vla.fsq import FSQ

SUMMARIES = ("vector", "queries")
LIMITS = {
    "width": 8192,
    "num_channels": 4096,
    "num_heads": 256,
    "num_encoder_layers": 64,
    "num_decoder_layers": 64,
    "trunk_length": 4096,
    "replan_interval": 4096,
}
MAX_SIDE, MAX_ACTIONS = 1024, 1 << 20


@dataclass(frozen=True, kw_only=True)
class BehaviourConfig:
    """Options of `BehaviourTokeniser`. Lengths as in OmniJARVIS; the network is our own small one (INFERRED).

    Attributes:
        num_actions: choices of each part of an action: (7,) for MiniGrid, (8641, 121) for VPT's buttons and camera.
        frame_size: height and width in pixels.
        patch_size: pixels a side of the squares that the frame is read in; it divides the frame. 8 is a MiniGrid cell.
        levels: of the code.
        fsq_variant: "jax" or "pypi", see `FSQ`.
        summary: "vector": one summary of the trunk, projected to d numbers. "queries": d summaries, one number each.
            The paper's text says the former, its figure could be read as either (INFERRED).
        trunk_length: most frames that are encoded at once, and how far back the decoder looks, itself included.
        replan_interval: after how many steps the big model is called again: the paper's text says 32, its captions 128.
        encoder_sees_actions: the encoder reads actions too. The paper's sees frames only, which cannot show what the
            last action of a trunk does; that matters in short trunks.
        decoder_sees_previous_action: as in the original GROOT, not in MineStudio's; the paper does not say.
        width: of all vectors.
        num_channels: of the convolutions over a frame.
        num_encoder_layers: transformer layers of the encoder.
        num_decoder_layers: transformer layers of the decoder.
        num_heads: attention heads; they divide the width.

    Raises:
        BadOption: an option is not as above.
    """

    num_actions: tuple[int, ...] = (7,)
    frame_size: tuple[int, int] = (56, 56)
    patch_size: int = 8
    levels: tuple[int, ...] = (8, 8, 8, 6, 5)
    fsq_variant: str = "jax"
    summary: str = "vector"
    trunk_length: int = 128
    replan_interval: int = 32
    encoder_sees_actions: bool = False
    decoder_sees_previous_action: bool = False
    width: int = 128
    num_channels: int = 32
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    num_heads: int = 4

    def __post_init__(self):
        for name in ("num_actions", "frame_size", "levels"):
            value = getattr(self, name)
            if not isinstance(value, Sequence) or isinstance(value, str) or not value:
                raise BadOption(f"{name} must be a list of whole numbers, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        FSQ(self.levels, self.fsq_variant)
        for name, most in LIMITS.items():
            _check_count(name, getattr(self, name), most)
        for count in self.num_actions:
            _check_count("num_actions", count, MAX_ACTIONS)
        for side in (*self.frame_size, self.patch_size):
            _check_count("frame_size and patch_size", side, MAX_SIDE)
        if len(self.frame_size) != 2 or any(side % self.patch_size for side in self.frame_size):
            raise BadOption(
                f"frame_size must be a height and a width in whole patches of {self.patch_size} pixels, got "
                f"{list(self.frame_size)}."
            )
        if self.summary not in SUMMARIES:
            raise BadOption(f"summary must be one of {SUMMARIES}, got {self.summary!r}.")
        if self.width % self.num_heads:
            raise BadOption(f"num_heads must divide the width, got {self.num_heads} heads and {self.width}.")
        for name in ("encoder_sees_actions", "decoder_sees_previous_action"):
            if not isinstance(getattr(self, name), bool):
                raise BadOption(f"{name} must be True or False, got {getattr(self, name)!r}.")

    @property
    def fsq(self) -> FSQ:
        """The quantiser."""
        return FSQ(self.levels, self.fsq_variant)


def num_plans(num_steps: int, replan_interval: int) -> int:
    """How often the big model is called in an episode: `ceil(num_steps / replan_interval)`.

    Raises:
        BadOption: `num_steps` is below 0 or `replan_interval` below 1.
    """
    if num_steps < 0 or replan_interval < 1:
        raise BadOption(f"Need steps from 0 and an interval from 1, got {num_steps} and {replan_interval}.")
    return -(-num_steps // replan_interval)


def _check_count(name: str, value: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise BadOption(f"{name} must be a whole number from 1 to {most}, got {value!r}.")
