"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokensieve.errors import BadOption


def check_new(out: Path) -> None:
    """Raises BadOption unless a folder can be made at `out`: nothing is there, or an empty folder."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise BadOption(f"{out} exists already and is no empty folder.", hint="Give the name of a new folder.")
    if not out.absolute().parent.is_dir():
        raise BadOption(f"There is no folder {out.absolute().parent} to write into.", hint="Make it first.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that gets its name when the block ends well, and goes when it does not.

    Raises:
        BadOption: as `check_new`.
    """
    check_new(out)
    target = out.absolute()
    folder = target.with_name(f".{target.name}.{os.getpid()}.part")
    folder.mkdir()
    try:
        yield folder
        if target.is_dir():
            target.rmdir()  # empty, or this raises; not every system renames onto a folder
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
