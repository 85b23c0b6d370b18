"""Prompts to distil on: unique, normalised texts, read from text, JSON lines and tensorflow-datasets' caption sets."""

import dataclasses
import hashlib
import json
import os
import struct
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from etils import epath

from tiue_jax import files

JSON_LINES = (".jsonl", ".json", ".ndjson")
DATASET_INFO = "dataset_info.json"  # by which a folder of tensorflow-datasets is known
WITHOUT_FIELD, EMPTY, REPEATED = "without the field", "empty", "repeated"
READ_AHEAD = 256  # rows of a tensorflow-datasets folder

PathLike = str | os.PathLike[str]


class PromptSource(Protocol):
    """Unique prompts by number, wherever they are kept; threads may read at once."""

    @property
    def fingerprint(self) -> str:
        """A hash of all prompts in their order."""

    @property
    def dropped(self) -> dict[str, int]:
        """How many texts were dropped for which reason."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[str]:
        """These prompts, in this order."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts in memory, in the order of their file."""

    prompts: list[str]
    dropped: dict[str, int]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.prompts)

    def read(self, indices: Sequence[int]) -> list[str]:
        return [self.prompts[i] for i in indices]


def load_prompts(path: PathLike, field: str | None = None) -> Prompts:
    """All prompts of one file in memory. Arguments and errors are those of PromptReader."""
    reader = PromptReader([path], field)
    prompts = list(reader)
    return Prompts(prompts, reader.dropped, reader.fingerprint)


class PromptReader:
    """Reads unique, non-empty, NFC-normalised prompts once, one after the other, and counts what it drops.

    Memory grows by about 0.15 GB for each million of prompts, for the hashes by which repeated ones are known.

    Args:
        paths: any of: UTF-8 text, a prompt a line; JSON lines (.jsonl, .json, .ndjson); a folder that
            tensorflow-datasets prepared (array_record or tfrecord), such as coco_captions. Also in a bucket.
        field: for the latter two, the path to the prompt (or to a list of prompts) with dots, as in JourneyDB's
            "Task2.Caption" and coco_captions' "captions.text". In JSON lines each name matches whatever its case and
            with or without a colon at its end: JourneyDB spells `Caption`, `Caption:`, `caption`. Rows without the
            field are dropped and counted, as such corpora have some.
        split: of a folder of tensorflow-datasets.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the file and the line: text that is not UTF-8, a line that is not a JSON object, a prompt
            that is not text; naming the file: no prompt in it, or `field` or `split` missing or out of place.
    """

    def __init__(self, paths: Sequence[PathLike], field: str | None = None, split: str = "train"):
        if not paths:
            raise ValueError("expected at least one file of prompts, got none")
        self._paths = [files.at(path) for path in paths]
        self._field, self._split = field, split
        self._dropped: Counter[str] = Counter()
        self._hash = hashlib.blake2b(digest_size=16)
        for path in self._paths:
            if not path.exists():
                raise FileNotFoundError(f"no prompt file at {path}")
        needing = [path for path in self._paths if _is_json_lines(path) or path.is_dir()]
        if needing and field is None:
            raise ValueError(f"{needing[0]}: expected the prompt's field, such as 'Task2.Caption', got field None")
        if field is not None and not needing:
            raise ValueError(f"{self._paths[0]}: expected field None unless it is {JSON_LINES}, got field {field!r}")

    @property
    def dropped(self) -> dict[str, int]:
        """How many texts were dropped so far, by reason."""
        return dict(self._dropped)

    @property
    def fingerprint(self) -> str:
        """Hash of all prompts so far, in their order."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[str]:
        seen: set[bytes] = set()
        for path in self._paths:
            found, lost = False, self._dropped.copy()
            for where, text in self._texts(path):
                prompt = " ".join(unicodedata.normalize("NFC", text).split())
                if not prompt:
                    self._dropped[EMPTY] += 1
                    continue
                found = True
                encoded = _encode(prompt, where)
                digest = hashlib.blake2b(encoded, digest_size=16).digest()
                if digest in seen:
                    self._dropped[REPEATED] += 1
                    continue
                seen.add(digest)
                self._hash.update(encoded + b"\n")
                yield prompt
            if not found:
                within = f" in {self._field!r}" if self._field else ""
                reasons = ", ".join(f"{n} {reason}" for reason, n in (self._dropped - lost).items()) or "it is empty"
                raise ValueError(f"{path}: expected at least one prompt{within}, got none ({reasons})")

    def _texts(self, path: epath.Path) -> Iterator[tuple[str, str]]:
        """Every text of one input, and where it is."""
        for where, row in _dataset_rows(path, str(self._field), self._split) if path.is_dir() else _lines(path):
            if isinstance(row, str):
                yield where, row
                continue
            found = _field(row, str(self._field))
            if found in (None, []):
                self._dropped[WITHOUT_FIELD] += 1
            for text in found if isinstance(found, list) else [found] * (found is not None):
                if not isinstance(text, str):
                    expected = f"expected text or a list of texts in {self._field!r}"
                    raise ValueError(f"{where}: {expected}, got {type(text).__name__}")
                yield where, text


def _is_json_lines(path: epath.Path) -> bool:
    return path.suffix.lower() in JSON_LINES


def _lines(path: epath.Path) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """The rows of a file, each with its place: text, or an object of JSON lines."""
    is_json = _is_json_lines(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8").removeprefix("\ufeff").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: expected UTF-8 text, got byte 0x{line[error.start]:02x}") from error
            yield where, _object(text, where) if is_json and text else text


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object on every line, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object on every line, got {type(value).__name__}")
    return value


def _dataset_rows(folder: epath.Path, field: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a prepared tensorflow-datasets folder, reduced to the field, with bytes decoded."""
    import tensorflow_datasets as tfds  # a second to import

    if not (folder / DATASET_INFO).is_file():
        raise ValueError(f"{folder}: no {DATASET_INFO} in it, expected a folder that tensorflow-datasets prepared")
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        raise ValueError(f"{folder}: expected one of the splits {sorted(builder.info.splits)}, got {split!r}")
    try:
        features = _only(builder.info.features, field.split("."))
    except KeyError as error:
        described = " ".join(str(builder.info.features).split())
        raise ValueError(f"{folder}: expected a field of {described}, got {field!r}") from error
    for number, record in enumerate(_records(builder, split, folder)):
        where = f"{folder}[{number}]"
        yield where, _plain_values(features.deserialize_example_np(record), where)


