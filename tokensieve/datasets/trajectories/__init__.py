"""Episodes of pictures and actions: contractor clips of VPT, LeRobot datasets, BabyAI experts.

Names below are resolved on first use, so importing this package costs nothing.
"""

from __future__ import annotations

from tokensieve.lazy_names import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, {name: f"{__name__}.{home}" for name, home in _HOME_OF.items()})
