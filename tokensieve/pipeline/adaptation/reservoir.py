"""The memory of TCA: per class, the paths of a few confident images, and what is computed from them.

    Z_n [L, D]   path of stored item n: its class token (or what stands for it) after each of L blocks
    H_n          its key: how unsure the model was; low keys are stored first

    admission    append (H, Z) to the list of the predicted class; if it is then longer than M, one item leaves:
                 rule "diverse": the one with the largest H + mean cosine to the others (of Z averaged over blocks)
                 rule "lowest":  the one with the largest H
    anchors      A_c = mean of Z over the list of class c, once every class has at least 2 items
    affinity     aff_n = sum_l u_l cos(Z[l], Z_n[l]),   u_l ~ exp((l / (L - 1)) / scale), sum u = 1
    correction   "sharp sum": corr_c = lambd * sum_{n of class c} exp(-beta (1 - aff_n))
                 "mean":      corr_c = lambd * mean_{n of class c} aff_n

See `tca_stream` for which rules belong to which variant, and to which paper.
"""

# Shape legend: C classes, M places per class, L blocks, D width of the tower, I items (I <= M + 1), S stored items

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from tokensieve.errors import BadOption

EMPTY = -1  # in `Reservoir.step_CM`


def survivors(key_I: Tensor, path_ILD: Tensor, num_places: int, rule: str) -> Tensor:
    """`[min(I, num_places)]`: which items stay, keys rising; at most one leaves. Equal keys stay in their order."""
    order_I = key_I.argsort(stable=True)
    if len(key_I) <= num_places:
        return order_I
    if rule == "lowest":
        return order_I[:num_places]
    return order_I[order_I != (key_I + mean_similarity(path_ILD)).argmax()]


def mean_similarity(path_ILD: Tensor) -> Tensor:
    """`[I]`: mean cosine of every item with the other I - 1, of paths averaged over blocks."""
    unit_ID = F.normalize(path_ILD.mean(1), dim=-1)
    cosine_II = unit_ID @ unit_ID.T
    return (cosine_II.sum(-1) - cosine_II.diagonal()) / (len(cosine_II) - 1)


def block_weights(num_blocks: int, scale: float) -> Tensor:
    """`[L]` float64: `exp((l / (L - 1)) / scale)` divided by its sum; a small `scale` leaves the last block only."""
    depth_L = torch.linspace(0, 1, num_blocks, dtype=torch.float64) if num_blocks > 1 else torch.ones(1).double()
    return (depth_L / scale).softmax(0)


def affinity(path_LD: Tensor, stored_SLD: Tensor, weight_L: Tensor) -> Tensor:
    """`[S]` float64: mean cosine over blocks, weighted by `weight_L`; 1 for an item with itself."""
    return F.cosine_similarity(path_LD, stored_SLD, dim=-1).double() @ weight_L


