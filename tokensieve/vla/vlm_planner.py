"""Any vision-language model as the planner, with its visual tokens compressed by any method of this library.

    TASK: go to the red ball
    OBSERVATION: <what is left of the picture's tokens>
    CONTROL: <behaviour tokens>

Prompts and labels come from `Packer`: prefix language modelling, where instruction and picture are given and the
behaviour is learned. Here the model emits the code at once; thoughts, memory and past sub-tasks are `Packer`'s to add.
"""

# Shape legend: B environments, H height, W width in pixels, d digits of a code, L tokens of a prompt

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.prompt import PUBLISHED_PROMPTS, as_frames, run_processor, user_turn
from tokensieve.pipeline.vlm import VLM
from tokensieve.vla.constrained import BehaviourConstraint
from tokensieve.vla.packing import Packed, Packer, SubTask, collate
from tokensieve.vla.planner_config import Planned
from tokensieve.vla.vocabulary import BehaviourVocabulary, add_behaviour_tokens

_QUESTION = "What next?"  # only where the picture's tokens are looked up, never in a prompt


class VLMPlanner:
    """Plans with a model of `tokensieve.load`; set its compression with `planner.vlm.compress`.

    Args:
        vlm: with a processor. The model is changed if it has no behaviour tokens yet.
        levels: of the code; None for those that the tokenizer has.
        seed: of new rows of the embedding.

    Raises:
        BadOption: no processor; levels are missing, or other than the tokenizer's.
        UnsupportedModel: the model takes no new tokens, see `add_behaviour_tokens`.
    """

    def __init__(self, vlm: VLM, levels: Sequence[int] | None = None, *, seed: int = 0):
        if vlm.processor is None:
            raise BadOption("This VLM has no processor.", hint="Load it with tokensieve.load.")
        self.vlm, tokenizer = vlm, vlm.processor.tokenizer
        try:
            self.vocabulary = BehaviourVocabulary.of(tokenizer)
        except BadOption:
            if levels is None:
                raise
            self.vocabulary = add_behaviour_tokens(vlm.model, tokenizer, tuple(levels), seed=seed)
        if levels is not None and self.vocabulary.levels != tuple(levels):
            raise BadOption(f"The model's code has levels {list(self.vocabulary.levels)}, not {list(levels)}.")
        self.packer = Packer(tokenizer)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str | torch.device | None = None) -> VLMPlanner:
        """A model with behaviour tokens. Errors as in `tokensieve.load`, or BadOption if it has no such tokens."""
        from tokensieve.pipeline.loader import load

        return cls(load(name, device=device))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model and processor, for `tokensieve.load`."""
        self.vlm.model.save_pretrained(folder)
        self.vlm.processor.save_pretrained(folder)

    @property
    def levels(self) -> tuple[int, ...]:
        """Of the code."""
        return self.vocabulary.levels

    @property
    def network(self) -> nn.Module:
        """What learns: the whole model; freeze parts of it, or wrap it, as any transformers model."""
        return self.vlm.model

    @property
    def memory(self) -> tuple[int, ...]:
        """No earlier frames: each call sees the present one."""
        return ()

    def loss(self, frames: Tensor, instructions: Sequence[str], digits: Tensor, memory: None = None) -> Tensor:
        """Mean cross-entropy of the behaviour tokens, 0-d: instruction and picture carry no labels.

        Args:
            frames: `[B, H, W, 3]` uint8.
            instructions: B of them.
            digits: `[B, d]` int64.

        Raises:
            BadOption: an empty instruction, one that holds a special token, or digits that are no code.
        """
        pictures, pixels = self._see(frames)
        rows = zip(instructions, pictures, digits.tolist(), strict=True)
        packed = [self.packer.pack(text, [SubTask(observation=ids, digits=code)]) for text, ids, code in rows]
        inputs = self._inputs(packed, pixels)
        prepared = self.vlm.compress_inputs(inputs, target="forward", questions=list(instructions))
        return self.network(**prepared).loss

    @torch.no_grad()
    def plan(
        self,
        frames: Tensor,
        instructions: Sequence[str],
        memory: None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Planned:
        """One valid behaviour for each environment; `BehaviourConstraint` allows nothing else.

        Args:
            frames: `[B, H, W, 3]` uint8.
            instructions: B of them.
            generator: on the CPU; draws the tokens. None takes the likeliest.

        Raises:
            BadOption: as in `loss`.
        """
        pictures, pixels = self._see(frames)
        rows = zip(instructions, pictures, strict=True)
        prompts = [self.packer.prompt(text, SubTask(observation=ids), thought=False) for text, ids in rows]
        packed = [Packed(torch.tensor(ids), torch.full((len(ids),), -100)) for ids in prompts]
        prepared = self.vlm.compress_inputs(self._inputs(packed, pixels), questions=list(instructions))
        tokenizer, num_digits = self.vlm.processor.tokenizer, self.vocabulary.num_digits
        end = self.network.generation_config.eos_token_id
        end = end[0] if isinstance(end, list) else tokenizer.eos_token_id if end is None else end
        length = prepared["input_ids"].shape[1]
        seed = None if generator is None else int(torch.randint(2**31, (), generator=generator))
        cuda = [self.network.device] if self.network.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda, enabled=seed is not None):  # `generate` knows no generator
            if seed is not None:
                torch.manual_seed(seed)
            out = self.network.generate(
                **prepared,
                do_sample=seed is not None,
                min_new_tokens=num_digits,
                max_new_tokens=num_digits,
                logits_processor=[BehaviourConstraint(self.vocabulary, length, end)],
            )
        digits = self.vocabulary.ids_to_digits(out[:, length:])
        kept = [prepared.visual_tokens(row)["kept"] for row in range(len(frames))]
        return Planned(digits=digits.to(frames.device), kept=None, num_visual=sum(kept) / len(kept))

    def _inputs(self, packed: Sequence[Packed], pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        pad = self.vlm.processor.tokenizer.pad_token_id
        inputs = collate(packed, 0 if pad is None else pad)
        if "mm_token_type_ids" in pixels:  # which tokens are pictures, of the prompt as it is now
            image_id = self.network.config.image_token_id
            pixels = pixels | {"mm_token_type_ids": (inputs["input_ids"] == image_id).long()}
        return inputs | pixels

    def _see(self, frames: Tensor) -> tuple[list[list[int]], dict[str, Tensor]]:
        """Token ids of every picture as the family writes them, and what the processor made of the pixels."""
        processor = self.vlm.processor
        clips = [as_frames(frame) for frame in frames.cpu().numpy()]
        made = dict(run_processor(processor, clips, [[user_turn(clip, _QUESTION, False)] for clip in clips]))
        shape = made["input_ids"].shape
        pixels = {name: x for name, x in made.items() if name not in ("input_ids", "attention_mask", "labels")}
        odd = sorted(n for n, x in pixels.items() if x.shape == shape and n != "mm_token_type_ids")
        if odd:
            raise UnsupportedModel(f"{type(processor).__name__} writes {odd[0]}, which is unknown for packed prompts.")
        return _picture_ids(made["input_ids"], self._ids_without_picture()), pixels

    def _ids_without_picture(self) -> Tensor:
        processor = self.vlm.processor
        template = getattr(processor, "chat_template", None) or PUBLISHED_PROMPTS.get(type(processor).__name__)
        turn = {"role": "user", "content": [{"type": "text", "text": _QUESTION}]}
        text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False, chat_template=template)
        return torch.tensor(processor.tokenizer(text)["input_ids"])


def _picture_ids(ids_BL: Tensor, others: Tensor) -> list[list[int]]:
    """From the first to the last token of each row that the same prompt without a picture does not have."""
    rows = []
    for ids_L in ids_BL:
        own = (~torch.isin(ids_L, others)).nonzero()[:, 0]
        rows.append(ids_L[own[0] : own[-1] + 1].tolist())
    return rows
