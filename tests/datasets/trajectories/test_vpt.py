"""Made-up clips, each with one of the quirks that recordings of VPT's contractors have."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.datasets.conftest import decode_all, encode, pictures
from tokensieve.datasets.trajectories import VPTOptions, read_vpt, vpt_clips
from tokensieve.datasets.trajectories.screen import arrow_cursor, draw_cursor, resize_bilinear
from tokensieve.datasets.trajectories.vpt_actions import BUTTONS, encode_actions
from tokensieve.datasets.trajectories.vpt_log import OTHER_BUTTONS, read_vpt_log
from tokensieve.errors import BadMedia, BadOption, MediaNotFound


def step(*, keys=(), buttons=(), new=(), dx=0.0, dy=0.0, x=0.0, y=0.0, gui=False, hotbar=0, **more) -> dict:
    return {
        "mouse": {"x": x, "y": y, "dx": dx, "dy": dy, "buttons": list(buttons), "newButtons": list(new)},
        "keyboard": {"keys": [f"key.keyboard.{key}" for key in keys], "newKeys": [], "chars": ""},
        "isGuiOpen": gui,
        "hotbar": hotbar,
        "inventory": [{"type": "oak_door", "quantity": 3}],
        **more,
    }


def write_log(path: Path, steps: list[dict], end: str = "\n") -> Path:
    path.write_text("\n".join(map(json.dumps, steps)) + end)
    return path


def held(row: np.ndarray) -> set[str]:
    return {BUTTONS[k] for k in np.flatnonzero(row)}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """100 pictures at 20 a second, 72 lines high, a tenth of the window."""
    path = tmp_path_factory.mktemp("vpt") / "cheeky-setter-1.mp4"
    return encode(path, pictures(100, 72, 128), rate=20, time_base=Fraction(1, 20), options={"g": "20", "crf": "12"})


def log_of(tmp_path, *steps):
    return read_vpt_log(write_log(tmp_path / "a.jsonl", list(steps)))


def test_keys_and_mouse(tmp_path):
    log = log_of(
        tmp_path,
        step(keys=["w", "space", "left.control", "3"], buttons=[1]),
        step(keys=["s", "a", "left.shift", "e", "q"], buttons=[0, 2], new=[0, 2], dx=10, dy=-4),
        step(keys=["d", "f", "escape", "p", "left.alt"]),
        step(),
    )
    assert held(log.buttons[0]) == {"forward", "jump", "sprint", "hotbar.3", "use"}
    assert held(log.buttons[1]) == {"back", "left", "sneak", "inventory", "drop", "attack"}
    assert held(log.buttons[2]) == {"right"}  # p and alt are no buttons
    assert OTHER_BUTTONS == ("ESC", "swapHands", "pickItem")
    assert log.other_buttons.tolist() == [[0, 0, 0], [0, 0, 1], [1, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(log.camera, [[0, 0], [-0.6, 1.5], [0, 0], [0, 0]])  # pitch first
    assert log.is_null.tolist() == [False, False, False, True] and log.notes == ()


def test_attack_that_is_stuck_from_the_start(tmp_path):
    attack = BUTTONS.index("attack")
    stuck = [
        step(buttons=[0], new=[0]),
        step(buttons=[0]),
        step(buttons=[0, 1], new=[1]),
        step(buttons=[0], new=[0]),
        step(buttons=[0]),
    ]
    log = log_of(tmp_path, *stuck)
    assert log.buttons[:, attack].tolist() == [0, 0, 0, 1, 1]
    assert log.is_null.tolist() == [True, True, False, False, False]  # nothing else was done in the first two
    assert "use" in held(log.buttons[2])
    # not stuck: attack with another button, or without being new
    for first in (step(buttons=[0, 1], new=[0, 1]), step(buttons=[0])):
        assert log_of(tmp_path, first, step(buttons=[0])).buttons[:, attack].tolist() == [1, 1]


def test_a_slot_chosen_with_the_wheel_becomes_its_key(tmp_path):
    log = log_of(tmp_path, step(hotbar=0), step(hotbar=4), step(hotbar=4), step(hotbar=8, keys=["w"]), step(hotbar=0))
    assert [held(row) for row in log.buttons] == [set(), {"hotbar.5"}, set(), {"hotbar.9", "forward"}, {"hotbar.1"}]
    # nothing but the wheel is a null step all the same, as in VPT's loader
    assert log.is_null.tolist() == [True, True, True, False, True]
    assert log_of(tmp_path, step(hotbar=2)).buttons[0, BUTTONS.index("hotbar.3")] == 1  # slot 0 is taken for granted


def test_angles_cut_to_whole_degrees(tmp_path):
    path = write_log(tmp_path / "a.jsonl", [step(dy=5, dx=-13), step(dy=-6, dx=20), step(dx=7)])
    exact, cut = read_vpt_log(path), read_vpt_log(path, truncate_camera=True)
    np.testing.assert_allclose(exact.camera, [[0.75, -1.95], [-0.9, 3.0], [0, 1.05]])
    assert cut.camera.tolist() == [[0, -1], [0, 3], [0, 1]] and not np.signbit(cut.camera[:, 0]).any()
    assert not cut.is_null.any()  # motion that is cut to nothing is still motion
    np.testing.assert_array_equal(cut.buttons, exact.buttons)


@pytest.mark.parametrize(
    ("version", "factor"), [(None, 1), ("6.9", 2), ("6.7", 2), ("5.7", 0.5), ("6.10", 1), ("10.0", 1)]
)
def test_mouse_motion_in_menus_by_recorder_version(tmp_path, version, factor):
    path = write_log(tmp_path / "a.jsonl", [step(dx=8, dy=4), step(dx=8, dy=4, gui=True)])
    log = read_vpt_log(path, recorder_version=version)
    np.testing.assert_allclose(log.camera, [[0.6, 1.2], [0.6 * factor, 1.2 * factor]])


def test_no_line_feed_at_the_end(tmp_path):
    steps = [step(keys=["w"]), step(keys=["a"])]
    for end in ("", "\n", "\r\n", "\n\n"):
        log = read_vpt_log(write_log(tmp_path / "a.jsonl", steps, end))
        assert [held(row) for row in log.buttons] == [{"forward"}, {"left"}] and log.notes == ()


@pytest.mark.parametrize("cut", [5, 100, -1])
def test_a_last_line_that_is_cut_off(tmp_path, cut):
    path = write_log(tmp_path / "a.jsonl", [step(keys=["w"]), step(keys=["s"])], "")
    first, last = path.read_text().split("\n")
    path.write_text(f"{first}\n{last[:cut]}")
    log = read_vpt_log(path)
    assert [held(row) for row in log.buttons] == [{"forward"}]
    assert log.notes == ("the last line of the log, 2, is cut off and left out",)


def test_fields_that_some_releases_leave_out_or_set_to_null(tmp_path):
    log = log_of(tmp_path, {"mouse": None, "keyboard": None}, {"mouse": {"dx": 4}, "keyboard": {"keys": None}})
    assert log.buttons.sum() == 0 and log.camera.tolist() == [[0, 0], [0, 0.6]]
    assert log.hotbar.tolist() == [-1, -1] and not log.is_gui_open.any() and log.is_null.tolist() == [True, False]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Line 2 of .* no JSON object"),
        ("[1]", "Line 2 of .* no JSON object"),
        ("", "Line 2 of .* no JSON object"),  # an empty line would shift what follows against the pictures
        ("[" * 100_000, "Line 2 of .* no JSON object"),
        ('{"keyboard": {}}', 'no "mouse"'),
        ('{"mouse": 3, "keyboard": {}}', "object or null, got int"),
        ('{"mouse": {"buttons": 1}, "keyboard": {}}', '"buttons" must be a list'),
        ('{"mouse": {"dx": "1"}, "keyboard": {}}', '"dx" must be a number'),
        ('{"mouse": {"dy": NaN}, "keyboard": {}}', '"dy" must be a number'),
        ('{"mouse": {"dy": 1e300}, "keyboard": {}}', '"dy" must be a number'),
        ('{"mouse": {}, "keyboard": {}, "hotbar": 9}', "from 0 to 8"),
        ('{"mouse": {}, "keyboard": {}, "hotbar": true}', "from 0 to 8"),
        (" " * (1 << 20), "too much"),
    ],
)
def test_lines_that_are_no_steps(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(step()) + "\n" + line + "\n" + json.dumps(step()) + "\n")
    with pytest.raises(BadOption, match=words):
        read_vpt_log(path)


def test_a_log_without_a_step(tmp_path):
    for text in ("", "\n", "{"):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(BadOption, match="no step"):
            read_vpt_log(tmp_path / "a.jsonl")
    with pytest.raises(BadOption, match="no log"):
        read_vpt_log(tmp_path / "b.jsonl")


def test_pictures_stay_with_their_lines(clip):
    write_log(clip.with_suffix(".jsonl"), [step(dx=k, keys=["w"] if k % 3 else []) for k in range(100)])
    whole, _ = decode_all(clip)
    kept = read_vpt(clip, VPTOptions(size=None))
    assert len(kept) == 100 and kept.notes == () and kept.name == "cheeky-setter-1"
    np.testing.assert_allclose(kept.timestamps_s, np.arange(100) / 20)
    for window in ((0, 100), (63, 66), (99, 100), (17, 90)):
        np.testing.assert_array_equal(kept.frames(*window), whole[slice(*window)])
    np.testing.assert_allclose(kept.actions["camera"][:, 1], np.arange(100) * 0.15)
    numbers = encode_actions(kept.actions["buttons"], kept.actions["camera"])
    assert numbers[0][:3].tolist() == [0, 288, 289]  # nothing; forward; forward and a camera that moves


def test_null_steps_and_their_pictures_go_together(clip):
    is_null = np.arange(100) % 7 > 1
    is_null[20:95] = True  # a gap wider than what is in memory at once
    write_log(clip.with_suffix(".jsonl"), [step() if null else step(keys=["w"]) for null in is_null])
    whole, _ = decode_all(clip)
    kept, dropped = (read_vpt(clip, VPTOptions(size=None, null_steps=what)) for what in ("keep", "drop"))
    np.testing.assert_array_equal(kept.info["is_null"], is_null)
    alive = np.flatnonzero(~is_null)
    np.testing.assert_array_equal(dropped.info["step"], alive)
    np.testing.assert_allclose(dropped.timestamps_s, alive / 20)
    np.testing.assert_array_equal(dropped.frames(), whole[alive])
    np.testing.assert_array_equal(dropped.frames(4, 8), whole[alive[4:8]])
    assert dropped.actions["buttons"][:, BUTTONS.index("forward")].all()
    write_log(clip.with_suffix(".jsonl"), [step()] * 100)
    with pytest.raises(BadOption, match="none of the 100 steps"):
        read_vpt(clip, VPTOptions(null_steps="drop"))


def test_the_cursor_is_drawn_where_a_menu_is_open(clip):
    steps = [step(x=10 * k, y=5 * k, gui=k in (30, 31, 70)) for k in range(100)]
    write_log(clip.with_suffix(".jsonl"), steps)
    whole, _ = decode_all(clip)
    seen = read_vpt(clip, VPTOptions(size=None)).frames(25, 75)
    expected = whole[25:75].copy()
    for k in (30, 31, 70):
        draw_cursor(expected[k - 25], arrow_cursor(), 10 * k, 5 * k)
    changed = [k + 25 for k in range(50) if (seen[k] != whole[25 + k]).any()]
    assert changed == [30, 31, 70]
    np.testing.assert_array_equal(seen, expected)
    np.testing.assert_array_equal(read_vpt(clip, VPTOptions(size=None, cursor=None)).frames(25, 75), whole[25:75])
    own = np.full((16, 16, 4), 255, dtype=np.uint8)
    assert (read_vpt(clip, VPTOptions(size=None, cursor=own)).frames(30, 31)[0, 15:31, 30:46] == 255).all()


def test_the_cursor_keeps_its_place_when_null_steps_are_dropped(clip):
    steps = [step(x=5 * k, y=5 * k, gui=k % 8 == 4, keys=["w"] if k % 4 == 0 else []) for k in range(100)]
    write_log(clip.with_suffix(".jsonl"), steps)
    kept, dropped = (read_vpt(clip, VPTOptions(size=None, null_steps=what)) for what in ("keep", "drop"))
    assert dropped.info["is_gui_open"].sum() == 12
    np.testing.assert_array_equal(dropped.frames(), kept.frames()[::4])


def test_scaled_after_the_cursor_is_drawn(clip):
    write_log(clip.with_suffix(".jsonl"), [step(x=300, y=200, gui=True)] * 100)
    large = read_vpt(clip, VPTOptions(size=None)).frames(3, 5)
    small = read_vpt(clip).frames(3, 5)
    assert small.shape == (2, 128, 128, 3)
    np.testing.assert_array_equal(small, resize_bilinear(large, (128, 128)))


def test_as_the_released_loader_does(clip):
    steps = [step(dy=6, hotbar=k // 50) if k % 2 else step(hotbar=k // 50) for k in range(100)]
    write_log(clip.with_suffix(".jsonl"), steps)
    read = read_vpt(clip, VPTOptions.as_released())
    np.testing.assert_array_equal(read.info["step"], np.arange(1, 100, 2))
    assert (read.actions["camera"] == 0).all() and read.frames(0, 1).shape == (1, 128, 128, 3)


@pytest.mark.parametrize(("lines", "steps"), [(90, 90), (120, 100)])
def test_a_log_and_a_video_of_different_lengths(clip, lines, steps):
    write_log(clip.with_suffix(".jsonl"), [step(keys=["w"])] * lines)
    read = read_vpt(clip)
    assert len(read) == steps and len(read.frames(steps - 2)) == 2
    assert read.notes == (f"the log has {lines} steps and the video 100 pictures: {steps} are used",)


def test_a_video_at_another_rate_cannot_be_matched(tmp_path):
    path = encode(tmp_path / "a.mp4", pictures(50), rate=25)
    write_log(path.with_suffix(".jsonl"), [step(keys=["w"])] * 50)
    with pytest.raises(BadMedia, match="20 pictures a second"):
        read_vpt(path).frames()


def test_only_what_is_asked_for_is_read(clip, monkeypatch):
    from tokensieve.datasets.trajectories import steps_video, vpt

    calls, real = [], vpt.read_video
    for module in (vpt, steps_video):
        spy = lambda *a, **k: calls.append((k["start_s"], k["end_s"])) or real(*a, **k)  # noqa: E731
        monkeypatch.setattr(module, "read_video", spy)
    write_log(clip.with_suffix(".jsonl"), [step(keys=["w"])] * 100)
    read = read_vpt(clip)
    assert calls == [(0, 1e-3)]  # the length of the video, from its first picture
    read.window(40, 60).frames(5, 10)
    assert calls[1:] == [(45.5 / 20, 50 / 20)]
    read.frames()
    assert len(calls) == 4  # 64 pictures at once


def test_a_folder_of_clips(clip, tmp_path):
    for name in ("b.mp4", "a.mp4", "alone.mp4"):
        (tmp_path / name).write_bytes(clip.read_bytes())
    write_log(tmp_path / "a.jsonl", [step()])
    write_log(tmp_path / "b.jsonl", [step()])
    write_log(tmp_path / "c.jsonl", [step()])
    assert [path.name for path in vpt_clips(tmp_path)] == ["a.mp4", "b.mp4"]
    with pytest.raises(BadOption, match="NAME.jsonl"):
        vpt_clips(tmp_path / "none")
    with pytest.raises(BadOption, match="no log"):
        read_vpt(tmp_path / "alone.mp4")
    with pytest.raises(MediaNotFound):
        read_vpt(tmp_path / "c.mp4")


@pytest.mark.parametrize(
    "options",
    [
        {"size": (128,)},
        {"size": (0, 5)},
        {"size": 128},
        {"null_steps": "skip"},
        {"cursor": np.zeros((8, 8, 4), dtype=np.uint8)},
        {"recorder_version": 6.9},
    ],
)
def test_options_that_are_refused(options):
    with pytest.raises(BadOption):
        VPTOptions(**options)
