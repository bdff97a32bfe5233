"""Runs every setting of a benchmark in turns and keeps what was measured.

Phases of one answer:

    read      the clip is decoded and made pixel tensors, once for every prompt of the batch
    encode    vision tower and projector, with what the methods of the setting have recorded in it
    select    the method at the projector chooses, and the shorter prompt is put together
    prefill   up to the first new token, with the work of a method inside the language model
    decode    up to the last new token

Settings with the same encoding share it; within a repeat they run one after another, so that a slow minute of the
machine slows all of them.
"""

# Shape legend: B prompts, L layers

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tokensieve.compression import list_methods
from tokensieve.errors import TokensieveError
from tokensieve.pipeline.bench.flops import cache_bytes, encoder_flops, prefill_flops, step_flops
from tokensieve.pipeline.bench.phases import FirstToken, Sample, Stopwatch
from tokensieve.pipeline.bench.presets import encoder_sizes, language_sizes
from tokensieve.pipeline.bench.workload import Workload, num_pictures, side_of
from tokensieve.pipeline.evaluation.settings import Setting, make_settings
from tokensieve.pipeline.generation import generate_options
from tokensieve.pipeline.stages import with_policy
from tokensieve.pipeline.vlm import VLM

WARM_UP_FRAMES = 4
QUESTION = "What happens in the clip?"


@dataclass(kw_only=True)
class Facts:
    """What a setting amounts to at one number of frames and batch size, measured or counted once.

    Attributes:
        visual_full, visual, visual_last_layer: visual tokens of a prompt: before, in the first and in the last layer.
        prompt_full, prompt: tokens of a prompt with its text.
        flops: of "encode", "prefill" and "method" (the selection at the projector: matrix products only), of the batch.
        step_flops: of every further token, one after the other.
        cache_bytes: keys and values after the prompt, of the batch.
    """

    visual_full: int
    visual: float
    visual_last_layer: float
    prompt_full: int
    prompt: float
    flops: dict[str, int]
    step_flops: list[int]
    cache_bytes: int


@dataclass(kw_only=True)
class Result:
    """Everything a benchmark found.

    Attributes:
        rows: raw measurements, one phase of one repeat each; "settings" holds the numbers of all settings it is of.
        settings: the full prompt first.
        facts: by (frames, batch, setting).
        refused: methods that cannot run here, and why.
        weight_bytes: of all weights.
        in_use_bytes: memory in use with the weights loaded.
    """

    rows: list[dict[str, object]] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    facts: dict[tuple[int, int, int], Facts] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    weight_bytes: int = 0
    in_use_bytes: int | None = None


def settings_of(methods: Sequence[str], keeps: Sequence[float | int], width: int) -> list[Setting]:
    """What `make_settings` makes of the methods, all of them if there are none, with a policy for those that need one.

    Args:
        methods, keeps: as in `make_settings`.
        width: of the language model; a light scorer with random weights is made for it.

    Raises:
        BadOption: an unknown method or a budget that is not allowed.
    """
    from tokensieve.policies.light_scorer import LightScorer

    scorer = LightScorer(width).eval()
    full, *others = make_settings(methods or [method.name for method in list_methods()], keeps)
    return [full] + [
        replace(s, compression=replace(s.compression, stages=with_policy(s.compression.stages, scorer))) for s in others
    ]


def run(
    vlm: VLM,
    settings: Sequence[Setting],
    *,
    frames: Sequence[int],
    batches: Sequence[int],
    new_tokens: Sequence[int],
    repeats: int,
    on_row: Callable[[dict], None] = lambda row: None,
) -> Result:
    """Measures every setting; methods that cannot run on this model are left out and named.

    Args:
        vlm: the model; its compression is changed.
        settings: what `settings_of` made.
        frames, batches: frames of a prompt and prompts of a batch, every pair of them.
        new_tokens: lengths of answers.
        repeats: measured runs, after a warm-up on few frames.
        on_row: told every raw measurement at once.
    """
    result = Result(weight_bytes=sum(w.numel() * w.element_size() for w in vlm.model.parameters()))
    device = vlm.model.device
    with tempfile.TemporaryDirectory() as folder:
        loads = [
            Workload.write(vlm.model.config, t, b, Path(folder))
            for t in sorted(set(frames))
            for b in sorted(set(batches))
        ]
        warm_up = Workload.write(vlm.model.config, min(WARM_UP_FRAMES, *frames), 1, Path(folder))
        result.settings = list(settings)
        runner = _Runner(vlm, result, new_tokens, Stopwatch(device))
        runner.run(warm_up, repeats=1)
        result.settings = [s for s in settings if s.method not in result.refused]
        result.rows, result.facts = [], {}
        result.in_use_bytes = runner.watch.in_use()
        runner.on_row = on_row
        for load in loads:
            runner.run(load, repeats)
    vlm.compress(None)
    return result


