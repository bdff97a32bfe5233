"""What encoder and decoder of behaviours are built of: a reader of small frames, and transformer layers.

Attention is written out as matrix products and a softmax: for networks this small its backward in bfloat16 is faster on
a CPU than the fused kernel's.
"""

# Shape legend: N frames, H height, W width in pixels, C channels, h, w cells of a frame, B rows, Q queries, K keys,
#               D width, G heads, P numbers of a patch

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokensieve.errors import BadOption

KeysValues = tuple[Tensor, Tensor]


class FrameEncoder(nn.Module):
    """One vector per frame: patches, two 3 x 3 convolutions beside a shortcut, and a linear map of all cells.

    Args:
        frame_size: height and width in pixels, whole patches.
        patch_size: pixels a side of a patch, which becomes one cell.
        num_channels: C.
        width: D.
    """

    def __init__(self, frame_size: tuple[int, int], patch_size: int, num_channels: int, width: int):
        super().__init__()
        self.frame_size, self.patch_size = tuple(frame_size), patch_size
        num_cells = (frame_size[0] // patch_size) * (frame_size[1] // patch_size)
        self.patch = nn.Linear(3 * patch_size**2, num_channels)
        self.first = nn.Conv2d(num_channels, num_channels, 3, padding=1)
        self.second = nn.Conv2d(num_channels, num_channels, 3, padding=1)
        self.out = nn.Sequential(nn.Linear(num_channels * num_cells, width), nn.LayerNorm(width))

    def forward(self, frames_NHW3: Tensor, film_N2C: Tensor | None = None) -> Tensor:
        """`[N, D]` for uint8 frames; `film` scales and shifts the channels between the convolutions.

        Raises:
            BadOption: the frames are of another size or dtype.
        """
        if frames_NHW3.dtype != torch.uint8 or tuple(frames_NHW3.shape[1:]) != (*self.frame_size, 3):
            raise BadOption(
                f"Frames must be uint8 of {self.frame_size[0]} x {self.frame_size[1]} pixels in RGB, got "
                f"{frames_NHW3.dtype} {list(frames_NHW3.shape)}."
            )
        # Channels stay last in memory, as pixels come and as convolutions on a CPU like them.
        x_NChw = self._patches(frames_NHW3).permute(0, 3, 1, 2)
        y_NChw = self.first(F.relu(x_NChw))
        if film_N2C is not None:
            scale_NC, shift_NC = film_N2C.chunk(2, dim=1)
            y_NChw = y_NChw * (1 + scale_NC[..., None, None]) + shift_NC[..., None, None]
        x_NChw = x_NChw + self.second(F.relu(y_NChw))
        return self.out(F.relu(x_NChw).permute(0, 2, 3, 1).flatten(1))

    def _patches(self, frames_NHW3: Tensor) -> Tensor:
        """`[N, h, w, C]`: a linear map of every patch, of pixels as if they were scaled to [-1, 1]."""
        device, weight = frames_NHW3.device.type, self.patch.weight
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        split = frames_NHW3.unflatten(2, (-1, self.patch_size)).unflatten(1, (-1, self.patch_size))
        pixels_NhwP = split.transpose(2, 3).flatten(3).to(dtype)  # whole numbers to 255 are exact in bfloat16 too
        # Scaling the weights instead of the pixels saves two passes over all frames.
        return F.linear(pixels_NhwP, weight / 127.5, self.patch.bias - weight.sum(1))


class Layer(nn.Module):
    """A transformer layer with norms first: attention over keys that may reach back beyond the queries, then an MLP.

    Args:
        width: D.
        num_heads: G, which divides D.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BQD: Tensor, bias: Tensor, past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """New `[B, Q, D]`, and the keys and values `[B, G, K, D / G]` of the past and now.

        Args:
            bias: added to the scores, broadcast to `[B, G, Q, K]`: minus infinity where a query must not look.
            past: keys and values of earlier steps, which come first in K.
        """
        heads = self.query_key_value(self.norm(x_BQD)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        scores_BGQK = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + bias
        mixed_BGQd = scores_BGQK.softmax(-1).to(value.dtype) @ value
        x_BQD = x_BQD + self.out(mixed_BGQd.transpose(1, 2).flatten(2))
        return x_BQD + self.mlp(self.mlp_norm(x_BQD)), (key, value)


class LinearOfPlaces(nn.Module):
    """A linear map of its own for each of P places.

    Args:
        num_places: P.
        num_in: numbers that come in at a place.
        num_out: numbers that go out.
    """

    def __init__(self, num_places: int, num_in: int, num_out: int):
        super().__init__()
        bound = num_in**-0.5  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(num_places, num_in, num_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_places, num_out).uniform_(-bound, bound))

    def forward(self, x_BPC: Tensor) -> Tensor:
        """`[B, P, num_out]`."""
        return torch.einsum("bpc,pcd->bpd", x_BPC, self.weight.to(x_BPC.dtype)) + self.bias


class ActionEmbedding(nn.Module):
    """The sum of one embedding per part of an action; part -1 ("none yet") has an entry of its own.

    Args:
        num_actions: choices of each part.
        width: D.
    """

    def __init__(self, num_actions: tuple[int, ...], width: int):
        super().__init__()
        self.parts = nn.ModuleList(nn.Embedding(count + 1, width) for count in num_actions)

    def forward(self, actions: Tensor) -> Tensor:
        """`[..., D]` for actions `[..., A]`."""
        return sum(part(actions[..., i] + 1) for i, part in enumerate(self.parts))


def draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """`[B]` int64 for logits `[B, N]`: a draw for every row, or the likeliest without a generator."""
    if generator is None:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def check_actions(actions: Tensor, num_actions: tuple[int, ...], lowest: int = 0) -> None:
    """Raises BadOption unless part i of `actions` `[..., A]` is in `lowest` .. num_actions[i] - 1."""
    if actions.shape[-1] != len(num_actions):
        raise BadOption(f"An action has {len(num_actions)} parts, got shape {list(actions.shape)}.")
    if not ((actions >= lowest) & (actions < actions.new_tensor(num_actions))).all():
        raise BadOption(
            f"Part i of an action must be in {lowest} .. n_i - 1 for n = {list(num_actions)}; some are not."
        )
