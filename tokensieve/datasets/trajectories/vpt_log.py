"""The log beside a clip of VPT's contractors: one JSON object a line, a line a step.

Quirks that are met here (see docs/trajectories.md): an attack button that is stuck from the start, hotbar slots that
were chosen with the wheel, mouse or keyboard recorded as null, fields that some releases leave out, no line feed at the
end, and a last line that was cut off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokensieve.datasets.trajectories.vpt_actions import BUTTONS
from tokensieve.errors import BadOption

KEYS = {
    "key.keyboard.w": "forward",
    "key.keyboard.s": "back",
    "key.keyboard.a": "left",
    "key.keyboard.d": "right",
    "key.keyboard.space": "jump",
    "key.keyboard.left.shift": "sneak",
    "key.keyboard.left.control": "sprint",
    "key.keyboard.q": "drop",
    "key.keyboard.e": "inventory",
    "key.keyboard.f": "swapHands",
    "key.keyboard.escape": "ESC",
    **{f"key.keyboard.{slot}": f"hotbar.{slot}" for slot in range(1, 10)},
}
MOUSE_BUTTONS = ("attack", "use", "pickItem")
OTHER_BUTTONS = ("ESC", "swapHands", "pickItem")  # recorded, but not among the 20 of the policies
_COLUMN = {name: place for place, name in enumerate((*BUTTONS, *OTHER_BUTTONS))}

DEGREES_PER_COUNT = 360 / 2400
# By recorder version: how much mouse motion in a menu must be multiplied by. VPT's loader has the numbers, unused.
GUI_MOUSE_SCALES = {"5.7": 0.5, "5.8": 0.5, "6.7": 2.0, "6.8": 2.0, "6.9": 2.0}

_MAX_LINE_BYTES = 1 << 20
_MAX_STEPS = 1_000_000  # 14 hours; a clip has up to five minutes


@dataclass(frozen=True, kw_only=True)
class VPTLog:
    """The steps of one log, in arrays.

    Shape legend: T steps
    """

    buttons: np.ndarray
    """In the order of BUTTONS, 0 or 1, uint8 [T, 20]."""
    other_buttons: np.ndarray
    """In the order of OTHER_BUTTONS, uint8 [T, 3]."""
    camera: np.ndarray
    """Pitch and yaw in degrees, float64 [T, 2]."""
    cursor_xy: np.ndarray
    """Where the mouse is, in pixels of the 720-line window, float64 [T, 2]."""
    is_gui_open: np.ndarray
    """Whether a menu is open, bool [T]."""
    is_null: np.ndarray
    """No key, no mouse button, no motion: VPT's loader leaves such steps out, bool [T]."""
    hotbar: np.ndarray
    """The chosen slot, 0 to 8; -1 where the log does not say, int64 [T]."""
    notes: tuple[str, ...] = ()
    """What was lost."""


