"""TCA on streams of corrupted digits, with its parts and its peers, on a tiny CLIP that is trained here.

    python benchmarks/tca_digits.py --out docs/benchmarks/tca_digits.md

A CLIP of transformers (12 image blocks, so that blocks 3, 6 and 9 exist) learns clean scikit-learn digits with
captions such as "a photo of the digit three", from the training handwriting. A stream is the 360 images of the test
handwriting under one corruption, in a random order. All methods see the same images in the same orders with the same
prompts. No method is tuned: TCA has the official settings for DTD, TDA values from inside its published ranges. The
strengths of noise and contrast were set on the validation handwriting, so that the dense model loses about a third.
ToMe and EViT get the budget whose compute is nearest to TCA's. The model is kept in `--run` and used again.
"""

# Shape legend: B images, C classes, O width of the features, S side of an image

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur
from transformers import CLIPConfig, CLIPModel

import tokensieve as ts
from tokensieve.datasets.digits import digit_ids, glyphs
from tokensieve.pipeline.adaptation import TCAStream
from tokensieve.pipeline.machine import processor_name
from tokensieve.pipeline.optim import muon_adamw, warm_up_then_cosine
from tokensieve.pipeline.towers import compress_tower, tower_macs

SIDE, PATCH, WIDTH, DEPTH = 32, 4, 48, 12
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = ("a photo of the digit {}", "a picture of the number {}", "the handwritten digit {}", "a scan of a {}")
WORDS = ["<pad>", "<start>", *sorted({w for p in PROMPTS for w in p.split()} - {"{}"}), *NAMES, "<end>"]
CONTEXT = 8
BATCH = 64
DROP_RATE = 0.1
LOW_DROP_RATE = 0.035
TCA_SETTINGS = {"reservoir_size": 3, "scale": 1.0, "lambd": 2.0, "beta": 6.0}
TDA_SETTINGS = {"alpha": 2.0, "beta": 5.0, "alpha_negative": 0.117, "beta_negative": 1.0}
HEAD = "Measured on "  # begins the part of --out that is written anew
CORRUPTIONS = ("clean", "noise", "blur", "contrast", "inversion", "shift")


# --- data


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Clean images `[B, S, S]` in [0, 1] and labels `[B]` of one split of the handwriting."""
    ids = digit_ids(split)
    labels = torch.cat([torch.full((len(part),), digit) for digit, part in enumerate(ids)])
    return torch.from_numpy(glyphs())[torch.cat([torch.from_numpy(part) for part in ids])], labels


def moved(images_BSS: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Every image moved by up to `limit` pixels each way, zeros coming in."""
    padded = F.pad(images_BSS, (limit,) * 4)
    starts = torch.randint(2 * limit + 1, (len(images_BSS), 2), generator=generator).tolist()
    side = images_BSS.shape[-1]
    return torch.stack([image[y : y + side, x : x + side] for image, (y, x) in zip(padded, starts, strict=True)])


def corrupted(images_BSS: Tensor, kind: str) -> Tensor:
    """The same corruption of every image, whatever the order of the stream later."""
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        return (images_BSS + 0.3 * torch.randn(images_BSS.shape, generator=generator)).clamp(0, 1)
    if kind == "blur":
        return gaussian_blur(images_BSS, [21, 21], [4.0, 4.0])
    if kind == "contrast":
        return 0.5 + 0.45 * (images_BSS - 0.5)
    if kind == "inversion":
        return 1 - images_BSS
    if kind == "shift":
        return moved(images_BSS, 6, generator)
    return images_BSS


def as_pixels(images_BSS: Tensor) -> Tensor:
    return (images_BSS[:, None].expand(-1, 3, -1, -1) - 0.5) / 0.5


def as_ids(captions: list[str]) -> Tensor:
    rows = [[WORDS.index(word) for word in f"<start> {caption} <end>".split()] for caption in captions]
    return torch.tensor([row + [0] * (CONTEXT - len(row)) for row in rows])


# --- the model


def new_model(seed: int) -> CLIPModel:
    torch.manual_seed(seed)
    shared = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=4)
    vision = dict(shared, num_hidden_layers=DEPTH, image_size=SIDE, patch_size=PATCH)
    text = dict(shared, num_hidden_layers=2, vocab_size=len(WORDS), max_position_embeddings=CONTEXT)
    text |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=len(WORDS) - 1)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def text_features(model: CLIPModel, prompts: tuple[str, ...]) -> Tensor:
    """`[C, O]`: the mean over prompts of each class's caption, length 1."""
    captions = [prompt.format(name) for name in NAMES for prompt in prompts]
    features = F.normalize(model.get_text_features(as_ids(captions)).pooler_output, dim=-1)
    return F.normalize(features.view(len(NAMES), len(prompts), -1).mean(1), dim=-1)


