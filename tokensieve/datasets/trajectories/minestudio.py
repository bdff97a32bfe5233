"""MineStudio's Minecraft datasets: recognised, and refused.

They are LMDB environments (`<modality>/part-<k>/data.mdb`) in which the index and every value but the videos are Python
pickles: reading one runs whatever code its author put there, and reading it safely would need both a dependency and an
unpickler of our own for what the same recordings give in another form, the `.mp4` and `.jsonl` that `read_vpt` reads.
"""

from __future__ import annotations

import os
from pathlib import Path

from tokensieve.errors import BadOption


def is_minestudio(folder: str | os.PathLike) -> bool:
    """Whether a folder is an LMDB environment, or holds some as MineStudio lays them out; looks at names alone."""
    folder = Path(folder)
    if (folder / "data.mdb").is_file():
        return True
    return any(True for depth in ("*", "*/part-*", "part-*") for _ in folder.glob(f"{depth}/data.mdb"))


def refuse_minestudio(folder: str | os.PathLike) -> None:
    """Raise BadOption, with the reason and what to do instead, where `is_minestudio(folder)`."""
    if is_minestudio(folder):
        raise BadOption(
            f"{str(folder)!r} is an LMDB dataset such as MineStudio's; its values are Python pickles, and reading a "
            "pickle runs code that its author chose, so it is not read.",
            "Use the recordings it was made from (NAME.mp4 with NAME.jsonl) and read_vpt, or convert it to a LeRobot "
            "dataset with MineStudio in an environment that you trust it with.",
        )
