"""TCA: Is Less More? Exploring Token Condensation as Training-free Test-time Adaptation.

Wang, Gong, Wang, Huang, Luo. https://arxiv.org/abs/2410.14729 (ICCV 2025). This file is the condensation, which
works alone in any vision tower; the adaptation to a stream (reservoir, anchors, correction of logits) is
`tokensieve.pipeline.adaptation`. Three blocks (3, 6, 9) shorten the sequence between attention and MLP. With P
patches, drop rate r and a_j the attention from the class token to patch j, mean over heads:

    top = ceil((1 - r) P),  m = P + 1 - top
    keep   the top - 2m highest a_j stay as they are, in falling order of a_j
    merge  the next 2m become 4: greedy centres (first one given, then always the token farthest from its nearest
           centre), every token y to its nearest centre z, merged = sum w y / sum w, w = 1 / ||y - z||, 1 for z itself
    fuse   the other m - 1 become one: sum a_j x_j, weights not normalised

An anchor, if there are some, joins a block's attention as one more token in front: of the class means A_c after the
block before, the one with the highest cosine to the class token. Its output row is thrown away, and a_j is not
renormalised.

Variants. "released" is what the authors' code does. "paper" follows a second-hand account of the paper where that
differs, because the paper's text could not be read: a_j is the mean over heads of the rank of patch j in that head,
and the lowest m - 1 patches are dropped instead of fused. The paper's own thresholds for pruning and merging could
not be recovered, so both variants split as above; nor could how the paper samples an anchor and asks with it.

From a budget to r: the smallest r whose three blocks end with as many patches as the budget allows, or the fewest
that are possible. The paper's R = 0.9 and 0.7 are r = 0.035 and 0.105 (inferred from matching compute).

What differs from the official code (Jo-wang/TCA):
- The first centre is the highest score of the band unless another is asked for (there: drawn at random).
- Centres are distinct and belong to their own cluster; with exact copies in the band the official code may give
  tokens of zeros. A block that would not get shorter is left alone; there small r adds tokens.
- Towers with fewer than 10 blocks condense after a quarter, a half and three quarters of their depth.
- Towers without a class token (SigLIP) are our own design, no code or statement exists: a_j is the attention that
  patch j receives, mean over heads and queries, and the size-weighted mean token stands for the class token.
"""

# Shape legend: B images, N tokens in and K tokens out (prefix included), P patches, D width, S kept, F fused,
#               C classes, L blocks

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tokensieve.compression.budget import num_to_keep
from tokensieve.compression.condensation import (
    MAX_DROP_RATE,
    NUM_CENTERS,
    Condensation,
    condense,
    drop_rate_for,
    num_left,
    rank_score,
    split_patches,
)
from tokensieve.compression.registry import did_you_mean, register_method
from tokensieve.compression.tower_stage import BlockView, Reduced, TowerStage
from tokensieve.errors import BadOption

VARIANTS = ("released", "paper")
BLOCKS = (3, 6, 9)

FirstCenter = int | torch.Generator | Callable[[int, int], int]


