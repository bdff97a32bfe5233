from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

from tokensieve.datasets import clip_frames, make_clip, read_video, write_clips
from tokensieve.datasets.clips import COLOURS, COUNTS, DIRECTIONS, FRAME_SIZE, KINDS, NUM_FRAMES
from tokensieve.datasets.digits import SPLITS, digit_ids, glyphs
from tokensieve.datasets.mosaic import IGNORE, NO_COLOUR, NO_DIGIT, make_mosaics
from tokensieve.datasets.render import frame_times, render_clips
from tokensieve.errors import BadOption


def test_no_digit_image_is_in_two_splits():
    ids = {split: {int(i) for group in digit_ids(split) for i in group} for split in SPLITS}
    assert not ids["train"] & ids["test"] and not ids["train"] & ids["val"] and not ids["val"] & ids["test"]
    assert sum(map(len, ids.values())) == len(glyphs()) == 1797


def test_clips_use_only_digits_of_their_split():
    for split in SPLITS:
        allowed = [set(group.tolist()) for group in digit_ids(split)]
        for i in range(50):
            assert all(m.glyph in allowed[m.label] for m in make_clip(split, i).movers if m.label >= 0)


def test_same_arguments_same_clip():
    assert make_clip("test", 5) == make_clip("test", 5)
    assert make_clip("test", 5) != make_clip("test", 5, seed=1)
    assert make_clip("test", 5).movers != make_clip("val", 5).movers
    clip = make_clip("test", 5)
    assert torch.equal(render_clips([clip]), render_clips([clip]))
    alone, beside = render_clips([clip])[0], render_clips([make_clip("test", 6), clip])[1]
    assert torch.equal(alone, beside)


def test_making_and_rendering_clips_leaves_the_global_generators_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    render_clips([make_clip("train", 0)])
    make_mosaics("train", 2, torch.Generator().manual_seed(0))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_answers_follow_from_the_scene():
    for i in range(200):
        clip = make_clip("test", i)
        digits = [m for m in clip.movers if m.label >= 0]
        for q in clip.questions:
            if q.kind == "digit":
                (asked,) = [m for m in digits if m.colour in q.text]
                assert q.answer == str(asked.label)
            elif q.kind == "colour":
                (asked,) = [m for m in digits if str(m.label) in q.text]
                assert q.answer == asked.colour
            elif q.kind in ("count", "total"):
                assert q.answer == COUNTS[len(digits)]
            elif q.kind == "direction":
                (asked,) = [m for m in digits if m.colour in q.text]
                step = np.sign(np.subtract(asked.end, asked.start))
                assert DIRECTIONS[q.answer] == tuple(step.astype(int))
            elif q.kind == "first":
                assert q.answer == str(min(digits, key=lambda m: m.on).label)
            elif q.kind == "last":
                assert q.answer == str(max(digits, key=lambda m: m.off).label)
            else:
                (asked,) = [m for m in digits if str(m.label) in q.text]
                (following,) = [m for m in digits if m.on == asked.off]
                assert q.answer == str(following.label)


def test_every_kind_is_asked_and_its_answers_are_balanced():
    questions = [q for i in range(1500) for q in make_clip("test", i).questions]
    by_kind = {kind: Counter(q.answer for q in questions if q.kind == kind) for kind in KINDS}
    assert len(by_kind) >= 6 and all(sum(c.values()) > 500 for c in by_kind.values())
    sizes = {"colour": len(COLOURS), "count": 4, "direction": 4, "total": 3}
    for kind, counts in by_kind.items():
        assert len(counts) == sizes.get(kind, 10)
        share = max(counts.values()) / sum(counts.values())
        assert share < 1.45 / sizes.get(kind, 10), f"{kind}: {counts.most_common(2)}"


def test_digits_of_a_sequence_show_up_one_at_a_time():
    clip = next(c for c in (make_clip("test", i) for i in range(20)) if c.questions[0].kind == "first")
    times = frame_times().tolist()
    shown = [[m.label for m in clip.movers if m.label >= 0 and m.on <= t < m.off] for t in times]
    assert all(len(s) == 1 for s in shown)
    assert min(Counter(s[0] for s in shown).values()) >= 2


def test_frames_have_the_size_and_tokens_that_make_pruning_meaningful():
    frames = clip_frames(make_clip("test", 0))
    assert frames.data.shape == (NUM_FRAMES, FRAME_SIZE, FRAME_SIZE, 3)
    assert NUM_FRAMES * (FRAME_SIZE // 8 // 2) ** 2 >= 256
    assert np.abs(np.diff(frames.data.astype(int), axis=0)).mean() > 1  # the background moves


@pytest.mark.parametrize(("split", "index"), [("trial", 0), ("test", -1)])
def test_bad_clip(split, index):
    with pytest.raises(ValueError):
        make_clip(split, index)


def test_files_hold_the_frames_of_training(tmp_path):
    manifest = write_clips("test", 2, tmp_path)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert {r["video"] for r in rows} == {"test-0-000000.mp4", "test-0-000001.mp4"}
    assert [(r["question"], r["answer"]) for r in rows[:4]] == [
        (q.text, q.answer) for q in make_clip("test", 0).questions
    ]
    video = read_video(tmp_path / "test-0-000000.mp4", num_frames=NUM_FRAMES)
    want = clip_frames(make_clip("test", 0))
    assert np.allclose(video.times_s, want.times_s, atol=1e-3)
    small = video.data.reshape(NUM_FRAMES, FRAME_SIZE, 2, FRAME_SIZE, 2, 3).mean((2, 4))
    assert np.abs(small - want.data).mean() < 4  # H.264 is lossy; another frame would be off by 10 and more


@pytest.mark.parametrize(("split", "count"), [("trial", 1), ("test", 0)])
def test_bad_write(split, count, tmp_path):
    with pytest.raises(BadOption):
        write_clips(split, count, tmp_path)


def test_mosaic_labels_agree_with_the_picture():
    mosaic = make_mosaics("val", 16, torch.Generator().manual_seed(3))
    digit, colour, offset = mosaic.labels(12)
    assert digit.shape == colour.shape == (16, 144) and offset.shape == (16, 144, 2)
    assert digit.max() == NO_DIGIT and colour.max() == NO_COLOUR and digit.min() == IGNORE
    assert torch.equal(digit == NO_DIGIT, colour == NO_COLOUR)
    # Where a patch lies on a digit, its strongest pixels have the hue of the label.
    patches = mosaic.images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(16, 144, 64, 3)
    palette = torch.tensor(list(COLOURS.values())) / 255
    brightest = patches.gather(2, patches.amax(-1).argmax(-1)[..., None, None].expand(-1, -1, 1, 3)).squeeze(2)
    hue = (brightest[:, :, None] - palette).abs().sum(-1).argmin(-1)
    on_digit = (digit >= 0) & (digit < NO_DIGIT)
    assert (hue == colour)[on_digit].float().mean() > 0.8


def test_mosaics_are_deterministic():
    first, second = (make_mosaics("train", 2, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.images, second.images)
