"""Streaming test-time adaptation of a zero-shot classifier with TCA; nothing is trained.

"Is Less More? Exploring Token Condensation as Training-free Test-time Adaptation", Wang, Gong, Wang, Huang, Luo,
https://arxiv.org/abs/2410.14729 (ICCV 2025). For every image of the stream, in order:

    1. the tower runs with three condensing blocks (`compression/tca.py`), steered by the class anchors, if any
    2. s = logit_scale * W z,  H = entropy of softmax(s) in nats,  c = argmax s
    3. the class token's path through the blocks enters the reservoir under class c, with key H
    4. the anchors of the next image: class means, once every class has at least 2 items
    5. logits = s + correction by all stored items, the image itself included

Variants ("released" is checked against a recorded run of the authors' code, all decisions equal):

    |            | released                                   | paper, by a second-hand account                   |
    |------------|--------------------------------------------|---------------------------------------------------|
    | token score| mean attention over heads                  | mean over heads of the rank inside the head       |
    | lowest     | fused to one token                         | dropped                                           |
    | key        | entropy H                                  | -p_c log p_c                                      |
    | who leaves | largest H + mean similarity to the others  | largest key                                       |
    | correction | lambd * sum exp(-beta (1 - aff)) on logits | lambd * mean of aff, on probabilities             |

The paper's text could not be read. What the account leaves open stays as released: the ratio of the prune and merge
bands (the paper has thresholds), the way of anchors into the attention (there: one is sampled, and asks beside the
class token), the blocks where anchors start. In the mean, dividing by the number of stored items (not by M) and
block weights that sum to 1 are inferred. `beta` has no place in it; the paper's own beta is `scale` here.

Without a class token (SigLIP, map or average pooling) there is no official code. Our own design: patches are scored
by the attention they receive, and the mean token after each block, weighted by how many patches a token stands for,
takes the class token's place in paths and anchors. H is the entropy of the softmax over the classes there too,
although SigLIP was trained with a sigmoid.
"""

# Shape legend: B images, C classes, L blocks, D width of the tower, O width of the features

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tokensieve.compression.tca import FirstCenter, tca
from tokensieve.errors import BadOption
from tokensieve.pipeline.adaptation.reservoir import Reservoir, block_weights
from tokensieve.pipeline.towers.compress import compress_tower, find_tower

FORMAT = "tokensieve-tca-stream-1"
CLIP_LOGIT_SCALE = 100.0  # hard-coded in the official code, and what CLIP's own scale was clipped to
NORM_TOLERANCE = 1e-2  # float16 and bfloat16 rows of length 1 are off by up to 4e-3


