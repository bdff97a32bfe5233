"""The action space of VPT: what a contractor's keys and mouse become for a policy, and back.

Video PreTraining (VPT): Learning to Act by Watching Unlabeled Online Videos, Baker and others, arXiv 2206.11795;
the numbers are those of its released agent. Two forms:

- *factored*: 20 buttons, each 0 or 1, and the camera's pitch and yaw, each one of 11 bins
- *joint*: one number for all buttons (8,641) and one for the camera (121), which is what the policy predicts

The joint form cannot say everything: of buttons that exclude each other one is left (both of forward and back, or of
left and right: none of them; else the later one in BUTTON_GROUPS), and the inventory key excludes all else. So
factored -> joint -> factored is a projection. Joint -> factored -> joint returns what it got, except for pairs that
contradict themselves: buttons that say "the camera moves" beside a camera that does not, and the other way round, and
the inventory key beside a camera that moves; all come back with the camera off.

Shape legend: ... any leading axes, 20 buttons, 2 pitch and yaw
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tokensieve.errors import BadOption

BUTTONS = (
    *("attack", "back", "forward", "jump", "left", "right", "sneak", "sprint", "use", "drop", "inventory"),
    *(f"hotbar.{slot}" for slot in range(1, 10)),
)
# Slowest-changing first; choice 0 of each group is "none of them". The last one says whether the camera moves.
BUTTON_GROUPS = (
    tuple(f"hotbar.{slot}" for slot in range(1, 10)),
    ("forward", "back"),
    ("left", "right"),
    ("sprint", "sneak"),
    ("use",),
    ("drop",),
    ("attack",),
    ("jump",),
    ("camera",),
)
_CANCELLING = (("forward", "back"), ("left", "right"))
_SIZES = tuple(len(group) + 1 for group in BUTTON_GROUPS)

INVENTORY = int(np.prod(_SIZES))  # the joint button number after all combinations
NUM_BUTTONS = INVENTORY + 1
NUM_CAMERA_BINS = 11
NULL_BIN = NUM_CAMERA_BINS // 2
NUM_CAMERAS = NUM_CAMERA_BINS**2
NULL_CAMERA = NULL_BIN * NUM_CAMERA_BINS + NULL_BIN

MAX_DEGREES = 10.0
_BIN_WIDTH = 2.0
_MU = 10.0


def camera_bins(degrees: np.ndarray) -> np.ndarray:
    """Bins of camera angles, any shape: clipped to 10 degrees, mu-law (mu 10), bins of width 2; int64 in [0, 11).

    The bin changes where the angle passes 0.271, 1.053, 2.317, 4.358 and 7.655 degrees.
    """
    part = np.clip(np.asarray(degrees, dtype=np.float64), -MAX_DEGREES, MAX_DEGREES) / MAX_DEGREES
    if not np.isfinite(part).all():
        raise BadOption("Camera angles must be finite.")
    bent = np.sign(part) * np.log1p(_MU * np.abs(part)) / np.log1p(_MU)
    return np.round((bent * MAX_DEGREES + MAX_DEGREES) / _BIN_WIDTH).astype(np.int64)


def camera_degrees(bins: np.ndarray) -> np.ndarray:
    """The angle that stands for each bin, float64: 0, 0.6154, 1.6095, 3.2154, 5.8095 and 10 degrees either way."""
    bins = _whole(bins, NUM_CAMERA_BINS, "camera bins")
    bent = (bins * _BIN_WIDTH - MAX_DEGREES) / MAX_DEGREES
    return np.sign(bent) * ((1 + _MU) ** np.abs(bent) - 1) / _MU * MAX_DEGREES


def to_joint(buttons: np.ndarray, camera: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factored to joint actions.

    Args:
        buttons: [..., 20], 0 or 1, in the order of BUTTONS.
        camera: [..., 2] bins of pitch and yaw.

    Returns:
        Button numbers in [0, 8641) and camera numbers (pitch * 11 + yaw) in [0, 121), int64 [...].

    Raises:
        BadOption: other shapes or values.
    """
    buttons, camera = _whole(buttons, 2, "buttons"), _whole(camera, NUM_CAMERA_BINS, "camera bins")
    if buttons.shape[-1:] != (len(BUTTONS),) or camera.shape != (*buttons.shape[:-1], 2):
        raise BadOption(
            f"buttons must be [..., {len(BUTTONS)}] and camera [..., 2] with the same leading axes, "
            f"got {list(buttons.shape)} and {list(camera.shape)}."
        )
    number = np.zeros(buttons.shape[:-1], dtype=np.int64)
    for group, size in zip(BUTTON_GROUPS[:-1], _SIZES[:-1], strict=True):
        pressed = buttons[..., [BUTTONS.index(name) for name in group]]
        choice = (pressed * np.arange(1, size)).max(-1)  # the later one wins
        if group in _CANCELLING:
            choice = np.where(pressed.all(-1), 0, choice)
        number = number * size + choice
    joint_camera = camera[..., 0] * NUM_CAMERA_BINS + camera[..., 1]
    number = number * _SIZES[-1] + (joint_camera != NULL_CAMERA)
    is_inventory = buttons[..., BUTTONS.index("inventory")] == 1
    return np.where(is_inventory, INVENTORY, number), np.where(is_inventory, NULL_CAMERA, joint_camera)


