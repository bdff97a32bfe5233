"""tokensieve models on the command line of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval).

    python -m lmms_eval --model tokensieve --model_args pretrained=tiny,method=zoprune,keep=0.25 --tasks mme

lmms-eval finds `manifest` through the entry-point group `lmms_eval.models`. What a task or a user asks for and this
plug-in cannot do is an error, not a silent change of the benchmark: several pictures in a prompt, a prompt without one,
more than one round, generation options it does not know. Only a file that cannot be read is survived: it is logged and
its answer is empty, so that it counts as wrong.
"""

from __future__ import annotations

import inspect
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from tokensieve.compression import list_methods
from tokensieve.compression.registry import did_you_mean
from tokensieve.errors import BadOption, MediaError

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

    from tokensieve.datasets.frames import Frames
    from tokensieve.pipeline.results import Answer, Prepared
    from tokensieve.pipeline.vlm import VLM

MAX_NEW_TOKENS = 1024  # where a task names no limit, as in lmms-eval's own models
PLACEHOLDER = "<image>"  # how tasks mark the place of a picture in their text
SAMPLING = ("temperature", "top_p", "top_k")
GENERATION = ("max_new_tokens", "until", "do_sample", "num_beams", "repetition_penalty", *SAMPLING)
OF_LLAVA = ("image_aspect_ratio",)  # tells LLaVA's own code how to resize; here the model's processor decides


