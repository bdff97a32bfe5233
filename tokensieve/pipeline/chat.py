"""Several questions about one clip, with its visual tokens encoded, selected and cached once.

Every turn renders the whole conversation through the model's template and gives it the visual tokens of the
first turn. Its compressed form starts with what is in the cache, so only the rest is computed, at the
positions that the full conversation would have. Where a template rewrites history, the cache is cut back to
the common part, or built anew if that ends before the picture does: the answer is the same as from scratch in
every case.
"""

# Shape legend: K length of the compressed conversation

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tokensieve.compression import Plan
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.adapter import MODALITIES, VisualItem
from tokensieve.pipeline.generation import generate_options, num_sequences
from tokensieve.pipeline.prompt import as_frames, check_question, run_processor, shows_video, user_turn
from tokensieve.pipeline.vlm import VLM


class Chat:
    """A conversation about one clip.

    The compression in force at the first question is kept. A question that fails leaves the conversation as it was.

    Args:
        vlm: a loaded model, compressed or not.
        media: a path, `Frames`, PIL image or uint8 array.
        **read_options: passed to `read_video`.

    Attributes:
        turns: the messages so far, as a chat template takes them.

    Raises:
        UnsupportedModel: the family looks at its whole prompt in both directions (PaliGemma), so that nothing of
            an earlier turn stays valid in a longer prompt.
        BadOption, MediaError: as `VLM.prepare`.

    Example:
        >>> chat = Chat(tokensieve.load("tiny").compress("zoprune", 0.25), "clip.mp4")
        >>> chat.ask("Which digit is red?"), chat.ask("Which way does it move?")
    """

    def __init__(self, vlm: VLM, media, **read_options):
        if vlm.processor is None:
            raise BadOption("A chat needs a VLM with a processor.", hint="Pass one to VLM(...).")
        if not vlm.adapter.family.causal_prompt:
            raise UnsupportedModel(
                f"{type(vlm.model).__name__} answers one question about a picture; it has no conversations.",
                hint="Use VLM.answer for each question.",
            )
        self.vlm = vlm
        self.clip = as_frames(media, **read_options)
        self.turns: list[dict] = []
        self._items: list[VisualItem] | None = None
        self._plans: list[Plan] = []
        self._positions = "preserve"
        self._cache = None
        self._cached_ids_K = torch.empty(0, dtype=torch.long)

    @torch.no_grad()
    def ask(self, question: str, *, max_new_tokens: int = 64, **generate) -> str:
        """Answers the next question.

        Args:
            question: a string that is not empty.
            max_new_tokens: longest answer.
            **generate: passed to `model.generate`; greedy unless told otherwise.

        Raises:
            BadOption: more than one beam or returned sequence, because the cache holds one conversation; an empty
                question; an argument that `generate` would drop without a word beside `custom_generate`; or a template
                that leaves out the turn with the picture.
        """
        from transformers import DynamicCache

        check_question(question)
        if self.vlm.compression and (stage := self.vlm.compression.at("decoder")):
            raise BadOption(
                f"{stage.method.name!r} drops tokens inside the language model, for one question: the cache of a chat "
                "could not be continued.",
                hint="Use a method in the tower or at the projector, or VLM.answer for each question.",
            )
        vlm, model = self.vlm, self.vlm.model
        options = generate_options(model, max_new_tokens, generate) | {"return_dict_in_generate": True}
        if max(num_sequences(model, options)) > 1:
            raise BadOption("A chat keeps one conversation in its cache: num_beams and num_return_sequences must be 1.")
        if self.turns:
            turn = {"role": "user", "content": [{"type": "text", "text": question}]}
        else:
            turn = user_turn(self.clip, question, shows_video(vlm.processor, self.clip))
        conversation = [*self.turns, turn]
        arguments = self._compressed(run_processor(vlm.processor, [self.clip], [conversation]), question)
        ids_K = arguments["input_ids"][0]
        self._keep_common(ids_K)
        if self._cache is None:
            # Without a config every layer keeps all tokens, those with a sliding window too: they mask instead of
            # forgetting, so the cache can be cut back.
            self._cache = DynamicCache()
        else:
            arguments.pop("mm_encoder_outputs", None)
        cache, self._cache = self._cache, None  # if generation is broken off, the next turn starts afresh
        out = model.generate(**arguments, cache=cache, **options)
        # The last token was sampled but never went through the model, so the cache does not hold it.
        self._cache, self._cached_ids_K = cache, out.sequences[0, : cache.get_seq_length()]
        text = vlm.processor.batch_decode(out.sequences[:, len(ids_K) :], skip_special_tokens=True)[0].strip()
        self.turns = [*conversation, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        return text

    def _compressed(self, inputs: Mapping, question: str) -> dict[str, object]:
        """The conversation without the dropped tokens, which are chosen at the first turn."""
        vlm = self.vlm
        if self._items is None:
            joined = self.clip.num_frames > 1 and vlm.adapter.family.join_frames
            prepared = vlm.compress_inputs(inputs, frames_as_video=joined, questions=[question])
            self._items, self._plans = prepared.items, prepared.plans
            self._positions = vlm.compression.positions if vlm.compression else "preserve"
            return dict(prepared)
        inputs = {k: v.to(vlm.model.device) for k, v in inputs.items() if isinstance(v, Tensor) and k != "labels"}
        items = self._placed(inputs["input_ids"])
        return vlm.adapter.emit(inputs, items, self._plans, positions=self._positions)

    def _placed(self, input_ids: Tensor) -> list[VisualItem]:
        """The items at the places their placeholders have in this turn's prompt."""
        try:
            return self.vlm.adapter.place(self._items, input_ids)
        except BadOption as error:
            hint = "Start a new Chat."
            raise BadOption("The chat template leaves out the turn with the picture.", hint=hint) from error

    def _keep_common(self, ids_K: Tensor) -> None:
        """Cuts the cache back to what the new prompt starts with, at least one token short of all of it."""
        if self._cache is None:
            return
        limit = min(len(self._cached_ids_K), len(ids_K) - 1)
        same = self._cached_ids_K[:limit] == ids_K[:limit]
        common = limit if bool(same.all()) else int(same.int().argmin())
        config = self.vlm.model.config
        visual = [getattr(config, f"{m}_token_id", None) for m in MODALITIES]
        visual_K = torch.isin(ids_K, torch.tensor([v for v in visual if v is not None], device=ids_K.device))
        if visual_K[common:].any():  # part of the picture would have to go through the model again: then all of it
            self._cache = None
            return
        excess = self._cache.get_seq_length() - common
        if excess:
            self._cache.crop(-excess)
