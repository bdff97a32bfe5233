"""Questions to train on: manifests good and bad, and an order that knows no processes and no interruptions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tokensieve.errors import BadOption
from tokensieve.pipeline.policy.data import PolicyData, Stream, generated, read_manifest, source_of_draws


def write(folder, *rows, name="manifest.jsonl"):
    for video in ("a.png", "b.png"):
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / video)
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows))
    return path


def row(video="a.png", question="How many?", **more):
    return {"video": video, "question": question, **more}


def test_questions_of_a_clip_come_together(tmp_path):
    path = write(tmp_path, row("b.png", "1", answer=3), row("a.png", "2"), "", row("b.png", "3", answer="x", more=1))
    a, b = read_manifest(path)
    assert (a.id, a.questions, a.answers, a.source.source) == ("a.png", ("2",), (None,), tmp_path / "a.png")
    assert (b.id, b.questions, b.answers) == ("b.png", ("1", "3"), ("3", "x"))


def test_parts_of_a_video_are_clips_of_their_own(tmp_path):
    parts = [row(question=q, start=start, end=end) for q, start, end in (("1", 5, 9), ("2", 0, 5), ("3", 5, 9))]
    first, second = read_manifest(write(tmp_path, *parts))
    assert first.id == second.id == "a.png" and first != second
    assert (first.questions, first.source.end_s, second.questions, second.source.start_s) == (("2",), 5, ("1", "3"), 5)


def test_the_first_of_several_answers_counts(tmp_path):
    (clip,) = read_manifest(write(tmp_path, row(answer=["one", "1"])))
    assert clip.answers == ("one",)


def test_a_question_may_hold_any_character(tmp_path):
    odd = "one\u2028two\x85three\x0cfour"
    assert read_manifest(write(tmp_path, row(question=odd)))[0].questions == (odd,)


@pytest.mark.parametrize(
    "line", ["{", "[1]", "3", '"video"', "null", '{"video": "a"}', '{"question": "a"}', "[" * 10_000]
)
def test_a_bad_line_is_named(line, tmp_path):
    with pytest.raises(BadOption, match="Line 2 of .*manifest.jsonl"):
        read_manifest(write(tmp_path, row(), line))


def test_what_is_no_manifest(tmp_path):
    with pytest.raises(BadOption, match="no manifest"):
        read_manifest(tmp_path / "nothing.jsonl")
    with pytest.raises(BadOption, match="no dataset"):
        read_manifest(tmp_path)
    with pytest.raises(BadOption, match="empty"):
        read_manifest(write(tmp_path, "", " "))
    with pytest.raises(BadOption, match="Line 2 .*not there: 'c.png'"):
        read_manifest(write(tmp_path, row(), row("c.png")))
    with pytest.raises(BadOption, match="not there"):
        read_manifest(write(tmp_path, row("x" * 10_000)))
    (tmp_path / "bytes.jsonl").write_bytes(b'{"video": "\xff"}')
    with pytest.raises(BadOption, match="UTF-8"):
        read_manifest(tmp_path / "bytes.jsonl")


@pytest.mark.parametrize(
    "field, value", [("question", None), ("question", 3), ("video", None), ("video", ["a"]), ("answer", {"a": 1})]
)
def test_fields_are_text(field, value, tmp_path):
    with pytest.raises(BadOption, match="Line 1"):
        read_manifest(write(tmp_path, row() | {field: value}))


def test_frames_of_either_kind(tmp_path):
    (clip,) = read_manifest(write(tmp_path, row()))
    assert clip.load().num_frames == 1
    (clip,) = generated("val", 1)
    assert clip.load().num_frames == 8 and len(clip.questions) == len(clip.answers) == 4


def taken(clips, count, **options):
    stream = iter(Stream(clips, **options))
    return [next(stream) for _ in range(count)]


def test_every_epoch_shows_every_clip_once_in_another_order():
    clips = list("abcdefg")
    shown = sum(taken(clips, 7, batch=3, seed=0), [])
    epochs = [shown[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == clips for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert sum(taken(clips, 7, batch=3, seed=5), []) != shown


def test_processes_share_the_order_of_one():
    clips = list("abcdefg")
    one = taken(clips, 6, batch=6, seed=0)
    ranks = [taken(clips, 6, batch=2, seed=0, rank=rank, world=3) for rank in range(3)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == one


def test_a_later_start_goes_on_where_the_other_would_be():
    options = dict(batch=2, seed=0, rank=1, world=2)
    assert taken(list("abcde"), 3, start=4, **options) == taken(list("abcde"), 7, **options)[4:]


def test_draws_follow_from_seed_place_and_question():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 2**40, 0)]
    draws = [tuple(torch.rand(4, generator=source_of_draws(*place)).tolist()) for place in places]
    assert len(set(draws)) == len(places)
    assert tuple(torch.rand(4, generator=source_of_draws(0, 1, 0)).tolist()) == draws[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_validation_questions(tmp_path):
    own = write(tmp_path, row(answer="2"))
    other = write(tmp_path, row(), row(answer="2"), name="other.jsonl")
    for options, count, answered in [
        (dict(clips=2, val_clips=3), 3, True),
        (dict(manifest=str(own)), 0, True),
        (dict(manifest=str(own), val_manifest=str(other)), 1, False),
        (dict(clips=2, val_manifest=str(own)), 1, True),
    ]:
        data = PolicyData(**options)
        data.setup("fit")
        assert len(data.val) == count and data.val_has_answers is answered
        assert sum(data.val_dataloader(), []) == data.val


@pytest.mark.parametrize("name, value", [("clips", 0), ("val_clips", 0), ("batch", 0), ("seed", -1)])
def test_options(name, value):
    with pytest.raises(BadOption, match=name):
        PolicyData(**{name: value})
