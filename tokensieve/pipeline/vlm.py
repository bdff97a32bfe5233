"""What a user holds in the hand: a model, its processor, and the compression between them."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tokensieve.compression import Plan, keep_all
from tokensieve.decoding.ledger import Ledger, counted
from tokensieve.errors import BadOption
from tokensieve.pipeline.adapter import VisualItem, VLMAdapter
from tokensieve.pipeline.generation import generate_options, num_generated, num_sequences
from tokensieve.pipeline.prompt import as_batch, as_frames, run_processor, shows_video, user_turn
from tokensieve.pipeline.results import Answer, Prepared
from tokensieve.pipeline.stages import Compression, Stage, build_stages, with_policy

if TYPE_CHECKING:
    from tokensieve.pipeline.decoder_hooks import DecoderHooks


class VLM:
    """A vision-language model that can look at fewer visual tokens.

    Args:
        model: a `*ForConditionalGeneration` of a supported family; it stays an ordinary transformers model.
        processor: its processor; None if only `compress_inputs` is wanted.
        name: shown in answers.
        policy: what methods that need a trained policy use unless they are given one: a folder, or a callable.

    Raises:
        UnsupportedModel: the family is not supported.

    Example:
        >>> vlm = tokensieve.load("tiny").compress("zoprune", keep=0.25)
        >>> print(vlm.answer("clip.mp4", "Which digit is red?"))
    """

    def __init__(self, model: nn.Module, processor=None, name: str = "", policy=None):
        self.model = model
        self.processor = processor
        self.policy = policy
        self.name = name or getattr(model, "name_or_path", "") or type(model).__name__
        self.adapter = VLMAdapter(model)
        self.compression: Compression | None = None
        self._decoder: DecoderHooks | None = None

    def compress(
        self,
        method: str | Stage | Sequence[str | Stage] | None,
        keep: float | int | Sequence[float | int] = 0.25,
        *,
        positions: str = "preserve",
        seed: int = 0,
        **options,
    ) -> VLM:
        """Sets the compression of all later calls and returns self; `compress(None)` takes it off.

        Args:
            method: a name from `tokensieve.list_methods()`, a `Stage`, or a stack of them: at most one in the vision
                tower, one at the projector and one in the decoder.
            keep: fraction in (0, 1] or whole number of tokens, of those that reach the method, per image or video
                (in the decoder: per prompt); for a stack one for all, or a list.
            positions: "preserve" keeps the positions of kept tokens, "compact" renumbers.
            seed: for methods that draw at random.
            **options: the method's own options; in a stack they go to the methods that know them.

        A method in the decoder hooks the model's layers until it is taken off; `model.generate` and `model(...)` are
        compressed as well as long as it is on.

        Raises:
            BadOption: unknown method or option, or a value that is not allowed; what was set before stays.
            UnsupportedModel: the method cannot work in this model; what was set before stays.
        """
        compression, decoder = None, None
        if method is not None:
            stages = with_policy(build_stages(method, keep, options), self.policy)
            compression = Compression(stages=stages, positions=positions, seed=seed)
            if (tower := compression.at("tower")) is not None:
                self.adapter.check_tower(tower)
            if (stage := compression.at("decoder")) is not None:
                from tokensieve.pipeline.decoder_hooks import DecoderHooks

                decoder = DecoderHooks(self.model, stage.method.fn(**stage.options), stage.keep)
        if self._decoder is not None:
            self._decoder.remove()
        try:
            if decoder is not None:
                decoder.install()
        except BadOption:  # another VLM works inside the same model
            if self._decoder is not None:
                self._decoder.install()
            raise
        self.compression, self._decoder = compression, decoder
        return self

    def compress_inputs(
        self,
        inputs: Mapping[str, Tensor],
        *,
        target: str = "generate",
        frames_as_video: bool = False,
        questions: Sequence[str] | None = None,
        needs: Collection[str] = (),
    ) -> Prepared:
        """What the processor made, with visual tokens dropped; gradients reach the encoder if they are on.

        Args:
            inputs: the processor's output, with `labels` if a loss is wanted. Left as they are.
            target: "generate" or "forward" (for `model(...)`, training included).
            frames_as_video: treat all images of a prompt as frames of one video.
            questions: one a prompt, for methods that read the question as text.
            needs: what to record beside what the method in force needs ("tower", "question"), so that `reselect`
                can try other methods.

        Raises:
            BadOption: no `input_ids`, or placeholders and pixels that do not match.
        """
        if not isinstance(inputs.get("input_ids"), Tensor) or inputs["input_ids"].ndim != 2:
            raise BadOption('inputs must hold "input_ids", a tensor [batch, length]; pass return_tensors="pt".')
        inputs = {k: v.to(self.model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        if target == "generate":  # some processors make labels whether wanted or not
            inputs.pop("labels", None)
        seconds: dict[str, float] = {}
        with _timed(seconds, "encode", self.model.device):
            compression = self.compression
            items = self.adapter.encode(
                inputs,
                frames_as_video,
                needs={*needs, *(compression.needs if compression else ())},
                questions=questions,
                tower=compression.at("tower") if compression else None,
            )
        with _timed(seconds, "select", self.model.device):
            plans = [self._select(item) for item in items]
        return self._emit(inputs, items, plans, target=target, seconds=seconds)

    def _select(self, item: VisualItem) -> Plan:
        plan = self.compression.select(item.tokens) if self.compression else None
        return plan or item.tower_plan or keep_all(len(item.tokens), item.features.device)

    def _emit(self, inputs, items, plans, *, target: str, seconds: dict[str, float]) -> Prepared:
        pad = self.model.generation_config.pad_token_id
        positions = self.compression.positions if self.compression else "preserve"
        prepared = Prepared(
            self.adapter.emit(
                inputs, items, plans, positions=positions, target=target, pad_token_id=0 if pad is None else pad
            )
        )
        prepared.inputs, prepared.items, prepared.plans = inputs, items, plans
        prepared.clips, prepared.seconds = [], seconds
        return prepared

    @torch.no_grad()
    def prepare(self, media, question, *, needs: Collection[str] = (), **read_options) -> Prepared:
        """Reads, encodes and selects: the keyword arguments for `model.generate`.

        Args:
            media: a path, `Frames`, PIL image or uint8 array; or a list of them for a batch.
            question: a string, or one per medium.
            needs: as in `compress_inputs`.
            **read_options: passed to `read_video` for paths; 8 frames unless told otherwise.

        Raises:
            BadOption: an empty batch, one of unequal lengths, one of images and videos, or a question that cannot
                be asked.
            MediaError: a medium that cannot be read.
        """
        media, questions = as_batch(media, question)
        if self.processor is None:
            raise BadOption("This VLM has no processor.", hint="Pass one to VLM(...), or use compress_inputs.")
        seconds: dict[str, float] = {}
        with _timed(seconds, "read"):
            clips = [as_frames(m, **read_options) for m in media]
        with _timed(seconds, "encode"):
            turns = [
                [user_turn(clip, q, shows_video(self.processor, clip))]
                for clip, q in zip(clips, questions, strict=True)
            ]
            inputs = run_processor(self.processor, clips, turns)
        joined = clips[0].num_frames > 1 and self.adapter.family.join_frames
        prepared = self.compress_inputs(inputs, frames_as_video=joined, questions=questions, needs=needs)
        prepared.clips = clips
        prepared.seconds = {
            "read": seconds["read"],
            "encode": seconds["encode"] + prepared.seconds["encode"],
            "select": prepared.seconds["select"],
        }
        return prepared

    @torch.no_grad()
    def reselect(self, prepared: Prepared) -> Prepared:
        """The same prompts under the compression in force now, for `model.generate`: nothing is encoded again.

        For comparing methods and budgets on the same clips; also makes arguments that beam search used up afresh.

        Raises:
            BadOption: the method needs something that was not recorded (see `needs` of `prepare`), or the tower ran
                under another tower stage.
        """
        tower = self.compression.at("tower") if self.compression else None
        if any(repr(item.tower_stage) != repr(tower) for item in prepared.items):
            raise BadOption(
                "The vision tower ran with another tower stage, so its tokens cannot be reselected.",
                hint="Call prepare again.",
            )
        seconds = dict(prepared.seconds) | {"select": 0.0}
        with _timed(seconds, "select", self.model.device):
            plans = [self._select(item) for item in prepared.items]
        again = self._emit(prepared.inputs, prepared.items, plans, target="generate", seconds=seconds)
        again.clips = prepared.clips
        return again

    def answer(self, media, question, *, max_new_tokens: int = 64, read_options: Mapping | None = None, **generate):
        """Answers a question about a video or image; with lists, a list of answers.

        Args:
            media: as in `prepare`.
            question: as in `prepare`.
            max_new_tokens: longest answer.
            read_options: passed to `read_video`.
            **generate: passed to `model.generate`; greedy unless told otherwise. With `custom_generate`, say one of
                `tokensieve.decoding`, prompts are answered one by one.

        Returns:
            `Answer`, or a list of them if `media` or `question` is a list. With `num_return_sequences` above 1
            a list of that many answers stands in place of each.

        Raises:
            BadOption, MediaError: as `prepare`, `max_new_tokens` is not a whole number above 0, or an argument that
                `generate` would drop without a word beside `custom_generate`.
        """
        single = not isinstance(media, list) and not isinstance(question, list)
        media, questions = as_batch(media, question)
        options = generate_options(self.model, max_new_tokens, generate)
        custom = options.get("custom_generate") is not None
        if custom:
            options["return_dict_in_generate"] = True
        if len(media) > 1 and (custom or max(num_sequences(self.model, options)) > 1):
            # Beams over prompts of unequal length are wrong in some families (see RaggedFeatures): one by one. So are
            # decoding methods, some of which take one prompt only, and whose costs are told for each.
            batches = [([m], [q]) for m, q in zip(media, questions, strict=True)]
        else:
            batches = [(media, questions)]
        answers = []
        for batch in batches:
            answers += self._generate(self.prepare(*batch, **(read_options or {})), options)
        return answers[0] if single else answers

    @torch.no_grad()
    def _generate(self, prepared: Prepared, options: Mapping[str, object]) -> list:
        seconds = dict(prepared.seconds)
        ledger = Ledger()
        with _timed(seconds, "generate", self.model.device), counted(self.model, ledger):
            out = self.model.generate(**prepared, **options)
        ids = out if isinstance(out, Tensor) else out.sequences
        new = ids[:, prepared["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        returned = len(new) // len(prepared.clips)
        lengths = [num_generated(row, self.model, options) for row in new]
        made = getattr(out, "ledger", ledger)
        one_a_pass = ledger.forward_passes == max(lengths)
        answers = [
            Answer(
                answer=text.strip(),
                visual_tokens=prepared.visual_tokens(i // returned) | self._last_layer(i // returned),
                prompt_tokens=prepared.prompt_tokens[i // returned],
                generated_tokens=length,
                seconds=dict(seconds),
                model=self.name,
                method=self.compression.name if self.compression else None,
                keep=self.compression.keep if self.compression else 1.0,
                notes=prepared.clips[i // returned].notes,
                drafted_tokens=made.drafted_tokens,
                accepted_tokens=made.accepted_tokens,
                forward_passes=None if one_a_pass else ledger.forward_passes,
            )
            for i, (text, length) in enumerate(zip(texts, lengths, strict=True))
        ]
        return answers if returned == 1 else [answers[i : i + returned] for i in range(0, len(answers), returned)]

    def tokens_per_layer(self) -> list[list[int]] | None:
        """Visual tokens of every prompt of the last prefill in each layer; None without a method in the decoder."""
        return None if self._decoder is None else self._decoder.kept_per_layer

    def last_layer_tokens(self) -> list[int] | None:
        """`tokens_per_layer` of the last layer."""
        per_layer = self.tokens_per_layer()
        return None if per_layer is None else [layers[-1] for layers in per_layer]

    def _last_layer(self, row: int) -> dict[str, int]:
        left = self.last_layer_tokens()
        return {} if left is None else {"last_layer": left[row]}


@contextmanager
def _timed(seconds: dict[str, float], name: str, device: torch.device | None = None):
    """Adds the wall-clock seconds of the block, with the GPU's queue emptied at both ends."""

    def now() -> float:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    yield
    seconds[name] = seconds.get(name, 0.0) + now() - start
