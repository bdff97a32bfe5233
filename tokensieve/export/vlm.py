"""`export_vlm`: a vision-language model with its compression as a folder of ONNX graphs.

    DIR/tokensieve.json                              what is in the folder: see manifest.py
    DIR/config.json, tokenizer.json, ...             as save_pretrained writes them
    DIR/onnx/vision_encoder.onnx (+ _data)           pixels of one image or video -> the visual tokens that stay
    DIR/onnx/embed_tokens.onnx (+ _data)             ids -> embeddings
    DIR/onnx/decoder_model_merged.onnx (+ _data)     embeddings and cache -> logits of the last place and cache

The names are those of transformers.js and optimum. A matrix that embeds tokens and gives logits is written twice, once
for each graph; inside a graph nothing is written twice.

`Manifest.model` holds:

    num_layers, num_kv_heads, head_dim     of the cache
    width, vocab                           of the language model
    modalities                             "image", "video"
    image_token_id, video_token_id         placeholders; null where there is none
    patches_per_tile                       projector rows of a tile or frame (not of Qwen2.5-VL, where it varies)
    eos_token_ids, pad_token_id            for generation
    question_ids_skipped                   ids that are no text of a question
    suppress_token_ids                     never generated: the placeholders, and what the generation config forbids
    merge, window, patch, tokens_per_second          Qwen2.5-VL: sides in patches and pixels, positions a second
    image_grid_pinpoints, vision_aspect_ratio        LLaVA-OneVision
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export.graph_file import OPSET, versions_used, write_graph
from tokensieve.export.language import (
    Decoder,
    Embedding,
    cache_facts,
    check_text,
    decoder_inputs,
    decoder_outputs,
)
from tokensieve.export.manifest import Manifest
from tokensieve.export.new_folder import check_new, new_folder
from tokensieve.export.precision import check_precision, exportable_copy, quantize_weights, weight_dtype
from tokensieve.export.runtime import DECODER, EMBED, VISION
from tokensieve.export.selectors import make_selector
from tokensieve.export.verify import Example, generated_examples, verify_folder
from tokensieve.export.vision import VisionGraph, check_family, make_encoder, vision_inputs
from tokensieve.pipeline.prompt import takes_video
from tokensieve.pipeline.stages import Stage
from tokensieve.pipeline.vlm import VLM


def export_vlm(
    vlm: VLM,
    out: str | Path,
    *,
    precision: str = "fp32",
    verify: bool = True,
    examples: Sequence[Example] | None = None,
) -> Manifest:
    """Writes the folder `out` with the model and the compression set by `vlm.compress`, or nothing at all.

    Args:
        vlm: of a supported family, with a processor; it stays as it is.
        out: a folder that does not exist yet, or is empty.
        precision: "fp32", "fp16" (weights, products and the cache; selection, logits and other inputs and outputs stay
            float32) or "int8" (weights of the language model as 8-bit numbers).
        verify: run every graph and a greedy generation and compare them with PyTorch.
        examples: media and questions for that; by default a generated clip and a generated image.

    Returns:
        What `tokensieve.json` says.

    Raises:
        BadOption: a bad argument, or `out` exists.
        UnsupportedModel: the model or its compression cannot be exported, or the graphs differ from PyTorch by more
            than the precision allows.
    """
    out = Path(out)
    check_precision(precision)
    stage = check_exportable(vlm)
    check_new(out)
    made = _in(vlm, weight_dtype(precision))
    selector = None if stage is None else make_selector(made, stage)
    graph = VisionGraph(make_encoder(made, selector is not None and selector.records), selector)
    with new_folder(out) as folder, torch.no_grad():
        (folder / "onnx").mkdir()
        shapes = _write_graphs(made, graph, folder, precision)
        vlm.model.config.save_pretrained(folder)
        vlm.model.generation_config.save_pretrained(folder)
        vlm.processor.save_pretrained(folder)
        manifest = Manifest(
            kind="vlm",
            family=vlm.model.config.model_type,
            method=None if stage is None else stage.method.name,
            keep=1.0 if stage is None else stage.keep,
            options={} if stage is None else _plain_options(stage),
            positions=vlm.compression.positions if vlm.compression else "preserve",
            precision=precision,
            opset=OPSET,
            graphs={name: f"onnx/{name}.onnx" for name in shapes},
            inputs=shapes,
            model=model_facts(vlm, graph),
            versions=versions_used("transformers"),
        )
        manifest.save(folder)
        if verify:
            found = verify_folder(_in(vlm, torch.float32), folder, manifest, examples or generated_examples())
            manifest = replace(manifest, verified=found)
            manifest.save(folder)
    return manifest


def check_exportable(vlm: VLM) -> Stage | None:
    """The method in force, None without one.

    Raises:
        BadOption: there is no processor.
        UnsupportedModel: the family, the language model, or a method in this place cannot be exported.
    """
    if vlm.processor is None:
        raise BadOption("This VLM has no processor, and the exported folder needs one.", hint="Pass one to VLM(...).")
    check_family(vlm.model)
    check_text(vlm.model)
    if vlm.compression is None:
        return None
    for place in ("tower", "decoder"):
        if (stage := vlm.compression.at(place)) is not None:
            raise UnsupportedModel(
                f"{stage.method.name!r} works in the {place}; with a vision-language model only methods at the "
                "projector can be exported.",
                hint="Choose one of zoprune, norm-diversity, divprune, evs, cacovid, visionzip and uniform.",
            )
    if vlm.compression.positions != "preserve":
        raise UnsupportedModel(
            f"positions={vlm.compression.positions!r} cannot be exported.", hint="Use positions='preserve'."
        )
    return vlm.compression.at("projector")


def model_facts(vlm: VLM, graph: VisionGraph) -> dict[str, object]:
    """`Manifest.model`: see the module."""
    model, config = vlm.model, vlm.model.config
    generation = model.generation_config
    placeholders = [getattr(config, f"{m}_token_id", None) for m in ("image", "video")]
    ends = generation.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    pad = generation.pad_token_id
    facts: dict[str, object] = {
        **cache_facts(model),
        "modalities": ["image", "video"] if takes_video(vlm.processor) or vlm.adapter.family.join_frames else ["image"],
        "image_token_id": placeholders[0],
        "video_token_id": placeholders[1],
        "eos_token_ids": ends,
        "pad_token_id": 0 if pad is None else pad,
        "question_ids_skipped": vlm.adapter.special_ids(),
        "suppress_token_ids": sorted({*(generation.suppress_tokens or ()), *placeholders} - {None}),
    }
    if config.model_type == "qwen2_5_vl":
        vision = config.vision_config
        return facts | {
            "merge": vision.spatial_merge_size,
            "window": vision.window_size,
            "patch": vision.patch_size,
            "tokens_per_second": vision.tokens_per_second,
        }
    facts["patches_per_tile"] = graph.encoder.rows_per_tile
    if config.model_type == "llava_onevision":
        facts["image_grid_pinpoints"] = config.image_grid_pinpoints
        facts["vision_aspect_ratio"] = config.vision_aspect_ratio
    return facts


def _in(vlm: VLM, dtype: torch.dtype) -> VLM:
    """The same VLM with weights of `dtype`, ready to be traced; decoder hooks stay behind."""
    made = VLM(exportable_copy(vlm.model, dtype), vlm.processor, name=vlm.name, policy=vlm.policy)
    made.compression = vlm.compression
    return made


def _write_graphs(vlm: VLM, graph: VisionGraph, folder: Path, precision: str) -> dict[str, dict[str, list[int | str]]]:
    """Writes the three graphs; returns the shapes of their inputs."""
    model = vlm.model
    width = cache_facts(model)["width"]
    pixels, pixel_shapes = vision_inputs(vlm, graph)
    kept: dict[str, list[int | str]] = {"features": ["kept", width], "kept": ["kept"], "newline": [width]}
    kept = {name: kept[name] for name in graph.outputs}
    ids, ids_shapes = {"input_ids": torch.arange(6).view(2, 3)}, {"input_ids": ["batch", "length"]}
    past, past_shapes = decoder_inputs(model, weight_dtype(precision))
    int8 = precision == "int8"
    _write(graph, folder, VISION, pixels, pixel_shapes, kept)
    _write(Embedding(model), folder, EMBED, ids, ids_shapes, {"inputs_embeds": ["batch", "length", width]}, int8)
    _write(Decoder(model), folder, DECODER, past, past_shapes, decoder_outputs(model), int8)
    return {VISION: pixel_shapes, EMBED: ids_shapes, DECODER: past_shapes}


def _write(module: nn.Module, folder: Path, name: str, inputs, shapes, outputs, int8: bool = False) -> None:
    path = folder / "onnx" / f"{name}.onnx"
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        first = Path(aside) / path.name if int8 else path
        write_graph(module.eval(), first, inputs, shapes, outputs)
        if int8:
            quantize_weights(first, path)


def _plain_options(stage: Stage) -> dict[str, object]:
    """The method's options with their defaults, as far as JSON can hold them; a policy is in the graph."""
    options = {**stage.method.options(), **stage.options}
    return {name: value for name, value in options.items() if _is_json(value)}


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
