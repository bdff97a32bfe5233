"""What a batch job works through: clips of a folder, a glob or a manifest, each with a key that outlives a restart.

Nothing is opened here but the manifest. A row that cannot be used (no path, a time that is none) becomes an input with
a failure, because every row of a manifest gets its row in the result; a manifest that cannot be parsed is an error.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokensieve.datasets.cells import Cells, all_columns, shown
from tokensieve.datasets.sources import check_path
from tokensieve.datasets.tables import Row, read_rows
from tokensieve.errors import BadOption, MediaNotAllowed, TokensieveError

MANIFESTS = (".jsonl", ".csv", ".parquet")
VIDEOS = frozenset(
    ".3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()
)  # what is taken from a folder; a glob or manifest takes any file
MISSING = "missing"
QUESTIONS = "questions"  # a column with a list of questions; "question" holds one


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why an input has no result, as its row will say."""

    stage: str
    """"input", "decode", "encode" or "answer"."""
    error_type: str
    message: str
    retryable: bool = False

    @classmethod
    def of(cls, stage: str, error: BaseException) -> Failure:
        """From an error; of one that is not ours only the class is told, as its text may hold what was in a file."""
        if isinstance(error, TokensieveError):
            return cls(
                stage=stage, error_type=type(error).__name__, message=error.message, retryable=bool(error.retryable)
            )
        kind = type(error).__name__
        return cls(stage=stage, error_type=kind, message=f"The {stage} step failed with {kind}.")


@dataclass(frozen=True, kw_only=True)
class Input:
    """One clip to work on.

    Attributes:
        id: of the manifest, else the path.
        path: as the source names it, relative to it where it is.
        file: what to open; None with a failure.
        questions: of the manifest's row, or those asked of every clip.
        start_s, end_s: the part of the video, in seconds.
        root: folder that links may not lead out of; None does not check.
        failure: why it cannot be worked on.
        where: for messages, where it stands in its source.
        key: 32 hexadecimal digits that follow from id, path, questions and times.
        version: size and time of change of the file: another version is another input of the same key.
    """

    id: str
    path: str
    file: Path | None
    questions: tuple[str, ...] = ()
    start_s: float | None = None
    end_s: float | None = None
    root: Path | None = None
    failure: Failure | None = None
    where: str = ""
    key: str = ""
    version: str = ""

    def __post_init__(self) -> None:
        identity = json.dumps([self.id, self.path, list(self.questions), self.start_s, self.end_s])
        object.__setattr__(self, "key", hashlib.sha256(identity.encode()).hexdigest()[:32])
        object.__setattr__(self, "version", _version(self.file))


@dataclass(frozen=True, kw_only=True)
class Found:
    """The inputs of a source, and how many entries of a folder were passed over (by reason)."""

    inputs: tuple[Input, ...]
    skipped: dict[str, int]


def find_inputs(
    source: str | os.PathLike, *, questions: Sequence[str] = (), allow_outside: bool = False, limit: int | None = None
) -> Found:
    """The inputs of a folder of videos, a glob, a manifest (JSONL, CSV, Parquet) or a single file.

    Args:
        source: a folder is walked, links to folders are not followed; a glob may hold `**`.
        questions: asked of every clip whose row has no question of its own.
        allow_outside: let links and paths lead out of the folder, or of that of the manifest or glob.
        limit: the first ones only.

    Raises:
        BadOption: nothing there, a manifest that cannot be parsed, or two rows with the same id, path, questions and
            times.
    """
    if limit is not None and limit < 1:
        raise BadOption(f"limit must be above 0, got {limit}.")
    try:
        text = check_path(source)
    except MediaNotAllowed:
        raise BadOption(f"SOURCE must be local, got the URL {shown(os.fsdecode(source))}.") from None
    skipped: dict[str, int] = {}
    path = Path(text)
    if path.is_dir():
        inputs = _of_files(path, _walk(path, skipped), None if allow_outside else path)
    elif path.suffix.lower() in MANIFESTS:
        root = None if allow_outside else path.parent
        inputs = (_of_row(row, path.parent, root, number) for number, row in enumerate(_rows(path)))
    elif path.exists():
        inputs = _of_files(path.parent, iter([path]), None if allow_outside else path.parent)
    elif glob.has_magic(text):
        fixed = _fixed_folder(path)
        files = (Path(name) for name in sorted(glob.glob(text, recursive=True)) if not os.path.isdir(name))
        inputs = _of_files(fixed, files, None if allow_outside else fixed)
    else:
        raise BadOption(f"There is no {text!r}.", hint="SOURCE is a folder, a glob in quotes, or a manifest.")
    kept: list[Input] = []
    seen: dict[str, str] = {}
    for one in inputs:
        if limit is not None and len(kept) == limit:
            break
        if not one.questions and one.failure is None:
            one = replace(one, questions=tuple(questions))
        if one.key in seen:
            raise BadOption(
                f"{one.where} is {seen[one.key]} again: same id, path, questions and times.",
                hint="Remove one of them, or give each row an id of its own.",
            )
        seen[one.key] = one.where
        kept.append(one)
    if not kept:
        raise BadOption(
            f"There is no clip in {text!r}.", hint=f"Of a folder these are taken: {' '.join(sorted(VIDEOS))}."
        )
    return Found(inputs=tuple(kept), skipped=skipped)


