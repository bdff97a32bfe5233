"""What a model of each family is given: pictures of a generated clip, and a prompt of random text around them.

The pictures go through the family's own processor class; no tokenizer is needed, because token ids are drawn. Frames
drift, and every eighth starts a new scene, so that methods that look at time find what they look for.
"""

# Shape legend: T frames, B prompts, L prompt length

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokensieve.errors import BadOption

TEXT_TOKENS = 64  # of a prompt, a quarter of them before the pictures
CLIP_FPS = 8.0
SCENE_FRAMES = 8
QWEN_SIDE = 448  # pixels; its towers take any size
FAMILIES = ("llava", "llava_onevision", "qwen2_5_vl")


def default_frames(config) -> int:
    """One picture for LLaVA, the shipped model's 8 frames, 32 frames for other video models."""
    if config.model_type == "llava":
        return 1
    return 8 if config.vision_config.hidden_size < 256 else 32


def side_of(config) -> int:
    """Pixels along a side of the square pictures."""
    return QWEN_SIDE if config.model_type == "qwen2_5_vl" else config.vision_config.image_size


def num_pictures(config, frames: int) -> int:
    """Pictures that go through the tower: Qwen joins two frames."""
    return -(-frames // config.vision_config.temporal_patch_size) if config.model_type == "qwen2_5_vl" else frames


def num_visual(config, frames: int) -> int:
    """Visual tokens of a prompt, structural ones included."""
    vision, along = config.vision_config, side_of(config) // config.vision_config.patch_size
    if config.model_type == "qwen2_5_vl":
        return num_pictures(config, frames) * (along // vision.spatial_merge_size) ** 2
    if config.model_type == "llava_onevision":
        return frames * (-(-along // 2)) ** 2 + 1  # pooled by two, one newline
    return frames * along**2


def make_clip(frames: int, side: int) -> np.ndarray:
    """`[T, side, side, 3]` uint8: smooth noise that drifts by two pixels a frame."""
    draw = np.random.default_rng(0)
    clip = np.empty((frames, side, side, 3), np.uint8)
    for first in range(0, frames, SCENE_FRAMES):
        cells = draw.integers(0, 256, (side // 16 + 4, side // 16 + 4, 3), dtype=np.uint8)
        scene = np.kron(cells, np.ones((16, 16, 1), np.uint8))
        for i in range(first, min(frames, first + SCENE_FRAMES)):
            start = 2 * (i - first)
            clip[i] = scene[:side, start : start + side]
    return clip


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A batch of equal pictures with different text.

    Attributes:
        config: of the model.
        frames: T, of every prompt.
        batch: B.
        clip: the file that holds the frames.
    """

    config: object
    frames: int
    batch: int
    clip: Path

    @classmethod
    def write(cls, config, frames: int, batch: int, folder: Path) -> Workload:
        """Writes the clip into `folder`.

        Raises:
            BadOption: the prompt would be longer than the model's positions.
        """
        from tokensieve.datasets import write_video

        length, most = num_visual(config, frames) + TEXT_TOKENS, config.get_text_config().max_position_embeddings
        if length > most:
            raise BadOption(
                f"{frames} frames make a prompt of {length} tokens, and the model has positions for {most}.",
                hint="Give fewer --frames.",
            )
        clip = folder / f"clip-{frames}.mp4"
        if not clip.exists():
            write_video(clip, make_clip(frames, side_of(config)), CLIP_FPS)
        return cls(config=config, frames=frames, batch=batch, clip=clip)

    def read(self) -> dict[str, Tensor]:
        """Decodes the clip for every prompt and makes pixel tensors of it."""
        from tokensieve.datasets import read_video

        clips = [read_video(self.clip, num_frames=self.frames).data for _ in range(self.batch)]
        return _PIXELS[self.config.model_type](self.config, clips)

    def inputs(self, pixels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The processor's output: pixels, and `[B, L]` ids with placeholders for them."""
        generator = torch.Generator().manual_seed(1)
        text_BL = torch.randint(10, 200, (self.batch, TEXT_TOKENS), generator=generator)
        image = self.config.model_type == "llava"
        places = torch.full((self.batch, num_visual(self.config, self.frames)), self._placeholder(image))
        before_BL, after_BL = text_BL.split([TEXT_TOKENS // 4, TEXT_TOKENS - TEXT_TOKENS // 4], 1)
        ids_BL = torch.cat([before_BL, places, after_BL], 1)
        inputs = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL), **pixels}
        if self.config.model_type == "qwen2_5_vl":
            inputs["mm_token_type_ids"] = 2 * (ids_BL == places[0, 0]).long()
            spacing_s = self.config.vision_config.temporal_patch_size / CLIP_FPS
            inputs["second_per_grid_ts"] = torch.full((self.batch,), spacing_s)
        return inputs

    def _placeholder(self, image: bool) -> int:
        return self.config.image_token_id if image else self.config.video_token_id

    @property
    def frames_as_video(self) -> bool:
        """Whether the pictures of a prompt are separate images to be joined."""
        return self.config.model_type == "llava" and self.frames > 1


def _llava_pixels(config, clips: list[np.ndarray]) -> dict[str, Tensor]:
    from transformers import CLIPImageProcessor

    side = config.vision_config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return dict(processor([frame for clip in clips for frame in clip], return_tensors="pt"))


def _onevision_pixels(config, clips: list[np.ndarray]) -> dict[str, Tensor]:
    from transformers import LlavaOnevisionVideoProcessor

    side = config.vision_config.image_size
    processor = LlavaOnevisionVideoProcessor(size={"height": side, "width": side}, do_sample_frames=False)
    return dict(processor(clips, return_tensors="pt"))


def _qwen_pixels(config, clips: list[np.ndarray]) -> dict[str, Tensor]:
    from transformers import Qwen2VLVideoProcessor

    vision = config.vision_config
    processor = Qwen2VLVideoProcessor(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        do_resize=False,
        cap_pixels_per_frame=False,  # whose default is about to change; nothing is resized here
        do_sample_frames=False,
    )
    return dict(processor(clips, return_tensors="pt"))


_PIXELS: dict[str, Callable] = dict(zip(FAMILIES, (_llava_pixels, _onevision_pixels, _qwen_pixels), strict=True))
