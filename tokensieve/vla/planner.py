"""A planner small enough for a CPU, with the interface of a big one: an instruction and a picture to behaviour tokens.

    words   -> GRU -> h                              patches -> convolutions scaled and shifted by h -> visual tokens
    [words | memory | visual tokens | digits]  -> transformer -> next token
     see each other                   causal             prefix language modelling (OmniJARVIS, section 4.1)

Why h meets the picture in convolutions: from nothing, attention learns slowly which word belongs to which patch. The
paper's LLaVA brings that along, this network does not. Its tokens are words and, after them, sum(levels) behaviour
tokens; only those of block i may come at place i of a code.

Visual tokens are four made of all patches, or the patches, of which any compression method that looks at tokens alone
keeps some; kept ones keep their positions. The memory is two tokens of each of a few earlier frames, which went through
the same convolutions. INFERRED: all of it; the paper has no such network, and its memory is text.
"""

# Shape legend: B rows, W words, P patches, R remembered frames, N tokens of each, K visual tokens, L = W + R * N + K,
#               Q digits now, d digits of a code, S codes in the running, V vocabulary, C channels, D width

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokensieve.compression import Plan, VisualTokens, apply_plan, get_method, keep_all
from tokensieve.errors import BadOption
from tokensieve.policies.checkpoint import SavedPolicy, register_policy, seeded_init
from tokensieve.vla.layers import FrameEncoder, KeysValues, Layer, LinearOfPlaces, draw
from tokensieve.vla.memory import Memories, Memory
from tokensieve.vla.planner_config import Planned, PlannerConfig
from tokensieve.vla.vocabulary import BehaviourVocabulary
from tokensieve.vla.words import MAX_LENGTH, PAD, WordReader

