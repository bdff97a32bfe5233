"""`load`: a Hugging Face id or folder, or the shipped model, as a `VLM`.

A checkpoint is untrusted: its JSON is looked at before anything is built from it, weights are safetensors or
nothing, and no code of its own ever runs. Messages name the kind of an error, never its text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.families import family_of
from tokensieve.pipeline.vlm import VLM

ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = {"tiny": ASSETS / "tiny"}
POLICY = "policy"  # folder of a trained policy inside a model's folder
DTYPES = ("auto", "float32", "bfloat16", "float16")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_PICKLE_HINT = (
    "Loading a pickle can run code, so it is refused: convert the weights with transformers' save_pretrained, on a "
    "machine where you trust them."
)


def load(
    name: str | Path = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
) -> VLM:
    """Loads a vision-language model with its processor.

    Args:
        name: "tiny" (shipped with the package), a folder in Hugging Face layout, or a hub id. A trained policy in a
            subfolder `policy` of a folder becomes `VLM.policy`.
        device: where to put it; a GPU if there is one when left out.
        dtype: "auto" (as saved), "float32", "bfloat16", "float16" or a torch dtype.
        revision: branch, tag or commit on the hub.
        local_files_only: never ask the hub.

    Raises:
        UnsupportedModel: the family is not supported, the weights are not safetensors (pickled weights can
            run code when loaded and are refused), or the checkpoint is damaged or incomplete.
        BadOption: there is no such folder or hub id, or `dtype` or `device` is not known here.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    dtype = as_dtype(dtype)
    device = as_device(device)
    name = str(name)
    folder = local_folder(name)
    source = str(folder) if folder else name
    hub = {"revision": revision, "local_files_only": local_files_only or folder is not None}
    check_config(name, folder, hub)
    _check_weights(name, folder)
    hub["trust_remote_code"] = False
    processor = _processor(name, source, hub)
    try:
        config = AutoConfig.from_pretrained(source, **hub)
        model, report = AutoModelForImageTextToText.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **hub
        )
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged or hostile checkpoint raises
        raise UnsupportedModel(
            f"The weights of {name!r} could not be loaded ({type(error).__name__}).",
            hint="They must be complete .safetensors files that fit config.json; pickled weights are refused.",
        ) from error
    lacking = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if lacking:  # transformers would draw them at random and go on
        raise UnsupportedModel(
            f"The checkpoint {name!r} lacks {len(lacking)} of the model's weights.", hint="Download it again."
        )
    policy = folder / POLICY if folder is not None and (folder / POLICY).is_dir() else None
    return VLM(model.eval().to(device), processor, name=name, policy=policy)


def as_dtype(dtype):
    """A torch dtype, or "auto"; raises BadOption for anything else."""
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadOption(f"dtype must be one of {DTYPES}, or a torch dtype of real numbers, got {dtype!r}.")
    return dtype if dtype == "auto" else getattr(torch, dtype)


def as_device(device) -> torch.device:
    """A device that works here, a GPU if there is one for None; raises BadOption."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise BadOption(f"device must be a torch device such as 'cpu' or 'cuda:0', got {device!r}.") from None
    try:
        usable = torch.ones(1, device=device).item() == 1
    except Exception:  # each backend raises its own when its library or hardware is missing
        usable = False
    if not usable:
        raise BadOption(f"Device {str(device)!r} cannot be used on this machine.", hint="Leave it out, or say 'cpu'.")
    return device


def local_folder(name: str) -> Path | None:
    """The local folder that is meant, None for a hub id."""
    if name in SHIPPED:
        return SHIPPED[name]
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if not name or path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise BadOption(f"There is no folder {name!r}.", hint="Check the spelling; a hub id looks like owner/name.")
    return None


def check_config(name: str, folder: Path | None, hub: Mapping) -> None:
    """Refuses by config.json alone, before anything big is fetched or built.

    Args:
        name: as the user typed it.
        folder: where it is, None for a hub id.
        hub: arguments for the hub.

    Raises:
        UnsupportedModel, BadOption: as `load`.
    """
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(str(folder) if folder else name, **hub)
    except Exception as error:  # no network, no such repository, no JSON
        kind = type(error).__name__
        if folder is not None:
            raise UnsupportedModel(
                f"The folder {name!r} has no readable config.json ({kind}).", hint="It must be in Hugging Face layout."
            ) from error
        raise BadOption(
            f"{name!r} is neither a shipped model ({', '.join(SHIPPED)}), nor a folder, nor a hub id that can be "
            f"reached ({kind}).",
            hint="Check the spelling, the network and, for gated models, your hub token.",
        ) from error
    if not isinstance(config, Mapping) or "model_type" not in config:
        raise UnsupportedModel(
            f"The checkpoint {name!r} has no config.json that names a model_type.",
            hint="It must be in Hugging Face layout: see save_pretrained.",
        )
    family_of(str(config["model_type"]))
    for path, value in _settings(config):
        # Parts of a model, too, could ask for code: transformers would prompt for permission, or fetch a kernel.
        nested_code = path[-1] == "auto_map" and len(path) > 1
        kernel = path[-1].endswith("attn_implementation") and isinstance(value, str) and "/" in value
        if nested_code or kernel:
            raise UnsupportedModel(
                f"The checkpoint {name!r} wants to run code of its own.", hint="Only models of transformers itself run."
            )


def _check_weights(name: str, folder: Path | None) -> None:
    if folder is not None and not any(folder.glob("*.safetensors")):
        if any(any(folder.glob(pattern)) for pattern in PICKLED):
            raise UnsupportedModel(f"The weights of {name!r} are pickled.", hint=_PICKLE_HINT)
        raise UnsupportedModel(
            f"The folder {name!r} has no weights.", hint="It must hold .safetensors files: see save_pretrained."
        )


def _settings(config: Mapping, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every setting of nested JSON with the keys that lead to it."""
    for key, value in config.items():
        yield (*path, key), value
        if isinstance(value, Mapping):
            yield from _settings(value, (*path, key))


def _processor(name: str, source: str, hub: Mapping):
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source, **hub)
    except ImportError as error:  # SmolVLM's needs num2words, say
        raise UnsupportedModel(
            f"The processor of {name!r} needs a package that is not installed.",
            hint="The cause of this error names it; install it with pip.",
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"The processor of {name!r} could not be loaded ({type(error).__name__}).",
            hint="The checkpoint must hold the files that the processor's save_pretrained writes.",
        ) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise UnsupportedModel(
            f"The checkpoint {name!r} has no processor for pictures and text, only {type(processor).__name__}.",
            hint="Save the model's processor beside it with save_pretrained.",
        )
    return processor