def manifest() -> ModelManifest:
    """What the entry point `tokensieve` of the group `lmms_eval.models` names."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="tokensieve", simple_class_path=f"{__name__}.TokensieveModel")


class TokensieveModel(lmms):
    """A model of `tokensieve.load`, compressed, as lmms-eval sees it.

    Args:
        pretrained: "tiny", a folder in Hugging Face layout, or a hub id.
        method: a name from `tokensieve methods`, a stack as `tome:0.5+zoprune`, or None for all tokens.
        keep: budget, as in `VLM.compress`; 0.25 when left out.
        policy: folder or hub id of a trained policy, for the methods that need one.
        positions, seed: as in `VLM.compress`.
        dtype, revision: as in `load`.
        device: as in `load`; under `accelerate launch` the GPU of the process.
        num_frames, fps, backend: how videos are read, as in `read_video`.
        batch_size: prompts that generate together. Likelihoods are worked out one by one.
        max_batch_size: belongs to "auto", which is refused.
        **options: of the method.

    Raises:
        BadOption: an argument that does not exist, or a value that is not allowed; before weights are read.
        UnsupportedModel: as `load`.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        method: str | None = None,
        keep: float | int | None = None,
        policy: str | None = None,
        positions: str = "preserve",
        seed: int = 0,
        dtype: str = "auto",
        revision: str | None = None,
        device: str | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        backend: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options,
    ):
        from tokensieve.pipeline.evaluation.settings import make_settings
        from tokensieve.pipeline.loader import load

        super().__init__()
        _check_names(options)
        if method is None and (keep is not None or policy is not None or options):
            raise BadOption("keep, policy and options of a method need a method.", hint="Add method=... to them.")
        methods = [] if method is None else [str(method)]
        keeps = [0.25 if keep is None else keep]
        setting = make_settings(methods, keeps, policy=policy, options=options, positions=positions, seed=seed)[-1]
        self.batch_size = _batch_size(batch_size, max_batch_size)
        given = {"num_frames": num_frames, "fps": fps, "backend": backend}
        self.read_options = {name: value for name, value in given.items() if value is not None}
        if device is None and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.vlm: VLM | None = load(str(pretrained), device=device, dtype=dtype, revision=revision)
        self.device = self.vlm.model.device
        setting.apply(self.vlm)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers to requests of `(context, generation_kwargs, doc_to_visual, doc_id, task, split)`, in their order.

        Raises:
            BadOption: a generation option or a prompt that is not supported.
            MediaError: nothing at all could be read.
        """
        results = [GenerationResult("")] * len(requests)
        failures: list[MediaError] = []
        answers: list[Answer] = []
        seconds = 0.0
        for name in sorted({name for request in requests for name in request.args[1]} & set(OF_LLAVA)):
            logger.warning(f"The generation option {name!r} is for LLaVA's own code; here it changes nothing.")
        for start in self._progress(range(0, len(requests), self.batch_size)):
            batches = defaultdict(list)  # a model takes together what has one number of frames and one set of options
            for place in range(start, min(start + self.batch_size, len(requests))):
                context, wanted, doc_to_visual, *where = requests[place].args
                until, options = generation_options(wanted)
                try:
                    clip, question = self._prompt(context, doc_to_visual, where)
                except MediaError as error:
                    logger.error(f"{_name(where)} cannot be read and counts as wrong: {error}")
                    failures.append(error)
                    continue
                batches[clip.num_frames, until, tuple(options.items())].append((place, clip, question))
            for (_, until, options), batch in batches.items():
                places, clips, questions = map(list, zip(*batch, strict=True))
                stopping = {"stop_strings": list(until), "tokenizer": self.vlm.processor.tokenizer} if until else {}
                said = self.vlm.answer(clips, questions, **stopping, **dict(options))
                for place, answer in zip(places, said, strict=True):
                    counts = TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=answer.generated_tokens)
                    results[place] = GenerationResult(cut(answer.answer, until), counts)
                answers += said
                seconds += said[0].seconds["generate"]  # of the whole batch
        if failures and not answers:
            raise failures[0]
        if failures:
            logger.warning(f"{len(failures)} of {len(requests)} answers are empty because a file could not be read.")
        if answers:
            _log_tokens(answers, seconds)
        return results

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """A loss, and whether the model would say just that, for `(context, continuation, doc_to_visual, ...)`.

        lmms-eval takes the choice with the smallest number for the model's choice, so this is no log-likelihood but
        what its own models return: the mean negative log-likelihood of the continuation's tokens, in nats. White space
        in front of a continuation is left out, because a chat template brings the border between turns with it.

        Raises:
            BadOption: a prompt that is not supported.
            MediaError: a picture or video that cannot be read: there is no likelihood that counts as wrong.
        """
        from tokensieve.pipeline.evaluation.answers import choice_logliks

        if any(len(request.args) != 6 for request in requests):
            raise BadOption("tokensieve has no likelihood without a picture, as acc_mutual_info asks for.")
        results = []
        documents = [list(same) for _, same in groupby(requests, lambda r: (r.args[0], *r.args[3:]))]
        for document in self._progress(documents):
            context, _, doc_to_visual, *where = document[0].args
            texts = [self._continuation(request.args[1], where) for request in document]
            prepared = self.vlm.prepare(*self._prompt(context, doc_to_visual, where))
            logliks, counts = choice_logliks(self.vlm, prepared, prepared.plans, texts)
            said = self._greedy(prepared, max(counts))
            for loglik, count, text in zip(logliks, counts, texts, strict=True):
                ids = self.vlm.processor.tokenizer.encode(text, add_special_tokens=False)
                # Up to 0.7.3 the evaluator turns a bare pair into a string, and no task can score that.
                results.append(GenerationResult((-loglik / count, said[:count] == ids)))
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raises NotImplementedError."""
        raise NotImplementedError("tokensieve asks one question a prompt; tasks of several rounds cannot be run.")

    def clean(self) -> None:
        """Frees the model before lmms-eval scores the answers, with a judge on the same GPU perhaps."""
        self.vlm = None
        super().clean()

    def _progress(self, work: Sequence) -> tqdm:
        return tqdm(work, desc="tokensieve", disable=self.rank != 0)

    def _document(self, where: Sequence) -> Mapping:
        doc_id, task, split = where
        return self.task_dict[task][split][doc_id]

    def _prompt(self, context: str, doc_to_visual: Callable, where: Sequence) -> tuple[Frames, str]:
        """The picture or video of a document and the text that goes below it."""
        from tokensieve.pipeline.prompt import as_frames

        visuals = doc_to_visual(self._document(where)) or []
        if len(visuals) != 1:
            raise BadOption(f"{_name(where)} shows {len(visuals)} pictures or videos; tokensieve takes one a prompt.")
        text = re.sub(rf"^\s*{PLACEHOLDER}\s*", "", context)
        if PLACEHOLDER in text:
            raise BadOption(
                f"{_name(where)} has {PLACEHOLDER} inside its text; tokensieve puts pictures in front of it."
            )
        return as_frames(visuals[0], **self.read_options), text

    def _continuation(self, wanted: str | Callable, where: Sequence) -> str:
        text = str(wanted(self._document(where)) if callable(wanted) else wanted).lstrip()
        if not text:
            raise BadOption(f"{_name(where)} asks for the likelihood of nothing.")
        return text

    @torch.no_grad()
    def _greedy(self, prepared: Prepared, length: int) -> list[int]:
        """The first tokens of the model's own answer."""
        from tokensieve.pipeline.evaluation.answers import GREEDY
        from tokensieve.pipeline.generation import generate_options

        emitted = self.vlm.reselect(prepared)
        ids = self.vlm.model.generate(**emitted, **generate_options(self.vlm.model, length, GREEDY))
        return ids[0, emitted["input_ids"].shape[1] :].tolist()