class TCAStream:
    """One stream of images over a zero-shot classifier, which adapts as the images come.

    The model stays as it is: the reduction is put on for the length of a `step` and taken off again. Many streams
    may share one model, each with its own memory, but not at the same time in several threads.

    Args:
        model: a CLIP or SigLIP of open_clip or transformers (a whole model, or only its vision part), or a timm
            tower, in eval mode.
        text_features: `[C, O]`, one row of length 1 per class, as the model's text tower gives them.
        variant: "released" or "paper", see the module's text.
        drop_rate: r in [0, 1/3), the official one; 0 leaves the tower dense. The paper's R = 0.9 and 0.7 are 0.035
            and 0.105 (inferred from matching compute).
        reservoir_size: M, items stored per class. With 1 there are never anchors.
        scale: how evenly blocks count in the affinity: 0.01 is the last block only, 5 nearly even.
        lambd: strength of the correction.
        beta: sharpness of the correction ("released" only).
        condense: False leaves the tower dense, so that only the correction adapts.
        correct: False returns the uncorrected logits; reservoir and anchors work on.
        logit_scale: None takes a SigLIP model's own scale, and 100 for all others, as the official code does.
        logit_bias: None takes the model's own (SigLIP), or 0. It shifts all classes alike.
        blocks, first_center: see `tokensieve.compression.tca.tca`. With a generator the draws continue over the
            stream; its state is not saved.

    The defaults of `drop_rate`, `reservoir_size`, `scale`, `lambd` and `beta` are the official ones for DTD at the
    official default rate. The official code tunes the last four per data set (lambd 1.5 to 8, beta 2 to 9).

    Raises:
        BadOption: an option is out of range.
        UnsupportedModel: the model has no vision tower that can be reduced.

    Example:
        >>> stream = TCAStream(clip_model, text_features, drop_rate=0.1)
        >>> for images in loader:
        ...     predicted = stream.step(images).argmax(-1)
        >>> stream.save("stream.safetensors")
    """

    def __init__(
        self,
        model: nn.Module,
        text_features: Tensor,
        *,
        variant: str = "released",
        drop_rate: float = 0.1,
        reservoir_size: int = 3,
        scale: float = 1.0,
        lambd: float = 2.0,
        beta: float = 6.0,
        condense: bool = True,
        correct: bool = True,
        logit_scale: float | None = None,
        logit_bias: float | None = None,
        blocks: tuple[int, ...] | None = None,
        first_center: FirstCenter = 0,
    ):
        self.stage = tca(
            drop_rate=drop_rate if condense else 0.0, variant=variant, blocks=blocks, first_center=first_center
        )
        if drop_rate is None:
            raise BadOption("drop_rate must be a number from 0 to below 1/3, got None.")
        for name, value in (("scale", scale), ("lambd", lambd), ("beta", beta)):
            _check_number(name, value, above_zero=name == "scale")
        if isinstance(reservoir_size, bool) or not isinstance(reservoir_size, int) or reservoir_size < 1:
            raise BadOption(f"reservoir_size must be a whole number from 1 up, got {reservoir_size!r}.")
        self.model = model
        self.tower = find_tower(model).module
        self.device = next(model.parameters()).device
        self.text_CO = _check_text_features(text_features).to(self.device).clone()
        self.variant, self.drop_rate, self.condense, self.correct = variant, drop_rate, condense, correct
        self.reservoir_size, self.scale, self.lambd, self.beta = reservoir_size, scale, lambd, beta
        self.logit_scale, self.logit_bias = _logit_numbers(model, logit_scale, logit_bias)
        self.reset()

    def reset(self) -> None:
        """Forgets the stream: the next image is the first one."""
        self.reservoir: Reservoir | None = None
        self.num_seen = 0

    @torch.no_grad()
    def step(self, images: Tensor) -> Tensor:
        """`[B, C]` float32 logits of the next images of the stream, `[B, 3, S, S]` as the model takes them.

        The images are taken in order, so that one call with B images equals B calls with one (up to rounding where
        the tower runs several at once). An image's anchors depend on all images before it; so the tower takes them
        one by one once there are anchors, and several at once only while none can appear in between. A dense tower
        takes all at once.

        With variant "paper" the corrected values are probabilities plus correction, not logits.

        Raises:
            BadOption: no batch of images, features of another width than the text features or not finite (the
                stream is then as before the image), a tower other than that of the loaded state, or a drop rate too
                high for the tower's number of patches.
        """
        if images.ndim != 4 or len(images) == 0:
            raise BadOption(f"images must be [batch, channels, height, width], got {tuple(images.shape)}.")
        done: list[Tensor] = []
        while len(done) < len(images):
            some = images[len(done) : len(done) + self._num_at_once(len(images))]
            feature_BO, path_BLD = self._run_tower(some)
            with torch.autocast(self.device.type, enabled=False):
                logits_BC = self.logit_scale * (feature_BO @ self.text_CO.T) + self.logit_bias
                done += [self._adapt(*each) for each in zip(logits_BC, path_BLD, strict=True)]
        return torch.stack(done)

    def _num_at_once(self, wanted: int) -> int:
        if self.stage.drop_rate == 0:
            return wanted
        if not isinstance(self.stage.first_center, int):
            return 1  # the order of the draws
        missing = 2 * len(self.text_CO) if self.reservoir is None else self.reservoir.num_missing()
        return max(1, min(wanted, missing))

    def _run_tower(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[B, O]` of length 1 and paths `[B, L, D]`, both float32."""
        self.stage.anchors = None if self.reservoir is None else self.reservoir.anchors()
        with compress_tower(self.tower, self.stage):
            feature_BO = image_features(self.model, images).float()
        path_BLD = torch.stack(self.stage.path, 1).float()
        self.stage.path.clear()
        if feature_BO.ndim != 2 or feature_BO.shape[1] != self.text_CO.shape[1]:
            raise BadOption(
                f"The model gives image features {tuple(feature_BO.shape)}, the text features are "
                f"{tuple(self.text_CO.shape)}: their widths must be equal.",
                hint="Give a model with its projection, such as CLIPVisionModelWithProjection.",
            )
        if not (feature_BO.isfinite().all() and path_BLD.isfinite().all()):
            raise BadOption(
                "Some image features are NaN or infinite; the stream is as before.",
                hint="Check the images and the model's dtype: float16 overflows in some vision towers.",
            )
        if self.reservoir is None:
            self.reservoir = Reservoir(len(self.text_CO), self.reservoir_size, *path_BLD.shape[1:], device=self.device)
        elif self.reservoir.path_CMLD.shape[2:] != path_BLD.shape[1:]:
            raise BadOption(
                f"The stream's state is of a tower of [blocks, width] = {list(self.reservoir.path_CMLD.shape[2:])}, "
                f"this model has {list(path_BLD.shape[1:])}.",
                hint="Call reset(), or load the state that belongs to this model.",
            )
        return F.normalize(feature_BO, dim=-1), path_BLD

    def _adapt(self, logits_C: Tensor, path_LD: Tensor) -> Tensor:
        released = self.variant == "released"
        log_p_C = logits_C.log_softmax(-1)
        surprise_C = -log_p_C.exp() * log_p_C
        label = int(logits_C.argmax())
        key = surprise_C.sum() if released else surprise_C[label]
        self.reservoir.admit(label, key, path_LD, self.num_seen, "diverse" if released else "lowest")
        self.num_seen += 1
        if not self.correct:
            return logits_C
        weight_L = block_weights(len(path_LD), self.scale)
        correction_C = self.reservoir.correction(
            path_LD, weight_L, lambd=self.lambd, beta=self.beta if released else None
        )
        return (logits_C if released else log_p_C.exp()) + correction_C

    # --- state

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state on the CPU: `num_seen` and, after the first image, the reservoir's three tensors."""
        state = {"num_seen": torch.tensor(self.num_seen)}
        if self.reservoir is not None:
            state |= {name: getattr(self.reservoir, name).cpu().clone() for name in Reservoir.STATE}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues from a state; it goes to the model's device.

        Raises:
            BadOption: the state is not one of a stream with these classes and this reservoir size; the stream then
                stays as it is.
        """
        self.num_seen, self.reservoir = self._checked(state)

    def _checked(self, state: dict[str, Tensor]) -> tuple[int, Reservoir | None]:
        places = (len(self.text_CO), self.reservoir_size)
        names = set(state)
        if names not in ({"num_seen"}, {"num_seen", *Reservoir.STATE}) or not all(
            isinstance(value, Tensor) for value in state.values()
        ):
            raise BadOption(f"This is no state of a TCAStream: it holds {sorted(map(str, names))}.")
        num_seen = state["num_seen"]
        if num_seen.numel() != 1 or num_seen.dtype != torch.int64 or num_seen < 0:
            raise BadOption("The state's num_seen must be one whole number from 0 up.")
        if len(state) == 1:
            return int(num_seen), None
        return int(num_seen), Reservoir.from_state(state, places, int(num_seen), self.device)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the state, the text features and the settings it depends on as one safetensors file."""
        tensors = {**self.state_dict(), "text_features": self.text_CO.cpu().contiguous()}
        part = Path(f"{os.fspath(path)}.part")
        save_file(tensors, part, metadata={"format": FORMAT, "settings": json.dumps(self._settings())})
        part.replace(path)  # a save that is cut off leaves the file of before

    def load(self, path: str | os.PathLike) -> None:
        """Continues from a saved file.

        Raises:
            BadOption: the file is missing, damaged or no saved stream, or it was written with other text features
                or other settings of the tower or the reservoir; the stream then stays as it is. `scale`, `lambd`,
                `beta` and `correct` may differ.
        """
        tensors, settings = _read(Path(path))
        for name, value in self._settings().items():
            if settings.get(name) != value:
                raise BadOption(
                    f"{path} was saved with {name}={settings.get(name)!r}, this stream has {name}={value!r}.",
                    hint="Make the stream with the settings of the file.",
                )
        text_CO = tensors.pop("text_features", None)
        same = text_CO is not None and text_CO.shape == self.text_CO.shape
        if not same or not torch.allclose(text_CO, self.text_CO.cpu(), atol=NORM_TOLERANCE):
            raise BadOption(
                f"{path} was saved for other classes: its text features differ from this stream's.",
                hint="Give the same class names in the same order, with the same prompts and text tower.",
            )
        self.load_state_dict(tensors)

    def _settings(self) -> dict[str, object]:
        """What stored items depend on, as JSON knows it."""
        stage = self.stage
        blocks = None if stage.blocks is None else list(stage.blocks)
        return {
            "variant": self.variant,
            "drop_rate": stage.drop_rate,
            "reservoir_size": self.reservoir_size,
            "blocks": blocks,
            "logit_scale": self.logit_scale,
        }


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    if not path.is_file():
        raise BadOption(f"There is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        settings = json.loads(metadata["settings"]) if metadata.get("format") == FORMAT else None
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise BadOption(f"{path} is damaged or no safetensors file ({type(error).__name__}).") from None
    if not isinstance(settings, dict):
        raise BadOption(f"{path} is no saved TCAStream (format {metadata.get('format')!r}, expected {FORMAT!r}).")
    return tensors, settings


def image_features(model: nn.Module, images: Tensor) -> Tensor:
    """What the model's own call for images gives: `[B, O]` embeddings of a whole model or a tower that pools."""
    if hasattr(model, "get_image_features"):  # transformers, whole model
        out = model.get_image_features(pixel_values=images)
    elif hasattr(model, "encode_image"):  # open_clip, whole model
        out = model.encode_image(images)
    else:
        out = model(images)
    for name in ("image_embeds", "pooler_output"):  # transformers
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    return out[0] if isinstance(out, tuple) else out


def _logit_numbers(model: nn.Module, scale: float | None, bias: float | None) -> tuple[float, float]:
    own_bias = getattr(model, "logit_bias", None)
    if scale is None:
        scale = CLIP_LOGIT_SCALE if own_bias is None else float(model.logit_scale.detach().exp())
    if bias is None:
        bias = 0.0 if own_bias is None else float(own_bias.detach())
    _check_number("logit_scale", scale, above_zero=True)
    if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not math.isfinite(bias):
        raise BadOption(f"logit_bias must be a finite number or None, got {bias!r}.")
    return float(scale), float(bias)


def _check_number(name: str, value: float, *, above_zero: bool) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (above_zero and value == 0):
        raise BadOption(f"{name} must be a finite number {'above 0' if above_zero else 'from 0 up'}, got {value!r}.")


def _check_text_features(text_features: Tensor) -> Tensor:
    if not isinstance(text_features, Tensor) or text_features.ndim != 2 or not len(text_features):
        shape = tuple(text_features.shape) if isinstance(text_features, Tensor) else type(text_features).__name__
        raise BadOption(f"text_features must be a tensor [classes, width], got {shape}.")
    text_CO = text_features.detach().float()
    if not ((text_CO.norm(dim=-1) - 1).abs() < NORM_TOLERANCE).all():
        raise BadOption(
            "text_features must be rows of length 1.",
            hint="Average the features of a class's prompts, then torch.nn.functional.normalize(features, dim=-1).",
        )
    return text_CO
