"""Models of true size without their weights: time and memory do not depend on what the weights are.

The numbers are those of the published `config.json` files, with the transformers names:

    llava-onevision-0.5b   huggingface.co/llava-hf/llava-onevision-qwen2-0.5b-ov-hf
    llava-onevision-7b     huggingface.co/llava-hf/llava-onevision-qwen2-7b-ov-hf
    llava-1.5-7b           huggingface.co/llava-hf/llava-1.5-7b-hf
    qwen2.5-vl-3b          huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct
    qwen2.5-vl-7b          huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct

A folder with a `config.json`, or a hub id of which only that file is fetched, works as well.
"""

from __future__ import annotations

import torch
from torch import nn

from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.bench.flops import Encoder, Language
from tokensieve.pipeline.loader import check_config, local_folder

_SIGLIP = dict(
    model_type="siglip_vision_model",
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=26,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
    vision_use_head=False,
)
_QWEN_VISION = dict(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    tokens_per_second=2,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
)
_QWEN_IDS = dict(image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653)
_QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def _qwen2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more) -> dict:
    return dict(
        model_type="qwen2",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **more,
    )


def _onevision(text: dict) -> dict:
    return dict(
        model_type="llava_onevision",
        vision_config=_SIGLIP,
        text_config=text,
        image_token_index=151646,
        video_token_index=151647,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def _qwen_vl(text: dict) -> dict:
    text = text | dict(model_type="qwen2_5_vl_text", rope_parameters=_QWEN_ROPE, max_position_embeddings=128000)
    vision = _QWEN_VISION | dict(out_hidden_size=text["hidden_size"])
    tied = text["tie_word_embeddings"]
    return dict(model_type="qwen2_5_vl", vision_config=vision, text_config=text, tie_word_embeddings=tied, **_QWEN_IDS)


PRESETS: dict[str, dict] = {
    "llava-onevision-0.5b": _onevision(_qwen2(896, 4864, 24, 14, 2, 152000, tie_word_embeddings=True)),
    "llava-onevision-7b": _onevision(_qwen2(3584, 18944, 28, 28, 4, 152128, tie_word_embeddings=False)),
    "llava-1.5-7b": dict(
        model_type="llava",
        vision_config=dict(
            model_type="clip_vision_model",
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=dict(
            model_type="llama",
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            vocab_size=32064,
            max_position_embeddings=4096,
        ),
        image_token_index=32000,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    ),
    "qwen2.5-vl-3b": _qwen_vl(_qwen2(2048, 11008, 36, 16, 2, 151936, tie_word_embeddings=True)),
    "qwen2.5-vl-7b": _qwen_vl(_qwen2(3584, 18944, 28, 28, 4, 152064, tie_word_embeddings=False)),
}


def config_of(name: str):
    """The transformers config of a preset, a folder, "tiny" or a hub id.

    Raises:
        BadOption: there is no such preset or folder, or the hub cannot be reached.
        UnsupportedModel: the config cannot be read, or is of a family that `workload` makes no inputs for.
    """
    from transformers import AutoConfig

    from tokensieve.pipeline.bench.workload import FAMILIES

    if name in PRESETS:
        facts = dict(PRESETS[name])
        config = AutoConfig.for_model(facts.pop("model_type"), **facts)
    else:
        folder = local_folder(name)
        try:
            check_config(name, folder, {"local_files_only": folder is not None})
        except BadOption as error:
            raise BadOption(f"{error.message} Presets: {', '.join(PRESETS)}.", hint=error.hint) from error
        config = AutoConfig.from_pretrained(folder or name, trust_remote_code=False)
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"bench makes inputs for models of type {', '.join(FAMILIES)}, not for {config.model_type!r}."
        )
    return config


def random_model(config, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model with weights of a plausible size; norms are 1, biases 0. On the meta device it has no weights."""
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    with no_init_weights(), device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.tie_weights()
    if device.type != "meta":
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    weight.uniform_(-0.035, 0.035, generator=generator)  # standard deviation 0.02
                else:
                    weight.fill_(float(name.endswith("weight")))
    return model.eval().requires_grad_(False)


def language_sizes(config) -> Language:
    """Sizes of the language model of a config."""
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Language(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        query_width=head * text.num_attention_heads,
        key_width=head * text.num_key_value_heads,
        inner=text.intermediate_size,
        vocabulary=text.vocab_size,
    )


def encoder_sizes(config, side: int) -> Encoder:
    """Sizes of the vision side of a config for square pictures of `side` pixels; Qwen takes two frames as a picture."""
    vision, out = config.vision_config, config.get_text_config().hidden_size
    patches = (side // vision.patch_size) ** 2
    common = dict(patches=patches, width=vision.hidden_size)
    if config.model_type == "qwen2_5_vl":
        joined = vision.spatial_merge_size**2
        windowed = _window_patches(side // vision.patch_size, vision.window_size // vision.patch_size)
        hidden = joined * vision.hidden_size
        return Encoder(
            **common,
            blocks=vision.depth,
            inner=vision.intermediate_size,
            gated=True,
            num_prefix=0,
            patch_values=3 * vision.temporal_patch_size * vision.patch_size**2,
            looks_at=tuple(patches if i in vision.fullatt_block_indexes else windowed for i in range(vision.depth)),
            projector=(patches // joined, (hidden, hidden, vision.out_hidden_size)),
        )
    return Encoder(
        **common,
        blocks=vision.num_hidden_layers,
        inner=vision.intermediate_size,
        gated=False,
        num_prefix=int(vision.model_type == "clip_vision_model"),
        patch_values=3 * vision.patch_size**2,
        looks_at=None,
        projector=(patches, (vision.hidden_size, out, out)),
    )


def _window_patches(along: int, window: int) -> float:
    """Mean patches in the window of a patch, of square windows over a square picture; those at the border are cut."""
    full, rest = divmod(along, window)
    return ((full * window**2 + rest**2) / along) ** 2
