"""ZOO-Prune's sensitivity for a graph: what `compression/sensitivity.py` computes, without autograd."""

# Shape legend: P projector rows, G patches a row joins, V width in, H hidden width, M directions

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional as F

from tokensieve.compression.sensitivity import draw_directions, gain_matrix
from tokensieve.compression.tokens import TwoLayerMLP
from tokensieve.compression.zoprune import NUM_DIRECTIONS, STEP, check_options
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export.encoded import Encoded
from tokensieve.pipeline.families.base import two_layer_mlp
from tokensieve.pipeline.vlm import VLM

Elementwise = Callable[[Tensor], Tensor]


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = torch.tanh(scale * (x + cubic * x * x * x))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * scale * (1 + 3 * cubic * x * x)


def _sigmoid_slope(x: Tensor, sharpness: float) -> Tensor:
    """Of `x * sigmoid(sharpness * x)`."""
    gate = torch.sigmoid(sharpness * x)
    return gate + sharpness * x * gate * (1 - gate)


# name -> the activation and its derivative
_SLOPES: dict[str, tuple[Elementwise, Elementwise]] = {
    "gelu": (F.gelu, _gelu_slope),
    "gelu_pytorch_tanh": (lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_slope),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), lambda x: _sigmoid_slope(x, 1.702)),
    "silu": (F.silu, lambda x: _sigmoid_slope(x, 1.0)),
    "relu": (F.relu, lambda x: (x > 0).float()),
}


class ClosedForm(nn.Module):
    """`gain_closed_form` of a projector that is a two-layer MLP on single patches.

    Raises:
        UnsupportedModel: the derivative of its activation is not known.
    """

    def __init__(self, mlp: TwoLayerMLP):
        super().__init__()
        self.slope = _slope_of(mlp.act)
        self.register_buffer("gain_HH", gain_matrix(mlp).detach())

    def forward(self, encoded: Encoded) -> Tensor:
        mlp, rows_PV = encoded.mlp, encoded.rows
        slope_PH = self.slope(F.linear(rows_PV, mlp.w1.float(), None if mlp.b1 is None else mlp.b1.float()))
        square_P = ((slope_PH @ self.gain_HH) * slope_PH).sum(-1)
        return (square_P.clamp(min=0) / rows_PV.shape[-1]).sqrt()


class Probing(nn.Module):
    """`gain_by_probing`, one direction after the other, for any projector.

    Args:
        bank_MV: unit directions.
        step: length of a probe.
    """

    def __init__(self, bank_MV: Tensor, step: float):
        super().__init__()
        self.register_buffer("bank_MV", bank_MV)
        self.step = step

    def forward(self, encoded: Encoded) -> Tensor:
        rows, bank_MV, num_directions = encoded.rows, self.bank_MV, self.bank_MV.shape[0]

        def unfinished(i, total_P):
            return i < num_directions

        def probe(i, total_P):
            shift_V = self.step * bank_MV.index_select(0, i[None])[0]
            change_PD = encoded.project(rows + shift_V) - encoded.project(rows - shift_V)
            return i + 1, total_P + change_PD.norm(dim=-1)

        start = torch.zeros((), dtype=torch.int64), torch.zeros_like(encoded.rows.flatten(1)[:, 0])
        return while_loop(unfinished, probe, start)[1] / (2 * self.step * num_directions)


class Flat(nn.Module):
    """Of a linear projector: every row answers alike, so that only diversity counts."""

    def forward(self, encoded: Encoded) -> Tensor:
        return torch.ones_like(encoded.rows.flatten(1)[:, 0])


def make_sensitivity(vlm: VLM, options: Mapping[str, object]) -> nn.Module:
    """The module that gives `[P]` sensitivities from `Encoded`, by ZOO-Prune's `options`.

    Raises:
        BadOption: an option is out of range.
        UnsupportedModel: the projector's activation has no closed form here.
    """
    estimator = options.get("estimator", "auto")
    num_directions, step = options.get("num_directions", NUM_DIRECTIONS), options.get("step", STEP)
    check_options(estimator, num_directions, step)
    projector = vlm.adapter.projector
    mlp = two_layer_mlp(projector)
    if mlp is None and estimator in ("exact", "zo-factorised"):
        raise BadOption(
            f"estimator={estimator!r} needs a projector that is a two-layer MLP on single patches; this one is not.",
            hint="Use estimator='zo' (or 'auto'), which works with any projector.",
        )
    if mlp is not None and estimator in ("auto", "exact"):
        return ClosedForm(mlp)
    if [type(part) for part in projector.modules() if not list(part.children())] == [nn.Linear]:
        return Flat()
    seed = 0 if vlm.compression is None else vlm.compression.seed
    width_in = vlm.model.config.vision_config.hidden_size if mlp is None else mlp.w1.shape[1]
    return Probing(draw_directions(num_directions, width_in, torch.Generator().manual_seed(seed)), step)


def _slope_of(act: Elementwise) -> Elementwise:
    """The derivative of an activation, which is recognised by its values."""
    probe = torch.linspace(-6, 6, 193)
    with torch.no_grad():
        values = act(probe).float()
        for known, slope in _SLOPES.values():
            if torch.allclose(values, known(probe), rtol=0, atol=1e-5):
                return slope
    raise UnsupportedModel(
        f"The derivative of the projector's {type(act).__name__} is not known, so 'zoprune' cannot be exported.",
        hint=f"Known are {', '.join(_SLOPES)}; use estimator='zo', or 'norm-diversity', which needs none.",
    )
