from __future__ import annotations

import numpy as np
import pytest

from tokensieve.datasets.trajectories import Trajectory
from tokensieve.errors import BadOption

PICTURES = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3)


def trajectory(**changes) -> Trajectory:
    parts = {
        "name": "one",
        "timestamps_s": np.arange(5) / 10,
        "actions": {"move": np.arange(10).reshape(5, 2)},
        "cameras": {"front": PICTURES},
        "instruction": "go to the red ball",
        "info": {"reward": np.zeros(5)},
    }
    return Trajectory(**{**parts, **changes})


def test_pictures_from_an_array_and_from_a_reader():
    asked = []

    def read(start, stop):
        asked.append((start, stop))
        return PICTURES[start:stop]

    one, two = trajectory(), trajectory(cameras={"front": read})
    assert not asked and len(two) == 5  # nothing is read before it is asked for
    for window in ((0, None), (1, 3), (4, 5)):
        np.testing.assert_array_equal(one.frames(*window), two.frames(*window))
    assert asked == [(0, 5), (1, 3), (4, 5)]


def test_windows_cover_everything_once_and_read_nothing():
    asked = []
    whole = trajectory(cameras={"front": lambda a, b: asked.append((a, b)) or PICTURES[a:b]})
    parts = [whole.window(start, start + 2) for start in range(0, len(whole), 2)]
    assert [len(part) for part in parts] == [2, 2, 1] and not asked
    np.testing.assert_array_equal(np.concatenate([part.actions["move"] for part in parts]), whole.actions["move"])
    np.testing.assert_array_equal(np.concatenate([part.frames() for part in parts]), PICTURES)
    np.testing.assert_array_equal(parts[1].window(1, 2).frames(), PICTURES[3:4])  # of a window of a window
    assert parts[1].instruction == whole.instruction and parts[1].timestamps_s[0] == 0.2
    np.testing.assert_array_equal(trajectory().window(3, 9).frames(), PICTURES[3:])


def test_two_cameras_must_be_told_apart():
    two = trajectory(cameras={"front": PICTURES, "wrist": PICTURES + 1})
    np.testing.assert_array_equal(two.frames(camera="wrist"), PICTURES + 1)
    with pytest.raises(BadOption, match="front, wrist; none was chosen"):
        two.frames()
    with pytest.raises(BadOption, match="no 'back'"):
        two.frames(camera="back")
    with pytest.raises(BadOption, match="none"):
        trajectory(cameras={}).frames()


@pytest.mark.parametrize("window", [(0, 6), (-1, 2), (3, 3), (4, 2), (5, None)])
def test_windows_that_are_not_there(window):
    with pytest.raises(BadOption, match="steps 0 to 5"):
        trajectory().frames(*window)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"timestamps_s": np.arange(5)}, "float64"),
        ({"timestamps_s": np.zeros(0)}, "at least 1"),
        ({"timestamps_s": np.array([0, 1, 1, 2, 3.0])}, "rise"),
        ({"timestamps_s": np.array([0, 1, np.nan, 2, 3])}, "finite"),
        ({"timestamps_s": np.arange(5) - 1.0}, "not negative"),
        ({"actions": {}}, "at least one array of actions"),
        ({"actions": {"move": np.zeros((4, 2))}}, r"5 steps, got float64 \[4, 2\]"),
        ({"actions": {"move": [0] * 5}}, "got list"),
        ({"actions": {"move": np.array([None] * 5)}}, "object"),
        ({"info": {"reward": np.zeros(6)}}, "reward"),
        ({"cameras": {"front": PICTURES[:4]}}, r"uint8 \[5, H, W, 3\]"),
        ({"cameras": {"front": PICTURES.astype(np.float32)}}, "float32"),
        ({"cameras": {"front": PICTURES[..., :2]}}, r"\[5, 4, 6, 2\]"),
    ],
)
def test_what_is_refused(changes, words):
    with pytest.raises(BadOption, match=words):
        trajectory(**changes)


def test_a_reader_that_returns_something_else_is_an_error():
    with pytest.raises(BadOption, match="the reader of camera 'front' for 1 to 3"):
        trajectory(cameras={"front": lambda a, b: PICTURES}).frames(1, 3)


def test_it_cannot_be_changed_behind_its_back():
    given = {"move": np.zeros(5)}
    made = trajectory(actions=given)
    given["other"] = np.zeros(4)
    assert list(made.actions) == ["move"]
    with pytest.raises(TypeError):
        made.actions["more"] = np.zeros(5)


def test_it_says_what_it_is():
    assert repr(trajectory()) == (
        "Trajectory('one', 5 steps in 0.400 s, move int64 [5, 2], cameras ['front'], 'go to the red ball')"
    )
