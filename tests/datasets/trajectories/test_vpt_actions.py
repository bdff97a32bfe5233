"""VPT's action space: every entry there and back, and the numbers that follow from its formula."""

from __future__ import annotations

import numpy as np
import pytest

from tokensieve.datasets.trajectories.vpt_actions import (
    BUTTON_GROUPS,
    BUTTONS,
    INVENTORY,
    NULL_BIN,
    NULL_CAMERA,
    NUM_BUTTONS,
    NUM_CAMERAS,
    camera_bins,
    camera_degrees,
    decode_actions,
    encode_actions,
    to_factored,
    to_joint,
)
from tokensieve.errors import BadOption


def pressed(*names: str) -> np.ndarray:
    return np.array([name in names for name in BUTTONS], dtype=np.int64)


def test_sizes():
    assert (len(BUTTONS), NUM_BUTTONS, NUM_CAMERAS) == (20, 8641, 121)
    assert [len(group) + 1 for group in BUTTON_GROUPS] == [10, 3, 3, 3, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("button", [np.arange(NUM_BUTTONS), np.array([0, 1, 4321, 8638, 8639, INVENTORY])])
def test_every_button_and_every_camera_number_round_trips(button):
    cameras = np.array([0, NULL_CAMERA, 61, 120]) if len(button) == NUM_BUTTONS else np.arange(NUM_CAMERAS)
    button, camera = np.meshgrid(button, cameras, indexing="ij")
    again = to_joint(*to_factored(button, camera))
    # the last bit of the button number, and the camera, say the same thing except in contradictory pairs
    says_moves, moves = (button % 2 == 1) & (button != INVENTORY), camera != NULL_CAMERA
    agree = says_moves == moves
    np.testing.assert_array_equal(again[0][agree], button[agree])
    np.testing.assert_array_equal(again[1][agree], camera[agree])
    assert set(button[agree]) == set(button.flat) and set(camera[agree]) == set(camera.flat)
    # a contradictory pair comes back with the camera off
    np.testing.assert_array_equal(again[0][~agree], button[~agree] - says_moves[~agree])
    assert (again[1][~agree] == NULL_CAMERA).all()


def test_factored_to_joint_and_back_is_a_projection():
    rng = np.random.default_rng(0)
    buttons, camera = rng.integers(0, 2, (20_000, 20)), rng.integers(0, 11, (20_000, 2))
    once = to_factored(*to_joint(buttons, camera))
    twice = to_factored(*to_joint(*once))
    np.testing.assert_array_equal(once[0], twice[0])
    np.testing.assert_array_equal(once[1], twice[1])


def test_order_of_the_joint_numbers():
    still = np.array([NULL_BIN, NULL_BIN])
    assert to_joint(pressed(), still) == (0, NULL_CAMERA)  # the null action
    assert NULL_CAMERA == 60
    assert to_joint(pressed(), np.array([5, 6])) == (1, 61)  # yaw is the fast one, and sets the camera bit
    assert to_joint(pressed(), np.array([6, 5])) == (1, 71)
    for name, number in {"jump": 2, "attack": 4, "drop": 8, "use": 16, "sprint": 32, "sneak": 64}.items():
        assert to_joint(pressed(name), still)[0] == number
    for name, number in {"left": 96, "right": 192, "forward": 288, "back": 576, "hotbar.1": 864}.items():
        assert to_joint(pressed(name), still)[0] == number
    assert to_joint(pressed("hotbar.9"), still)[0] == 9 * 864
    assert to_joint(pressed("inventory"), still) == (8640, NULL_CAMERA)


def test_buttons_that_exclude_each_other():
    still = np.array([NULL_BIN, NULL_BIN])
    for both, left in (
        (("forward", "back"), ()),
        (("left", "right"), ()),
        (("sprint", "sneak"), ("sneak",)),
        (("hotbar.3", "hotbar.8", "hotbar.1"), ("hotbar.8",)),
        (("forward", "back", "jump", "attack"), ("jump", "attack")),
        (("inventory", "jump", "hotbar.2"), ("inventory",)),
    ):
        buttons, _ = to_factored(*to_joint(pressed(*both), still))
        assert {BUTTONS[k] for k in np.flatnonzero(buttons)} == set(left)
    buttons, camera = to_factored(*to_joint(pressed("inventory"), np.array([0, 10])))  # excludes the camera, too
    assert buttons.sum() == 1 and camera.tolist() == [5, 5]
    assert to_factored(np.array(INVENTORY), np.array(7))[1].tolist() == [0, 7]  # but not on the way back


def test_camera_values_and_thresholds():
    values = [0, 0.6154, 1.6095, 3.2154, 5.8095, 10]
    np.testing.assert_allclose(camera_degrees(np.arange(5, 11)), values, atol=5e-5)
    np.testing.assert_allclose(camera_degrees(np.arange(5, -1, -1)), -np.array(values), atol=5e-5)
    assert camera_degrees(np.array(5)) == 0.0
    np.testing.assert_array_equal(camera_bins(camera_degrees(np.arange(11))), np.arange(11))
    for k, threshold in enumerate([0.271, 1.053, 2.317, 4.358, 7.655]):
        below, above = camera_bins(np.array([threshold - 6e-4, threshold + 6e-4]))
        assert (below, above) == (5 + k, 6 + k)
        below, above = camera_bins(-np.array([threshold - 6e-4, threshold + 6e-4]))
        assert (below, above) == (5 - k, 4 - k)
    assert camera_bins(np.array([-1e6, 1e6, 0.0])).tolist() == [0, 10, 5]  # clipped


def test_degrees_in_and_out():
    buttons = np.stack([pressed("forward", "sprint"), pressed("attack")])
    numbers = encode_actions(buttons, np.array([[3.2, -0.1], [0.0, 0.0]]))
    again, degrees = decode_actions(*numbers)
    np.testing.assert_array_equal(again, buttons)
    np.testing.assert_allclose(degrees, [[3.2154, 0], [0, 0]], atol=1e-4)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_any_leading_axes(shape):
    buttons, camera = np.zeros((*shape, 20), dtype=bool), np.full((*shape, 2), 7, dtype=np.uint8)
    number, camera_number = to_joint(buttons, camera)
    assert number.shape == camera_number.shape == shape and number.dtype == np.int64
    back, camera_back = to_factored(number, camera_number)
    assert back.shape == (*shape, 20) and (camera_back == 7).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: to_joint(np.zeros((3, 19), dtype=int), np.zeros((3, 2), dtype=int)),
        lambda: to_joint(np.zeros((3, 20), dtype=int), np.zeros((4, 2), dtype=int)),
        lambda: to_joint(np.full((3, 20), 2), np.zeros((3, 2), dtype=int)),
        lambda: to_joint(np.zeros((3, 20), dtype=int), np.full((3, 2), 11)),
        lambda: to_joint(np.zeros((3, 20)), np.zeros((3, 2), dtype=int)),
        lambda: to_factored(np.array([8641]), np.array([0])),
        lambda: to_factored(np.array([-1]), np.array([0])),
        lambda: to_factored(np.array([0]), np.array([121])),
        lambda: to_factored(np.array([0, 1]), np.array([0])),
        lambda: camera_bins(np.array([np.nan])),
        lambda: camera_degrees(np.array([11])),
    ],
)
def test_what_is_refused(call):
    with pytest.raises(BadOption):
        call()