def _of_files(base: Path, files: Iterator[Path], root: Path | None) -> Iterator[Input]:
    for file in files:
        name = os.path.relpath(file, base)
        yield Input(id=name, path=name, file=file, root=root, where=f"The file {name!r}")


def _walk(folder: Path, skipped: dict[str, int]) -> Iterator[Path]:
    def count(reason: str) -> None:
        skipped[reason] = skipped.get(reason, 0) + 1

    for at, folders, names in os.walk(folder, onerror=lambda _: count("folders that may not be read")):
        folders.sort()
        for name in folders:
            if os.path.islink(os.path.join(at, name)):
                count("links to folders")
        for name in sorted(names):
            if name.startswith("."):
                count("hidden files")
            elif Path(name).suffix.lower() in VIDEOS:
                yield Path(at, name)
            else:
                count("files that are no videos by their extension")


def _fixed_folder(pattern: Path) -> Path:
    """The folder in front of the first wildcard."""
    fixed = [part for part in pattern.parts]
    while fixed and glob.has_magic(os.path.join(*fixed)):
        fixed.pop()
    return Path(*fixed) if fixed else Path(".")


def _rows(path: Path) -> Iterator[Row]:
    rows = list(read_rows(path, (*all_columns(), QUESTIONS)))  # all of them: nothing starts on a manifest that breaks
    if not rows:
        raise BadOption(f"The manifest {str(path)!r} is empty.", hint="It needs at least one row.")
    return iter(rows)


def _of_row(row: Row, folder: Path, root: Path | None, number: int) -> Input:
    """The input of a manifest's row; what is wrong with the row is its failure."""
    name, path = f"row-{number:06d}", ""
    try:
        cells = Cells(row)
        column = cells.column("media")
        if column is None:
            raise cells.missing("media")
        text = row.values[column]
        if isinstance(text, dict):
            text = text.get("path")
        if not isinstance(text, str) or not text:
            raise cells.error("media", f"must be the path of a file, got {shown(row.values[column])}")
        path = text
        name = cells.label("id") or path
        questions = _questions(cells)
        start_s, end_s = cells.seconds("start_s"), cells.seconds("end_s")
        if end_s is not None and end_s <= (start_s or 0.0):
            raise cells.error("end_s", f"must be after the start at {start_s or 0:g} s, got {end_s:g}")
        file = folder / check_path(path)
        inside = os.path.normpath(path)
        if root is not None and (os.path.isabs(inside) or inside.split(os.sep)[0] == ".."):
            raise MediaNotAllowed(f"{row.where}: {shown(path)} is outside the manifest's folder.")
    except TokensieveError as error:
        failure = Failure.of("input", error)
        return Input(id=name, path=path, file=None, failure=failure, where=row.where)
    return Input(
        id=name, path=path, file=file, questions=questions, start_s=start_s, end_s=end_s, root=root, where=row.where
    )


def _questions(cells: Cells) -> tuple[str, ...]:
    values = cells.row.values
    several = values.get(QUESTIONS)
    if several is None:
        one = cells.text("question")
        return () if one is None else (one,)
    if "question" in values:
        raise BadOption(f'{cells.row.where} has both "question" and "questions".', hint="Keep one of them.")
    if isinstance(several, str) and several.lstrip().startswith("["):  # a list in a CSV file
        try:
            several = json.loads(several)
        except (ValueError, RecursionError):
            several = None
    several = [several] if isinstance(several, str) else several
    if not isinstance(several, list) or not all(isinstance(text, str) and text.strip() for text in several):
        raise BadOption(f'{cells.row.where}: "questions" must be a list of texts, got {shown(values[QUESTIONS])}.')
    return tuple(cells.plain("question", text) for text in several)


def _version(file: Path | None) -> str:
    try:
        info = os.stat(file) if file is not None else None
    except (OSError, ValueError):
        info = None
    return MISSING if info is None else f"{info.st_size}-{info.st_mtime_ns}"


def text_of(value: str) -> str:
    """Text that can be written as UTF-8: bytes of a file name that are no Unicode are spelt out."""
    return re.sub("[\ud800-\udfff]", lambda found: f"\\x{ord(found.group()) & 0xFF:02x}", value)
