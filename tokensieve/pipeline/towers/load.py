"""`load_tower`: a CLIP-like model of transformers, open_clip or timm by name."""

from __future__ import annotations

from torch import nn

from tokensieve.errors import BadOption, UnsupportedModel

LIBRARIES = ("transformers", "open_clip", "timm")


def load_tower(name: str) -> nn.Module:
    """Loads a model with its weights, in float32, on the CPU, ready to be used.

    Args:
        name: library and name: "transformers:openai/clip-vit-base-patch16" (a hub id or folder),
            "open_clip:ViT-B-16/laion2b_s34b_b88k" (architecture and pretrained tag or file), or
            "timm:vit_base_patch16_clip_224.openai".

    Raises:
        BadOption: the name is not of this form.
        UnsupportedModel: the library cannot load it.
    """
    library, _, which = name.partition(":")
    if library not in LIBRARIES or not which:
        raise BadOption(
            f"A tower is LIBRARY:NAME with one of {', '.join(LIBRARIES)}, got {name!r}.",
            hint="For example timm:vit_base_patch16_clip_224.openai.",
        )
    try:
        model = {"transformers": _transformers, "open_clip": _open_clip, "timm": _timm}[library](which)
    except (BadOption, MemoryError):
        raise
    except Exception as error:  # whatever a library raises for an unknown name or a damaged file
        raise UnsupportedModel(
            f"{library} could not load {which!r} ({type(error).__name__}).",
            hint="Check the spelling; weights must be there or on the hub.",
        ) from error
    return model.eval()


def _transformers(name: str) -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(name, dtype="float32", use_safetensors=True, trust_remote_code=False)


def _open_clip(name: str) -> nn.Module:
    import open_clip

    architecture, _, weights = name.partition("/")
    if not weights:
        raise BadOption(
            f"open_clip needs the weights too, got {name!r}.", hint="Write open_clip:ARCHITECTURE/TAG_OR_FILE."
        )
    return open_clip.create_model(architecture, pretrained=weights)


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=True)