NUM_BEAMS = 16  # codes that stay in the running


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
            self.memories = Memories(config) if config.memory else None
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

    @property
    def memory(self) -> tuple[int, ...]:
        """Steps back of the frames that it remembers."""
        return self.config.memory

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

    def start_from(self, other: Planner) -> Planner:
        """Copies the weights of a planner that is trained, without those that make visual tokens, and returns self.

        From nothing a planner over patches learns slowly; beginning with what one over resampled tokens knows of words
        and pictures, it learns as fast as that one did.

        Raises:
            BadOption: words, levels or sizes differ.
        """
        theirs = replace(other.config, visual=self.config.visual, num_resampled=self.config.num_resampled)
        if replace(theirs, method=None, keep=1.0) != replace(self.config, method=None, keep=1.0):
            raise BadOption(
                "The planner to start from has other words, levels or sizes.",
                hint="Train both on the same episodes, with the same tokeniser.",
            )
        weights = {name: value for name, value in other.state_dict().items() if not name.startswith("visual")}
        self.load_state_dict(weights, strict=False)
        return self

    def loss(self, frames: Tensor, instructions: Sequence[str], digits: Tensor, memory: Memory | None = None) -> Tensor:
        """Cross-entropy of the digits' tokens over the whole vocabulary, 0-d float32: the labels are the response.

        Args:
            frames: `[B, H, W, 3]` uint8.
            instructions: B of them.
            digits: `[B, d]` int64.
            memory: of the frames that `config.memory` names, in that order; None where it names none.

        Raises:
            BadOption: an unknown word, a digit out of range, or frames of another size or number.
        """
        ids_Bd = self.vocabulary.digits_to_ids(digits)
        logits_BdV = self.logits(frames, instructions, ids_Bd, memory)
        return F.cross_entropy(logits_BdV.flatten(0, 1), ids_Bd.flatten())

    def logits(
        self, frames: Tensor, instructions: Sequence[str], ids_Bd: Tensor, memory: Memory | None = None
    ) -> Tensor:
        """Logits `[B, d, V]` float32 of every token of a code, given the ones before it."""
        past, mask_BL, _ = self._prefix(frames, instructions, memory)
        return self._digits(self._begun(ids_Bd[:, :-1]), past, mask_BL)

    @torch.no_grad()
    def plan(
        self,
        frames: Tensor,
        instructions: Sequence[str],
        memory: Memory | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Planned:
        """Behaviours, valid by construction. Arguments and errors as in `loss`.

        Args:
            frames: `[B, H, W, 3]` uint8.
            instructions: B of them.
            memory: see `loss`.
            generator: draws every digit, on the model's device; None takes the likeliest code that beam search finds.
        """
        past, mask_BL, plans = self._prefix(frames, instructions, memory)
        ids_Bd = self._likeliest(past, mask_BL) if generator is None else self._drawn(past, mask_BL, generator)
        kept = None if plans is None else torch.stack([plan.mask() for plan in plans])
        num_visual = self.visual_places.shape[0] if plans is None else sum(p.num_kept for p in plans) / len(plans)
        return Planned(digits=self.vocabulary.ids_to_digits(ids_Bd), kept=kept, num_visual=float(num_visual))

    def _likeliest(self, past: list[KeysValues], mask_BL: Tensor) -> Tensor:
        """`[B, d]`, by beam search: the likeliest code need not begin with the likeliest digit."""
        rows = torch.arange(len(mask_BL), device=mask_BL.device)
        ids_BSd = torch.empty(len(rows), 1, 0, dtype=torch.int64, device=rows.device)
        score_BS = torch.zeros(len(rows), 1, device=rows.device)
        for dim in range(len(self.levels)):
            block, num = self.vocabulary.block(dim), ids_BSd.shape[1]
            each = rows.repeat_interleave(num)
            beams = [(key[each], value[each]) for key, value in past]
            logits = self._digits(self._begun(ids_BSd.flatten(0, 1)), beams, mask_BL[each])[:, -1]
            digit_BSn = logits.log_softmax(-1)[:, block.start : block.stop].unflatten(0, (-1, num))
            total_BN = (score_BS[..., None] + digit_BSn).flatten(1)
            score_BS, place_BS = total_BN.topk(min(NUM_BEAMS, total_BN.shape[1]), dim=1)
            before_BSd = ids_BSd[rows[:, None], place_BS // len(block)]
            ids_BSd = torch.cat([before_BSd, (place_BS % len(block) + block.start)[..., None]], 2)
        return ids_BSd[:, 0]

    def _drawn(self, past: list[KeysValues], mask_BL: Tensor, generator: torch.Generator) -> Tensor:
        ids_Bd = torch.empty(len(mask_BL), 0, dtype=torch.int64, device=mask_BL.device)
        for dim in range(len(self.levels)):
            block = self.vocabulary.block(dim)
            logits_BV = self._digits(self._begun(ids_Bd), past, mask_BL)[:, -1]
            digit_B = draw(logits_BV[:, block.start : block.stop], generator) + block.start
            ids_Bd = torch.cat([ids_Bd, digit_B[:, None]], 1)
        return ids_Bd

    def _begun(self, ids_BQ: Tensor) -> Tensor:
        """What the digit after each of these, and the first, is predicted from: `[B, Q + 1, D]`."""
        digits_BQD = self.words.embedding(ids_BQ).to(self.begin.dtype)
        return torch.cat([self.begin.expand(len(ids_BQ), 1, -1), digits_BQD], 1)

    def _prefix(
        self, frames: Tensor, instructions: Sequence[str], memory: Memory | None
    ) -> tuple[list[KeysValues], Tensor, list[Plan] | None]:
        """Keys and values of all but the digits in every layer, `[B, L]` where there is one, and the plans."""
        ids_BW = self.words.ids(instructions)
        film_B2C = self.film(self.words(ids_BW))
        visual_BKD, plans = self._visual_tokens(frames, film_B2C)
        if self.memories is not None or memory is not None:
            visual_BKD = torch.cat([self._memory_tokens(memory, film_B2C), visual_BKD], 1)
        words_BWD = self.words.embedding(ids_BW) + self.word_places[: ids_BW.shape[1]]
        mask_BL = torch.cat([ids_BW != PAD, ids_BW.new_ones(visual_BKD.shape[:2], dtype=torch.bool)], 1)
        bias_B11L = _bias(mask_BL)[:, None, None]
        x_BLD, past = torch.cat([words_BWD, visual_BKD], 1), []
        for layer in self.layers:
            x_BLD, keys_values = layer(x_BLD, bias_B11L)
            past.append(keys_values)
        return past, mask_BL, plans

    def _digits(self, x_BQD: Tensor, past: list[KeysValues], mask_BL: Tensor) -> Tensor:
        """Logits `[B, Q, V]` of the first Q digits, which are causal."""
        num_now = x_BQD.shape[1]
        now_QQ = torch.ones(num_now, num_now, dtype=torch.bool, device=mask_BL.device).tril()
        seen_BQL = mask_BL[:, None].expand(-1, num_now, -1)
        bias_B1QK = _bias(torch.cat([seen_BQL, now_QQ.expand(len(mask_BL), -1, -1)], 2))[:, None]
        x_BQD = x_BQD + self.digit_places[:num_now]
        for layer, layer_past in zip(self.layers, past, strict=True):
            x_BQD, _ = layer(x_BQD, bias_B1QK, layer_past)
        return self.head(self.norm(x_BQD)).float()

    def _memory_tokens(self, memory: Memory | None, film_B2C: Tensor) -> Tensor:
        given = None if memory is None else tuple(memory.there.shape)
        wanted = (len(film_B2C), len(self.memory))
        if given != wanted or tuple(memory.frames.shape[:2]) != wanted:
            raise BadOption(
                f"This planner remembers the frames {list(self.memory)} steps back of {wanted[0]} environments, got "
                f"{given}."
            )
        film_X2C = film_B2C.repeat_interleave(len(self.memory), 0)
        cells = self.frame(memory.frames.flatten(0, 1), film_X2C)
        return self.memories(cells.unflatten(0, memory.there.shape), memory.there)

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
