"""Runs the graphs of a folder and compares them with PyTorch, on real frames: pixels, tokens, logits, answers."""

# Shape legend: N candidate tokens, n placeholders of an item, K kept, L prompt length, D width of the language model,
#               V vocabulary, S generated tokens

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tokensieve.errors import UnsupportedModel
from tokensieve.export.geometry import budget_inputs, geometry
from tokensieve.export.language import cache_names
from tokensieve.export.manifest import Manifest
from tokensieve.export.packing import Packing, pack_anyres, pack_frames, pack_patches, pack_pooled_video, pack_tiles
from tokensieve.export.precision import TOLERANCES, Tolerance
from tokensieve.export.runtime import DECODER, EMBED, VISION, OnnxVLM
from tokensieve.export.sessions import open_session, running
from tokensieve.pipeline.results import Prepared
from tokensieve.pipeline.stages import Stage
from tokensieve.pipeline.vlm import VLM

NUM_TOKENS = 6  # generated an example
_HINT = "Export it in another precision, or leave verification out if the differences are small enough for you."


@dataclass(frozen=True)
class Example:
    """A medium as `VLM.prepare` takes it, and a question."""

    media: object
    question: str


def generated_examples() -> list[Example]:
    """A generated clip of digits, and its first frame as an image."""
    from tokensieve.datasets.clips import make_clip
    from tokensieve.datasets.render import render_clips

    clip = make_clip("val", 0)
    (frames,) = render_clips([clip]).numpy()
    frames = frames[::2]
    return [Example(frames, clip.questions[0].text), Example(frames[0], clip.questions[0].text)]


def verify_folder(vlm: VLM, folder: Path, manifest: Manifest, examples: Sequence[Example]) -> dict[str, object]:
    """Compares the graphs with the model, example by example and at two budgets.

    Args:
        vlm: the model in float32, on the CPU, with the compression that was exported.
        folder: with all files.
        manifest: what it says.
        examples: at least one.

    Returns:
        For `Manifest.verified`: greatest differences, tolerances, and the answers.

    Raises:
        UnsupportedModel: something differs by more than the precision's tolerance.
    """
    graphs = _Graphs(folder, manifest)
    runtime = OnnxVLM(folder, manifest, graphs.sessions)
    tolerance = TOLERANCES[manifest.precision]
    worst: dict[str, float] = {}
    answers = []
    for example in examples:
        media, question = example.media, example.question
        prepared = vlm.prepare(media, question)
        for budget in _budgets(manifest):
            other = _at(vlm, budget)
            chosen = other.reselect(prepared)
            _check_prompt(runtime.prepare(media, question, keep=budget).input_ids, chosen, manifest)
            found, tokens = _compare(other, graphs, chosen, tolerance)
            worst = {name: max(value, worst.get(name, 0.0)) for name, value in found.items()}
            # For people: the runtime resizes pictures by itself, a grey level or two off, so texts may differ.
            texts = {
                name: of.answer(media, question, max_new_tokens=NUM_TOKENS, **more).answer
                for name, of, more in (("pytorch", other, {}), ("exported", runtime, {"keep": budget}))
            }
            answers.append({"question": question, "keep": budget, **texts, **tokens})
    return {"differences": worst, "tolerances": tolerance.to_dict(), "answers": answers}


def _check_prompt(ids_1L: np.ndarray, chosen: Prepared, manifest: Manifest) -> None:
    """The text around the visual tokens, and how many these are; which of them stay is compared on equal pixels."""
    placeholders = [manifest.model["image_token_id"], manifest.model["video_token_id"]]
    expected_1L = chosen["input_ids"].numpy()
    texts = [ids[~np.isin(ids, [i for i in placeholders if i is not None])] for ids in (ids_1L, expected_1L)]
    if ids_1L.shape != expected_1L.shape or not np.array_equal(*texts):
        raise UnsupportedModel("The runtime makes another prompt than the model's own processor.", hint=_HINT)


