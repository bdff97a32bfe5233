"""Greedy search and sampling over the decoder graph, in numpy; the cache stays where the graph runs."""

# Shape legend: B batch, L prompt length, S new tokens so far, D width, X vocabulary

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real

import numpy as np
import onnxruntime as ort

from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export.folder import AGAIN
from tokensieve.export.sessions import running

# Settings of generation_config.json that would change which token comes next, and the values with which they do not.
_CHANGES_TOKENS = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "constraints": (None,),
    "diversity_penalty": (None, 0, 0.0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None,),
    "sequence_bias": (None,),
    "stop_strings": (None, []),
    "watermarking_config": (None,),
}
_CHANGES_SAMPLES = {
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
    "min_p": (None, 0, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1, 1.0),
}
QUERIES_PER_BLOCK = "queries_per_block"  # an input of decoder graphs with a default, see block_attention.py
_ON_GPU = 1024  # there a loop over small blocks would take longer to start its kernels than they run (not measured)
_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # those of transformers


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How tokens are chosen."""

    max_new_tokens: int = 64
    """Longest answer."""
    do_sample: bool = False
    """Draw from the distribution instead of taking the likeliest token."""
    temperature: float = 1.0
    """Logits are divided by it when sampling; below 1 sharpens."""
    top_k: int = 50
    """When sampling, only so many of the likeliest tokens may be drawn; 0 for all."""
    top_p: float = 1.0
    """When sampling, only the likeliest tokens that together reach this probability may be drawn."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens less likely that are in the prompt or the answer already."""
    seed: int = 0
    """Of the random numbers that sampling draws."""
    eos_token_id: int | Sequence[int] | None = None
    """Tokens that end an answer; the model's own when left out."""
    suppress_tokens: Sequence[int] = ()
    """Tokens that are never chosen."""

    def __post_init__(self):
        for name, low, kind in (("max_new_tokens", 1, int), ("top_k", 0, int), ("seed", 0, int)):
            _check(name, getattr(self, name), kind, low)
        for name in ("temperature", "top_p", "repetition_penalty"):
            _check(name, getattr(self, name), Real, 0)
            if getattr(self, name) == 0:
                raise BadOption(f"{name} must be above 0.", hint="Leave do_sample out for the likeliest token.")
        if self.top_p > 1:
            raise BadOption(f"top_p must be in (0, 1], got {self.top_p!r}.")
        if not isinstance(self.do_sample, bool):
            raise BadOption(f"do_sample must be True or False, got {self.do_sample!r}.")
        for name, value in (("eos_token_id", self.ends), ("suppress_tokens", self.suppress_tokens)):
            if isinstance(value, str) or not isinstance(value, Collection) or not all(map(_is_id, value)):
                raise BadOption(f"{name} must be token ids, got {getattr(self, name)!r}.")

    @property
    def ends(self) -> frozenset[int]:
        """The ids in `eos_token_id`."""
        given = self.eos_token_id
        if given is None:
            return frozenset()
        return frozenset(given if isinstance(given, Collection) else [given])


def options_from(config: Mapping, given: Mapping[str, object], placeholders: Collection[int]) -> GenerateOptions:
    """What a call asks for, on top of the model's own generation config.

    Args:
        config: `generation_config.json`; like `VLM.answer`, it is not asked whether to sample.
        given: `GenerateOptions` by name.
        placeholders: ids that stand for pictures and are never chosen.

    Raises:
        BadOption: an unknown option, or a value that is not allowed.
        UnsupportedModel: the config sets something that changes the tokens and that this runtime lacks.
    """
    names = [each.name for each in fields(GenerateOptions)]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise BadOption(
                f"An exported model has no option {name!r}; it takes {', '.join(names)}.",
                hint=f"Did you mean {near[0]!r}?" if near else "",
            )
    own = {n: config[n] for n in ("repetition_penalty", "eos_token_id") if config.get(n) is not None}
    if given.get("do_sample"):
        own |= {n: config[n] for n in _SAMPLING_DEFAULTS if config.get(n) is not None}
    refused = _CHANGES_TOKENS | (_CHANGES_SAMPLES if given.get("do_sample") else {})
    for name, neutral in refused.items():
        if config.get(name) not in neutral:
            raise UnsupportedModel(
                f"generation_config.json sets {name}={config[name]!r}, which exported models cannot do.",
                hint="Take it out of the file if answers may do without, or use the model with PyTorch.",
            )
    chosen = own | {name: value for name, value in given.items() if value is not None}
    suppressed = {*(config.get("suppress_tokens") or ()), *chosen.get("suppress_tokens", ()), *placeholders}
    return GenerateOptions(**(chosen | {"suppress_tokens": tuple(sorted(suppressed))}))


