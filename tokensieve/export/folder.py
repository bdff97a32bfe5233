"""Files of an exported folder: only its own, only plain ones, and JSON of a sensible size."""

from __future__ import annotations

import json
import stat
from pathlib import Path

from tokensieve.errors import UnsupportedModel

MAX_JSON_BYTES = 1 << 26  # tokenizers of today have up to some 30 MB
AGAIN = "Export the model again with `tokensieve export`."
_REAL = "Copy the folder so that links become files (cp -rL), and open the copy."


def own_file(folder: Path, name: str) -> Path:
    """The path of a regular file inside the folder.

    Args:
        folder: the exported folder; it may itself be reached through links.
        name: relative, with "/".

    Raises:
        UnsupportedModel: the name leads out of the folder, there is no such file, a link stands in its path, the file
            is known under a second name (a hard link), or it is no regular file.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or ":" in part or "\0" in part for part in parts):
        raise UnsupportedModel(f"{name!r} is no name of a file inside an exported folder.", hint=AGAIN)
    path = folder
    try:
        for part in parts:
            path = path / part
            found = path.lstat()
            if stat.S_ISLNK(found.st_mode):
                raise UnsupportedModel(f"{path} is a link, which could lead out of the folder.", hint=_REAL)
    except (OSError, ValueError):
        raise UnsupportedModel(f"{folder} lacks the file {name!r}.", hint=AGAIN) from None
    if not stat.S_ISREG(found.st_mode):
        raise UnsupportedModel(f"{path} is no regular file.", hint=AGAIN)
    if found.st_nlink > 1:
        raise UnsupportedModel(f"{path} has a second name (a hard link), perhaps outside the folder.", hint=_REAL)
    return path


def read_text(folder: Path, name: str, max_bytes: int | None = None) -> str:
    """The text of one of the folder's files, of at most `MAX_JSON_BYTES` unless told otherwise.

    Raises:
        UnsupportedModel: as `own_file`, or it is too large or no UTF-8.
    """
    path = own_file(folder, name)
    max_bytes = MAX_JSON_BYTES if max_bytes is None else max_bytes
    try:
        if path.stat().st_size > max_bytes:
            raise UnsupportedModel(f"{path} is larger than {max_bytes} bytes.", hint=AGAIN)
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UnsupportedModel(f"{path} cannot be read as text.", hint=AGAIN) from None


def read_json(folder: Path, name: str, max_bytes: int | None = None) -> dict[str, object]:
    """The JSON object in one of the folder's files; the size is bounded as in `read_text`.

    Raises:
        UnsupportedModel: as `read_text`, or it holds no JSON object.
    """
    try:
        found = json.loads(read_text(folder, name, max_bytes))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UnsupportedModel(f"{folder / name} holds no valid JSON object.", hint=AGAIN)
    return found