def _budgets(manifest: Manifest) -> list[float | int]:
    """The budget that was asked for, and half of it."""
    keep = manifest.keep
    if manifest.method is None or not manifest.dynamic_keep:
        return [keep]
    return list(dict.fromkeys([keep, max(1, keep // 2) if isinstance(keep, int) else keep / 2]))


def _at(vlm: VLM, budget: float | int) -> VLM:
    """The VLM with the same method at another budget."""
    other = VLM(vlm.model, vlm.processor, name=vlm.name, policy=vlm.policy)
    if vlm.compression is not None:
        stages = tuple(Stage(stage.method.name, budget, **stage.options) for stage in vlm.compression.stages)
        other.compression = replace(vlm.compression, stages=stages)
    return other


class _Graphs:
    """The sessions, and what is run on them."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.manifest = manifest
        self.sessions = {
            name: open_session(folder, file, "cpu", torch.get_num_threads()) for name, file in manifest.graphs.items()
        }

    def run(self, graph: str, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; the feed may hold more than the graph takes."""
        session = self.sessions[graph]
        taken = {each.name: feed[each.name] for each in session.get_inputs()}
        with running(graph):
            values = session.run(None, taken)
        return dict(zip((each.name for each in session.get_outputs()), values, strict=True))

    def logits(self, embeds_1LD: np.ndarray, positions: np.ndarray, tokens_S: Sequence[int]) -> np.ndarray:
        """`[S, V]`: logits in front of each of the given tokens, after a prompt.

        Args:
            embeds_1LD: of the prompt.
            positions: `[1, L]`, or `[3, 1, L]`.
            tokens_S: what is appended one by one.
        """
        model = self.manifest.model
        names = cache_names("past_key_values", model["num_layers"])
        half = self.manifest.precision == "fp16"
        empty = np.zeros((1, model["num_kv_heads"], 0, model["head_dim"]), dtype=np.float16 if half else np.float32)
        feed = {name: empty for name in names}
        rows, next_position = [], positions.max() + 1 if positions.ndim == 3 else positions[0, -1] + 1
        for step in range(len(tokens_S)):
            length = feed[names[0]].shape[2] + embeds_1LD.shape[1]
            feed |= {
                "inputs_embeds": embeds_1LD,
                "position_ids": positions,
                "attention_mask": np.ones((1, length), dtype=np.int64),
            }
            out = self.run(DECODER, feed)
            rows.append(out["logits"][0, 0])
            feed |= {name: out[name.replace("past_key_values", "present")] for name in names}
            embeds_1LD = self.run(EMBED, {"input_ids": np.array([[tokens_S[step]]])})["inputs_embeds"]
            positions = np.full_like(positions[..., :1], next_position + step)
        return np.stack(rows)


@torch.no_grad()
def _compare(
    vlm: VLM, graphs: _Graphs, prepared: Prepared, tolerance: Tolerance
) -> tuple[dict[str, float], dict[str, int]]:
    """Differences by name, and how many tokens were generated and how many of them are PyTorch's."""
    found: dict[str, float] = {}
    features_kD = _compare_features(vlm, graphs, prepared, tolerance, found)
    ids_1L = prepared["input_ids"].numpy()
    embeds_1LD = graphs.run(EMBED, {"input_ids": ids_1L})["inputs_embeds"].copy()
    expected_1LD = vlm.model.get_input_embeddings()(prepared["input_ids"]).numpy()
    found["embeddings"] = _difference(embeds_1LD, expected_1LD)
    _check("embeddings", found["embeddings"], tolerance.embeddings)

    placeholder = getattr(vlm.model.config, f"{prepared.items[0].modality}_token_id")
    embeds_1LD[ids_1L == placeholder] = features_kD
    tokens_S, expected_SV = _generate(vlm, prepared)
    positions = prepared["position_ids"].numpy()
    positions = positions[1:] if positions.ndim == 3 else positions  # the first row of M-RoPE's is for masks
    logits_SV = graphs.logits(embeds_1LD, positions, tokens_S)
    scale = max(1.0, float(np.abs(expected_SV).max()))
    found["logits"] = float(np.abs(logits_SV - expected_SV).max()) / scale
    _check("logits", found["logits"], tolerance.logits)

    # Within the tolerance another token is chosen only where PyTorch's first two are closer than twice that.
    equal = int((logits_SV.argmax(1) == expected_SV.argmax(1)).sum())
    return found, {"tokens": len(tokens_S), "equal_tokens": equal}


def _compare_features(
    vlm: VLM, graphs: _Graphs, prepared: Prepared, tolerance: Tolerance, found: dict[str, float]
) -> np.ndarray:
    """`[k, D]`: what goes into the prompt, structural tokens included, made by the graph.

    Made by PyTorch where the graph keeps other tokens, within the tolerance, so that logits can be compared.
    """
    (item,), (plan,) = prepared.items, prepared.plans
    packing, feed = pixels_and_packing(vlm, prepared)
    feed = feed | packing.inputs | geometry(packing.grids, packing.crop)
    if vlm.compression is not None:
        method = vlm.compression.at("projector").method.name
        feed |= budget_inputs(method, plan.num_kept, packing.grids, packing.crop, graphs.manifest.options)
    if item.tokens.question is not None:
        feed["question"] = item.tokens.question.embeds.numpy()
        feed["num_before"] = np.array([item.tokens.question.num_before])
    out = graphs.run(VISION, feed)

    place_k = item.kept(plan)
    expected_kD = item.kept_features(plan).numpy()
    is_candidate_k = torch.isin(place_k, item.candidates).numpy()
    kept_K, expected_K = out["kept"], plan.kept.numpy()
    common, mine, theirs = np.intersect1d(kept_K, expected_K, return_indices=True)
    found["unequal_kept"] = 1 - len(common) / max(len(kept_K), len(expected_K))
    _check("kept tokens", found["unequal_kept"], 1 - tolerance.kept)
    equal = len(common) == len(kept_K) == len(expected_K)
    if equal or plan.merge is None:  # else others are merged into the same tokens
        found["features"] = _difference(out["features"][mine], expected_kD[is_candidate_k][theirs])
        _check("visual features", found["features"], tolerance.features)
    if not equal:
        return expected_kD
    made_kD = np.empty_like(expected_kD)
    made_kD[is_candidate_k] = out["features"]
    if not is_candidate_k.all():
        made_kD[~is_candidate_k] = out["newline"]
        found["newline"] = _difference(made_kD[~is_candidate_k], expected_kD[~is_candidate_k])
        _check("the newline", found["newline"], tolerance.features)
    return made_kD


def _generate(vlm: VLM, prepared: Prepared) -> tuple[list[int], np.ndarray]:
    """Greedy tokens of PyTorch, `[S]`, and the logits in front of each, `[S, V]`."""
    out = vlm.model.generate(
        **prepared,
        do_sample=False,
        min_new_tokens=NUM_TOKENS,
        max_new_tokens=NUM_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, prepared["input_ids"].shape[1] :].tolist(), torch.cat(out.logits).float().numpy()


def pixels_and_packing(vlm: VLM, prepared: Prepared) -> tuple[Packing, dict[str, np.ndarray]]:
    """The tokens of the only item, and the pixel inputs of the vision graph, from what the model's processor made.

    Raises:
        UnsupportedModel: SmolVLM tiles with padding.
    """
    config, inputs = vlm.model.config, prepared.inputs
    is_video = prepared.clips[0].num_frames > 1
    key = "pixel_values_videos" if "pixel_values_videos" in inputs else "pixel_values"
    pixels = inputs[key].float()
    vision = config.vision_config
    if config.model_type == "qwen2_5_vl":
        grid = inputs["video_grid_thw" if is_video else "image_grid_thw"][0].tolist()
        packing = pack_patches(
            grid, merge=vision.spatial_merge_size, window=vision.window_size, patch=vision.patch_size
        )
        return packing, {"pixel_values": pixels.numpy()}
    side = vision.image_size // vision.patch_size
    if config.model_type == "llava":
        return pack_frames(len(pixels), side), {"pixel_values": pixels.numpy()}
    pixels = pixels.flatten(0, 1)
    if config.model_type == "smolvlm":
        mask = inputs.get("pixel_attention_mask")
        if mask is not None and not mask.all():
            raise UnsupportedModel(
                "This processor pads tiles, and only tiles that fill their square can be exported.",
                hint="Turn on do_image_splitting in the image processor.",
            )
        side //= config.scale_factor
        packing = (pack_frames if is_video else pack_tiles)(len(pixels), side)
    elif is_video:
        packing = pack_pooled_video(len(pixels), side)
    else:
        packing = pack_anyres(
            inputs["image_sizes"][0].tolist(),
            config.image_grid_pinpoints,
            tile=vision.image_size,
            side=side,
            most=int(config.vision_aspect_ratio.removeprefix("anyres_max_")),
        )
        pixels = pixels[: packing.inputs["rows"].max() // side**2 + 1]
    return packing, {"pixel_values": pixels.numpy()}


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Greatest difference as a share of the greatest magnitude."""
    if theirs.size == 0:
        return 0.0
    return float(np.abs(ours - theirs).max() / max(float(np.abs(theirs).max()), 1e-6))


def _check(what: str, value: float, most: float) -> None:
    if not value <= most:  # NaN included
        raise UnsupportedModel(
            f"The exported model differs from PyTorch: {what} by {value:.2g}, where {most:.2g} is allowed.", hint=_HINT
        )
