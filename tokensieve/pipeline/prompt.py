"""From media and a question to what the model's own processor makes of them."""

# Shape legend: T frames, H height, W width

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from tokensieve.datasets.frames import Frames
from tokensieve.errors import BadMedia, BadOption

TICKS_PER_S = 1_000_000  # clock of the video metadata: frame times in microseconds, whatever the real frame rate
# Switches of image processors that cut a picture into tiles: off for the frames of a video, as video paths do.
TILING = ("do_image_splitting", "do_pan_and_scan", "crop_to_patches")
_PARTS = (
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>SEPARATOR{% endif %}"
    "{% endfor %}"
)
# Prompts of families that are published without a chat template, as their papers and model cards write them.
PUBLISHED_PROMPTS = {
    "PaliGemmaProcessor": "{% for message in messages %}" + _PARTS.replace("SEPARATOR", "") + "{% endfor %}",
    "VideoLlavaProcessor": "{% for message in messages %}{{ message['role'] | upper }}: "
    + _PARTS.replace("SEPARATOR", "\n")
    + " {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
}


def as_frames(media, **read_options) -> Frames:
    """Any media as `Frames`: a path, `Frames`, a PIL image, or an array `[T, H, W, 3]` or `[H, W, 3]` uint8.

    Arrays have no clock: their frames are taken to be one second apart.

    Raises:
        BadOption: none of these.
        MediaError: a path that cannot be read, or a picture whose pixels cannot.
    """
    if isinstance(media, Frames):
        if media.num_frames == 0:
            raise BadMedia("There is no frame to look at.")
        return media
    if isinstance(media, (str, bytes, os.PathLike)):
        from tokensieve.datasets import read_media

        return read_media(media, **read_options)
    array = _pixels(media)
    if array is None or array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3 or 0 in array.shape:
        got = type(media).__name__ if array is None else f"{type(media).__name__} {array.dtype} {list(array.shape)}"
        raise BadOption(
            f"Media must be a path, Frames, a PIL image or a uint8 array [T, H, W, 3] or [H, W, 3], got {got}."
        )
    array = array[None] if array.ndim == 3 else array
    times_s = np.arange(len(array), dtype=np.float64)
    return Frames(data=array, times_s=times_s, duration_s=float(len(array)), source=type(media).__name__)


def _pixels(media) -> np.ndarray | None:
    """The array in a picture or array-like, None if there is none."""
    if hasattr(media, "convert"):
        try:
            return np.array(media.convert("RGB"))
        except Exception:  # PIL reads pixels late, and a damaged file raises anything
            raise BadMedia("The pixels of the PIL image cannot be read.") from None
    try:
        return np.asarray(media)
    except (TypeError, ValueError, RuntimeError):  # a ragged list, a tensor on a GPU or with a gradient
        return None


def check_question(question) -> None:
    """Raises BadOption unless it is a string with something in it."""
    if not isinstance(question, str) or not question.strip():
        raise BadOption(f"A question must be a string that is not empty, got {question!r}.")


def as_batch(media, question) -> tuple[list, list[str]]:
    """Media and questions as lists of one length; a single one of either is used for all.

    Raises:
        BadOption: there are none, unequal numbers of them, or a question that cannot be asked.
    """
    media_list = media if isinstance(media, list) else None
    questions = question if isinstance(question, list) else None
    count = len(media_list if media_list is not None else questions if questions is not None else [None])
    media_list = [media] * count if media_list is None else media_list
    questions = [question] * count if questions is None else questions
    if len(media_list) != len(questions) or not media_list:
        raise BadOption(
            f"Need as many media as questions and at least one, got {len(media_list)} media and "
            f"{len(questions)} questions."
        )
    for asked in questions:
        check_question(asked)
    return media_list, questions


def takes_video(processor) -> bool:
    """Whether the processor has a path for videos; without one, frames go in as images."""
    return getattr(processor, "video_processor", None) is not None


def shows_video(processor, clip: Frames) -> bool:
    """A clip of several frames goes through the video path where there is one."""
    return clip.num_frames > 1 and takes_video(processor)


def user_turn(frames: Frames, question: str, as_video: bool) -> dict:
    """A chat message that shows the frames and asks the question."""
    kinds = ["video"] if as_video else ["image"] * frames.num_frames
    return {"role": "user", "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]}


def run_processor(processor, clips: Sequence[Frames], conversations: Sequence[list[dict]]):
    """Token ids, masks and pixels of a batch: whole conversations, each about one clip, padded on the left.

    Raises:
        BadOption: clips with one frame and clips with several in one batch, text that holds a placeholder, no
            chat template, or a batch that this processor cannot make.
    """
    name = type(processor).__name__
    template = getattr(processor, "chat_template", None) or PUBLISHED_PROMPTS.get(name)
    if template is None:
        raise BadOption(
            f"{name} has no chat template, so the place of the picture in the prompt is unknown.",
            hint="Set processor.chat_template, or run the processor yourself and use VLM.compress_inputs.",
        )
    if len({clip.num_frames > 1 for clip in clips}) > 1:
        raise BadOption("Images and videos cannot share a batch.", hint="Pass them in separate calls.")
    _check_text(processor, conversations)
    options = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
    if shows_video(processor, clips[0]):
        clock = [_metadata(clip) for clip in clips]
        options |= {"videos": [clip.data for clip in clips], "video_metadata": clock, "do_sample_frames": False}
    else:
        options["images"] = [list(clip.data) for clip in clips]
        if clips[0].num_frames > 1:
            options |= {switch: False for switch in TILING if hasattr(processor.image_processor, switch)}
    # Left out when it is the processor's own: SmolVLM has another template for videos.
    own = {} if getattr(processor, "chat_template", None) else {"chat_template": template}
    try:
        texts = [
            processor.apply_chat_template(c, add_generation_prompt=True, tokenize=False, **own) for c in conversations
        ]
        return processor(text=texts, **options)
    except MemoryError:
        raise
    except Exception as error:  # whatever a processor or a template raises; the cause stays attached
        shapes = sorted({clip.data.shape[:3] for clip in clips})
        raise BadOption(
            f"{name} could not make a batch of {len(clips)} (frames, height, width: "
            f"{', '.join(map(str, shapes))}) ({type(error).__name__}).",
            hint="Most models need clips of equal length in a batch; pass them one by one."
            if len(shapes) > 1
            else "The traceback's cause tells what it did not like.",
        ) from error


def _check_text(processor, conversations: Sequence[list[dict]]) -> None:
    """A placeholder typed by a user would ask for one picture more than there is."""
    tokens = [getattr(processor, f"{m}_token", None) for m in ("image", "video")]
    placeholders = [t for t in tokens if isinstance(t, str) and t]
    for message in (m for conversation in conversations for m in conversation):
        for part in message["content"]:
            for placeholder in placeholders:
                if placeholder in part.get("text", ""):
                    raise BadOption(f"The text must not contain {placeholder!r}: this model puts a picture there.")


def _metadata(clip: Frames):
    """Processors know times only as frame number over rate; a microsecond clock carries any spacing."""
    from transformers.video_utils import VideoMetadata

    spacing_s = float(np.diff(clip.times_s).mean())
    return VideoMetadata(
        total_num_frames=max(1, round(spacing_s * clip.num_frames * TICKS_PER_S)),
        fps=TICKS_PER_S,
        width=clip.width,
        height=clip.height,
        duration=clip.duration_s,
        frames_indices=[round(t * TICKS_PER_S) for t in clip.times_s],
    )
