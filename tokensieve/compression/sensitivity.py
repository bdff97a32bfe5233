"""How strongly a projector answers to a small change of its input: three ways to the same number.

    S(x) = E_u || J(x) u ||,  J the Jacobian of the projector at x, u uniform on the unit sphere

`gain_by_probing` is the estimator of ZOO-Prune (arXiv 2509.24837): two projector calls per direction.
`gain_by_factored_probing` gives the same numbers for a two-layer MLP in half the work.
`gain_closed_form` is what they estimate, for a two-layer MLP and without random numbers.

All work in float32. In half precision a step of 0.01 is about one rounding unit per component, and the
scores come out up to 3.5 times too large. For the two probing forms keep
`torch.get_float32_matmul_precision()` at "highest", its default.
"""

# Shape legend: P projector rows, G patches a row joins, V width in, H hidden width, D width out,
#               M directions, C directions of a chunk, R rows of a chunk

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from tokensieve.compression.tokens import Projector, TwoLayerMLP

# Work is cut so that no tensor has more elements than this (16 MiB) or, when probing, than one projector
# pass has, whichever is larger; about six such tensors live at once.
MAX_ELEMENTS = 2**22


def draw_directions(num_directions: int, width: int, generator: torch.Generator) -> Tensor:
    """`[M, V]` unit vectors in random directions, on the generator's device."""
    bank_MV = torch.randn(num_directions, width, generator=generator, device=generator.device)
    return bank_MV / (bank_MV.norm(dim=-1, keepdim=True) + 1e-12)


@torch.no_grad()
def gain_by_probing(projector: Projector, bank_MV: Tensor, step: float, width_out: int) -> Tensor:
    """`[P]`: mean over directions of `|| fn(x + h u) - fn(x - h u) || / 2h`.

    One bank serves all rows; where a row joins G patches, `u` is added to each of them.
    """
    x = projector.inputs.float()  # [P, V] or [P, G, V]
    num_rows, width_in = x.shape[0], x.shape[-1]
    total_P = x.new_zeros(num_rows)
    for bank_CV in _chunks(bank_MV.to(x.device), max(x.numel(), num_rows * width_out)):
        shift = step * bank_CV.reshape(-1, *[1] * (x.ndim - 1), width_in)
        change_CPD = projector.fn(x + shift) - projector.fn(x - shift)
        if change_CPD.dtype != x.dtype:
            raise TypeError(
                f"Projector.fn answered float32 with {change_CPD.dtype}, which is too coarse for a probe. "
                "It must compute in the dtype of its argument; see tokensieve.compression.in_dtype_of_input."
            )
        total_P += change_CPD.norm(dim=-1).sum(0)
    return total_P / (2 * step * len(bank_MV))


@torch.no_grad()
def gain_by_factored_probing(mlp: TwoLayerMLP, inputs_PV: Tensor, bank_MV: Tensor, step: float) -> Tensor:
    """`[P]`: as `gain_by_probing`, with `W1 x` and `W1 u` computed once and `W2` once per direction."""
    w1_HV, w2_DH = mlp.w1.float(), mlp.w2.float()
    a_PH = _hidden(mlp, inputs_PV)
    shift_MH = step * bank_MV.to(w1_HV.device) @ w1_HV.T
    total_P = a_PH.new_zeros(len(a_PH))
    for shift_CH in _chunks(shift_MH, len(a_PH) * max(w2_DH.shape)):
        change_CPH = mlp.act(a_PH + shift_CH[:, None]) - mlp.act(a_PH - shift_CH[:, None])
        total_P += (change_CPH @ w2_DH.T).norm(dim=-1).sum(0)
    return total_P / (2 * step * len(bank_MV))


@torch.no_grad()
def gain_closed_form(mlp: TwoLayerMLP, inputs_PV: Tensor) -> Tensor:
    """`[P]`: root mean square gain `||J||_F / sqrt(V)`, exactly.

    `J = W2 diag(g) W1` with `g = act'(W1 x + b1)`, so `||J||_F^2 = g^T [(W2^T W2) o (W1 W1^T)] g` with
    `o` elementwise: one fixed `[H, H]` matrix for all tokens. It is computed once and kept as long as
    `w1` lives (64 MiB for H = 4096). The root of the mean square stands in for the mean: at LLaVA-1.5
    sizes they are 0.01 % apart (4096 directions, random weights), where 64 directions are up to 1.5 % off.
    """
    matrix_HH = gain_matrix(mlp)
    squares = []
    for rows_RV in inputs_PV.split(max(1, MAX_ELEMENTS // len(matrix_HH))):
        slope_RH = _slope(mlp.act, _hidden(mlp, rows_RV))
        squares.append(((slope_RH @ matrix_HH) * slope_RH).sum(-1))
    return (torch.cat(squares).clamp_min(0) / inputs_PV.shape[-1]).sqrt()


def _hidden(mlp: TwoLayerMLP, inputs_PV: Tensor) -> Tensor:
    bias = None if mlp.b1 is None else mlp.b1.float()
    return F.linear(inputs_PV.float(), mlp.w1.float(), bias)


def _slope(act: Callable[[Tensor], Tensor], a_PH: Tensor) -> Tensor:
    """`act'(a)` of an elementwise function, also inside `torch.no_grad` and `torch.inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf_PH = a_PH.detach().clone().requires_grad_()
        return torch.autograd.grad(act(leaf_PH).sum(), leaf_PH)[0]


def _chunks(bank: Tensor, elements_per_direction: int) -> Iterator[Tensor]:
    return iter(bank.split(max(1, MAX_ELEMENTS // elements_per_direction)))


# w1 -> (w2, state of both, matrix). Adapters may build a new TwoLayerMLP on every call; the weight
# tensor itself is what lasts, and the entry goes when it goes.
_GAIN_MATRICES = WeakTensorKeyDictionary()


def gain_matrix(mlp: TwoLayerMLP) -> Tensor:
    """`(W2^T W2) o (W1 W1^T)`, `[H, H]` float32, computed again if a weight changed."""
    state = (_state(mlp.w1), _state(mlp.w2))
    known = _GAIN_MATRICES.get(mlp.w1)
    if known is not None and known[0]() is mlp.w2 and known[1] == state:
        return known[2]
    w1_HV, w2_DH = mlp.w1.float(), mlp.w2.float()
    matrix_HH = (w2_DH.T @ w2_DH).mul_(w1_HV @ w1_HV.T)
    _GAIN_MATRICES[mlp.w1] = (TensorWeakRef(mlp.w2), state, matrix_HH)
    return matrix_HH


def _state(weight: Tensor) -> tuple:
    """Changes with every in-place update (optimiser steps, load_state_dict) and with a new storage.

    Edits through `.data`, or inside `torch.inference_mode`, are invisible to autograd and to this.
    """
    return weight.data_ptr(), None if weight.is_inference() else weight._version