class _Runner:
    def __init__(self, vlm: VLM, result: Result, new_tokens: Sequence[int], watch: Stopwatch):
        self.vlm, self.result, self.watch = vlm, result, watch
        self.new_tokens = sorted(set(new_tokens))
        self.on_row: Callable[[dict], None] = lambda row: None
        self.language = language_sizes(vlm.model.config)
        self.encoder = encoder_sizes(vlm.model.config, side_of(vlm.model.config))

    @torch.no_grad()
    def run(self, load: Workload, repeats: int) -> None:
        groups: dict[tuple, list[int]] = {}
        for number, setting in enumerate(self.result.settings):
            groups.setdefault(setting.encoding, []).append(number)
        for repeat in range(repeats):
            note = self._noting(load, repeat)
            self.watch.start()
            pixels = load.read()
            note("read", self.watch.lap(), range(len(self.result.settings)))
            inputs = load.inputs(pixels)
            for (_, needs_tower), members in groups.items():
                self._group(load, inputs, needs_tower, members, note, count=repeat == 0)

    def _group(self, load: Workload, inputs, needs_tower: bool, members: list[int], note, count: bool) -> None:
        settings = self.result.settings
        tower = settings[members[0]].tower
        needs = {"question", *(("tower",) if needs_tower else ())}
        try:
            self.vlm.compress([tower] if tower else None)
            with _block_lengths(self.vlm, load) as lengths:
                self.watch.start()
                encoded = self.vlm.compress_inputs(
                    inputs,
                    frames_as_video=load.frames_as_video,
                    questions=[QUESTION] * load.batch,
                    needs=needs,
                )
                sample = self.watch.lap()
        except TokensieveError as error:
            for number in members:
                self.result.refused.setdefault(settings[number].method, str(error))
            return
        note("encode", sample, members)
        for number in members:
            if settings[number].method in self.result.refused:
                continue
            try:
                self._setting(load, encoded, number, note, lengths if tower and count else None, count)
            except TokensieveError as error:
                self.result.refused[settings[number].method] = str(error)

    def _setting(self, load: Workload, encoded, number: int, note, lengths: list[int] | None, count: bool) -> None:
        vlm, setting = self.vlm, self.result.settings[number]
        vlm.compress(setting.compression.stages if setting.compression else None)
        method_flops = 0
        if count:
            with _Products() as products:
                vlm.reselect(encoded)
            method_flops = products.flops
        self.watch.start()
        prepared = vlm.reselect(encoded)
        note("select", self.watch.lap(), [number])
        first = FirstToken(self.watch, self.new_tokens)
        longest = self.new_tokens[-1]
        options = generate_options(
            vlm.model, longest, {"min_new_tokens": longest, "stopping_criteria": [first], "do_sample": False}
        )
        self.watch.start()
        vlm.model.generate(**prepared, **options)
        note("prefill", first.prefill, [number])
        for new_tokens, sample in first.decode.items():
            note("decode", sample, [number], new_tokens=new_tokens)
        if count:
            self.result.facts[load.frames, load.batch, number] = self._facts(load, prepared, lengths, method_flops)
        vlm.compress(None)

    def _facts(self, load: Workload, prepared, lengths: list[int] | None, method_flops: int) -> Facts:
        rows = range(load.batch)
        visual = [prepared.visual_tokens(row)["kept"] for row in rows]
        per_layer = self.vlm.tokens_per_layer() or [[count] * self.language.layers for count in visual]
        text = [prompt - count for prompt, count in zip(prepared.prompt_tokens, visual, strict=True)]
        layers_BL = [[text[row] + count for count in per_layer[row]] for row in rows]
        pictures = load.batch * num_pictures(load.config, load.frames)
        return Facts(
            visual_full=prepared.visual_tokens(0)["full"],
            visual=sum(visual) / load.batch,
            visual_last_layer=sum(counts[-1] for counts in per_layer) / load.batch,
            prompt_full=prepared.full_prompt_tokens[0],
            prompt=sum(prepared.prompt_tokens) / load.batch,
            flops={
                "encode": encoder_flops(self.encoder, pictures, lengths),
                "prefill": sum(prefill_flops(self.language, layers) for layers in layers_BL),
                "method": method_flops,
            },
            step_flops=[
                sum(step_flops(self.language, [count + step for count in layers]) for layers in layers_BL)
                for step in range(self.new_tokens[-1] - 1)
            ],
            cache_bytes=sum(cache_bytes(self.language, layers, self.vlm.model.dtype.itemsize) for layers in layers_BL),
        )

    def _noting(self, load: Workload, repeat: int):
        def note(phase: str, sample: Sample, numbers: Sequence[int], **more) -> None:
            settings = self.result.settings
            row = {
                "frames": load.frames,
                "batch": load.batch,
                "repeat": repeat,
                "phase": phase,
                **more,
                "settings": list(numbers),
                "ways": [f"{settings[n].method or 'all tokens'} {settings[n].keep:g}" for n in numbers],
                **asdict(sample),
            }
            self.result.rows.append(row)
            self.on_row(row)

        return note


class _Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products. (torch's own FlopCounterMode cannot look into `autograd.grad`.)"""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@contextmanager
def _block_lengths(vlm: VLM, load: Workload) -> Iterator[list[int]]:
    """Fills a list with the tokens that enter the tower's first block and that leave each one."""
    lengths: list[int] = []
    modality = "image" if load.config.model_type == "llava" else "video"
    hooks = []
    for block in vlm.adapter.family.tower_blocks(vlm.adapter.base, modality):

        def note(_, args, out):
            out = out[0] if isinstance(out, tuple) else out
            if not lengths:
                lengths.append(args[0].shape[-2])
            lengths.append(out.shape[-2])

        hooks.append(block.register_forward_hook(note))
    try:
        yield lengths
    finally:
        for hook in hooks:
            hook.remove()
