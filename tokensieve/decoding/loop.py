"""What all decoding methods share: the seat in `model.generate`, refusals, drawing tokens, stopping, and the output.

`generate` prepares ids, masks, positions, cache, processors and stopping criteria, then calls what it was given as
`custom_generate`. Its arguments `streamer`, `assistant_model`, `assistant_tokenizer`, `tokenizer` and `synced_gpus`
never get there and leave no trace (transformers 5.24), so they cannot be refused here: `VLM.answer` and
`check_arguments` do it.
"""

# Shape legend: B rows, L tokens so far, S prompt tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from tokensieve.decoding.ledger import Ledger, num_generated
from tokensieve.decoding.session import DecodeSession
from tokensieve.errors import BadOption

LOST = ("assistant_model", "assistant_tokenizer", "streamer", "synced_gpus", "tokenizer")
# Options of a generation config that a method's own loop has no place for, with the values that ask for nothing.
_REFUSED = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "speculation_type": (None,),
    "use_cache": (None, True),
    "cache_implementation": (None, "dynamic"),
    "compile_config": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_logits": (None, False),
    "output_scores": (None, False),
    "num_return_sequences": (None, 1),
}
# These remember what they saw at the last call, which another branch may have made.
_WITH_STATE = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")


@dataclass
class DecodeOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Attributes:
        sequences: `[B, L]` prompt and answer, padded on the right.
        cache: holds all of `sequences` but the last token.
        ledger: what it cost.
        details: what the method tells about its work; see each method.
    """

    sequences: Tensor | None = None
    cache: object | None = None
    ledger: Ledger | None = None
    details: dict[str, object] | None = None


@dataclass(frozen=True)
class Decoding:
    """A decoding method with its options, for `model.generate(..., custom_generate=...)`.

    Attributes:
        name: of the method.
        run: continues a `Loop` to its end and returns the output's `details`.
        one_prompt: whether it takes one prompt at a time.
        branches: whether it follows several continuations of a row, of which one stays.
        seed: of the draws; every call starts from it.
    """

    name: str
    run: Callable[[Loop], dict[str, object]]
    one_prompt: bool = False
    branches: bool = True
    seed: int = 0

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        """Called by `generate`.

        Raises:
            BadOption: an option of the generation config, or a processor, that the method has no place for; or several
                prompts for a method that takes one.
            UnsupportedModel: the model failed a test of what the method needs.
        """
        self._check(input_ids, generation_config, logits_processor, model_kwargs)
        loop = Loop(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, self.seed)
        details = self.run(loop)
        loop.session.truncate(max(0, loop.session.length - loop.cached_length))
        new = loop.ids_BL[:, loop.prompt_length :]
        loop.ledger.generated_tokens = num_generated(new, getattr(generation_config, "_eos_token_tensor", None))
        if not generation_config.return_dict_in_generate:
            return loop.ids_BL
        return DecodeOutput(
            sequences=loop.ids_BL,
            cache=loop.session.cache,
            ledger=loop.ledger,
            details={"method": self.name, **details},
        )

    def _check(self, input_ids: Tensor, config, processors, model_kwargs: Mapping[str, object]) -> None:
        for name, allowed in _REFUSED.items():
            value = getattr(config, name, None)
            if not any(value is a or (value == a and type(value) is type(a)) for a in allowed):
                raise BadOption(
                    f"{self.name} decoding has no place for {name}={value!r}.",
                    hint=f"Leave {name} out, or leave custom_generate out.",
                )
        embeds = model_kwargs.get("inputs_embeds")
        rows = len(input_ids if embeds is None else embeds)
        if self.one_prompt and rows > 1:
            raise BadOption(f"{self.name} decoding takes one prompt at a time, got {rows}.", hint="Call it in a loop.")
        for processor in processors if self.branches else ():
            if type(processor).__name__ in _WITH_STATE:
                raise BadOption(
                    f"{self.name} decoding follows several branches, and {type(processor).__name__} remembers one.",
                    hint="Leave guidance_scale and SynthID watermarks out.",
                )


def check_arguments(given: Mapping[str, object]) -> None:
    """Refuses arguments of `generate` that never reach a `custom_generate` callable.

    Raises:
        BadOption: one of them is given beside `custom_generate`.
    """
    lost = [name for name in LOST if given.get(name) is not None]
    if given.get("custom_generate") is not None and lost:
        raise BadOption(
            f"generate drops {', '.join(lost)} silently when it is given custom_generate.", hint="Leave them out."
        )


@dataclass(eq=False)
class Loop:
    """The state of one call: the session and the ids so far. Methods advance both.

    Attributes:
        session: the prompts, run.
        ids_BL: what there is so far, prompt included (empty prompts for embeddings).
        logits_BV: raw logits of the next token.
        prompt_length: S.
        generator: of all draws.
    """

    model: nn.Module
    ids_BL: Tensor
    processors: Callable[[Tensor, Tensor], Tensor]
    criteria: Callable[[Tensor, object], Tensor]
    config: object
    model_kwargs: dict[str, object]
    seed: int
    session: DecodeSession = field(init=False)
    logits_BV: Tensor = field(init=False)
    prompt_length: int = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.session = DecodeSession(self.model)
        self.prompt_length = self.ids_BL.shape[1]
        self.logits_BV = self.session.prefill(self.ids_BL, generation_config=self.config, **self.model_kwargs)
        self._hidden = self.session.length - self.prompt_length  # embeddings without ids
        self.generator = torch.Generator(device=self.logits_BV.device).manual_seed(self.seed)

    @property
    def ledger(self) -> Ledger:
        return self.session.ledger

    @property
    def pad_id(self) -> int:
        """Fills the rows that have ended; 0 where no row can."""
        pad = getattr(self.config, "_pad_token_tensor", None)
        return 0 if pad is None else int(pad)

    @property
    def cached_length(self) -> int:
        """How many tokens of the sequence `generate` leaves in the cache: all but the last."""
        return self._hidden + max(self.prompt_length, self.ids_BL.shape[1] - 1)

    def scores(self, ids_BL: Tensor, logits_BV: Tensor) -> Tensor:
        """`[B, V]`, the logits after all processors."""
        return self.processors(ids_BL, logits_BV.clone())

    def draw(self, scores_BV: Tensor, *, sample: bool | None = None) -> Tensor:
        """`[B]` the next token: drawn, or the likeliest if `do_sample` (or `sample`) is off."""
        if not (self.config.do_sample if sample is None else sample):
            return scores_BV.argmax(-1)
        return torch.multinomial(scores_BV.softmax(-1), 1, generator=self.generator)[:, 0]

    def stopped(self, ids_BL: Tensor) -> Tensor:
        """`[B]` bool: an end token, the length limit or any other criterion was met by the last token."""
        return self.criteria(ids_BL, None).bool()
