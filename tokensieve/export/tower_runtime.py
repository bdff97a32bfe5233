"""Runs exported vision towers and text encoders: numpy and onnxruntime, no torch.

>>> tower = OnnxTower.from_pretrained("clip-tome-onnx")
>>> texts = tower.encode_text(ids)                    # [C, O]
>>> tower.classify(pixels, texts).argmax(-1)          # zero-shot classes of [B, 3, H, W]
"""

# Shape legend: B images, H and W of an image, C classes (texts), T tokens of a text, O width of the embeddings,
#               A anchors, S blocks that take an anchor, L blocks, D width of the tower

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export.folder import AGAIN
from tokensieve.export.manifest import Manifest
from tokensieve.export.sessions import open_session, running

VISION, TEXT = "vision_model", "text_model"
CLIP_LOGIT_SCALE = 100.0  # of models that bring no scale of their own: what CLIP's was clipped to


class OnnxTower:
    """A vision tower, and the text encoder where the model had one.

    Attributes:
        manifest: what was exported.
    """

    def __init__(self, manifest: Manifest, sessions: dict):
        self.manifest = manifest
        self._sessions = sessions
        self._shapes = {
            name: {each.name: each.shape for each in session.get_inputs()} for name, session in sessions.items()
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path, provider: str | None = None, threads: int | None = None) -> OnnxTower:
        """Opens a folder that `export_tower` wrote.

        Args:
            folder: with `tokensieve.json`.
            provider: of onnxruntime; see `sessions.open_session`.
            threads: for one product; None leaves it to onnxruntime.

        Raises:
            UnsupportedModel: it holds no exported tower, or a graph that cannot be opened.
            BadOption: the provider is not there.
        """
        folder = Path(folder)
        manifest = Manifest.load(folder)
        if manifest.kind != "tower" or VISION not in manifest.graphs:
            raise UnsupportedModel(
                f"{folder} holds a {manifest.kind} and no exported tower.",
                hint="Open vision-language models with the runtime for them.",
            )
        if odd := _odd_fact(manifest.model):
            raise UnsupportedModel(f"The manifest in {folder} has a wrong value for {odd!r}.", hint=AGAIN)
        files = {name: file for name, file in manifest.graphs.items() if name in (VISION, TEXT)}
        return cls(manifest, {name: open_session(folder, file, provider, threads) for name, file in files.items()})

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images it takes, in pixels."""
        return tuple(self._shapes[VISION]["pixel_values"][2:])

    @property
    def anchor_blocks(self) -> tuple[int, ...]:
        """The blocks (from 0) that an anchor joins; empty unless the method is tca and shortens the sequence."""
        return tuple(self.manifest.model.get("anchor_blocks", ()))

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """`[B, O]` float32, what the model's own call gives, from `[B, 3, H, W]` pixels as the model takes them.

        Raises:
            BadOption: pixels of another shape or kind.
        """
        return self._run_vision(pixels)[0]

    def encode_with_path(self, pixels: np.ndarray, anchors: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings and, `[B, L, D]`, the path of the class token through the blocks (towers with tca only).

        Args:
            pixels: `[B, 3, H, W]`.
            anchors: `[A, S, D]`, one for each class: its path after the blocks before `anchor_blocks`.

        Raises:
            BadOption: the tower was exported with another method, or an input has a wrong shape or kind.
        """
        if self.manifest.method != "tca":
            raise BadOption(
                f"This tower was exported with method {self.manifest.method!r}, which records no paths.",
                hint="Export the model with method tca.",
            )
        return tuple(self._run_vision(pixels, anchors))

    def _run_vision(self, pixels: np.ndarray, anchors: np.ndarray | None = None) -> list[np.ndarray]:
        shapes = self._shapes[VISION]
        inputs = {"pixel_values": _checked("pixels", pixels, shapes["pixel_values"], np.floating, np.float32)}
        if "anchors" in shapes:
            if anchors is None:
                anchors = np.zeros((0, *shapes["anchors"][1:]), np.float32)
            shape = shapes["anchors"]
            inputs["anchors"] = _checked("anchors", anchors, shape, np.floating, np.float32, may_be_empty=True)
        with running(VISION):
            return self._sessions[VISION].run(None, inputs)

    def encode_text(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """`[C, O]` float32, what the model's own call gives, from token ids `[C, T]`.

        Args:
            ids: whole numbers.
            attention_mask: 1 at tokens, 0 at padding, where the model takes one; by default all ones.

        Raises:
            BadOption: no text encoder was exported, it takes no mask, or an input has a wrong shape or kind.
        """
        if TEXT not in self._sessions:
            raise BadOption("This export has no text encoder.", hint="Export a whole model, not only its tower.")
        shapes = self._shapes[TEXT]
        inputs = {"input_ids": _checked("ids", ids, shapes["input_ids"], np.integer, np.int64)}
        if "attention_mask" in shapes:
            mask = np.ones_like(inputs["input_ids"]) if attention_mask is None else attention_mask
            shape = list(inputs["input_ids"].shape)
            inputs["attention_mask"] = _checked("attention_mask", mask, shape, np.integer, np.int64)
        elif attention_mask is not None:
            raise BadOption("This text encoder takes no attention_mask.")
        with running(TEXT):
            return self._sessions[TEXT].run(None, inputs)[0]

    def classify(self, pixels: np.ndarray, text_embeds: np.ndarray) -> np.ndarray:
        """`[B, C]` float32 zero-shot logits: scale * cosine + bias, with the model's own numbers, else 100 and 0.

        Raises:
            BadOption: pixels of another shape or kind, or `text_embeds` not `[C, O]`.
        """
        image_BO = self.encode_image(pixels)
        text_CO = _checked("text_embeds", text_embeds, ["classes", image_BO.shape[-1]], np.floating, np.float32)
        scale, bias = self.logit_numbers
        return scale * (unit(image_BO) @ unit(text_CO).T) + bias

    @property
    def logit_numbers(self) -> tuple[np.float32, np.float32]:
        """Scale and bias of the cosines."""
        facts = self.manifest.model
        return np.float32(facts.get("logit_scale", CLIP_LOGIT_SCALE)), np.float32(facts.get("logit_bias", 0.0))


def _odd_fact(facts: Mapping[str, object]) -> str:
    """The name of a fact that the runtime cannot use, or ""."""
    for name in ("logit_scale", "logit_bias"):
        value = facts.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return name
    blocks = facts.get("anchor_blocks", [])
    if not isinstance(blocks, list) or not all(type(block) is int and block > 0 for block in blocks):
        return "anchor_blocks"
    return ""


def unit(x: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; zeros stay zeros."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _checked(
    name: str, value: np.ndarray, shape: list[int | str], kind: type, dtype: type, *, may_be_empty: bool = False
) -> np.ndarray:
    value = np.asarray(value)
    fits = value.ndim == len(shape) and all(
        isinstance(want, str) or size == want for size, want in zip(value.shape, shape, strict=True)
    )
    if not (fits and np.issubdtype(value.dtype, kind) and (value.size or may_be_empty)):
        wanted = ", ".join(map(str, shape))
        raise BadOption(
            f"{name} must be an array [{wanted}] of {'whole' if kind is np.integer else 'floating'} numbers, "
            f"got {list(value.shape)} of {value.dtype}."
        )
    return np.ascontiguousarray(value, dtype)
