"""Policies on disk and on the Hugging Face hub: one JSON file with the options, one safetensors file with the weights.

    config.json         {"tokensieve_policy": "cacovid-scorer", ...the options of the class}
    model.safetensors   its state dict

A checkpoint is untrusted. Its name is looked up among the policies registered here, options go to that class only,
shapes are compared before any memory is taken, nothing is unpickled and no code of its own runs; messages never repeat
text of a parser.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from tokensieve.errors import BadOption, UnsupportedModel

CONFIG, WEIGHTS = "config.json", "model.safetensors"
KIND = "tokensieve_policy"
MAX_CONFIG_BYTES = 1 << 20
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_POLICIES: dict[str, type[SavedPolicy]] = {}


class SavedPolicy(nn.Module):
    """A module that can be written, read and shared. Subclasses are registered and say their `options()`."""

    kind = ""

    def options(self) -> dict[str, object]:
        """Keyword arguments that make a module of the same shape, as JSON can hold them."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`; a file is replaced only once its successor is complete.

        Raises:
            BadOption: `folder` is a file.
        """
        from safetensors.torch import save_file

        folder = Path(folder).expanduser()
        if folder.exists() and not folder.is_dir():
            raise BadOption(f"{str(folder)!r} is no folder.", hint="A policy is saved as a folder of two files.")
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / (WEIGHTS + ".part"), metadata={"format": "pt"})
        text = json.dumps({KIND: self.kind, **self.options()}, indent=2, sort_keys=True)
        (folder / (CONFIG + ".part")).write_text(text + "\n", encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            os.replace(folder / (name + ".part"), folder / name)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        local_files_only: bool = False,
    ):
        """Reads what `save_pretrained` or `push_to_hub` wrote; in evaluation mode, in the dtype it was saved in.

        Args:
            name: a folder, or a hub id such as owner/name.
            device: where to put it.
            revision: branch, tag or commit on the hub.
            local_files_only: never ask the hub.

        Raises:
            BadOption: there is no such folder or hub id.
            UnsupportedModel: it is no policy, one of another class, or damaged.
        """
        folder = _folder(str(name), revision, local_files_only)
        options = _read_config(folder, str(name))
        found = _POLICIES[options.pop(KIND)]
        if not issubclass(found, cls):
            raise UnsupportedModel(f"{str(name)!r} holds a {found.__name__}, not a {cls.__name__}.")
        try:
            with torch.device("meta"):
                policy = found(**options)
        except Exception as error:  # whatever hostile options make of a constructor
            raise UnsupportedModel(
                f"No {found.__name__} can be made from the {CONFIG} of {str(name)!r} ({type(error).__name__}).",
                hint=error.message if isinstance(error, BadOption | UnsupportedModel) else None,
            ) from error
        weights = _read_weights(folder, str(name), policy.state_dict(), device)
        if any(buffer.is_meta for key, buffer in policy.named_buffers() if key not in weights):
            policy = found(**options).to(device)  # for what is no weight; their shapes are known to be the file's
        policy.load_state_dict(weights, assign=True)
        return policy.eval()

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads what `save_pretrained` writes to a repository of that id, made if need be; returns its address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload policy")
        return f"{api.endpoint}/{repo_id}"


def register_policy(kind: str) -> Callable[[type[SavedPolicy]], type[SavedPolicy]]:
    """Decorator that makes a `SavedPolicy` class known to `load_policy` as `kind`."""

    def register(policy: type[SavedPolicy]) -> type[SavedPolicy]:
        policy.kind = kind
        _POLICIES[kind] = policy
        return policy

    return register


def load_policy(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    local_files_only: bool = False,
) -> SavedPolicy:
    """The policy of a folder or hub id, of whatever class. Arguments and errors: see `SavedPolicy.from_pretrained`."""
    return SavedPolicy.from_pretrained(name, device=device, revision=revision, local_files_only=local_files_only)


@contextmanager
def seeded_init(seed: int):
    """Modules made inside draw their first weights from `seed`; the global generator is put back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _folder(name: str, revision: str | None, local_files_only: bool) -> Path:
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path) or not HUB_ID.fullmatch(name):
        raise BadOption(f"There is no folder {name!r}.", hint="Check the spelling; a hub id looks like owner/name.")
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            name, revision=revision, allow_patterns=[CONFIG, WEIGHTS], local_files_only=local_files_only
        )
    except Exception as error:  # no network, no such repository
        raise BadOption(
            f"{name!r} is neither a folder nor a hub id with a policy that can be reached ({type(error).__name__}).",
            hint="Check the spelling, the network and, for private repositories, your hub token.",
        ) from error
    return Path(snapshot)


def _read_config(folder: Path, name: str) -> dict[str, object]:
    path = folder / CONFIG
    if not path.is_file():
        raise UnsupportedModel(f"{name!r} has no {CONFIG}.", hint="A policy is a folder that save_pretrained wrote.")
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("too large")
        options = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModel(f"The {CONFIG} of {name!r} cannot be read ({type(error).__name__}).") from None
    kind = options.get(KIND) if isinstance(options, dict) else None
    if not isinstance(kind, str) or kind not in _POLICIES:
        raise UnsupportedModel(
            f"{name!r} holds no known policy: its {CONFIG} must have {KIND!r}, one of {sorted(_POLICIES)}.",
            hint="It may be of a newer release, or another kind of model.",
        )
    return options


def _read_weights(folder: Path, name: str, expected: Mapping[str, Tensor], device) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        raise UnsupportedModel(
            f"{name!r} has no {WEIGHTS}.", hint="Pickled weights can run code when loaded, so they are never read."
        )
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118, not a dict
            problem = _difference(shapes, {key: tuple(value.shape) for key, value in expected.items()})
            if problem:
                raise UnsupportedModel(f"The weights of {name!r} do not fit its {CONFIG}: {problem}.")
            weights = {key: file.get_tensor(key).to(device) for key in shapes}
    except (SafetensorError, OSError, ValueError) as error:
        raise UnsupportedModel(f"The {WEIGHTS} of {name!r} is damaged ({type(error).__name__}).") from None
    real = {key for key, value in expected.items() if value.is_floating_point()}
    dtypes = {weights[key].dtype for key in real}
    others = all(weights[key].dtype == expected[key].dtype for key in expected.keys() - real)
    if len(dtypes) != 1 or not dtypes.pop().is_floating_point or not others:
        raise UnsupportedModel(f"The weights of {name!r} must all be of one dtype of real numbers.")
    return weights


def _difference(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with the first few weights, in words, or an empty string."""
    lacking, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [
        f"{key} is {found[key]} instead of {expected[key]}"
        for key in sorted(expected.keys() & found.keys())
        if found[key] != expected[key]
    ]
    words = [f"{len(lacking)} are missing ({lacking[0]})"] if lacking else []
    words += [f"{len(unknown)} are unknown"] if unknown else []
    return "; ".join(words + wrong[:3])
