"""What choosing costs: time and extra memory of every registered method, beside one layer of the language model.

    python benchmarks/selection.py --repeats 5 --threads 1 --out docs/benchmarks/selection.md

Sizes: 576 tokens (an image of LLaVA-1.5), 2,880 (the five tiles of LLaVA-NeXT) and 6,272 (32 frames of 14 x 14, as in
LLaVA-OneVision), each at widths 4096 and 3584. Tokens, towers and weights are random, frames resemble the ones before.
All ways run one after another within each repeat, so that a busy machine slows all of them; compare the ratios.
Methods come from the registry. `--smoke` runs tiny sizes to see that everything works.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from tokensieve.compression import (
    Method,
    Projector,
    Question,
    TowerLayer,
    TowerView,
    TwoLayerMLP,
    VisualTokens,
    apply_plan,
    in_dtype_of_input,
    list_methods,
    num_to_keep,
)
from tokensieve.compression.decoder_stage import DecoderTokens, Raster
from tokensieve.compression.tokens import identity
from tokensieve.compression.tower_stage import BlockView
from tokensieve.errors import TokensieveError
from tokensieve.pipeline.bench.phases import Stopwatch
from tokensieve.pipeline.machine import processor_name

NUM_TEXT = 20  # tokens of the question
NOTES = """
- `projector` methods: the whole method on tokens that carry everything it may ask for (recorded queries and keys of the
  tower, projector, question). `cacovid` gets a policy that costs nothing: its trained scorer is not in the time.
- `tower` methods: the reductions of all blocks of the tower together, on given attention and keys. `decoder` methods:
  the selections of all steps together, on given attention rows. What it costs to compute these in a model, and what the
  shorter sequence saves, is not in the time.
