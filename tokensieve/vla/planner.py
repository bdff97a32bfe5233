"""A planner small enough for a CPU, with the interface of a big one: an instruction and a picture to behaviour tokens.

    words   -> GRU -> h                              patches -> convolutions scaled and shifted by h -> visual tokens
    [words | visual tokens | digits]  -> transformer -> next token
     see each other           causal                    prefix language modelling (OmniJARVIS, section 4.1)

Why h meets the picture in convolutions: from nothing, attention learns slowly which word belongs to which patch. The
paper's LLaVA brings that along, this network does not. Its tokens are words and, after them, sum(levels) behaviour
tokens; only those of block i may come at place i of a code.

Visual tokens are four made of all patches, or the patches, of which any compression method that looks at tokens alone
keeps some; kept ones keep their positions. INFERRED: all of it; the paper has no such network.
"""

# Shape legend: B rows, M words, P patches, K visual tokens, L = M + K, Q digits now, d digits of a code, V vocabulary,
#               C channels, D width, H height, W width in pixels

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokensieve.compression import Plan, VisualTokens, apply_plan, get_method, keep_all
from tokensieve.policies.checkpoint import SavedPolicy, register_policy, seeded_init
from tokensieve.vla.layers import FrameEncoder, KeysValues, Layer, LinearOfPlaces, draw
from tokensieve.vla.planner_config import Planned, PlannerConfig
from tokensieve.vla.vocabulary import BehaviourVocabulary
from tokensieve.vla.words import MAX_LENGTH, PAD, WordReader


