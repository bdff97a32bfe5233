"""TCA on a stream around an exported tower: memory and correction in numpy, so no torch is needed.

What is computed, and from which paper, is told in `tokensieve.pipeline.adaptation`; this gives the same logits. How
the tower condenses (drop rate, blocks, variant, first centre) is a constant of the export; a tower exported with a
drop rate of 0 only corrects.
"""

# Shape legend: B images, C classes, M places per class, L blocks, S blocks that take an anchor, D width of the tower,
#               O width of the embeddings, I items (I <= M + 1), N stored items

from __future__ import annotations

import math

import numpy as np

from tokensieve.errors import BadOption
from tokensieve.export.tower_runtime import CLIP_LOGIT_SCALE, OnnxTower, unit

NORM_TOLERANCE = 1e-2  # rows made in half precision are off by up to 4e-3


class OnnxTCAStream:
    """One stream of images over a zero-shot classifier, which adapts as the images come.

    Args:
        tower: exported with method tca.
        text_features: `[C, O]`, one row of length 1 per class.
        reservoir_size: M, items stored per class. With 1 there are never anchors.
        scale: how evenly blocks count in the affinity: 0.01 is the last block only, 5 nearly even.
        lambd: strength of the correction.
        beta: sharpness of the correction (variant "released" only).
        correct: False returns the uncorrected logits; memory and anchors work on.
        logit_scale: None takes a SigLIP model's own scale, and 100 for all others, as the official code does.
        logit_bias: None takes the model's own (SigLIP), or 0.

    Raises:
        BadOption: an option is out of range, or the tower was exported with another method.

    Example:
        >>> stream = OnnxTCAStream(OnnxTower.from_pretrained("clip-tca"), text_features)
        >>> for pixels in loader:
        ...     predicted = stream.step(pixels).argmax(-1)
    """

    def __init__(
        self,
        tower: OnnxTower,
        text_features: np.ndarray,
        *,
        reservoir_size: int = 3,
        scale: float = 1.0,
        lambd: float = 2.0,
        beta: float = 6.0,
        correct: bool = True,
        logit_scale: float | None = None,
        logit_bias: float | None = None,
    ):
        if tower.manifest.method != "tca":
            raise BadOption(
                f"A stream needs a tower exported with method tca, this one has {tower.manifest.method!r}.",
                hint="Export it again with method tca.",
            )
        own_scale, own_bias = map(float, tower.logit_numbers)
        if logit_scale is None:
            logit_scale = own_scale if "logit_bias" in tower.manifest.model else CLIP_LOGIT_SCALE
        if logit_bias is None:
            logit_bias = own_bias
        for name, value in (("scale", scale), ("lambd", lambd), ("beta", beta), ("logit_scale", logit_scale)):
            _check_number(name, value, lowest=0.0, above=name in ("scale", "logit_scale"))
        _check_number("logit_bias", logit_bias)
        if isinstance(reservoir_size, bool) or not isinstance(reservoir_size, int) or reservoir_size < 1:
            raise BadOption(f"reservoir_size must be a whole number from 1 up, got {reservoir_size!r}.")
        self.tower = tower
        self.text_CO = _checked_text(text_features)
        self.is_released = tower.manifest.options.get("variant", "released") == "released"
        self.reservoir_size, self.scale, self.lambd, self.beta, self.correct = (
            reservoir_size, scale, lambd, beta, correct
        )  # fmt: skip
        self.logit_scale, self.logit_bias = np.float32(logit_scale), np.float32(logit_bias)
        self.reset()

    def reset(self) -> None:
        """Forgets the stream: the next image is the first one."""
        self.memory: Memory | None = None
        self.num_seen = 0

    def step(self, pixels: np.ndarray) -> np.ndarray:
        """`[B, C]` float32 logits of the next images of the stream, `[B, 3, H, W]` as the model takes them.

        The images are taken in order: one call with B images equals B calls with one, up to rounding. With variant
        "paper" the corrected values are probabilities plus correction, not logits.

        Raises:
            BadOption: pixels of another shape or kind, or embeddings of another width than the text features or not
                finite (the stream is then as before the image).
        """
        pixels = np.asarray(pixels)
        if pixels.ndim != 4 or len(pixels) == 0:
            raise BadOption(f"pixels must be [batch, 3, height, width], got {list(pixels.shape)}.")
        done: list[np.ndarray] = []
        while len(done) < len(pixels):
            embed_BO, path_BLD = self._run_tower(pixels[len(done) : len(done) + self._num_at_once(len(pixels))])
            logits_BC = self.logit_scale * (unit(embed_BO) @ self.text_CO.T) + self.logit_bias
            done += [self._adapt(*each) for each in zip(logits_BC, path_BLD, strict=True)]
        return np.stack(done)

    def _num_at_once(self, wanted: int) -> int:
        if not self.tower.anchor_blocks:
            return wanted
        missing = 2 * len(self.text_CO) if self.memory is None else self.memory.num_missing()
        return max(1, min(wanted, missing))

    def _run_tower(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        anchors = None
        if self.tower.anchor_blocks and self.memory is not None and not self.memory.num_missing():
            anchors = self.memory.mean_CLD[:, [block - 1 for block in self.tower.anchor_blocks]]
        embed_BO, path_BLD = self.tower.encode_with_path(pixels, anchors)
        if embed_BO.ndim != 2 or embed_BO.shape[1] != self.text_CO.shape[1]:
            raise BadOption(
                f"The tower gives embeddings {list(embed_BO.shape)}, the text features are "
                f"{list(self.text_CO.shape)}: their widths must be equal.",
                hint="Export a model with its projection, such as CLIPVisionModelWithProjection.",
            )
        if not (np.isfinite(embed_BO).all() and np.isfinite(path_BLD).all()):
            raise BadOption("Some embeddings are NaN or infinite; the stream is as before.", hint="Check the pixels.")
        if self.memory is None:
            self.memory = Memory(len(self.text_CO), self.reservoir_size, *path_BLD.shape[1:])
        return embed_BO, path_BLD

    def _adapt(self, logits_C: np.ndarray, path_LD: np.ndarray) -> np.ndarray:
        shifted_C = logits_C - logits_C.max()
        log_p_C = shifted_C - np.log(np.exp(shifted_C).sum())
        surprise_C = -np.exp(log_p_C) * log_p_C
        label = int(logits_C.argmax())
        key = surprise_C.sum() if self.is_released else surprise_C[label]
        self.memory.admit(label, key, path_LD, self.num_seen, diverse=self.is_released)
        self.num_seen += 1
        if not self.correct:
            return logits_C
        beta = self.beta if self.is_released else None
        correction_C = self.memory.correction(path_LD, scale=self.scale, lambd=self.lambd, beta=beta)
        return (logits_C if self.is_released else np.exp(log_p_C)) + correction_C


class Memory:
    """At most M paths for each class; the twin of `pipeline.adaptation.reservoir.Reservoir`.

    Attributes:
        key_CM: float32 keys in rising order, inf where a place is empty.
        step_CM: which image of the stream an item is, -1 where a place is empty.
        path_CMLD: the paths, zeros where a place is empty.
        count_C: items of each class.
        mean_CLD: their mean path.
    """

    def __init__(self, num_classes: int, num_places: int, num_blocks: int, width: int):
        self.key_CM = np.full((num_classes, num_places), np.inf, np.float32)
        self.step_CM = np.full((num_classes, num_places), -1)
        self.path_CMLD = np.zeros((num_classes, num_places, num_blocks, width), np.float32)
        self.count_C = np.zeros(num_classes, np.int64)
        self.mean_CLD = np.zeros((num_classes, num_blocks, width), np.float32)

    def admit(self, label: int, key: np.ndarray, path_LD: np.ndarray, step: int, *, diverse: bool) -> None:
        """Inserts an image of predicted class `label`; it may be the one that leaves again."""
        count, num_places = self.count_C[label], self.key_CM.shape[1]
        key_I = np.append(self.key_CM[label, :count], np.float32(key))
        step_I = np.append(self.step_CM[label, :count], step)
        path_ILD = np.concatenate([self.path_CMLD[label, :count], path_LD[None]])
        stay = key_I.argsort(kind="stable")
        if len(stay) > num_places:
            stay = stay[stay != (key_I + _mean_similarity(path_ILD)).argmax()] if diverse else stay[:num_places]
        self.key_CM[label, : len(stay)] = key_I[stay]
        self.step_CM[label, : len(stay)] = step_I[stay]
        self.path_CMLD[label, : len(stay)] = path_ILD[stay]
        self.mean_CLD[label] = path_ILD[stay].mean(0)
        self.count_C[label] = len(stay)

    def num_missing(self) -> int:
        """How many images at least must still be admitted before there are anchors; 0 once there are some."""
        return int(np.maximum(2 - self.count_C, 0).sum())

    def correction(self, path_LD: np.ndarray, *, scale: float, lambd: float, beta: float | None) -> np.ndarray:
        """`[C]` float32: what the stored items add to the score of every class; `beta` None takes means."""
        depth_L = np.linspace(0, 1, len(path_LD)) if len(path_LD) > 1 else np.ones(1)
        weight_L = np.exp((depth_L - 1) / scale)
        label_N, place_N = np.nonzero(self.step_CM >= 0)
        cosine_NL = (unit(path_LD) * unit(self.path_CMLD[label_N, place_N])).sum(-1)
        affinity_N = cosine_NL.astype(np.float64) @ (weight_L / weight_L.sum())
        value_N = affinity_N / self.count_C[label_N] if beta is None else np.exp(-beta * (1 - affinity_N))
        return (lambd * np.bincount(label_N, value_N, len(self.count_C))).astype(np.float32)


def _mean_similarity(path_ILD: np.ndarray) -> np.ndarray:
    unit_ID = unit(path_ILD.mean(1))
    cosine_II = unit_ID @ unit_ID.T
    return (cosine_II.sum(-1) - np.diagonal(cosine_II)) / (len(cosine_II) - 1)


def _check_number(name: str, value: float, lowest: float = -math.inf, above: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < lowest or (above and value == lowest):
        bounds = "" if lowest == -math.inf else f" {'above' if above else 'from'} {lowest:g}{'' if above else ' up'}"
        raise BadOption(f"{name} must be a finite number{bounds}, got {value!r}.")


def _checked_text(text_features: np.ndarray) -> np.ndarray:
    text_CO = np.array(text_features)
    if text_CO.ndim != 2 or not len(text_CO) or not np.issubdtype(text_CO.dtype, np.floating):
        raise BadOption(f"text_features must be an array [classes, width], got {list(text_CO.shape)}.")
    text_CO = text_CO.astype(np.float32)
    if not (abs(np.linalg.norm(text_CO, axis=-1) - 1) < NORM_TOLERANCE).all():
        raise BadOption(
            "text_features must be rows of length 1.",
            hint="Average the embeddings of a class's prompts, then divide each row by its length.",
        )
    return text_CO