def train(seed: int, steps: int) -> CLIPModel:
    """Images against the captions of all ten classes, one prompt drawn per step."""
    model = new_model(seed)
    images, labels = digits("train")
    generator = torch.Generator().manual_seed(seed)
    optimizers = muon_adamw(model, lr=3e-3)
    schedules = [warm_up_then_cosine(optimizer, steps) for optimizer in optimizers]
    start = time.perf_counter()
    for step in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        prompt = PROMPTS[int(torch.randint(len(PROMPTS), (), generator=generator))]
        pixels = as_pixels(moved(images[rows], 2, generator))
        image = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
        logits = model.logit_scale.exp() * image @ text_features(model, (prompt,)).T
        loss = F.cross_entropy(logits, labels[rows])
        model.zero_grad()
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval().requires_grad_(False)


def trained(run: Path, seed: int, steps: int) -> CLIPModel:
    folder = run / f"clip-seed{seed}-steps{steps}"
    if not folder.exists():
        train(seed, steps).save_pretrained(folder)
    return CLIPModel.from_pretrained(folder).eval().requires_grad_(False)


# --- methods


def tower_pass(model: CLIPModel, pixels: Tensor, method: str | None = None, keep: float = 1.0, **options) -> Tensor:
    """`[B, O]` image features of length 1, with a method in the tower if one is named."""
    if method is None:
        return F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    with compress_tower(model, method, keep, **options):
        return tower_pass(model, pixels)


