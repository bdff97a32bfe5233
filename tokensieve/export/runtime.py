"""Runs exported vision-language models: numpy and onnxruntime, no torch.

>>> vlm = OnnxVLM.from_pretrained("tiny-zoprune-onnx")
>>> print(vlm.answer("clip.mp4", "Which digit is red?"))
>>> print(vlm.answer("clip.mp4", "Which digit is red?", keep=0.1))     # one file serves every budget
"""

# Shape legend: B batch, L prompt length, K kept tokens, n placeholders of an item, M words of a question,
#               D width of the language model

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from tokensieve.budget import check_keep
from tokensieve.datasets.frames import Frames
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export.folder import AGAIN, read_json
from tokensieve.export.generation import Decoder, GenerateOptions, device_of, generate, numpy_dtype, options_from
from tokensieve.export.geometry import budget_inputs, geometry, num_kept
from tokensieve.export.items import Item, check_family, make_item
from tokensieve.export.manifest import Manifest
from tokensieve.export.packing import NEWLINE, mrope_positions
from tokensieve.export.prompts import Prompt, Tokenizer, Words, expand, padded_left
from tokensieve.export.sessions import open_session, running
from tokensieve.pipeline.answer import Answer
from tokensieve.pipeline.prompt import as_batch, as_frames, user_turn

VISION, EMBED, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"


@dataclass(frozen=True, kw_only=True, eq=False)
class OnnxPrompts:
    """A batch of prompts without their dropped tokens, padded on the left.

    Attributes:
        input_ids: `[B, L]` int64.
        inputs_embeds: `[B, L, D]`, visual tokens in their places.
        attention_mask: `[B, L]` int64, 0 at padding.
        position_ids: `[B, L]` or `[3, B, L]` int64; kept tokens have the positions of the full prompt.
        visual_tokens: "full" and "kept" of every prompt.
        kept: `[K]` int64 of every prompt, which candidates stayed.
        keep: the budget that was used.
        clips: what was shown.
        seconds: "read", "encode" and "select", of the whole batch.
    """

    input_ids: np.ndarray
    inputs_embeds: np.ndarray
    attention_mask: np.ndarray
    position_ids: np.ndarray
    visual_tokens: list[dict[str, int]]
    kept: list[np.ndarray]
    keep: float | int
    clips: list[Frames]
    seconds: dict[str, float]