def read_vpt_log(path: Path, *, truncate_camera: bool = False, recorder_version: str | None = None) -> VPTLog:
    """Read a `.jsonl` of VPT's contractors.

    Args:
        path: The file. A last line that is cut off is left out and noted.
        truncate_camera: Cut camera angles to whole degrees towards zero, as VPT's loader does by keeping them in an
            array of integers; a slow movement of 6 counts (0.9 degrees) then is none.
        recorder_version: Such as "6.9", the first part of a clip's relative path: mouse motion in menus is scaled as
            that version needs. None scales nothing, as VPT's loader.

    Raises:
        BadOption: no such file, a line that is no step, or too many or too long ones.
    """
    gui_scale = 1.0 if recorder_version is None else GUI_MOUSE_SCALES.get(recorder_version, 1.0)
    rows, notes = [], []
    last_hotbar, is_attack_stuck = 0, False
    for number, step in _steps(path, notes):
        where = f"Line {number} of {str(path)!r}"
        mouse, keyboard = _part(step, "mouse", where), _part(step, "keyboard", where)
        pressed, newly_pressed = _list(mouse, "buttons", where), _list(mouse, "newButtons", where)
        if not rows:  # some games begin with attack held down until it is pressed for the first time
            is_attack_stuck = newly_pressed == [0]
        elif 0 in newly_pressed:
            is_attack_stuck = False
        names = [name for k, name in enumerate(MOUSE_BUTTONS) if k in pressed and not (k == 0 and is_attack_stuck)]
        names += [KEYS[key] for key in _list(keyboard, "keys", where) if isinstance(key, str) and key in KEYS]
        dx, dy, x, y = (_number(mouse, key, where) for key in ("dx", "dy", "x", "y"))
        is_null = not names and dx == 0 and dy == 0

        hotbar = step.get("hotbar", -1)
        if isinstance(hotbar, bool) or not isinstance(hotbar, int) or not -1 <= hotbar <= 8:
            raise BadOption(f'{where}: "hotbar" must be a whole number from 0 to 8, got {str(hotbar)[:50]!r}.')
        if hotbar >= 0 and hotbar != last_hotbar:  # also what the wheel chose, which is no key
            names.append(f"hotbar.{hotbar + 1}")
            last_hotbar = hotbar

        is_gui_open = step.get("isGuiOpen") is True
        scale = DEGREES_PER_COUNT * (gui_scale if is_gui_open else 1.0)
        rows.append((names, (dy * scale, dx * scale), (x, y), is_gui_open, is_null, hotbar))
    if not rows:
        raise BadOption(f"{str(path)!r} holds no step.", hint="Get the file again.")

    held, camera, cursor_xy, is_gui_open, is_null, hotbars = zip(*rows, strict=True)
    buttons = np.zeros((len(rows), len(_COLUMN)), dtype=np.uint8)
    for row, names in zip(buttons, held, strict=True):
        row[[_COLUMN[name] for name in names]] = 1
    camera = np.array(camera, dtype=np.float64)
    return VPTLog(
        buttons=buttons[:, : len(BUTTONS)],
        other_buttons=buttons[:, len(BUTTONS) :],
        camera=np.trunc(camera) + 0.0 if truncate_camera else camera,  # + 0.0: no negative zeros
        cursor_xy=np.array(cursor_xy, dtype=np.float64),
        is_gui_open=np.array(is_gui_open),
        is_null=np.array(is_null),
        hotbar=np.array(hotbars, dtype=np.int64),
        notes=tuple(notes),
    )


def _steps(path: Path, notes: list[str]) -> Iterator[tuple[int, dict]]:
    """Numbered JSON objects of the file; a broken one is an error unless it is the last."""
    try:
        file = open(path, "rb")
    except OSError:
        raise BadOption(f"There is no log {str(path)!r} that this user may read.") from None
    with file:
        line, number = file.readline(_MAX_LINE_BYTES), 0
        while line:
            number += 1
            following = file.readline(_MAX_LINE_BYTES)
            if number > _MAX_STEPS or len(line) == _MAX_LINE_BYTES:
                raise BadOption(
                    f"Line {number} of {str(path)!r} is too much: a log has at most {_MAX_STEPS} lines, "
                    f"each below {_MAX_LINE_BYTES} bytes."
                )
            step = _parsed(line)
            if step is not None:
                yield number, step
            elif following.strip():
                raise BadOption(f"Line {number} of {str(path)!r} is no JSON object.", hint="Get the file again.")
            elif line.strip():
                notes.append(f"the last line of the log, {number}, is cut off and left out")
            line = following


def _parsed(line: bytes) -> dict | None:
    try:
        step = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return step if isinstance(step, dict) else None


def _part(step: dict, key: str, where: str) -> dict:
    """Mouse or keyboard; early recorders wrote null where nothing happened."""
    if key not in step:
        raise BadOption(f'{where} has no "{key}".', hint="Is this a log of VPT's contractors?")
    value = step[key]
    if value is not None and not isinstance(value, dict):
        raise BadOption(f'{where}: "{key}" must be an object or null, got {type(value).__name__}.')
    return value or {}


def _list(part: dict, key: str, where: str) -> list:
    value = part.get(key)
    if value is not None and not isinstance(value, list):
        raise BadOption(f'{where}: "{key}" must be a list, got {type(value).__name__}.')
    return value or []


def _number(part: dict, key: str, where: str) -> float:
    value = part.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > 1e9:
        raise BadOption(f'{where}: "{key}" must be a number, got {str(value)[:50]!r}.')
    return float(value)