def condensing_blocks(num_blocks: int) -> tuple[int, ...]:
    """Blocks 3, 6 and 9 of a tower with at least 10; else those after 1/4, 1/2 and 3/4 of its depth."""
    return BLOCKS if num_blocks > BLOCKS[-1] else tuple(sorted({num_blocks * i // 12 for i in BLOCKS}))


class TCAStage(TowerStage):
    """Condensation in a tower, and the two things that adaptation needs of it: anchors in, paths out.

    Attributes:
        anchors: `[C, L, D]` class means of earlier paths, or None; set between forwards.
        path: list of L `[B, D]`: the class token (else the mean token) after every block of the last forward.
        steps: block -> `Condensation` of the last forward.
        anchor_rows: block -> `[B]`, the class whose anchor joined, of the last forward.
    """

    needs = frozenset({"attention"})

    def __init__(
        self,
        *,
        drop_rate: float | None = None,
        variant: str = "released",
        blocks: tuple[int, ...] | None = None,
        first_center: FirstCenter = 0,
    ):
        self.drop_rate, self.variant, self.blocks, self.first_center = drop_rate, variant, blocks, first_center
        self.fuses = variant == "released"
        self.anchors: Tensor | None = None

    def begin(self, *, num_tokens: int, num_prefix: int, num_blocks: int, keep: float | int, batch: int) -> None:
        num_patches = num_tokens - num_prefix
        self.num_prefix = num_prefix
        self.acting = condensing_blocks(num_blocks) if self.blocks is None else self.blocks
        if self.acting[-1] >= num_blocks:
            raise BadOption(f"blocks must lie in 0..{num_blocks - 1} for this tower, got {self.blocks}.")
        self.rate = self.drop_rate
        if self.rate is None:
            num_keep = num_to_keep(keep, num_patches)
            self.rate = drop_rate_for(num_patches, num_keep, num_steps=len(self.acting), fuse=self.fuses)
        self.size: Tensor | None = None
        self.path: list[Tensor] = []
        self.steps: dict[int, Condensation] = {}
        self.anchor_rows: dict[int, Tensor] = {}

    def acts_in(self, block: int) -> bool:
        return block in self.acting and self.rate > 0

    def extra_tokens(self, block: int, x: Tensor) -> Tensor | None:
        if self.anchors is None or block == 0:
            return None
        anchor_CD = self.anchors[:, block - 1].to(x.device)
        cosine_BC = F.cosine_similarity(self._summary(x).float()[:, None], anchor_CD, dim=-1)
        self.anchor_rows[block] = cosine_BC.argmax(1)
        return anchor_CD[self.anchor_rows[block]][:, None].to(x.dtype)

    def reduce(self, x: Tensor, view: BlockView) -> Reduced | None:
        num_prefix = view.num_prefix
        num_patches = x.shape[1] - num_prefix
        split = split_patches(num_patches, self.rate)
        if num_left(num_patches, self.rate, fuse=self.fuses) == num_patches:
            return None
        if split.keep < 1:
            raise BadOption(
                f"drop_rate={self.rate} leaves no patch of {num_patches} as it is in block {view.index}.",
                hint="Give a lower drop_rate.",
            )
        if self.fuses:
            score_BP = view.class_attention[:, num_prefix:]
        else:
            score_BP = rank_score(view.head_attention[:, :, num_prefix:])
        first_B = self._first_centers(view.index, split.merge, x.shape[0]).to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            made = condense(x[:, num_prefix:], score_BP.detach(), split, first_B, fuse=self.fuses)
        self.steps[view.index] = replace(made, x=made.x.detach())
        reduced = _with_books(x[:, :num_prefix], made, view.size)
        self.size = reduced.size
        return reduced

    def after_block(self, block: int, x: Tensor) -> None:
        self.path.append(self._summary(x))

    def _summary(self, x: Tensor) -> Tensor:
        if self.num_prefix:
            return x[:, 0].detach().clone()  # not a view, which would hold all of x
        size_BN = x.new_ones(x.shape[:2], dtype=torch.float32) if self.size is None else self.size
        return (size_BN[..., None] * x.detach().float()).sum(1) / size_BN.sum(1, keepdim=True)

    def _first_centers(self, block: int, band: int, batch: int) -> Tensor:
        if isinstance(self.first_center, torch.Generator):
            return torch.cat([torch.randint(band, (1,), generator=self.first_center) for _ in range(batch)])
        chosen = self.first_center
        drawn = [chosen(block, band) for _ in range(batch)] if callable(chosen) else [chosen]
        if not all(0 <= index < band for index in drawn):
            raise BadOption(f"first_center must lie in 0..{band - 1} in block {block}, got {drawn}.")
        return torch.tensor(drawn).expand(batch)


def _with_books(prefix_BND: Tensor, made: Condensation, size_BN: Tensor) -> Reduced:
    """What the sequence became, and which old token went into which new one."""
    batch, num_prefix, _ = prefix_BND.shape
    num_keep = made.keep.shape[1]
    first_merged = num_prefix + num_keep
    fuses = made.x.shape[1] > num_keep + NUM_CENTERS
    prefix_BN = torch.arange(num_prefix, device=size_BN.device).expand(batch, -1)
    kept_BS = torch.arange(num_prefix, first_merged, device=size_BN.device).expand(batch, -1)
    fused_BF = torch.full_like(made.rest, first_merged + NUM_CENTERS if fuses else -1)
    old_BN = torch.cat([prefix_BN, num_prefix + torch.cat([made.keep, made.band, made.rest], 1)], 1)
    new_BN = torch.cat([prefix_BN, kept_BS, first_merged + made.cluster, fused_BF], 1)
    target_BN = torch.empty_like(old_BN).scatter(1, old_BN, new_BN)
    anchor = [prefix_BN, num_prefix + made.keep, num_prefix + made.band.gather(1, made.centers)]
    if fuses:
        anchor.append(num_prefix + made.rest[:, :1])
    x = torch.cat([prefix_BND, made.x], 1)
    bin_BN = torch.where(target_BN < 0, x.shape[1], target_BN)  # dropped tokens go to a last bin, cut off again
    size_BK = size_BN.new_zeros(batch, x.shape[1] + 1).scatter_add(1, bin_BN, size_BN)[:, :-1]
    return Reduced(x=x, size=size_BK, target=target_BN, anchor=torch.cat(anchor, 1))


@register_method(
    "tca",
    title="Is Less More? Exploring Token Condensation as Training-free Test-time Adaptation",
    url="https://arxiv.org/abs/2410.14729",
    place="tower",
    effect="merges",
    needs=("attention",),
    output_length="at most the budget, by steps of the drop rate; more where the tower has too few patches for it",
    licence="none given",
    differs="The first merge centre is the highest score, not a random one; a block that would not get shorter is "
    "left alone; towers with fewer than 10 blocks condense at a quarter, a half and three quarters of their depth; "
    "towers without a class token are our own design.",
)
def tca(
    *,
    drop_rate: float | None = None,
    variant: str = "released",
    blocks: tuple[int, ...] | None = None,
    first_center: FirstCenter = 0,
) -> TCAStage:
    """Condenses patches in three blocks of a vision tower; without anchors unless a `TCAStream` drives it.

    Args:
        drop_rate: the official r, in [0, 1/3); it then replaces the budget `keep`. None finds r from the budget.
        variant: "released" or "paper", see the module's text.
        blocks: where to condense, rising; None means 3, 6, 9, scaled down for towers with fewer than 10 blocks.
        first_center: the first merge centre: an index into the band (0 is its highest score), a CPU
            `torch.Generator` to draw one, or a function of (block, size of the band).

    Raises:
        BadOption: an option is out of range. While the tower runs: a block the tower lacks, a first centre outside
            the band, or a drop rate that leaves no patch as it is.
    """
    if variant not in VARIANTS:
        raise BadOption(
            f"variant must be one of {', '.join(VARIANTS)}; got {variant!r}.",
            hint=did_you_mean(str(variant), VARIANTS),
        )
    is_number = isinstance(drop_rate, (int, float)) and not isinstance(drop_rate, bool)
    if drop_rate is not None and not (is_number and 0 <= drop_rate < MAX_DROP_RATE):
        raise BadOption(f"drop_rate must be a number from 0 to below 1/3, or None, got {drop_rate!r}.")
    if blocks is not None:
        blocks = tuple(blocks)
        rising = all(isinstance(b, int) and b >= 0 for b in blocks) and list(blocks) == sorted(set(blocks))
        if not blocks or not rising:
            raise BadOption(f"blocks must be rising whole numbers from 0 up, got {blocks}.")
    is_index = isinstance(first_center, int) and not isinstance(first_center, bool) and first_center >= 0
    if not (is_index or isinstance(first_center, torch.Generator) or callable(first_center)):
        raise BadOption(f"first_center must be an index, a torch.Generator or a function, got {first_center!r}.")
    return TCAStage(drop_rate=drop_rate, variant=variant, blocks=blocks, first_center=first_center)
