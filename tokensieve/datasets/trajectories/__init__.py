"""Episodes of pictures and actions: contractor clips of VPT, LeRobot datasets, BabyAI experts.

Names below are resolved on first use, so importing this package costs nothing.
"""

from __future__ import annotations

import importlib

_HOME_OF = {
    "Episodes": "episodes",
    "LeRobotDataset": "lerobot",
    "Trajectory": "trajectory",
    "VPTOptions": "vpt",
    "generate_episodes": "babyai",
    "make_level": "babyai",
    "open_lerobot": "lerobot",
    "read_episodes": "episodes",
    "read_vpt": "vpt",
    "refuse_minestudio": "minestudio",
    "render_grids": "tiles",
    "vpt_clips": "vpt",
    "write_episodes": "episodes",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