def to_factored(button_number: np.ndarray, camera_number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joint to factored actions: the inverse of `to_joint`.

    Args:
        button_number, camera_number: [...] in [0, 8641) and [0, 121).

    Returns:
        buttons, int64 [..., 20], and camera bins, int64 [..., 2]; the null bin where the buttons say that the camera
        does not move. The inventory key says nothing about the camera here, as in the released agent.

    Raises:
        BadOption: numbers out of range, or of different shapes.
    """
    button_number = _whole(button_number, NUM_BUTTONS, "joint buttons")
    camera_number = _whole(camera_number, NUM_CAMERAS, "joint cameras")
    if button_number.shape != camera_number.shape:
        raise BadOption(
            f"Button and camera numbers must have one shape, got {button_number.shape} and {camera_number.shape}."
        )
    table, moves = _button_table()
    camera = np.stack([camera_number // NUM_CAMERA_BINS, camera_number % NUM_CAMERA_BINS], axis=-1)
    return table[button_number], np.where(moves[button_number][..., None], camera, NULL_BIN)


def encode_actions(buttons: np.ndarray, degrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`to_joint` for a camera [..., 2] in degrees, as the readers give it."""
    return to_joint(buttons, camera_bins(degrees))


def decode_actions(button_number: np.ndarray, camera_number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`to_factored` with the camera [..., 2] in degrees, as an environment takes it."""
    buttons, camera = to_factored(button_number, camera_number)
    return buttons, camera_degrees(camera)


@cache
def _button_table() -> tuple[np.ndarray, np.ndarray]:
    """For each joint button number its buttons, int64 [8641, 20], and whether the camera moves, bool [8641]."""
    table = np.zeros((NUM_BUTTONS, len(BUTTONS)), dtype=np.int64)
    choices = np.stack(np.unravel_index(np.arange(INVENTORY), _SIZES), axis=-1)
    for group, choice in zip(BUTTON_GROUPS[:-1], choices.T[:-1], strict=True):
        for place, name in enumerate(group, 1):
            table[:INVENTORY, BUTTONS.index(name)] = choice == place
    table[INVENTORY, BUTTONS.index("inventory")] = 1
    moves = np.append(choices[:, -1] == 1, True)
    table.flags.writeable = moves.flags.writeable = False
    return table, moves


def _whole(values: np.ndarray, size: int, what: str) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind not in "bui" or (values.size and not 0 <= values.min() <= values.max() < size):
        shown = f"{values.dtype}" if values.dtype.kind not in "bui" else f"{values.min()} to {values.max()}"
        raise BadOption(f"The {what} must be whole numbers from 0 to {size - 1}, got {shown}.")
    return values.astype(np.int64)