class Reservoir:
    """At most M items for each of C classes, in float32 on one device; 4 * C * M * L * D bytes, taken at once.

    Attributes:
        key_CM: keys in rising order, inf where a place is empty.
        step_CM: int64, which image of the stream an item is, -1 where a place is empty.
        path_CMLD: the paths, zeros where a place is empty.
        count_C: int64, items of each class.
    """

    STATE = ("key_CM", "step_CM", "path_CMLD")

    def __init__(self, num_classes: int, num_places: int, num_blocks: int, width: int, device="cpu"):
        self.key_CM = torch.full((num_classes, num_places), torch.inf, device=device)
        self.step_CM = torch.full((num_classes, num_places), EMPTY, device=device)
        self.path_CMLD = torch.zeros(num_classes, num_places, num_blocks, width, device=device)
        self.count_C = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._mean_CLD = torch.zeros(num_classes, num_blocks, width, device=device)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], places: tuple[int, int], num_seen: int, device) -> Reservoir:
        """The reservoir of a state that holds the tensors named in `STATE`, on `device`.

        Args:
            state: the tensors; they are copied.
            places: (C, M) that are expected.
            num_seen: images the stream has seen.
            device: where the reservoir is to live.

        Raises:
            BadOption: the tensors are of another reservoir, or damaged.
        """
        key_CM, step_CM, path_CMLD = (state[name] for name in cls.STATE)
        if path_CMLD.ndim != 4 or not key_CM.shape == step_CM.shape == path_CMLD.shape[:2] == places:
            raise BadOption(
                f"The state has {tuple(path_CMLD.shape[:2])} (classes, places), this stream has {places}.",
                hint="Make the stream with the classes and the reservoir_size of the state.",
            )
        if (key_CM.dtype, step_CM.dtype, path_CMLD.dtype) != (torch.float32, torch.int64, torch.float32):
            raise BadOption(f"The state has tensors of the wrong dtype: {key_CM.dtype}, {path_CMLD.dtype}.")
        is_stored_CM = step_CM >= 0
        count_C = is_stored_CM.sum(1)
        steps_S = step_CM[is_stored_CM]
        whole = (
            torch.equal(is_stored_CM, torch.arange(places[1], device=step_CM.device) < count_C[:, None])
            and torch.equal(is_stored_CM, key_CM.isfinite())
            and bool((key_CM[:, 1:] >= key_CM[:, :-1]).all())
            and len(steps_S.unique()) == len(steps_S)
            and bool((steps_S < num_seen).all())
            and bool(path_CMLD.isfinite().all())
        )
        if not whole:
            raise BadOption("The state is damaged: its keys, steps and paths do not agree with each other.")
        reservoir = cls(*path_CMLD.shape, device=device)
        for name in cls.STATE:
            getattr(reservoir, name).copy_(state[name])
        reservoir.count_C.copy_(count_C)
        mean_CLD = reservoir.path_CMLD.sum(1) / reservoir.count_C.clamp(min=1)[:, None, None]
        reservoir._mean_CLD.copy_(mean_CLD)
        return reservoir

    def admit(self, label: int, key: Tensor, path_LD: Tensor, step: int, rule: str) -> None:
        """Inserts an image of predicted class `label`; it may be the one that leaves again."""
        count = int(self.count_C[label])
        key_I = torch.cat([self.key_CM[label, :count], key.float().reshape(1)])
        step_I = torch.cat([self.step_CM[label, :count], self.step_CM.new_tensor([step])])
        path_ILD = torch.cat([self.path_CMLD[label, :count], path_LD.float()[None]])
        stay = survivors(key_I, path_ILD, self.key_CM.shape[1], rule)
        num_stay = len(stay)
        self.key_CM[label, :num_stay] = key_I[stay]
        self.step_CM[label, :num_stay] = step_I[stay]
        self.path_CMLD[label, :num_stay] = path_ILD[stay]
        self.count_C[label] = num_stay
        self._mean_CLD[label] = path_ILD[stay].mean(0)

    def num_missing(self) -> int:
        """How many images at least must still be admitted before there are anchors; 0 once there are some."""
        return int((2 - self.count_C).clamp(min=0).sum())

    def anchors(self) -> Tensor | None:
        """`[C, L, D]`: the mean path of every class, or None while a class has fewer than 2 items."""
        return None if self.num_missing() else self._mean_CLD

    def correction(self, path_LD: Tensor, weight_L: Tensor, *, lambd: float, beta: float | None) -> Tensor:
        """`[C]` float32: what the stored items add to the score of every class; 0 where there is none.

        `beta` is the sharpness of the sum; None takes the mean of plain affinities instead.
        """
        is_stored_CM = self.step_CM != EMPTY
        label_S = is_stored_CM.nonzero()[:, 0]
        affinity_S = affinity(path_LD.float(), self.path_CMLD[is_stored_CM], weight_L.to(path_LD.device))
        value_S = affinity_S / self.count_C[label_S] if beta is None else torch.exp(-beta * (1 - affinity_S))
        sum_C = value_S.new_zeros(len(self.count_C)).index_add_(0, label_S, value_S)
        return (lambd * sum_C).float()
