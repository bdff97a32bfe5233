"""The behaviour encoder of OmniJARVIS (arXiv 2407.00114, section 3.1): a trunk of frames to d numbers, not causal.

    [query_1 .. query_n, frame_1 .. frame_T]  ->  bidirectional transformer  ->  the queries' outputs  ->  d numbers

As in GROOT, whose encoder it modifies, learned queries gather what all frames show. INFERRED: how the summary becomes d
numbers (here LayerNorm and a linear map), and everything about the network's size and its reader of frames.
"""

# Shape legend: R trunks, T steps, H height, W width in pixels, A parts of an action, n queries, d numbers, D width,
#               K = n + T

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokensieve.errors import BadOption
from tokensieve.vla.config import BehaviourConfig
from tokensieve.vla.layers import ActionEmbedding, FrameEncoder, Layer
from tokensieve.vla.trunks import Trunks


class BehaviourEncoder(nn.Module):
    """Summaries `[R, d]` of trunks, before quantisation.

    Args:
        config: the options.
    """

    def __init__(self, config: BehaviourConfig):
        super().__init__()
        self.config = config
        num_queries = 1 if config.summary == "vector" else len(config.levels)
        self.frame = FrameEncoder(config.frame_size, config.patch_size, config.num_channels, config.width)
        self.action = ActionEmbedding(config.num_actions, config.width) if config.encoder_sees_actions else None
        self.queries = nn.Parameter(0.02 * torch.randn(num_queries, config.width))
        self.positions = nn.Parameter(0.02 * torch.randn(config.trunk_length, config.width))
        self.layers = nn.ModuleList(Layer(config.width, config.num_heads) for _ in range(config.num_encoder_layers))
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, len(config.levels) // num_queries)

    def forward(self, trunks: Trunks) -> Tensor:
        """`[R, d]`. Padding is not looked at.

        Raises:
            BadOption: trunks are longer than `trunk_length`, or their frames are of another size.
        """
        num_trunks, num_steps = trunks.mask.shape
        if num_steps > self.config.trunk_length:
            raise BadOption(f"Trunks of {num_steps} steps are longer than trunk_length, {self.config.trunk_length}.")
        x_RTD = frame_vectors(self.frame, trunks.frames, trunks.mask) + self.positions[:num_steps]
        if self.action is not None:
            x_RTD = x_RTD + self.action(trunks.actions)
        x_RKD = torch.cat([self.queries.expand(num_trunks, -1, -1), x_RTD], 1)
        seen_RK = torch.cat([trunks.mask.new_ones(num_trunks, len(self.queries)), trunks.mask], 1)
        bias_R11K = torch.zeros_like(seen_RK, dtype=torch.float32).masked_fill(~seen_RK, -torch.inf)[:, None, None]
        for layer in self.layers:
            x_RKD, _ = layer(x_RKD, bias_R11K)
        return self.out(self.norm(x_RKD[:, : len(self.queries)])).flatten(1)


def frame_vectors(
    encoder: FrameEncoder, frames_RTHW3: Tensor, mask_RT: Tensor, film_RC: Tensor | None = None
) -> Tensor:
    """`[R, T, D]`: what `encoder` makes of the frames under the mask, zeros elsewhere, where it would be wasted."""
    film = None if film_RC is None else film_RC[:, None].expand(-1, mask_RT.shape[1], -1)[mask_RT]
    vectors_ND = encoder(frames_RTHW3[mask_RT], film)
    x_RTD = vectors_ND.new_zeros(*mask_RT.shape, vectors_ND.shape[-1])
    x_RTD[mask_RT] = vectors_ND
    return x_RTD
