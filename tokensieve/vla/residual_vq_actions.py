"""Residual VQ of action chunks, as in VQ-BeT (Lee et al., arXiv 2403.03181) and MiniVLA.

chunk [H, D] -> flat -> MLP -> latent -> G codebooks one after the other, each for what the ones before it left over
loss = |chunk - reconstruction| (mean) + 5 * commitment

Sizes as in MiniVLA on LIBERO: 8 steps, 7 codebooks of 128 codes, a latent of 512; VQ-BeT's MLP of width 128. All
positions share one range of codes. The quantiser is that of vector-quantize-pytorch, an optional package.
"""

# Shape legend: B chunks, H steps, D numbers of an action, G codebooks, E width of the latent

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokensieve.errors import BadOption
from tokensieve.policies.checkpoint import SavedPolicy, register_policy
from tokensieve.vla.action_tokens import check_chunk, check_codes

COMMITMENT = 5.0


@register_policy("residual-vq-actions")
class ResidualVQActions(SavedPolicy):
    """Residual VQ as an `ActionTokeniser` for chunks of one shape; to be trained on `loss`.

    `save_pretrained` and `from_pretrained` as policies.

    Args:
        shape: `(H, D)` of a chunk.
        num_codebooks: G, codes of a chunk.
        num_codes: of each codebook.
        latent_width: E.
        hidden_width: of the MLPs.

    Raises:
        BadOption: a size is below 1, or vector-quantize-pytorch is not installed.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        num_codebooks: int = 7,
        num_codes: int = 128,
        latent_width: int = 512,
        hidden_width: int = 128,
    ):
        super().__init__()
        sizes = (*shape, num_codebooks, num_codes, latent_width, hidden_width)
        if len(shape) != 2 or min(sizes) < 1:
            raise BadOption(f"Need a shape (H, D) and sizes from 1, got {sizes}.")
        self.shape, self.num_codebooks, self.num_codes = tuple(shape), num_codebooks, num_codes
        self.latent_width, self.hidden_width = latent_width, hidden_width
        num_inputs = shape[0] * shape[1]
        self.encoder = _mlp(num_inputs, hidden_width, latent_width)
        self.quantiser = _residual_vq()(dim=latent_width, num_quantizers=num_codebooks, codebook_size=num_codes)
        self.decoder = _mlp(latent_width, hidden_width, num_inputs)

    def options(self) -> dict[str, object]:
        names = ("shape", "num_codebooks", "num_codes", "latent_width", "hidden_width")
        return {name: getattr(self, name) for name in names}

    def loss(self, chunks: Tensor) -> Tensor:
        """What to minimise, 0-d, for normalised chunks `[B, H, D]`; codebooks move too in training mode.

        Raises:
            BadOption: the chunks are of another shape.
        """
        if chunks.ndim != 3 or tuple(chunks.shape[1:]) != self.shape:
            raise BadOption(f"Need chunks [B, {self.shape[0]}, {self.shape[1]}], got {list(chunks.shape)}.")
        flat = chunks.flatten(1)
        latent, _, commitment = self.quantiser(self.encoder(flat)[:, None])
        return (self.decoder(latent[:, 0]) - flat).abs().mean() + COMMITMENT * commitment.sum()

    @torch.no_grad()
    def encode(self, chunk: Tensor) -> list[int]:
        """G codes of `[H, D]`.

        Raises:
            BadOption: another shape, or numbers that are not finite.
        """
        was_training = self.training
        self.eval()  # in training mode the codebooks would move
        latent = self.encoder(check_chunk(chunk, self.shape).flatten().to(self.encoder[0].weight))
        codes = self.quantiser(latent[None, None])[1]
        self.train(was_training)
        return codes.flatten().tolist()

    @torch.no_grad()
    def decode(self, codes: Sequence[int]) -> Tensor:
        """`[H, D]` float32.

        Raises:
            BadOption: there are not G codes, or one is not in [0, num_codes).
        """
        if len(codes) != self.num_codebooks:
            raise BadOption(f"A chunk has {self.num_codebooks} codes, got {len(codes)}.")
        check_codes(codes, self.num_codes)
        index = torch.tensor(codes, device=self.encoder[0].weight.device)[None, None]
        latent = self.quantiser.get_output_from_indices(index)[0, 0]
        return self.decoder(latent).view(self.shape).float().cpu()


def _mlp(num_inputs: int, hidden_width: int, num_outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(num_inputs, hidden_width),
        nn.ReLU(),
        nn.Linear(hidden_width, hidden_width),
        nn.ReLU(),
        nn.Linear(hidden_width, num_outputs),
    )


def _residual_vq():
    try:
        from vector_quantize_pytorch import ResidualVQ
    except ImportError:
        raise BadOption(
            "Residual VQ needs a package that is not installed (vector-quantize-pytorch).",
            hint="pip install vector-quantize-pytorch",
        ) from None
    return ResidualVQ