@register_policy("behaviour-planner")
class Planner(SavedPolicy):
    """See the module. `save_pretrained` and `from_pretrained` as policies.

    Args:
        config: the options, or a mapping of them.
        seed: of the first weights.

    Raises:
        BadOption: an option is not allowed, see `PlannerConfig`.
    """

    def __init__(self, config: PlannerConfig | Mapping[str, object], *, seed: int = 0):
        super().__init__()
        self.config = config = config if isinstance(config, PlannerConfig) else PlannerConfig(**config)
        self.vocabulary = BehaviourVocabulary(config.levels, first_id=1 + len(config.words))
        num_ids, width, channels = self.vocabulary.all_ids.stop, config.width, config.num_channels
        num_patches = config.grid[0] * config.grid[1]
        self._draws = torch.Generator(device="cpu").manual_seed(seed)
        with seeded_init(seed):
            self.words = WordReader(config.words, width, num_ids)
            self.film = nn.Linear(width, 2 * channels)
            self.frame = FrameEncoder(config.frame_size, config.patch_size, channels, width)
            self.frame.out = nn.Identity()  # all cells instead of one vector
            if config.visual == "resampled":
                self.visual = nn.Linear(num_patches * channels, config.num_resampled * width)
            else:
                # A map for every place: with one for all, it takes far longer to learn where things are.
                self.visual = LinearOfPlaces(num_patches, channels, width)
            num_visual = config.num_resampled if config.visual == "resampled" else num_patches
            self.visual_norm = nn.LayerNorm(width)
            self.word_places = nn.Parameter(0.02 * torch.randn(MAX_LENGTH, width))
            self.visual_places = nn.Parameter(0.02 * torch.randn(num_visual, width))
            self.digit_places = nn.Parameter(0.02 * torch.randn(len(config.levels), width))
            self.begin = nn.Parameter(0.02 * torch.randn(width))  # what the first digit is predicted from
            self.layers = nn.ModuleList(Layer(width, config.num_heads) for _ in range(config.num_layers))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, num_ids)

    def options(self) -> dict[str, object]:
        return {"config": asdict(self.config)}

    @property
    def levels(self) -> tuple[int, ...]:
        """Of the code."""
        return self.config.levels

    @property
    def network(self) -> nn.Module:
        """What learns: itself."""
        return self

    def compress(self, method: str | None, keep: float | int = 0.25, *, seed: int = 0) -> Planner:
        """Sets the compression of all later calls, training included, and returns self; None takes it off.

        Args:
            method: see `PlannerConfig`.
            keep: share in (0, 1] or number of patches.
            seed: for methods that draw at random; every call and row draws anew.

        Raises:
            BadOption: the method cannot work here, or the budget is none.
        """
        self.config = replace(self.config, method=method, keep=1.0 if method is None else keep)
        self._draws = torch.Generator().manual_seed(seed)
        return self

    def loss(self, frames: Tensor, instructions: Sequence[str], digits: Tensor) -> Tensor:
        """Cross-entropy of the digits' tokens over the whole vocabulary, 0-d float32: the labels are the response.

        Args:
            frames: `[B, H, W, 3]` uint8.
            instructions: B of them.
            digits: `[B, d]` int64.

        Raises:
            BadOption: an unknown word, a digit out of range, or frames of another size.
        """
        ids_Bd = self.vocabulary.digits_to_ids(digits)
        logits_BdV = self.logits(frames, instructions, ids_Bd)
        return F.cross_entropy(logits_BdV.flatten(0, 1), ids_Bd.flatten())

    def logits(self, frames: Tensor, instructions: Sequence[str], ids_Bd: Tensor) -> Tensor:
        """Logits `[B, d, V]` float32 of every token of a code, given the ones before it."""
        past, mask_BL, _ = self._prefix(frames, instructions)
        return self._digits(self._shifted(ids_Bd), 0, past, mask_BL)[0]

    @torch.no_grad()
    def plan(self, frames: Tensor, instructions: Sequence[str], *, generator: torch.Generator | None = None) -> Planned:
        """Behaviours, valid by construction. Arguments and errors as in `loss`.

        Args:
            frames: `[B, H, W, 3]` uint8.
            instructions: B of them.
            generator: draws every digit, on the model's device; None takes the likeliest.
        """
        past, mask_BL, plans = self._prefix(frames, instructions)
        x_B1D = self.begin.expand(len(frames), 1, -1)
        ids = []
        for dim in range(len(self.levels)):
            logits_B1V, past = self._digits(x_B1D, dim, past, mask_BL)
            block = self.vocabulary.block(dim)
            ids.append(draw(logits_B1V[:, 0, block.start : block.stop], generator) + block.start)
            x_B1D = self.words.embedding(ids[-1])[:, None]
        kept = None if plans is None else torch.stack([plan.mask() for plan in plans])
        num_visual = self.visual_places.shape[0] if plans is None else sum(p.num_kept for p in plans) / len(plans)
        return Planned(
            digits=self.vocabulary.ids_to_digits(torch.stack(ids, -1)), kept=kept, num_visual=float(num_visual)
        )

    def _shifted(self, ids_Bd: Tensor) -> Tensor:
        before_BdD = self.words.embedding(ids_Bd[:, :-1])
        return torch.cat([self.begin.expand(len(ids_Bd), 1, -1), before_BdD.to(self.begin.dtype)], 1)

    def _prefix(
        self, frames: Tensor, instructions: Sequence[str]
    ) -> tuple[list[KeysValues], Tensor, list[Plan] | None]:
        """Keys and values of words and visual tokens in every layer, `[B, L]` where there is one, and the plans."""
        ids_BM = self.words.ids(instructions)
        visual_BKD, plans = self._visual_tokens(frames, self.film(self.words(ids_BM)))
        words_BMD = self.words.embedding(ids_BM) + self.word_places[: ids_BM.shape[1]]
        mask_BL = torch.cat([ids_BM != PAD, ids_BM.new_ones(visual_BKD.shape[:2], dtype=torch.bool)], 1)
        bias_B11L = _bias(mask_BL)[:, None, None]
        x_BLD, past = torch.cat([words_BMD, visual_BKD], 1), []
        for layer in self.layers:
            x_BLD, keys_values = layer(x_BLD, bias_B11L)
            past.append(keys_values)
        return past, mask_BL, plans

    def _digits(
        self, x_BQD: Tensor, first: int, past: list[KeysValues], mask_BL: Tensor
    ) -> tuple[Tensor, list[KeysValues]]:
        """Logits `[B, Q, V]` of digits `first` .. `first + Q - 1`, which are causal, and all keys and values."""
        num_now = x_BQD.shape[1]
        now_QQ = torch.ones(num_now, num_now, dtype=torch.bool, device=mask_BL.device).tril()
        seen_BQ = [mask_BL[:, None].expand(-1, num_now, -1), mask_BL.new_ones(len(mask_BL), num_now, first)]
        bias_B1QK = _bias(torch.cat([*seen_BQ, now_QQ.expand(len(mask_BL), -1, -1)], 2))[:, None]
        x_BQD, memory = x_BQD + self.digit_places[first : first + num_now], []
        for layer, layer_past in zip(self.layers, past, strict=True):
            x_BQD, keys_values = layer(x_BQD, bias_B1QK, layer_past)
            memory.append(keys_values)
        return self.head(self.norm(x_BQD)).float(), memory

    def _visual_tokens(self, frames: Tensor, film_B2C: Tensor) -> tuple[Tensor, list[Plan] | None]:
        cells_BPC = self.frame(frames, film_B2C).unflatten(1, (-1, self.config.num_channels))
        if self.config.visual == "resampled":
            flat = self.visual(cells_BPC.flatten(1)).unflatten(1, (self.config.num_resampled, -1))
            return self.visual_norm(flat) + self.visual_places, None
        tokens_BPD = self.visual_norm(self.visual(cells_BPC))
        if self.config.method is None:
            return tokens_BPD + self.visual_places, [keep_all(tokens_BPD.shape[1], frames.device)] * len(frames)
        method, grids = get_method(self.config.method), ((1, *self.config.grid),)
        crop_P = torch.zeros(tokens_BPD.shape[1], dtype=torch.int64, device=frames.device)
        plans = [
            method(VisualTokens(features=features, grids=grids, crop=crop_P), self.config.keep, generator=self._draws)
            for features in tokens_BPD.detach()
        ]
        kept = [apply_plan(plan, x) + self.visual_places[plan.kept] for plan, x in zip(plans, tokens_BPD, strict=True)]
        return torch.stack(kept), plans


def _bias(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, -torch.inf)