def _records(builder: Any, split: str, folder: epath.Path) -> Iterator[bytes]:
    """The serialised rows of a tensorflow-datasets folder, in their order, read without TensorFlow."""
    file_format = builder.info.file_format.value
    if file_format == "array_record":
        records = builder.as_data_source(split=split).data_source
        for start in range(0, len(records), READ_AHEAD):
            yield from records.__getitems__(range(start, min(start + READ_AHEAD, len(records))))
    elif file_format == "tfrecord":  # the default format, in which most sets lie on disks
        for path in builder.info.splits[split].filepaths:
            with path.open("rb") as file:
                while header := file.read(12):  # length, checksum
                    (length,) = struct.unpack("<Q4x", header) if len(header) == 12 else (0,)
                    body = file.read(length + 4)  # record, checksum
                    if not length or len(body) != length + 4:
                        raise ValueError(f"{path}: not a whole tfrecord file")
                    yield body[:-4]
    else:
        raise ValueError(f"{folder}: expected the file_format 'array_record' or 'tfrecord', got {file_format!r}")


def _only(feature: Any, names: list[str]) -> Any:
    """A feature of tensorflow-datasets with but one field in it: images, say, cannot be decoded without TensorFlow."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Sequence):
        return tfds.features.Sequence(_only(feature.feature, names))
    if not names:
        return feature
    if not isinstance(feature, tfds.features.FeaturesDict) or names[0] not in feature:
        raise KeyError(names[0])
    return tfds.features.FeaturesDict({names[0]: _only(feature[names[0]], names[1:])})


def _plain_values(value: Any, where: str) -> Any:
    """What tensorflow-datasets returns, with lists for arrays and text for bytes."""
    if isinstance(value, dict):
        return {name: _plain_values(inner, where) for name, inner in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: expected UTF-8 text, got byte 0x{value[error.start]:02x}") from error
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain_values(inner, where) for inner in value] if isinstance(value, list) else value


def _field(row: dict[str, Any], field: str) -> Any:
    """The value at a dotted path, None where it is missing; of a list on the way, a list of what its items have.

    An exact name wins over one in another spelling, unless there is nothing in it.
    """
    return _at(row, field.split("."))


def _at(value: Any, names: list[str]) -> Any:
    if not names:
        return value
    if isinstance(value, list):
        of_items = [_at(item, names) for item in value]
        return [
            text for found in of_items for text in (found if isinstance(found, list) else [found]) if text is not None
        ]
    if not isinstance(value, dict):
        return None
    spelled = sorted((key for key in value if _plain(key) == _plain(names[0])), key=lambda key: key != names[0])
    found = [inner for key in spelled if (inner := _at(value[key], names[1:])) is not None]
    return next((inner for inner in found if inner), found[0] if found else None)


def _plain(name: str) -> str:
    return name.strip().removesuffix(":").strip().casefold()


def _encode(prompt: str, where: str) -> bytes:
    try:
        return prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may spell half a surrogate pair
        lone = ord(prompt[error.start])
        raise ValueError(f"{where}: expected Unicode text, got the lone surrogate U+{lone:04X}") from error


def describe(dropped: dict[str, int]) -> str:
    """What was dropped, as text: ", 3 left out: empty"."""
    return "".join(f", {count:,} left out: {reason}" for reason, count in dropped.items())
