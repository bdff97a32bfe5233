"""`tokensieve.json`: what an exported folder holds and how to run it; written by the exporter, read by the runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from tokensieve.errors import UnsupportedModel
from tokensieve.export.folder import AGAIN, read_json

NAME = "tokensieve.json"
FORMAT = 1
MAX_BYTES = 1 << 20  # a manifest is a few kB
KINDS = ("vlm", "tower")
PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What was exported, from what, and how it is run.

    Attributes:
        kind: "vlm" or "tower".
        family: `config.model_type` of a VLM; the library ("open_clip", "timm", "transformers") of a tower.
        method: name of the compression method, None without.
        keep: budget used unless another is asked for: a share in (0, 1] or a whole number.
        options: the method's own options, plain JSON values.
        dynamic_keep: whether one file serves every budget.
        positions: "preserve".
        precision: one of `PRECISIONS`.
        opset: of the graphs.
        graphs: name of each graph ("vision_encoder", ...) -> its file, relative to the folder, with "/".
        inputs: per graph: input name -> shape, with names for what is dynamic.
        model: facts that the runtime needs and the configuration does not tell (per family).
        versions: of tokensieve, torch, transformers, onnx, onnxruntime.
        verified: what the exporter compared with PyTorch: greatest differences, tolerances, answers; empty if it was
            told not to.
    """

    kind: str
    family: str
    method: str | None = None
    keep: float | int = 1.0
    options: dict[str, object] = field(default_factory=dict)
    dynamic_keep: bool = True
    positions: str = "preserve"
    precision: str = "fp32"
    opset: int = 18
    graphs: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, dict[str, list[int | str]]] = field(default_factory=dict)
    model: dict[str, object] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    verified: dict[str, object] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes `tokensieve.json` into the folder."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2, sort_keys=True, allow_nan=False)
        (folder / NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads and checks the manifest of an exported folder.

        Raises:
            UnsupportedModel: there is none, it is a link or no valid JSON, its format is unknown, a field is missing,
                unknown or of the wrong type, or a graph's path leaves the folder.
        """
        path = folder / NAME
        if not path.exists():
            raise UnsupportedModel(f"{folder} holds no {NAME}, so it is no exported model.", hint=AGAIN)
        found = read_json(folder, NAME, MAX_BYTES)
        if found.get("format") != FORMAT:
            given = found.get("format")
            raise UnsupportedModel(f"{path} has format {given!r}, and this release reads {FORMAT}.", hint=AGAIN)
        found.pop("format")
        names = {each.name for each in fields(cls)}
        if not names >= set(found) >= {"kind", "family", "graphs"}:
            odd = sorted(set(found) - names) or sorted({"kind", "family", "graphs"} - set(found))
            raise UnsupportedModel(f"{path} has unknown or missing fields: {', '.join(map(repr, odd))}.", hint=AGAIN)
        manifest = cls(**found)
        if problem := manifest._problem():
            raise UnsupportedModel(f"{path}: {problem}", hint=AGAIN)
        return manifest

    def _problem(self) -> str:
        """A sentence on what is wrong with the values, or ""."""
        if self.kind not in KINDS:
            return f"kind must be one of {KINDS}, got {self.kind!r}."
        if self.precision not in PRECISIONS:
            return f"precision must be one of {PRECISIONS}, got {self.precision!r}."
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not self.keep > 0:
            return f"keep must be a number above 0, got {self.keep!r}."
        for name in ("family", "positions"):
            if not isinstance(getattr(self, name), str):
                return f"{name} must be a string, got {getattr(self, name)!r}."
        for name in ("options", "graphs", "inputs", "model", "versions", "verified"):
            if not isinstance(getattr(self, name), Mapping):
                return f"{name} must be an object, got {getattr(self, name)!r}."
        for name, file in self.graphs.items():
            parts = file.split("/") if isinstance(file, str) else [""]
            if any(part in ("", ".", "..") or "\\" in part or ":" in part for part in parts):
                return f"graph {name!r} must be a file inside the folder, got {file!r}."
        return ""
