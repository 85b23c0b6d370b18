"""Finds files of prompts and reads their texts. A format is one row of FORMATS, and is known by the content."""

import contextlib
import dataclasses
import fnmatch
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from tiue_jax import files
from tiue_jax.data import csv_rows, dataset_folder, hub_rows, json_rows, shard_rows, table_rows, text_rows
from tiue_jax.data.fields import Bad, Value, listed, usual_field, usual_fields, value_at
from tiue_jax.data.file_kinds import DAMAGE, Opened, check_regular, content_suffix, open_file

logger = logging.getLogger(__name__)

WITHOUT_FIELD, EMPTY, BAD = "without the field", "empty", "bad"
MAX_BAD_SHARE = 0.01
MAX_CHARACTERS = 100_000  # of a prompt
SHOWN, SHOWN_CHARACTERS = 5, 200  # bad rows that are logged, and the characters of each


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of files that hold prompts.

    Attributes:
        name: as users read it.
        suffixes: the files of a folder that have it.
        recognises: returns True if the content of a file has the format.
        rows: yields the rows of a file after their places, given the field.
        has_fields: False if a row is a text.
    """

    name: str
    suffixes: tuple[str, ...]
    recognises: Callable[[Opened], bool]
    rows: Callable[[Opened, str | None], Iterator[tuple[object, Value]]]
    has_fields: bool = True


SHARDS = Format("webdataset shards", (".tar",), shard_rows.is_tar, shard_rows.rows)
FORMATS = (  # a file has the first one that recognises it
    SHARDS,
    Format("parquet", (".parquet",), table_rows.is_parquet, table_rows.parquet_rows),
    Format("Arrow", (".arrow",), table_rows.is_arrow, table_rows.arrow_rows),
    Format("JSON", json_rows.SUFFIXES, json_rows.is_json, json_rows.rows),
    Format("CSV", csv_rows.SUFFIXES, csv_rows.is_csv, csv_rows.rows),
    Format("text", (".txt", ".caption"), text_rows.is_text, text_rows.rows, has_fields=False),
)
_NO_CAPTIONS = ("dataset_info.json", "dataset_dict.json", "state.json")  # beside the files of the datasets library
_WILDCARDS = frozenset("*?[")


def detect(opened: Opened) -> Format:
    """Returns the format of an open file.

    Raises:
        ValueError: the content is of no format in FORMATS.
    """
    for each in FORMATS:
        if each.recognises(opened):
            return each
    known = ", ".join(each.name for each in FORMATS)
    raise ValueError(f"unknown binary data that begins with {opened.head[:8]!r}, expected one of {known}")


def find(path: str | os.PathLike[str]) -> "Source":
    """Finds a file, a folder, the files of a pattern, or a data set on the hub by its name. Reads no prompts yet.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a pipe or a device, or a folder without prompts, or a file of a kind that is not read.
    """
    name, found = os.fspath(path), files.at(path)
    if found.exists():
        check_regular(found)
        if not found.is_dir():
            return Source(name, files=(found,))
        return Source(name, folder=found) if dataset_folder.is_dataset_folder(found) else _of_folder(found)
    if _WILDCARDS & set(name):
        return _of_pattern(found)
    if hub_rows.is_name(name) and not any(content_suffix(found) in each.suffixes for each in FORMATS):
        hub_rows.check_installed(name)
        return Source(name, on_hub=True)
    raise FileNotFoundError(f"no prompt file at {path}")


def read_texts(path: str | os.PathLike[str], field: str | None = None) -> list[str]:
    """Reads the texts of one path into memory, with repeated ones, in their order. No row may be bad.

    Raises:
        FileNotFoundError, ValueError: as `PromptReader`.
        OSError: a file cannot be read.
    """
    return list(find(path).texts(field, "train", 0.0, Counter()))


@dataclasses.dataclass(frozen=True)
class Source:
    """The origin of prompts: files, or a folder of tensorflow-datasets, or a data set on the hub.

    Attributes:
        name: as the user gave it.
        files: in the order in which they are read.
        folder: of tensorflow-datasets.
        on_hub: True if `name` names a data set on the hub.
    """

    name: str
    files: tuple[epath.Path, ...] = ()
    folder: epath.Path | None = None
    on_hub: bool = False

    @property
    def has_fields(self) -> bool:
        """True if the rows of the first file have fields. Errors are those of `open_file` and `detect`."""
        if not self.files:
            return True
        opened, found = _open(self.files[0])
        opened.close()
        return found.has_fields

    def texts(self, field: str | None, split: str, max_bad_share: float, dropped: Counter[str]) -> Iterator[str]:
        """Yields the texts that are not empty, without spaces around them. Counts in `dropped` what it leaves out.

        Raises:
            ValueError: as `PromptReader`.
        """
        rows = _Rows(self.name, field, dropped)
        if self.folder is not None:
            dataset = dataset_folder.rows(self.folder, field, split)
            yield from rows.texts(((f"{self.folder}[{number}]", row) for number, row in dataset))
        elif self.on_hub:
            found = hub_rows.rows(self.name, field, split)
            yield from rows.texts((f"{self.name}:{number}", row) for number, row in found)
        for path in self.files:
            yield from rows.texts(_rows(path, field))
        rows.finish(max_bad_share)


def _open(path: epath.Path) -> tuple[Opened, Format]:
    opened = open_file(path)
    try:
        return opened, detect(opened)
    except ValueError as error:
        opened.close()
        raise ValueError(f"{path}: {error}") from error


def _rows(path: epath.Path, field: str | None) -> Iterator[tuple[str, Value]]:
    """Yields the rows of a file after their places, such as `prompts.txt:3`."""
    opened, found = _open(path)
    where = str(path)
    with contextlib.closing(opened):
        try:
            for place, row in found.rows(opened, field):
                where = f"{path}:{place}"
                yield where, row
        except (ValueError, *DAMAGE) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
        except OSError as error:
            if error.errno:
                raise
            raise ValueError(f"{path}: damaged after {where}: {error}") from error  # of a decompressor


class _Rows:
    """Takes the texts out of the rows of one source, and counts those that are bad, empty or without the field."""

    def __init__(self, name: str, field: str | None, dropped: Counter[str]):
        self._name, self._field, self._dropped = name, field, dropped
        self._counts: Counter[str] = Counter()
        self._total = self._good = 0
        self._bad: list[str] = []  # the first ones
        self._without: dict[str, Any] | None = None  # the first row without the field

    def texts(self, rows: Iterator[tuple[str, Value]]) -> Iterator[str]:
        """Yields the texts of rows. A row follows its place."""
        field = self._field
        for where, row in rows:
            if isinstance(row, dict):
                if field is None and (usual := usual_fields(row)):
                    field = usual[0] if len(usual) == 1 else self._usual(where, row)
                found = None if field is None else value_at(row, field)
                values = found if isinstance(found, list) else [found]
                if not values or found is None:
                    self._without = self._without or row
                    values = [None]
            else:
                values = [row]
            for value in values:
                if (text := self._checked(where, value, field if isinstance(row, dict) else None)) is not None:
                    yield text

    def _checked(self, where: str, value: Any, field: str | None) -> str | None:
        """Returns a text that can be used. Counts everything else."""
        self._total += 1
        if isinstance(value, bytes):
            value = value.decode("utf-8", "surrogateescape")
        if isinstance(value, str):
            text = value.strip()
            if not text:
                self._count(EMPTY)
                return None
            value = text if (reason := _problem(text)) is None else Bad(reason)
        if isinstance(value, str):
            self._good += 1
            return value
        if value is None:
            self._count(WITHOUT_FIELD)
            return None
        if not isinstance(value, Bad):
            value = Bad(f"expected text or a list of texts in {field!r}, got {json_rows.type_name(value)}")
        self._count(BAD)
        if len(self._bad) < SHOWN:
            message = " ".join(f"{where}: {value.reason}".split())
            self._bad.append(message if len(message) <= SHOWN_CHARACTERS else f"{message[:SHOWN_CHARACTERS]} ...")
        return None

    def _count(self, reason: str) -> None:
        self._counts[reason] += 1
        self._dropped[reason] += 1

    def _usual(self, where: str, row: dict[str, Any]) -> str:
        try:
            return usual_field(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def finish(self, max_bad_share: float) -> None:
        """Logs the first bad rows. ValueError if too many rows were bad, or there was no prompt."""
        bad = self._counts[BAD]
        if bad > max_bad_share * self._total:
            raise ValueError(
                f"{self._name}: {bad:,} of {self._total:,} rows are bad, more than the share that may be left out "
                f"(--max_bad_share {max_bad_share:g}); the first: {self._bad[0]}"
            )
        for shown in self._bad:
            logger.warning("left out: %s", shown)
        if bad > SHOWN:
            logger.warning("%s: %s bad rows were left out; the first %d were shown", self._name, f"{bad:,}", SHOWN)
        if self._good:
            return
        if self._field is None and self._without is not None:
            self._usual(self._name, self._without)
        within = f" in {self._field!r}" if self._field else ""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self._counts.items()) or "it is empty"
        there = f"; {listed(self._without)}" if self._without is not None else ""
        raise ValueError(f"{self._name}: expected at least one prompt{within}, got none ({reasons}){there}")


def _problem(text: str) -> str | None:
    """The reason why a text cannot be a prompt, or None."""
    if len(text) > MAX_CHARACTERS:
        return f"expected at most {MAX_CHARACTERS:,} characters, got {len(text):,}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes that are not UTF-8, or half of a surrogate pair in JSON
        lone = ord(text[error.start])
        if 0xDC80 <= lone <= 0xDCFF:
            return f"expected UTF-8 text, got byte 0x{lone - 0xDC00:02x}"
        return f"expected Unicode text, got the lone surrogate U+{lone:04X}"
    return None


# ---- folders and patterns -------------------------------------------------------------------------------------------


def _of_folder(folder: epath.Path) -> Source:
    """The files of a folder, and of the folders in it, that hold prompts, in the order of their names."""
    return _of_files(folder, folder, list(_below(folder)))


def _below(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields the files below a folder, apart from hidden ones. Links to folders are not followed."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _NO_CAPTIONS:
            continue
        if not path.is_dir():
            yield path
        elif files.is_remote(path) or not os.path.islink(path):
            yield from _below(path)


def _of_pattern(pattern: epath.Path) -> Source:
    """The files of a pattern, in the order of their names."""
    parts = pattern.parts
    if "**" in parts:
        raise ValueError(f"{pattern}: ** is not read, expected the folder itself: the folders in it are read, too")
    first = next(i for i, part in enumerate(parts) if _WILDCARDS & set(part))
    base = pattern
    for _ in parts[first:]:
        base = base.parent
    found = [base]
    for part in parts[first:]:  # glob() of epath loses gs://
        inside = [path for folder in found if folder.is_dir() for path in sorted(folder.iterdir())]
        found = [path for path in inside if fnmatch.fnmatchcase(path.name, part)]
    if not found:
        raise FileNotFoundError(f"no prompt file at {pattern}: nothing fits this pattern")
    return _of_files(pattern, base, [path for path in found if not path.is_dir()])


def _of_files(name: epath.Path, root: epath.Path, paths: list[epath.Path]) -> Source:
    """Chooses the files that hold prompts, by their suffixes. In a folder of shards only the shards do.

    Raises:
        ValueError: there are none, or they have several formats.
    """
    by_format: dict[str, list[epath.Path]] = {}
    for path in paths:
        if each := next((each for each in FORMATS if content_suffix(path) in each.suffixes), None):
            by_format.setdefault(each.name, []).append(path)
    chosen = by_format.get(SHARDS.name) or next(iter(by_format.values()), [])
    if not chosen:
        suffixes = Counter(path.suffix or path.name for path in paths)
        there = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes.most_common(3)) or "nothing"
        expected = ", ".join(suffix for each in FORMATS for suffix in each.suffixes)
        raise ValueError(f"{name}: no files of prompts in it, expected some of {expected}; it holds {there}")
    if len(by_format) > 1 and SHARDS.name not in by_format:
        there = ", ".join(f"{len(those):,} of {format_name}" for format_name, those in by_format.items())
        example = f"{root}/*{chosen[0].suffix}"
        raise ValueError(f"{name}: holds files of several formats ({there}): name those of one, such as '{example}'")
    if not files.is_remote(root):
        links = [path for path in chosen if os.path.islink(path)]
        for path in (*links, *sorted({path.parent for path in chosen})):
            if not _is_inside(path, root):
                raise ValueError(
                    f"{path}: a link that leads out of {root} (or nowhere), and is not followed: "
                    "name what it leads to, or copy it"
                )
    return Source(os.fspath(name), files=tuple(chosen))


def _is_inside(path: epath.Path, root: epath.Path) -> bool:
    """Returns True if a path lies in a folder after all links are followed.

    In the hub's cache, the files of `snapshots/<commit>` are links to the folder `blobs` beside `snapshots`.
    """
    folder, target = Path(os.path.realpath(root)), Path(os.path.realpath(path))  # resolve() of epath follows no link
    above = [parent.parent for parent in (folder, *folder.parents) if parent.name == "snapshots"]
    return target.exists() and any(target.is_relative_to(each) for each in (folder, *above))
