"""Media and frame times on their way into the processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.pipeline.tiny_families import IMAGE
from tests.pipeline.tiny_processors import make_processor, noise, shared_vlm
from tokensieve.datasets.frames import Frames
from tokensieve.errors import BadOption
from tokensieve.pipeline.prompt import as_frames, run_processor, shows_video, user_turn


def clip(times_s, **changes) -> Frames:
    times_s = np.asarray(times_s, dtype=np.float64)
    facts = dict(data=noise(len(times_s)), times_s=times_s, duration_s=float(times_s[-1]) + 1.0, source="x")
    return Frames(**(facts | changes))


def processed(name: str, *clips: Frames):
    processor = shared_vlm(name).processor
    turns = [[user_turn(c, "what?", shows_video(processor, c))] for c in clips]
    return processor, run_processor(processor, clips, turns)


def text_of(processor, inputs) -> str:
    return processor.tokenizer.decode(inputs["input_ids"][0])


@pytest.mark.parametrize("start", [0.0, 10.0])
@pytest.mark.parametrize("spacing", [0.5, 1.0, 0.04, 7.25])
def test_qwen2_5_gets_the_spacing(start, spacing):
    _, inputs = processed("qwen2_5_vl", clip(start + spacing * np.arange(4)))
    assert list(inputs["second_per_grid_ts"]) == pytest.approx([2 * spacing], rel=1e-5)  # two frames a token


def test_qwen2_5_counts_time_in_its_positions():
    """Two tokens a second: rows of two frames 2 s apart lie four positions apart, compressed or not."""
    vlm = shared_vlm("qwen2_5_vl")
    for compression in (None, "uniform"):
        prepared = vlm.compress(compression, 0.5).prepare(clip(10 + np.arange(4.0)), "what?")
        (item,) = prepared.items
        assert item.tokens.times_s.tolist() == [0.0, 2.0]
        visual = prepared["input_ids"][0] == vlm.model.config.video_token_id
        assert sorted(set((prepared["position_ids"][1, 0, visual] - item.slots[0]).tolist())) == [0, 4]


@pytest.mark.parametrize(
    ("times_s", "stamps"),
    [
        ([0, 0.5, 1, 1.5], ["0.2", "1.2"]),
        ([10, 10.5, 11, 11.5], ["10.2", "11.2"]),
        ([10, 11, 13, 17], ["10.5", "15.0"]),  # uneven
        ([3723.0, 3723.2, 3723.4], ["3723.1", "3723.4"]),  # an odd frame is repeated
    ],
)
def test_qwen3_writes_the_times(times_s, stamps):
    processor, inputs = processed("qwen3_vl", clip(times_s))
    text = text_of(processor, inputs)
    assert [text.count(f"<{stamp} seconds>") for stamp in stamps] == [1, 1]
    assert text.count(" seconds>") == 2


def test_smolvlm_writes_the_times():
    processor, inputs = processed("smolvlm", clip([70, 70.5, 71.5, 72]))
    text = text_of(processor, inputs)
    assert [text.count(f"Frame from 01:{s}:") for s in (10, 11, 12)] == [2, 1, 1]
    assert "four frames" in text and "0:01:13" in text


def test_frames_of_one_moment():
    _, inputs = processed("qwen2_5_vl", clip([2.0, 2.0, 2.0, 2.0]))
    assert list(inputs["second_per_grid_ts"])[0] > 0


def test_the_clip_is_not_sampled_again():
    """Qwen3-VL's processor samples two frames a second unless told not to."""
    _, inputs = processed("qwen3_vl", clip(np.arange(12) * 0.1))
    assert inputs["video_grid_thw"][0, 0] == 6


@pytest.mark.parametrize(("name", "switch"), [("idefics3", "do_image_splitting"), ("gemma3", "do_pan_and_scan")])
def test_frames_that_go_in_as_images_are_not_tiled(name, switch):
    processor = make_processor(name)
    setattr(processor.image_processor, switch, True)
    if name == "gemma3":
        for setting, value in (("min_crop_size", 8), ("max_num_crops", 4), ("min_ratio_to_activate", 1.1)):
            setattr(processor.image_processor, f"pan_and_scan_{setting}", value)
    counts = {}
    for frames in (1, 3):
        shown = clip(np.arange(frames), data=noise(frames, 20, 60))
        inputs = run_processor(processor, [shown], [[user_turn(shown, "what?", False)]])
        counts[frames] = int((inputs["input_ids"] == IMAGE).sum())
    assert counts[3] == 3 * 4 and counts[1] >= 4
    if name == "idefics3":
        assert counts[1] > 4


def test_shorter_prompts_are_padded_on_the_left():
    clips = [clip(np.arange(4)), clip(np.arange(4))]
    vlm = shared_vlm("llava")
    turns = [[user_turn(c, q, False)] for c, q in zip(clips, ["a?", "a longer question?"], strict=True)]
    mask = run_processor(vlm.processor, clips, turns)["attention_mask"]
    assert mask[:, -1].tolist() == [1, 1] and mask[:, 0].tolist() == [0, 1]


def test_models_published_without_a_template():
    processor, inputs = processed("paligemma", clip([0.0]))
    assert text_of(processor, inputs) == "<image>" * 16 + "<bos>what?\n"
    bare = make_processor("video_llava")
    bare.chat_template = None
    for frames, kind in ((1, "image"), (4, "video")):
        shown = clip(np.arange(frames))
        inputs = run_processor(bare, [shown], [[user_turn(shown, "what?", frames > 1)]])
        text = text_of(bare, inputs)
        assert text.startswith(f"USER: <{kind}>") and text.endswith(f"<{kind}>\nwhat? ASSISTANT:")


def test_no_template():
    processor = make_processor("llava")
    processor.chat_template = None
    with pytest.raises(BadOption, match="no chat template"):
        run_processor(processor, [clip([0.0])], [[user_turn(clip([0.0]), "what?", False)]])


@pytest.mark.parametrize("template", ["{{ raise_exception('SECRET') }}", "{{ 1 / 0 }}", "{% if %}", "no picture"])
def test_broken_template(template):
    processor = make_processor("llava")
    processor.chat_template = template
    with pytest.raises(BadOption, match="could not make") as caught:
        run_processor(processor, [clip([0.0])], [[user_turn(clip([0.0]), "what?", False)]])
    assert "SECRET" not in str(caught.value) and caught.value.__cause__ is not None


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl", "gemma3", "internvl"])
def test_placeholders_in_the_question(name):
    processor = shared_vlm(name).processor
    with pytest.raises(BadOption, match="must not contain"):
        run_processor(processor, [clip([0.0])], [[user_turn(clip([0.0]), f"a {processor.image_token}?", False)]])


def test_clips_of_unequal_length_say_so():
    with pytest.raises(BadOption, match="equal length"):
        processed("llava_onevision", clip(np.arange(4)), clip(np.arange(3)))


@pytest.mark.parametrize(
    "media",
    [3, "", None, object(), [[1, 2], [3]], np.zeros((4, 4, 3), np.float32), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)],
)
def test_no_media(media):
    with pytest.raises((BadOption, FileNotFoundError)):
        as_frames(media)


def test_a_tensor_is_an_array():
    frames = as_frames(torch.from_numpy(noise(3)))
    assert frames.num_frames == 3 and frames.times_s.tolist() == [0, 1, 2]