class OnnxVLM:
    """An exported vision-language model.

    Attributes:
        manifest: what was exported, and what was verified.
        name: shown in answers.
    """

    def __init__(self, folder: Path, manifest: Manifest, sessions: Mapping[str, ort.InferenceSession], name: str = ""):
        self.manifest = manifest
        self.name = name or str(folder)
        self._vision, self._embed = sessions[VISION], sessions[EMBED]
        self._decoder = Decoder(sessions[DECODER])
        self._needs = {each.name: numpy_dtype(each.type) for each in self._vision.get_inputs()}
        self._processor = read_json(folder, "processor_config.json")
        self._generation = read_json(folder, "generation_config.json")
        self._tokenizer = Tokenizer(folder)
        self._words = self._placeholder_words()

    @classmethod
    def from_pretrained(cls, folder: str | Path, provider: str | None = None, threads: int | None = None) -> OnnxVLM:
        """Opens a folder that `export_vlm` wrote.

        Args:
            folder: with `tokensieve.json`.
            provider: "cuda", "cpu" or another provider of onnxruntime; left out, CUDA where it works, else the CPU.
            threads: of the CPU, for one operator; as many as onnxruntime likes when left out.

        Raises:
            UnsupportedModel: it holds no exported vision-language model, or a file is missing, damaged or not allowed.
            BadOption: the provider cannot be had here.
        """
        folder = Path(folder)
        manifest = Manifest.load(folder)
        lacking = [name for name in (VISION, EMBED, DECODER) if name not in manifest.graphs]
        if manifest.kind != "vlm" or lacking:
            raise UnsupportedModel(
                f"{folder} holds no exported vision-language model (kind {manifest.kind!r}, without {lacking}).",
                hint="Open exported towers with OnnxTower.",
            )
        check_family(manifest.family)
        if manifest.positions != "preserve":
            raise UnsupportedModel(f"positions must be 'preserve', got {manifest.positions!r}.", hint=AGAIN)
        files = {name: manifest.graphs[name] for name in (VISION, EMBED, DECODER)}
        sessions = {name: open_session(folder, file, provider, threads) for name, file in files.items()}
        return cls(folder, manifest, sessions)

    @property
    def provider(self) -> str:
        """The provider of onnxruntime that runs the decoder."""
        return self._decoder.session.get_providers()[0]

    def answer(
        self,
        media,
        question,
        *,
        keep: float | int | None = None,
        max_new_tokens: int = 64,
        read_options: Mapping | None = None,
        **options,
    ) -> Answer | list[Answer]:
        """Answers a question about a video or image; with lists, a list of answers. As `VLM.answer`.

        Args:
            media: a path, `Frames`, PIL image or uint8 array; or a list of them for a batch.
            question: a string, or one per medium.
            keep: the budget, instead of the one that the model was exported with.
            max_new_tokens: longest answer.
            read_options: passed to `read_video`.
            **options: of `GenerateOptions`; greedy unless told otherwise.

        Returns:
            `Answer`, or a list of them if `media` or `question` is a list. Tokens are selected inside the vision graph,
            so that `seconds["select"]` is 0.0 and "encode" holds both.

        Raises:
            BadOption: an empty batch or one of unequal lengths, a question that cannot be asked, a `keep` that this
                export cannot serve, or an unknown option.
            MediaError: a medium that cannot be read.
        """
        single = not isinstance(media, list) and not isinstance(question, list)
        chosen = self._options(max_new_tokens, options)  # before anything takes time
        prompts = self.prepare(media, question, keep=keep, **(read_options or {}))
        seconds = dict(prompts.seconds)
        with _timed(seconds, "generate"):
            new = self._generate(prompts, chosen)
        answers = [
            Answer(
                answer=self._tokenizer.decode(ids).strip(),
                visual_tokens=tokens,
                prompt_tokens=int(mask_L.sum()),
                generated_tokens=len(ids),
                seconds=dict(seconds),
                model=self.name,
                method=self.manifest.method,
                keep=prompts.keep,
                notes=clip.notes,
            )
            for ids, tokens, mask_L, clip in zip(
                new, prompts.visual_tokens, prompts.attention_mask, prompts.clips, strict=True
            )
        ]
        return answers[0] if single else answers

    def prepare(self, media, question, *, keep: float | int | None = None, **read_options) -> OnnxPrompts:
        """Reads, encodes and selects: what `generate` takes.

        Args:
            media, question, keep: as in `answer`.
            **read_options: passed to `read_video` for paths; 8 frames unless told otherwise.

        Raises:
            BadOption, MediaError: as `answer`.
        """
        media, questions = as_batch(media, question)
        keep = self._budget(keep)
        seconds: dict[str, float] = {}
        with _timed(seconds, "read"):
            clips = [as_frames(medium, **read_options) for medium in media]
        with _timed(seconds, "encode"):
            rows = [self._encode(clip, asked, keep) for clip, asked in zip(clips, questions, strict=True)]
            prompts, embeds, kept, full = zip(*rows, strict=True)
        return OnnxPrompts(
            input_ids=padded_left([prompt.ids for prompt in prompts], self._pad),
            inputs_embeds=padded_left(embeds, axis=0),
            attention_mask=padded_left([np.ones(len(prompt.ids), dtype=np.int64) for prompt in prompts]),
            position_ids=padded_left([prompt.positions for prompt in prompts]),
            visual_tokens=[{"full": n, "kept": len(p.places)} for n, p in zip(full, prompts, strict=True)],
            kept=list(kept),
            keep=keep,
            clips=clips,
            seconds=seconds | {"select": 0.0},
        )

    def generate(self, prompts: OnnxPrompts, *, max_new_tokens: int = 64, **options) -> list[list[int]]:
        """New token ids of every prompt, up to and including the one that ends it.

        Args:
            prompts: from `prepare`; good for any number of calls.
            max_new_tokens: longest answer.
            **options: of `GenerateOptions`; greedy unless told otherwise.

        Raises:
            BadOption: an unknown option, or a value that is not allowed.
            UnsupportedModel: the model's own generation config asks for what this runtime lacks.
        """
        return self._generate(prompts, self._options(max_new_tokens, options))

    def _options(self, max_new_tokens: int, given: Mapping[str, object]) -> GenerateOptions:
        own = dict(self._generation)
        if own.get("eos_token_id") is None:
            own["eos_token_id"] = self.manifest.model.get("eos_token_ids")
        placeholders = [i for i in (self._id("image_token_id"), self._id("video_token_id")) if i is not None]
        return options_from(own, {"max_new_tokens": max_new_tokens, **given}, placeholders)

    def _generate(self, prompts: OnnxPrompts, options: GenerateOptions) -> list[list[int]]:
        return generate(
            self._decoder,
            self._embed_next,
            prompts.inputs_embeds,
            prompts.attention_mask,
            prompts.position_ids,
            prompts.input_ids,
            options,
        )

    def _budget(self, keep: float | int | None) -> float | int:
        """The budget of this call, checked against what the graph can do."""
        manifest = self.manifest
        if keep is None:
            return manifest.keep if manifest.method else 1.0
        keep = check_keep(keep)
        if manifest.method is None and keep != 1:
            raise BadOption(
                f"This model was exported without a method, so it keeps all tokens; got keep={keep!r}.",
                hint="Export it with a method, such as --method zoprune.",
            )
        if manifest.method and not manifest.dynamic_keep and keep != manifest.keep:
            raise BadOption(
                f"This model was exported for keep={manifest.keep!r} alone, got {keep!r}.",
                hint="Leave keep out, or export the model again with the budget you want.",
            )
        return keep

    def _encode(self, clip: Frames, question: str, keep: float | int) -> tuple[Prompt, np.ndarray, np.ndarray, int]:
        """One prompt without its dropped tokens, its embeddings `[L, D]`, what was kept, and how many were shown."""
        self._words.check(question)
        item = make_item(self.manifest.family, clip, self._processor, self.manifest.model, self._words)
        full = self._prompt(item, clip, question)
        features_KD, kept_K, newline = self._look(item, full, keep)
        prompt, source_n = full.without_dropped(item.packing.slots, kept_K)
        ids_L = prompt.ids.copy()
        ids_L[prompt.places] = self._pad  # what stands there is replaced, and need not be in the vocabulary
        embeds_LD = self._embed_text(ids_L)
        rows = np.where(source_n == NEWLINE, len(features_KD), source_n)
        embeds_LD[prompt.places] = np.concatenate([features_KD, newline])[rows]
        return prompt, embeds_LD, kept_K, len(full.places)

    def _prompt(self, item: Item, clip: Frames, question: str) -> Prompt:
        """The prompt with all placeholders."""
        shown = self._words.video if item.as_video else self._words.image
        text = self._tokenizer.render([user_turn(clip, question, item.as_video)], item.template)
        ids_L = self._tokenizer.encode(expand(text, shown, item.texts))
        is_visual_L = ids_L == self._tokenizer.id(item.word)
        places = np.flatnonzero(is_visual_L)
        if len(places) != len(item.packing.slots):
            raise UnsupportedModel(
                f"The prompt has {len(places)} places for visual tokens, and there are {len(item.packing.slots)}.",
                hint=AGAIN,
            )
        positions = np.arange(len(ids_L), dtype=np.int64)
        if item.interval is not None:
            positions = mrope_positions(is_visual_L, item.packing.grids[0], item.interval)
        return Prompt(ids=ids_L, positions=positions, places=places)

    def _look(self, item: Item, full: Prompt, keep: float | int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features `[K, D]` of the tokens that stay, their places `[K]` and newlines `[0 or 1, D]`."""
        packing, manifest = item.packing, self.manifest
        inputs = item.pixels | packing.inputs | geometry(packing.grids, packing.crop)
        if manifest.method:
            count = num_kept(manifest.method, keep, packing.grids, packing.crop)
            inputs |= budget_inputs(manifest.method, count, packing.grids, packing.crop, manifest.options)
        if "question" in self._needs:
            is_text_L = ~np.isin(full.ids, list(manifest.model.get("question_ids_skipped") or ()))
            inputs["question"] = self._embed_text(full.ids[is_text_L])
            inputs["num_before"] = np.asarray([is_text_L[: full.places[0]].sum()])
        lacking = sorted(set(self._needs) - set(inputs))
        if lacking:
            raise UnsupportedModel(f"The vision graph wants inputs that this release lacks: {lacking}.", hint=AGAIN)
        fed = {name: np.ascontiguousarray(inputs[name], dtype=kind) for name, kind in self._needs.items()}
        with running(VISION):
            outputs = dict(zip((o.name for o in self._vision.get_outputs()), self._vision.run(None, fed), strict=True))
        features_KD, kept_K = outputs["features"], outputs["kept"]
        newline = outputs.get("newline", np.empty(0, features_KD.dtype)).reshape(-1, features_KD.shape[1])
        return features_KD, kept_K, newline

    def _embed_text(self, ids_L: np.ndarray) -> np.ndarray:
        """`[L, D]`."""
        vocabulary = self.manifest.model.get("vocab")
        if isinstance(vocabulary, int) and ids_L.max(initial=0) >= vocabulary:
            raise UnsupportedModel("The tokenizer has more tokens than the model.", hint=AGAIN)
        with running(EMBED):
            return self._embed.run(None, {"input_ids": ids_L[None]})[0][0]

    def _embed_next(self, ids_B1: np.ndarray) -> ort.OrtValue:
        """`[B, 1, D]`, left where the decoder runs."""
        binding = self._embed.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids_B1))
        binding.bind_output(self._embed.get_outputs()[0].name, device_of(self._embed))
        with running(EMBED):
            self._embed.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    def _id(self, name: str) -> int | None:
        value = self.manifest.model.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise UnsupportedModel(f"The manifest's {name!r} must be a token id, got {value!r}.", hint=AGAIN)
        return value

    @property
    def _pad(self) -> int:
        return self._id("pad_token_id") or 0

    def _placeholder_words(self) -> Words:
        tokenizer, image, video = self._tokenizer, self._id("image_token_id"), self._id("video_token_id")
        shows_videos = "video_processor" in self._processor
        return Words(
            image=tokenizer.named("image_token", "<image>") if image is None else tokenizer.token(image),
            video=tokenizer.named("video_token", "<video>" if shows_videos else "")
            if video is None
            else tokenizer.token(video),
            around=tokenizer.named("fake_image_token", Words.around),
            whole=tokenizer.named("global_image_token", Words.whole),
        )


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
