"""What a LeRobot dataset says about itself: features, tasks, episodes, and in which file each of them is.

The format of the `lerobot` library, versions 2.1 (one file an episode) and 3.0 (many episodes a file), read without it:

    meta/info.json                   version, rate, features, templates of paths
    meta/tasks.jsonl                 2.1; 3.0 has meta/tasks.parquet
    meta/episodes.jsonl              2.1; 3.0 has meta/episodes/chunk-000/file-000.parquet and more
    data/.../*.parquet               rows of numbers, a row a step
    videos/.../*.mp4                 by camera

Untrusted input: names of files come from templates in info.json, which are filled in by hand (Python's own formatting
would follow attributes and make texts of any length) and must stay inside the folder, links followed.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from tokensieve.datasets.images import natural_key
from tokensieve.datasets.manifest import root_of
from tokensieve.datasets.sources import check_inside
from tokensieve.datasets.tables import read_rows
from tokensieve.errors import BadOption

VERSIONS = ("v2.1", "v3.0")
MAX_EPISODES = 1_000_000
MAX_STEPS = 1_000_000  # of one episode
_MAX_INFO_BYTES = 1 << 24
_DEPTH_MARKS = ("is_depth_map", "video.is_depth_map")
_MAX_VALUES = 1 << 24  # numbers of one feature at one step
_FIELD = re.compile(r"\{(\w+)(?::0?([1-9]))?d?\}")
_TEMPLATES = {
    "v2.1": {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    },
    "v3.0": {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    },
}


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One kind of values, of which there is one at each step."""

    dtype: str
    """As the dataset says: "float32", "int64", "string", "video", "image" and so on."""
    shape: tuple[int, ...]
    """Of one value; () for a single number."""
    is_depth: bool = False
    """Whether pictures are distances."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of a file that belongs to an episode."""

    path: Path
    """The file; it need not exist."""
    start: float
    """Number of the first row, or time of the first picture in seconds."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """Where one episode is."""

    index: int
    """As the dataset numbers it."""
    length: int
    """Steps."""
    tasks: tuple[str, ...]
    """What it was asked to do, of those the episodes' table names; may be empty."""
    rows: Piece
    """In the Parquet files."""
    videos: dict[str, Piece] = field(default_factory=dict)
    """By camera."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """All of it."""

    folder: Path
    root: Path
    """What files may not lead out of: the folder, or the repository of a Hugging Face cache."""
    version: str
    fps: float
    features: dict[str, Feature]
    tasks: dict[int, str]
    episodes: tuple[Episode, ...]


def read_meta(folder: Path) -> Meta:
    """Read and check everything under `meta/`.

    Raises:
        BadOption: not such a dataset, another version, or contents that contradict each other.
        MediaNotAllowed: a file is a link out of the dataset.
    """
    root = root_of(folder)
    path = folder / "meta" / "info.json"
    if not path.is_file():
        raise BadOption(f"{str(folder)!r} is no LeRobot dataset: it has no meta/info.json.")
    info = _read_info(path, root)
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise BadOption(
            f"{str(folder)!r} is of LeRobot's version {str(version)[:20]!r}; {' and '.join(VERSIONS)} are read.",
            hint="Convert it with the lerobot library.",
        )
    fps = info.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not math.isfinite(fps) or not 1e-3 <= fps <= 1e4:
        raise BadOption(f"{str(path)!r}: fps must be a number from 0.001 to 10000, got {str(fps)[:20]!r}.")
    features = _features(info, path)
    templates = {name: _template(info, name, version, path) for name in ("data_path", "video_path")}
    where = _Places(folder, templates, [key for key, f in features.items() if f.dtype == "video"])
    tasks = _tasks(folder, root, version)
    if version == "v2.1":
        episodes = _episodes_21(folder, root, where, _count(info, "chunks_size", path, 1000))
    else:
        episodes = _episodes_30(folder, root, where)
    total = info.get("total_episodes", len(episodes))
    if not episodes or total != len(episodes):
        raise BadOption(f"{str(path)!r} promises {str(total)[:20]} episodes, and meta/ describes {len(episodes)}.")
    return Meta(
        folder=folder,
        root=root,
        version=version,
        fps=float(fps),
        features=features,
        tasks=tasks,
        episodes=tuple(episodes),
    )


def fill_template(template: str, values: dict[str, int | str]) -> str:
    """`template` with {name} and {name:03d} replaced; no other formatting is understood.

    Raises:
        BadOption: an unknown name, a width above 9, or a brace that belongs to neither.
    """

    def put(match: re.Match) -> str:
        name, width = match.groups()
        if name not in values:
            raise BadOption(f"The template {template[:200]!r} names {name!r}; there are {', '.join(values)}.")
        return str(values[name]).zfill(int(width or 0))

    rest = _FIELD.sub("", template)
    if "{" in rest or "}" in rest:
        raise BadOption(f"The template {template[:200]!r} has more in it than {{name}} and {{name:03d}}.")
    return _FIELD.sub(put, template)


class _Places:
    """From numbers to paths inside the folder."""

    def __init__(self, folder: Path, templates: dict[str, str], cameras: list[str]):
        self.folder, self.templates, self.cameras = folder, templates, cameras

    def path(self, name: str, **values: int | str) -> Path:
        text = fill_template(self.templates[name], values)
        plain = os.path.normpath(text)
        if "\0" in text or os.path.isabs(plain) or plain.split(os.sep)[0] in ("..", "."):
            raise BadOption(f"{name} leads outside the dataset {str(self.folder)!r}: {text[:200]!r}.")
        return self.folder / plain  # links are followed, and checked, when the file is opened


def _read_info(path: Path, root: Path) -> dict:
    check_inside(os.path.realpath(path), str(root), str(path))
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_INFO_BYTES + 1)
        if len(text) > _MAX_INFO_BYTES:
            raise BadOption(f"{str(path)!r} has more than {_MAX_INFO_BYTES} bytes.")
        info = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, BadOption):
            raise
        raise BadOption(f"{str(path)!r} cannot be read as JSON ({type(error).__name__}).") from None
    if not isinstance(info, dict):
        raise BadOption(f"{str(path)!r} must be a JSON object, got {type(info).__name__}.")
    return info


def _features(info: dict, path: Path) -> dict[str, Feature]:
    given = info.get("features")
    if not isinstance(given, dict) or not given:
        raise BadOption(f'{str(path)!r}: "features" must be an object with at least one feature.')
    found = {}
    for key, about in given.items():
        shape = about.get("shape") if isinstance(about, dict) else None
        if not isinstance(shape, list) or not isinstance(about.get("dtype"), str):
            raise BadOption(f"{str(path)!r}: feature {key[:100]!r} must have a dtype and a list as its shape.")
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape) or math.prod(shape) > _MAX_VALUES:
            raise BadOption(f"{str(path)!r}: feature {key[:100]!r} has the shape {str(shape)[:50]}.")
        more = [about, about.get("info"), about.get("video_info")]
        marks = [part.get(name) for part in more if isinstance(part, dict) for name in _DEPTH_MARKS]
        found[key] = Feature(dtype=about["dtype"], shape=tuple(shape), is_depth=True in marks)
    return found


def _template(info: dict, name: str, version: str, path: Path) -> str:
    template = info.get(name) or _TEMPLATES[version][name]  # video_path is null where there are no videos
    if not isinstance(template, str):
        raise BadOption(f"{str(path)!r}: {name} must be a text, got {type(template).__name__}.")
    return template


def _tasks(folder: Path, root: Path, version: str) -> dict[int, str]:
    """Texts by number. In 3.0 the text is the index of a data frame, whose name some versions left out."""
    path = folder / "meta" / ("tasks.jsonl" if version == "v2.1" else "tasks.parquet")
    tasks = {}
    for row in _rows(path, root, ("task_index", "task", "__index_level_0__")):
        name = "task" if "task" in row.columns else "__index_level_0__"
        text = row.values.get(name, "" if name in row.columns else None)  # empty texts are left out of rows
        number = _count(row.values, "task_index", row.where)
        if not isinstance(text, str) or number in tasks:
            raise BadOption(f"{row.where} must give a task a text and a number of its own.")
        tasks[number] = text
    return tasks


def _episodes_21(folder: Path, root: Path, where: _Places, chunk_size: int) -> list[Episode]:
    episodes = []
    for row in _rows(folder / "meta" / "episodes.jsonl", root, ("episode_index", "length", "tasks")):
        index = _count(row.values, "episode_index", row.where)
        numbers = {"episode_chunk": index // max(1, chunk_size), "episode_index": index}
        videos = {
            key: Piece(path=where.path("video_path", video_key=key, **numbers), start=0.0) for key in where.cameras
        }
        rows = Piece(path=where.path("data_path", **numbers), start=0)
        episodes.append(_episode(row, index, rows, videos, episodes))
    return episodes


def _episodes_30(folder: Path, root: Path, where: _Places) -> list[Episode]:
    columns = ["episode_index", "length", "tasks", "dataset_from_index", "data/chunk_index", "data/file_index"]
    parts = ("chunk_index", "file_index", "from_timestamp")
    columns += [f"videos/{key}/{part}" for key in where.cameras for part in parts]
    paths = sorted((folder / "meta" / "episodes").glob("*/*.parquet"), key=lambda path: natural_key(str(path)))
    found = [row for path in paths for row in _rows(path, root, columns)]
    first_row: dict[tuple[int, int], int] = {}  # number of the first row of each data file in the whole dataset
    for row in found:
        file = tuple(_count(row.values, f"data/{part}", row.where) for part in parts[:2])
        start = _count(row.values, "dataset_from_index", row.where)
        first_row[file] = min(start, first_row.get(file, start))
    episodes = []
    for row in found:
        values = row.values
        chunk, file = (values[f"data/{part}"] for part in parts[:2])
        rows = Piece(
            path=where.path("data_path", chunk_index=chunk, file_index=file),
            start=values["dataset_from_index"] - first_row[chunk, file],
        )
        videos = {}
        for key in where.cameras:
            numbers = {part: _count(values, f"videos/{key}/{part}", row.where) for part in parts[:2]}
            start_s = values.get(f"videos/{key}/from_timestamp")
            if not isinstance(start_s, float) or not 0 <= start_s < 1e7:
                raise BadOption(f"{row.where}: videos/{key}/from_timestamp must be a time, got {str(start_s)[:50]!r}.")
            videos[key] = Piece(path=where.path("video_path", video_key=key, **numbers), start=start_s)
        episodes.append(_episode(row, _count(values, "episode_index", row.where), rows, videos, episodes))
    return episodes


def _episode(row, index: int, rows: Piece, videos: dict[str, Piece], before: list[Episode]) -> Episode:
    if len(before) >= MAX_EPISODES:
        raise BadOption(f"{row.where} is one episode too many: at most {MAX_EPISODES} are read.")
    if before and index <= before[-1].index:
        raise BadOption(f"{row.where}: episode {index} comes after episode {before[-1].index}.")
    length = _count(row.values, "length", row.where)
    if not 1 <= length <= MAX_STEPS:
        raise BadOption(f"{row.where}: an episode has 1 to {MAX_STEPS} steps, got {length}.")
    tasks = row.values.get("tasks", [])
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise BadOption(f"{row.where}: tasks must be a list of texts.")
    return Episode(index=index, length=length, tasks=tuple(tasks), rows=rows, videos=videos)


def _rows(path: Path, root: Path, columns):
    if not path.is_file():
        raise BadOption(f"The dataset lacks {str(path)!r}.", hint="Get the whole dataset again.")
    check_inside(os.path.realpath(path), str(root), str(path))
    return read_rows(path, columns)


def _count(values: dict, name: str, where, default: int | None = None) -> int:
    """A whole number that is not negative."""
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 53:
        raise BadOption(f"{where}: {name} must be a whole number, 0 or more, got {str(value)[:50]!r}.")
    return value