def macs(model: CLIPModel, method: str | None = None, keep: float = 1.0, anchors: bool = False, **options) -> int:
    """Multiply-accumulates of the image tower for one image."""
    tokens = (1 + (SIDE // PATCH) ** 2,) * (DEPTH + 1)
    if method is not None:
        with compress_tower(model, method, keep, **options) as handle:
            model.get_image_features(torch.zeros(1, 3, SIDE, SIDE))
        tokens = handle.trace.tokens_per_block
    extra = [int(anchors and block in (3, 6, 9)) for block in range(DEPTH)]
    return tower_macs(tokens, width=WIDTH, patch_size=PATCH, extra_tokens=extra, out_width=WIDTH)


def nearest_budget(model: CLIPModel, method: str, wanted: int) -> int:
    """The number of patches left at the end that costs about `wanted` multiply-accumulates."""
    return min(range(8, (SIDE // PATCH) ** 2), key=lambda keep: abs(macs(model, method, keep) - wanted))


def tda(feature_BO: Tensor, logits_BC: Tensor, *, alpha, beta, alpha_negative, beta_negative) -> Tensor:
    """TDA (CVPR 2024) on final features: a positive cache of 3 and a negative one of 2 entries per class."""
    num_classes = logits_BC.shape[1]
    caches: tuple[list, list] = ([[] for _ in range(num_classes)], [[] for _ in range(num_classes)])
    out = []
    for z_O, s_C in zip(feature_BO, logits_BC, strict=True):
        p_C = s_C.softmax(-1)
        entropy = float(-(p_C * s_C.log_softmax(-1)).sum())
        label = int(s_C.argmax())
        places = [(caches[0][label], 3, F.one_hot(s_C.argmax(), num_classes).float())]
        if 0.2 < entropy / torch.tensor(num_classes).log2() < 0.5:
            places.append((caches[1][label], 2, (p_C > 0.03).float()))
        for cache, size, value_C in places:
            cache.append((entropy, z_O, value_C))
            cache.sort(key=lambda item: item[0])  # stable: a newcomer that is no better leaves again
            del cache[size:]
        score_C = s_C.clone()
        for cache, a, b in zip(caches, (alpha, -alpha_negative), (beta, beta_negative), strict=True):
            for _, stored_O, value_C in (item for items in cache for item in items):
                score_C += a * torch.exp(-b * (1 - z_O @ stored_O)) * value_C
        out.append(score_C)
    return torch.stack(out)


def evaluate(model: CLIPModel, num_orders: int) -> tuple[dict[str, dict[str, list[float]]], dict[str, int]]:
    """Accuracy in % per method, corruption and order, and multiply-accumulates per image of each method."""
    clean, labels = digits("test")
    text_CO = text_features(model, PROMPTS)
    scale = float(model.logit_scale.exp())
    wanted = macs(model, "tca", drop_rate=DROP_RATE)
    tome, evit = (nearest_budget(model, name, wanted) for name in ("tome", "evit"))
    fixed = {
        "CLIP, dense": {},
        f"ToMe, {tome} patches left": {"method": "tome", "keep": tome},
        f"EViT, {evit} patches left": {"method": "evit", "keep": evit},
        "TCA, condensing only": {"method": "tca", "drop_rate": DROP_RATE},
        "TCA paper, condensing only": {"method": "tca", "drop_rate": DROP_RATE, "variant": "paper"},
    }
    streams = {
        "TCA": {},
        f"TCA, drop rate {LOW_DROP_RATE}": {"drop_rate": LOW_DROP_RATE},
        "TCA, anchors, no correction": {"correct": False},
        "TCA, correction only": {"condense": False},
        "TCA paper": {"variant": "paper"},
    }
    cost = {name: macs(model, **options) for name, options in fixed.items()}
    cost["TDA"] = cost["CLIP, dense"]
    for name, options in streams.items():
        rate = options.get("drop_rate", DROP_RATE) if options.get("condense", True) else 0.0
        variant = options.get("variant", "released")
        cost[name] = macs(model, "tca", drop_rate=rate, variant=variant, anchors=rate > 0)
    score: dict[str, dict[str, list[float]]] = {name: {} for name in [*fixed, *streams, "TDA"]}
    orders = [torch.randperm(len(labels), generator=torch.Generator().manual_seed(i)) for i in range(num_orders)]

    def accuracy(logits_BC: Tensor, order: Tensor) -> float:
        return 100 * (logits_BC.argmax(-1) == labels[order]).float().mean().item()

    for kind in CORRUPTIONS:
        pixels = as_pixels(corrupted(clean, kind))
        for name, options in fixed.items():
            logits = scale * tower_pass(model, pixels, **options) @ text_CO.T
            score[name][kind] = [accuracy(logits, torch.arange(len(labels)))]
        feature_BO = tower_pass(model, pixels)
        for order in orders:
            logits = tda(feature_BO[order], scale * feature_BO[order] @ text_CO.T, **TDA_SETTINGS)
            score["TDA"].setdefault(kind, []).append(accuracy(logits, order))
            for name, options in streams.items():
                settings = {"drop_rate": DROP_RATE, **TCA_SETTINGS, **options}
                stream = TCAStream(model, text_CO, logit_scale=scale, **settings)
                logits = stream.step(pixels[order])
                score[name].setdefault(kind, []).append(accuracy(logits, order))
        print(kind, {name: round(statistics.mean(per[kind]), 1) for name, per in score.items()}, flush=True)
    return score, cost


# --- report


def cell(values: list[float]) -> str:
    low, mean, high = min(values), statistics.mean(values), max(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({low:.1f} to {high:.1f})"


def report(score: dict[str, dict[str, list[float]]], cost: dict[str, int], num_orders: int, steps: int) -> str:
    dense = cost["CLIP, dense"]
    lines = [
        f"{HEAD}{processor_name()}, {torch.get_num_threads()} thread(s), float32, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, tokensieve {ts.__version__}. One model "
        f"({steps} training steps, seed 0), 360 test images per stream, {num_orders} orders of every stream: mean "
        "(lowest to highest), top-1 in %. Methods without a range do not depend on the order.",
        "",
        f"| method | MMACs per image | share | {' | '.join(CORRUPTIONS)} | mean of the corrupted |",
        f"|---|---|---|{'---|' * (len(CORRUPTIONS) + 1)}",
    ]
    for name, per in score.items():
        mean = statistics.mean(statistics.mean(per[kind]) for kind in CORRUPTIONS[1:])
        cells = " | ".join(cell(per[kind]) for kind in CORRUPTIONS)
        lines.append(f"| {name} | {cost[name] / 1e6:.2f} | {cost[name] / dense:.2f} | {cells} | **{mean:.1f}** |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/tca_digits", help="folder of the trained model")
    parser.add_argument("--steps", type=int, default=600, help="training steps, batches of 64")
    parser.add_argument("--orders", type=int, default=5, help="random orders of every stream")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="", help="Markdown file; the text before its table is kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = trained(Path(options.run), 0, options.steps)
    with torch.no_grad():
        score, cost = evaluate(model, options.orders)
    text = report(score, cost, options.orders, options.steps)
    print(text)
    if options.out:
        path = Path(options.out)
        start = (
            path.read_text().split(f"\n\n{HEAD}")[0].rstrip()
            if path.exists()
            else "# TCA on streams of corrupted digits"
        )
        path.write_text(f"{start}\n\n{text}\n")


if __name__ == "__main__":
    main()