def generation_options(wanted: Mapping[str, object]) -> tuple[tuple[str, ...], dict[str, object]]:
    """Stop strings, and keyword arguments for `VLM.answer`.

    As in lmms-eval's own models, a temperature above 0 means sampling; not so if `do_sample` is there and says no. What
    only matters in sampling is left out of greedy decoding.

    Args:
        wanted: the `generation_kwargs` of a task, with the user's `--gen_kwargs` in them.

    Raises:
        BadOption: an option that is not in `GENERATION`.
    """
    unknown = sorted(set(wanted) - {*GENERATION, *OF_LLAVA})
    if unknown:
        raise BadOption(f"tokensieve knows no generation option {unknown[0]!r}; it takes {', '.join(GENERATION)}.")
    given = {name: value for name, value in wanted.items() if value is not None and name not in OF_LLAVA}
    until = given.pop("until", ())
    until = (until,) if isinstance(until, str) else tuple(until)
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": given.get("temperature", 0) > 0, **given}
    if not options["do_sample"]:
        options = {name: value for name, value in options.items() if name not in SAMPLING}
    return tuple(stop for stop in until if stop), options


def cut(text: str, until: Iterable[str]) -> str:
    """The text in front of the first stop string."""
    return text[: min((text.index(stop) for stop in until if stop in text), default=None)]


def _check_names(options: Mapping[str, object]) -> None:
    """Raises BadOption, with a suggestion, unless every name in `options` is an option of some method."""
    own = [p.name for p in inspect.signature(TokensieveModel).parameters.values() if p.kind is not p.VAR_KEYWORD]
    of_methods = {option for method in list_methods() for option in method.options()}
    for name in options:
        if name not in of_methods:
            raise BadOption(
                f"tokensieve has no model argument {name!r}; there are {', '.join(own)} and the options of the method.",
                hint=did_you_mean(name, [*own, *of_methods]),
            )


def _batch_size(batch_size: int | str, max_batch_size: int | None) -> int:
    if max_batch_size is not None or not str(batch_size).isdecimal() or int(batch_size) < 1:
        given = f"{batch_size!r}" + ("" if max_batch_size is None else f" with max_batch_size {max_batch_size}")
        raise BadOption(f"batch_size must be a whole number above 0, got {given}.", hint="tokensieve has no 'auto'.")
    return int(batch_size)


def _name(where: Sequence) -> str:
    doc_id, task, split = where
    return f"Document {doc_id} of {task} ({split})"


def _log_tokens(answers: Sequence[Answer], seconds: float) -> None:
    """Puts what the model looked at under "throughput" in the results file."""
    from lmms_eval.models.model_utils.gen_metrics import log_metrics

    generated = sum(answer.generated_tokens for answer in answers)
    means = {
        f"visual_tokens_{name}": fmean(answer.visual_tokens[name] for answer in answers)
        for name in answers[0].visual_tokens
    }
    means["prompt_tokens"] = fmean(answer.prompt_tokens for answer in answers)
    log_metrics(seconds, generated, generated / seconds, additional_metrics=means)
