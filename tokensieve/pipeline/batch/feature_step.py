"""Compressed visual tokens of a clip, as the language model would get them, with where and when each of them is."""

# Shape legend: K kept tokens, D width of the language model, N candidates, T token frames, F frames shown

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokensieve.compression import Plan
from tokensieve.datasets.frames import Frames
from tokensieve.errors import BadMedia, BadOption, TokensieveError
from tokensieve.pipeline.adapter import VisualItem
from tokensieve.pipeline.batch.inputs import Failure, Input
from tokensieve.pipeline.batch.rows import FLOATS, Row, failed_row, feature_schema, frames_row, input_row
from tokensieve.pipeline.vlm import VLM


class FeatureStep:
    """Encodes every clip alone and keeps the tokens that its compression keeps.

    Structural tokens (learned newlines) are left out: they have no place in the picture. A method inside the language
    model cannot shorten what has not entered it, and is refused.

    Args:
        vlm: with its compression set.
        dtype: "float32" or "float16", of what is stored.

    Raises:
        BadOption: another dtype, or a method inside the language model.
    """

    def __init__(self, vlm: VLM, *, dtype: str = "float32"):
        if vlm.compression is not None and (stage := vlm.compression.at("decoder")) is not None:
            raise BadOption(
                f"{stage.method.name!r} drops tokens inside the language model, which features never enter.",
                hint="Take a method of the tower or the projector: see `tokensieve methods`.",
            )
        self.schema = feature_schema(vlm.model.get_input_embeddings().weight.shape[1], dtype)
        self.vlm, self.dtype = vlm, FLOATS[dtype]
        vlm.model.eval()

    def add(self, given: Input, frames: Frames) -> list[Row]:
        """As `Step.add`; the row is ready at once."""
        try:
            prepared = self.vlm.prepare(frames, given.questions[0])
            return [{**input_row(given), **frames_row(frames), **self._features(prepared, frames)}]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            stage = "answer" if isinstance(error, _NotStorable) else "encode"
            return [failed_row(given, Failure.of(stage, error), frames)]

    def finish(self) -> list[Row]:
        """As `Step.finish`: nothing waits."""
        return []

    def _features(self, prepared, frames: Frames) -> Row:
        (item,), (plan,) = prepared.items, prepared.plans
        features_KD = kept_candidates(item, plan).float().cpu()
        with np.errstate(over="ignore"):  # told below
            pooled_D = features_KD.mean(0).numpy().astype(self.dtype)
            stored_KD = features_KD.numpy().astype(self.dtype)
        if not (np.isfinite(stored_KD).all() and np.isfinite(pooled_D).all()):
            raise _NotStorable(f"A feature is no finite {self.dtype} number.", hint="Store float32.")
        positions_K4 = positions(item, plan)
        times_T = token_times(item.tokens.grids[0][0], frames)
        return {
            "visual_tokens_full": len(item.slots),
            "visual_tokens": [len(stored_KD)],
            "features": stored_KD,
            "positions": positions_K4,
            "times_s": times_T[positions_K4[:, 1]].tolist(),
            "grids": np.asarray(item.tokens.grids, dtype=np.int32),
            "pooled": pooled_D,
        }


class _NotStorable(TokensieveError):
    pass


def kept_candidates(item: VisualItem, plan: Plan) -> Tensor:
    """`[K, D]`, what the language model would get for the tokens that the plan keeps, without structural ones."""
    kept_K = item.candidates[plan.kept.to(item.candidates.device)]
    return item.kept_features(plan)[torch.isin(item.kept(plan), kept_K)]


def positions(item: VisualItem, plan: Plan) -> np.ndarray:
    """`[K, 4]` int32: raster block, frame, row and column of every kept token in its grid of tokens.

    Videos and plain pictures have one block, tiled pictures two: the whole picture, then the tiles as one raster.
    """
    blocks = [
        np.stack([np.full(t * h * w, block), *(axis.ravel() for axis in np.indices((t, h, w)))], axis=1)
        for block, (t, h, w) in enumerate(item.tokens.grids)
    ]
    return np.concatenate(blocks)[plan.kept.cpu().numpy()].astype(np.int32)


def token_times(num_token_frames: int, frames: Frames) -> np.ndarray:
    """`[T]` seconds: when the first frame that went into each token frame is shown. Some models join neighbours."""
    if num_token_frames > frames.num_frames:
        raise BadMedia(f"{frames.num_frames} frames gave {num_token_frames} token frames.")
    joined = -(-frames.num_frames // num_token_frames)
    return frames.times_s[np.minimum(np.arange(num_token_frames) * joined, frames.num_frames - 1)]
