"""Questions about videos and images as records, from a manifest, a Hugging Face dataset folder or our generated clips.

Columns, of which others are ignored:

    id                            text or number; "row-000012" where there is none (rows count from 0)
    video, image, path, file_name what is looked at: a path relative to the manifest, or in binary tables the bytes
                                  themselves or {bytes, path}; video and image go before path and file_name
    question                      text
    answers, answer               text, number or a list of them: every accepted answer
    choices, options              list of texts or numbers, or text: a JSON list, or "red|green|blue"
    start_s, end_s, start, end    the part of a video that is asked about, in seconds
    kind, category, question_type a label to group results by

With choices an answer is the text of one, its letter (A for the first) or its place (a number, from 0). Letters in
front of the choices themselves ("A. red", "(B) green") are taken off.

Untrusted input: see `tables`. Paths must stay inside the manifest's folder, links followed, unless that is allowed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tokensieve.datasets.cells import Cells, all_columns, shown
from tokensieve.datasets.sources import check_path
from tokensieve.datasets.tables import Row, dataset_files, read_rows
from tokensieve.errors import BadOption, MediaError, MediaNotAllowed

if TYPE_CHECKING:
    from tokensieve.datasets.frames import Frames

_OUTSIDE = "If you trust the manifest, allow_outside=True lets it name any file."
MAX_RECORDS = 5_000_000
MAX_MEDIA_BYTES = 4 << 30  # of encoded pictures held in memory


@dataclass(frozen=True, kw_only=True)
class Record:
    """One question about one video or image; `load()` reads or draws its frames.

    Attributes:
        id: names the question; no other record of a manifest has it.
        source: path of a video, image or folder of frames; the bytes of an encoded one; or (split, index, seed) of a
            generated clip.
        question: None where none was asked for.
        answers: every accepted answer, in a multiple-choice question the text of the right choice; may be empty.
        choices: of a multiple-choice question, else empty.
        start_s, end_s: the part of a video that is asked about, in seconds.
        kind: a label to group results by.
        clip: names what is looked at: records of one clip share it. The id unless told otherwise.
        root: folder that `source` may not lead out of by links; None does not check.
    """

    id: str
    source: Path | bytes | tuple[str, int, int]
    question: str | None = None
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    start_s: float | None = None
    end_s: float | None = None
    kind: str | None = None
    clip: str = ""
    root: Path | None = None

    def __post_init__(self):
        if not self.clip:
            object.__setattr__(self, "clip", self.id)

    def load(self, **read_options) -> Frames:
        """The frames of the part asked about.

        Args:
            **read_options: passed to `read_media`; a generated clip takes `num_frames` alone (8 unless told otherwise).

        Raises:
            BadOption: an option that the source does not take.
            MediaError: the source cannot be read.
        """
        if isinstance(self.source, tuple):
            return _generated_frames(self.source, read_options)
        from tokensieve.datasets import read_media

        part = {"start_s": self.start_s, "end_s": self.end_s, "root": self.root}
        read_options |= {name: value for name, value in part.items() if value is not None}
        if isinstance(self.source, Path):
            return read_media(self.source, **read_options)
        with tempfile.NamedTemporaryFile(prefix="tokensieve-") as file:  # decoders run apart and read files
            file.write(self.source)
            file.flush()
            try:
                return replace(read_media(file.name, **read_options), source=self.clip)
            except MediaError as error:
                raise type(error)(error.message.replace(file.name, self.clip), error.hint) from None


def read_records(
    source: str | os.PathLike,
    *,
    needs: Collection[str] = ("question", "answer"),
    split: str | None = None,
    limit: int | None = None,
    allow_outside: bool = False,
) -> list[Record]:
    """Records of a JSONL, CSV or Parquet manifest, or of a Hugging Face dataset folder.

    Args:
        source: the file or folder; see the module for its columns and `tables` for folders.
        needs: what every row must have beside something to look at: of "question", "answer", "choices".
        split: of a dataset folder that has several.
        limit: read about this many clips, the first ones: reading ends at the first row about one more.
        allow_outside: let paths lead out of the manifest's folder.

    Raises:
        BadOption: one line that names the file, the row, the column, and what is allowed there.
    """
    source = Path(source)
    if limit is not None and limit < 1:
        raise BadOption(f"limit must be above 0, got {limit}.")
    if source.is_dir():
        files, folder = dataset_files(source, split)
    elif split is not None:
        raise BadOption(f"Only dataset folders have splits, and {str(source)!r} is none.", hint="Leave split out.")
    else:
        files, folder = [source], source.parent
    root = None if allow_outside else root_of(folder)
    for file in files:
        if source.is_dir() and not _is_inside(file, root):
            raise BadOption(f"{str(file)!r} is a link out of the dataset's folder.", hint=_OUTSIDE)
    reader = _Reader(folder, root, needs)
    records, clips = [], set()
    rows = (row for file in files for row in read_rows(file, all_columns()))
    for number, row in enumerate(rows):
        record = reader.record(number, row)
        clips.add(record.clip)
        if limit is not None and len(clips) > limit:
            break
        records.append(record)
    if not records:
        raise BadOption(f"The manifest {str(source)!r} is empty.", hint="It needs at least one row.")
    return records


def generated_records(split: str, count: int, seed: int = 0) -> list[Record]:
    """Every question about the first `count` clips of a split of the generated data.

    Raises:
        BadOption: unknown split, or a count that is not positive.
    """
    from tokensieve.datasets.clips import make_clip

    if count < 1:
        raise BadOption(f"count must be positive, got {count}.")
    records = []
    for index in range(count):
        try:
            clip = make_clip(split, index, seed)
        except ValueError as error:
            raise BadOption(str(error)) from None
        records += [
            Record(
                id=f"{clip.id}-{asked.kind}",
                source=(split, index, seed),
                question=asked.text,
                answers=(asked.answer,),
                kind=asked.kind,
                clip=clip.id,
            )
            for asked in clip.questions
        ]
    return records


def _generated_frames(source: tuple[str, int, int], read_options: Mapping[str, object]) -> Frames:
    from tokensieve.datasets.clip_files import clip_frames
    from tokensieve.datasets.clips import make_clip

    if unknown := read_options.keys() - {"num_frames"}:
        raise BadOption(f"Generated clips are drawn, not read: they have no {', '.join(sorted(unknown))}.")
    return clip_frames(make_clip(*source), **read_options)


def root_of(folder: Path) -> Path:
    """Where links may lead. Snapshots in the Hugging Face cache link to the blobs of their repository."""
    for at in (folder.absolute(), *folder.absolute().parents):
        if at.parent.name == "snapshots" and (at.parent.parent / "blobs").is_dir():
            return at.parent.parent
    return folder


def _is_inside(path: Path, root: Path | None) -> bool:
    """Whether a path, its links followed, is below `root`; all are below None."""
    return root is None or Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


class _Reader:
    """Rows to records, with what must hold across rows."""

    def __init__(self, folder: Path, root: Path | None, needs: Collection[str]):
        self.folder, self.root, self.needs = folder, root, needs
        self._where: dict[str, str] = {}  # by id
        self._encoded: dict[str, bytes] = {}  # by clip, so that the same picture is in memory once
        self._num_bytes = 0

    def record(self, number: int, row: Row) -> Record:
        if number >= MAX_RECORDS:
            raise BadOption(f"{row.where} is one too many: at most {MAX_RECORDS} are read.", hint="Give a limit.")
        cells = Cells(row)
        source, clip = self._source(cells)
        choices = cells.choices()
        record = Record(
            id=cells.label("id") or f"row-{number:06d}",
            source=source,
            question=cells.text("question"),
            answers=cells.answers(choices),
            choices=tuple(choices),
            start_s=cells.seconds("start_s"),
            end_s=cells.seconds("end_s"),
            kind=cells.label("kind"),
            clip=clip,
            root=self.root if isinstance(source, Path) else None,
        )
        for thing, found in (("question", record.question), ("answer", record.answers), ("choices", choices)):
            if thing in self.needs and not found:
                raise cells.missing(thing)
        start_s = record.start_s or 0.0
        if record.end_s is not None and record.end_s <= start_s:
            raise cells.error("end_s", f"must be after the start at {start_s:g} s, got {record.end_s:g}")
        if record.id in self._where:
            before = self._where[record.id]
            raise BadOption(f"{row.where} has the id {shown(record.id)} of {before[0].lower()}{before[1:]}.")
        self._where[record.id] = row.where
        return record

    def _source(self, cells: Cells) -> tuple[Path | bytes, str]:
        """What is looked at, and its name."""
        values, column = cells.row.values, cells.column("media")
        if column is None:
            raise cells.missing("media")
        if "video" in values and "image" in values:
            raise BadOption(f'{cells.row.where} has both "video" and "image".', hint="A row is about one of them.")
        value = values[column]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return self._picture(cells, value)
        if isinstance(value, str):
            return self._path(cells, value)
        raise cells.error("media", f"must be a path or an encoded picture or video, got {shown(values[column])}")

    def _picture(self, cells: Cells, value: bytes) -> tuple[bytes, str]:
        clip = hashlib.sha256(value).hexdigest()[:16]
        if clip not in self._encoded:
            self._num_bytes += len(value)
            if self._num_bytes > MAX_MEDIA_BYTES:
                raise cells.error(
                    "media",
                    f"all up to here have more than {MAX_MEDIA_BYTES >> 30} GiB",
                    "Give a limit, or a manifest of files.",
                )
        return self._encoded.setdefault(clip, value), clip

    def _path(self, cells: Cells, text: str) -> tuple[Path, str]:
        try:
            check_path(cells.plain("media", text))
        except MediaNotAllowed:
            raise cells.error("media", f"is a URL; only local files are read: {shown(text)}") from None
        except (BadOption, MediaError):
            raise cells.error("media", f"must be the path of a file, got {shown(text)}") from None
        name = os.path.normpath(text)
        inside = f"must stay inside the manifest's folder, got {shown(text)}"
        if self.root is not None and (os.path.isabs(name) or name.split(os.sep)[0] == ".."):
            raise cells.error("media", inside, _OUTSIDE)
        path = self.folder / name
        if not os.path.exists(path):
            raise cells.error("media", f"names a file that is not there: {shown(text)}")
        if not _is_inside(path, self.root):
            raise cells.error("media", f"{inside}, a link out of it", _OUTSIDE)
        return path, name