- kept: tokens that stay, of `tower` methods patches of all pictures. A method that cannot work on an item says so.
- share of a layer: median time over the median time of one layer of the language model on all tokens.
- extra MiB: peak memory of the first call above what was in use before it, kept tables included.
"""


@dataclass(frozen=True, kw_only=True)
class Item:
    """The shape of one image or video.

    Attributes:
        kind: "image", "tiles" (a base view and four tiles) or "video".
        groups: pictures that go through the tower.
        side, token_side: patches and tokens along a side of one picture.
        heads, head_width, blocks: of the tower.
        num_prefix: 1 for a class token.
    """

    kind: str
    groups: int
    side: int
    token_side: int
    heads: int
    head_width: int
    blocks: int
    num_prefix: int

    @property
    def num_tokens(self) -> int:
        return self.groups * self.token_side**2

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        side = self.token_side
        return {
            "image": ((1, side, side),),
            "tiles": ((1, side, side), (1, 2 * side, 2 * side)),
            "video": ((self.groups, side, side),),
        }[self.kind]


@dataclass(frozen=True, kw_only=True)
class Language:
    """One decoder layer: its size, and how many the model has."""

    name: str
    width: int
    heads: int
    kv_heads: int
    hidden: int
    layers: int


CLIP = dict(side=24, token_side=24, heads=16, head_width=64, blocks=24, num_prefix=1)
ITEMS = [
    Item(kind="image", groups=1, **CLIP),
    Item(kind="tiles", groups=5, **CLIP),
    Item(kind="video", groups=32, side=27, token_side=14, heads=16, head_width=72, blocks=26, num_prefix=0),
]
LANGUAGES = [
    Language(name="Llama-2-7B", width=4096, heads=32, kv_heads=32, hidden=11008, layers=32),
    Language(name="Qwen2-7B", width=3584, heads=28, kv_heads=4, hidden=18944, layers=28),
]


def smaller(item: Item) -> Item:
    side = dict(side=7, token_side=4) if item.kind == "video" else dict(side=6, token_side=6)
    return replace(item, **side, groups=min(item.groups, 5), heads=2, head_width=8, blocks=4)


SMOKE = Language(name="tiny", width=32, heads=4, kv_heads=2, hidden=48, layers=8)


class Bench:
    """Random tensors of one dtype on one device; frames resemble the ones before."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def pictures(self, item: Item, places: int, width: int) -> Tensor:
        """`[groups * places, width]`: of a video every 8 frames a new scene, else noise around the first frame."""
        lengths = 0.5 + 1.5 * self.draw(item.groups * places, 1).abs()
        if item.kind != "video":
            return self.draw(item.groups * places, width) * lengths
        scenes = [self.draw(places, width) for _ in range(-(-item.groups // 8))]
        return torch.cat([scenes[i // 8] + 0.3 * self.draw(places, width) for i in range(item.groups)]) * lengths

    def tokens(self, item: Item, language: Language) -> VisualTokens:
        tower_width, patches = item.heads * item.head_width, item.side**2
        to_tokens = {"image": lambda _: identity, "tiles": tiles_to_raster, "video": pooled}[item.kind](item)
        inputs = self.pictures(item, patches, tower_width)
        length = item.num_prefix + patches
        groups = [(2 * self.draw(item.heads, length, item.head_width),) * 2 for _ in range(item.groups)]
        layer = TowerLayer(
            query=tuple(query for query, _ in groups),
            key=tuple(key.flip(1) for _, key in groups),
            scale=item.head_width**-0.5,
            num_prefix=item.num_prefix,
            to_tokens=to_tokens,
        )
        prefix = self.draw(item.num_prefix, tower_width)
        mlp = nn.Sequential(
            nn.Linear(tower_width, language.width), nn.GELU(), nn.Linear(language.width, language.width)
        )
        mlp.requires_grad_(False).to(self.device, self.dtype)
        return VisualTokens(
            features=self.pictures(item, item.token_side**2, language.width),
            grids=item.grids,
            crop=crops(item).to(self.device),
            times_s=torch.arange(item.groups) / 2.0 if item.kind == "video" else None,
            projector=Projector(
                inputs=inputs,
                fn=in_dtype_of_input(mlp),
                to_tokens=to_tokens,
                mlp=TwoLayerMLP(w1=mlp[0].weight, b1=mlp[0].bias, w2=mlp[2].weight, act=mlp[1]),
            ),
            tower=TowerView(
                layers={-1: layer, -2: layer},
                hidden=tuple(torch.cat([prefix, picture]) for picture in inputs.split(patches)),
            ),
            question=Question(embeds=self.draw(NUM_TEXT, language.width), text="What happens in the clip?"),
        )

    def layer(self, language: Language, num_tokens: int) -> Callable[[], object]:
        """A forward of one decoder layer (and the final norm) over `num_tokens`."""
        sizes = dict(
            hidden_size=language.width,
            num_attention_heads=language.heads,
            num_key_value_heads=language.kv_heads,
            intermediate_size=language.hidden,
            num_hidden_layers=1,
            vocab_size=8,
            max_position_embeddings=max(8192, num_tokens),
        )
        family = transformers.LlamaModel if language.kv_heads == language.heads else transformers.Qwen2Model
        model = family(family.config_class(**sizes)).to(self.device, self.dtype).eval()
        hidden = self.draw(1, num_tokens, language.width)
        return lambda: model(inputs_embeds=hidden, use_cache=False)

    def way(self, method: Method, item: Item, language: Language, tokens: VisualTokens, keep: float) -> Callable:
        """A function that runs the method once and returns how many tokens it keeps."""
        if method.place == "tower":
            return self.tower_way(method, item, keep)
        if method.place == "decoder":
            return self.decoder_way(method, language, tokens, keep)
        options = {"policy": free_policy} if "policy" in method.needs else {}
        return lambda: method(tokens, keep, **options).num_kept

    def tower_way(self, method: Method, item: Item, keep: float) -> Callable[[], int]:
        stage = method.fn()
        first = self.draw(item.groups, item.num_prefix + item.side**2, item.heads * item.head_width)
        maps = self.draw(item.groups, item.heads, first.shape[1]).float().softmax(-1)
        keys = self.draw(item.groups, first.shape[1], item.head_width).float()

        def run() -> int:
            x, size = first, first.new_ones(first.shape[:2], dtype=torch.float32)
            about = dict(num_tokens=x.shape[1], num_prefix=item.num_prefix, num_blocks=item.blocks - 1)
            stage.begin(**about, keep=keep, batch=item.groups)
            for block in range(item.blocks - 1):
                if stage.acts_in(block):
                    stage.extra_tokens(block, x)
                    maps_BHN = maps[:, :, : x.shape[1]]
                    view = BlockView(
                        index=block,
                        num_blocks=item.blocks - 1,
                        num_prefix=item.num_prefix,
                        size=size,
                        class_attention=maps_BHN.mean(1),
                        head_attention=maps_BHN,
                        keys=keys[:, : x.shape[1]],
                    )
                    reduced = stage.reduce(x, view)
                    if reduced is not None:
                        x, size = reduced.x, reduced.size
                stage.after_block(block, x)
            return (x.shape[1] - item.num_prefix) * item.groups

        return run

    def decoder_way(self, method: Method, language: Language, tokens: VisualTokens, keep: float) -> Callable[[], int]:
        stage, raster = method.fn(), raster_of(tokens)
        rows = self.draw(language.heads, len(tokens)).float().softmax(-1)
        num_keep = num_to_keep(keep, len(tokens))

        def run() -> int:
            hidden, memory, counts, where = tokens.features, {}, [], raster
            steps = {step.layer: step for step in stage.steps(language.layers)}
            if any(step.queries == "raters" for step in steps.values()):
                stage.raters(hidden, tokens.question.embeds)
            for layer in range(language.layers):
                if layer in steps:
                    seen = DecoderTokens(
                        hidden=hidden,
                        attention=partial(rows.narrow, 1, 0, len(hidden)),
                        raster=where,
                        num_first=len(tokens),
                        num_keep=num_keep,
                        counts=tuple(counts),
                        num_layers=language.layers,
                        memory=memory,
                    )
                    plan = stage.select(steps[layer], seen)
                    hidden = apply_plan(plan, hidden)
                    where = Raster(**{name: value[plan.kept] for name, value in vars(where).items()})
                counts.append(len(hidden))
            if stage.decode_layer(language.layers) is None:
                return len(hidden)
            chosen = stage.select_at_decode(rows.mean(0)[: len(hidden)], num_keep, None)
            return int(stage.select_at_decode(rows.mean(0)[: len(hidden)], num_keep, chosen).kept.sum())

        return run


def tiles_to_raster(item: Item) -> Callable[[Tensor], Tensor]:
    """The base view, then the four tiles as one raster of twice the side."""
    side = item.side
    base, tiles = torch.arange(5 * side * side).split([side * side, 4 * side * side])
    order = torch.cat([base, tiles.view(2, 2, side, side).transpose(1, 2).flatten()])
    return lambda values: values[order.to(values.device)]


def pooled(item: Item) -> Callable[[Tensor], Tensor]:
    """Bilinear pooling of every frame to `token_side`."""

    def to_tokens(values: Tensor) -> Tensor:
        frames = values.reshape(item.groups, item.side, item.side, -1).permute(0, 3, 1, 2)
        small = F.interpolate(frames, size=(item.token_side,) * 2, mode="bilinear").permute(0, 2, 3, 1)
        return small.reshape(item.num_tokens, *values.shape[1:])

    return to_tokens


def crops(item: Item) -> Tensor:
    if item.kind != "tiles":
        return torch.zeros(item.num_tokens, dtype=torch.int64)
    return tiles_to_raster(item)(torch.arange(5).repeat_interleave(item.side**2))


def raster_of(tokens: VisualTokens) -> Raster:
    parts = [
        torch.stack(torch.meshgrid(torch.tensor(i), torch.arange(t), torch.arange(h * w), indexing="ij")).flatten(1)
        for i, (t, h, w) in enumerate(tokens.grids)
    ]
    block, frame, place = torch.cat(parts, dim=1).to(tokens.features.device)
    return Raster(block=block, frame=frame, place=place)


def free_policy(tokens: VisualTokens) -> tuple[Tensor, Tensor]:
    score_N = tokens.features.float()[:, 0]
    frames = score_N.view(tokens.grids[0][0] if len(tokens.grids) == 1 else 1, -1).mean(1)
    return torch.stack([-score_N, score_N], -1), torch.stack([-frames, frames], -1)


# --- measuring


def seconds(way: Callable, device: str) -> float:
    start = time.perf_counter()
    way()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def extra_bytes(way: Callable, device: str) -> tuple[object, int | None]:
    """What `way` returns, and the peak memory of the call above what was in use before; None where not known."""
    watch = Stopwatch(torch.device(device))
    before = watch.in_use()
    watch.start()
    result, peak = way(), watch.lap().peak_bytes
    return result, None if peak is None else max(0, peak - before)


@torch.no_grad()
def measure(bench: Bench, item: Item, language: Language, methods: list[Method], keep: float, repeats: int) -> str:
    """The table of one size."""
    tokens = bench.tokens(item, language)
    ways, kept, memory, refused = {"layer": bench.layer(language, item.num_tokens)}, {}, {}, {}
    memory["layer"] = extra_bytes(ways["layer"], bench.device)[1]
    for method in methods:
        try:
            way = bench.way(method, item, language, tokens, keep)
            kept[method.name], memory[method.name] = extra_bytes(way, bench.device)
            ways[method.name] = way
        except TokensieveError as error:
            refused[method.name] = error.message
    times = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(seconds(way, bench.device))

    grids = " + ".join("x".join(map(str, grid)) for grid in item.grids)
    lines = [
        f"## {item.num_tokens} tokens ({grids}), width {language.width}\n",
        "| method | place | kept | median ms | fastest to slowest ms | share of a layer | extra MiB |",
        "|---|---|---|---|---|---|---|",
        row(f"one {language.name} layer", "-", item.num_tokens, times["layer"], times["layer"], memory["layer"]),
    ]
    for method in methods:
        name = method.name
        if name in refused:
            lines.append(f"| `{name}` | {method.place} | {refused[name]} | - | - | - | - |")
        else:
            lines.append(row(f"`{name}`", method.place, kept[name], times[name], times["layer"], memory[name]))
    return "\n".join(lines)


def row(name: str, place: str, kept: int, times: list[float], layer: list[float], memory: int | None) -> str:
    median, share = statistics.median(times), statistics.median(times) / statistics.median(layer)
    mib = "-" if memory is None else f"{memory / 2**20:,.1f}"
    spread = f"{min(times) * 1e3:,.2f} to {max(times) * 1e3:,.2f}"
    return f"| {name} | {place} | {kept} | {median * 1e3:,.2f} | {spread} | {share:.4f} | {mib} |"


def machine(device: str, threads: int) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor_name()}, {threads} thread(s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="times each way is run, after a first call")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="", help="float32, bfloat16 or float16; float32 on a CPU, else bfloat16")
    parser.add_argument("--keep", type=float, default=0.25, help="share of the tokens that stays")
    parser.add_argument("--tokens", default="", help="some of the sizes, such as 576,6272")
    parser.add_argument("--widths", default="", help="one of the widths")
    parser.add_argument("--methods", default="", help="some of the methods")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: do they all run?")
    parser.add_argument("--out", default="", help="Markdown file; what stands above its first table is kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # methods that keep everything say so; the table shows it

    def chosen(values, wanted: str, name):
        return [v for v in values if not wanted or str(name(v)) in wanted.split(",")]

    methods = chosen(list_methods(), options.methods, lambda m: m.name)
    items = chosen(ITEMS, options.tokens, lambda i: i.num_tokens)
    languages = chosen(LANGUAGES, options.widths, lambda k: k.width)
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    bench = Bench(options.device, getattr(torch, dtype))
    measure(bench, smaller(ITEMS[0]), SMOKE, methods, options.keep, 1)  # loads what loads lazily
    if options.smoke:
        items, languages = [smaller(item) for item in items], [SMOKE]
    tables = [measure(bench, i, k, methods, options.keep, options.repeats) for i in items for k in languages]
    text = "\n\n".join(
        [
            f"Machine: {machine(options.device, options.threads)}; Python {platform.python_version()}, torch "
            f"{torch.__version__}, transformers {transformers.__version__}; {dtype}, keep {options.keep:g}; median of "
            f"{options.repeats} interleaved repeats after a first call.",
            NOTES.strip(),
            *tables,
        ]
    )
    print(text)
    if options.out:
        path = Path(options.out)
        start = path.read_text().split("\n\nMachine: ")[0] if path.exists() else "# What choosing costs"
        path.write_text(f"{start}\n\n{text}\n")


if __name__ == "__main__":
    main()