class Decoder:
    """The decoder graph: one step after the other, its cache kept as OrtValues.

    Args:
        session: of the graph.

    Raises:
        UnsupportedModel: its inputs are not those of a decoder with a cache.
    """

    def __init__(self, session: ort.InferenceSession):
        self.session = session
        inputs = {each.name: each for each in session.get_inputs()}
        self._past = [name for name in inputs if name.startswith("past_key_values.")]
        self._present = [name.replace("past_key_values.", "present.") for name in self._past]
        outputs = {each.name for each in session.get_outputs()}
        wanted = {"inputs_embeds", "attention_mask", "position_ids"}
        if not self._past or not {*inputs} >= wanted or not outputs >= {"logits", *self._present}:
            raise UnsupportedModel("The decoder's inputs and outputs are not those of a decoder.", hint=AGAIN)
        self.embeds_dtype = numpy_dtype(inputs["inputs_embeds"].type)
        self._empty = {}
        for name in self._past:
            _, heads, _, width = inputs[name].shape
            if not isinstance(heads, int) or not isinstance(width, int):
                raise UnsupportedModel("The decoder does not say how large its cache is.", hint=AGAIN)
            self._empty[name] = (heads, width, numpy_dtype(inputs[name].type))
        self.device = device_of(session)
        self._extra = larger_blocks(session) if self.device == "cuda" else {}
        self._cache: list[ort.OrtValue] = []

    def start(self, batch: int) -> None:
        """Forgets what was computed; the next step begins new prompts."""
        self._cache = [
            ort.OrtValue.ortvalue_from_numpy(np.zeros((batch, heads, 0, width), dtype), self.device)
            for heads, width, dtype in (self._empty[name] for name in self._past)
        ]

    def step(self, embeds: np.ndarray | ort.OrtValue, mask_BL: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Logits `[B, X]` float32 after the last of the new places.

        Args:
            embeds: `[B, L, D]` of the new places.
            mask_BL: int64 `[B, past + L]`, 0 at padding.
            positions: int64 `[B, L]` or `[3, B, L]` of the new places.
        """
        binding = self.session.io_binding()
        if isinstance(embeds, ort.OrtValue):
            binding.bind_ortvalue_input("inputs_embeds", embeds)
        else:
            binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds, dtype=self.embeds_dtype))
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(mask_BL))
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        for name, value in self._extra.items():
            binding.bind_ortvalue_input(name, value)  # an array is refused where there is a default
        for name, value in zip(self._past, self._cache, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in self._present:
            binding.bind_output(name, self.device)
        with running("decoder"):
            self.session.run_with_iobinding(binding)
        logits, *self._cache = binding.get_outputs()
        return logits.numpy()[:, -1].astype(np.float32)


def larger_blocks(session: ort.InferenceSession) -> dict[str, ort.OrtValue]:
    """What to feed a decoder graph on a GPU beside its other inputs, if it has attention over blocks of queries."""
    optional = [each.name for each in session.get_overridable_initializers()]
    if QUERIES_PER_BLOCK not in optional:
        return {}
    return {QUERIES_PER_BLOCK: ort.OrtValue.ortvalue_from_numpy(np.array([_ON_GPU]), "cpu")}


def device_of(session: ort.InferenceSession) -> str:
    """Where onnxruntime keeps the values of a session: "cuda" or "cpu"."""
    return "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"


def numpy_dtype(kind: str) -> type:
    """The dtype of an onnxruntime tensor type; UnsupportedModel for others than float32, float16 and int64."""
    known = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    if kind not in known:
        raise UnsupportedModel(f"The graphs of an exported model have no inputs of type {kind}.", hint=AGAIN)
    return known[kind]


def generate(
    decoder: Decoder,
    embed: Callable[[np.ndarray], np.ndarray | ort.OrtValue],
    embeds_BLD: np.ndarray,
    mask_BL: np.ndarray,
    positions: np.ndarray,
    ids_BL: np.ndarray,
    options: GenerateOptions,
) -> list[list[int]]:
    """New tokens of every prompt, up to and including the one that ends it.

    Args:
        decoder: the decoder graph.
        embed: ids `[B, 1]` to embeddings `[B, 1, D]`.
        embeds_BLD: of the prompts, padded on the left.
        mask_BL: int64, 0 at padding.
        positions: int64 `[B, L]` or `[3, B, L]`.
        ids_BL: int64, for the repetition penalty.
        options: how to choose.
    """
    batch = len(ids_BL)
    rng = np.random.default_rng(options.seed)
    next_position_B = positions.max((0, 2) if positions.ndim == 3 else 1) + 1
    ends = np.asarray(sorted(options.ends), dtype=np.int64)
    going_B = np.ones(batch, dtype=bool)
    new: list[list[int]] = [[] for _ in range(batch)]
    # Padding was never said, so it is not penalised: a row's answer does not depend on the rest of the batch.
    ids_BL = np.where(mask_BL == 1, ids_BL, ids_BL[:, -1:])
    decoder.start(batch)
    logits_BX = decoder.step(embeds_BLD, mask_BL, positions)
    for number in range(options.max_new_tokens):
        token_B = choose(logits_BX, ids_BL, options, rng)
        for row in np.flatnonzero(going_B):  # finished prompts go on unheard until all are
            new[row].append(int(token_B[row]))
        going_B &= ~np.isin(token_B, ends)
        if not going_B.any() or number == options.max_new_tokens - 1:
            break
        ids_BL = np.concatenate([ids_BL, token_B[:, None]], axis=1)
        mask_BL = np.concatenate([mask_BL, np.ones((batch, 1), dtype=mask_BL.dtype)], axis=1)
        position = (next_position_B + number)[:, None]
        if positions.ndim == 3:
            position = np.broadcast_to(position, (3, batch, 1))
        logits_BX = decoder.step(embed(token_B[:, None]), mask_BL, position)
    return new


def choose(logits_BX: np.ndarray, ids_BL: np.ndarray, options: GenerateOptions, rng: np.random.Generator) -> np.ndarray:
    """`[B]` int64: the next token of every row, from float32 logits and the ids so far."""
    scores_BX = logits_BX.copy()
    if options.repetition_penalty != 1:
        seen = np.take_along_axis(scores_BX, ids_BL, axis=1)
        penalty = np.float32(options.repetition_penalty)
        np.put_along_axis(scores_BX, ids_BL, np.where(seen < 0, seen * penalty, seen / penalty), axis=1)
    scores_BX[:, [i for i in options.suppress_tokens if i < scores_BX.shape[1]]] = -np.inf
    if not options.do_sample:
        return scores_BX.argmax(1)
    return np.asarray([_draw(scores_X, options, rng) for scores_X in scores_BX], dtype=np.int64)


def _draw(scores_X: np.ndarray, options: GenerateOptions, rng: np.random.Generator) -> int:
    scores_X = scores_X.astype(np.float64) / options.temperature
    if 0 < options.top_k < len(scores_X):
        scores_X[scores_X < np.partition(scores_X, -options.top_k)[-options.top_k]] = -np.inf
    order_X = np.argsort(-scores_X, kind="stable")
    share_X = np.exp(scores_X[order_X] - scores_X[order_X[0]])
    share_X /= share_X.sum()
    if options.top_p < 1:
        share_X[share_X.cumsum() - share_X >= options.top_p] = 0
    total_X = share_X.cumsum()
    return int(order_X[np.searchsorted(total_X[:-1], rng.random() * total_X[-1], side="right")])


def _check(name: str, value: object, kind: type, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value < math.inf:
        number = "whole number" if kind is int else "number"
        raise BadOption(f"{name} must be a {number} of at least {low}, got {value!r}.")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
