"""Training prompts: unique, normalised texts from text files, JSON lines and caption sets of tensorflow-datasets."""

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
from tiue_jax.data.dataset_folder import DATASET_INFO, open_builder

JSON_LINES = (".jsonl", ".json", ".ndjson")
WITHOUT_FIELD, EMPTY, REPEATED = "without the field", "empty", "repeated"
READ_AHEAD = 256  # rows of a tensorflow-datasets folder

PathLike = str | os.PathLike[str]


class PromptSource(Protocol):
    """Unique prompts with the numbers 0 to len - 1, in memory or on disk. Several threads may read at the same time."""

    @property
    def fingerprint(self) -> str:
        """A hash of all prompts in their order."""

    @property
    def dropped(self) -> dict[str, int]:
        """The number of texts that were dropped when the prompts were read, by reason."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[str]:
        """Returns the prompts of these numbers, in this order.

        Raises:
            IndexError: a number is out of range.
            OSError: the disk cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts in memory, in the order of their file: a `PromptSource`."""

    prompts: list[str]
    dropped: dict[str, int]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.prompts)

    def read(self, indices: Sequence[int]) -> list[str]:
        """Returns the prompts of these numbers, in this order."""
        return [self.prompts[i] for i in indices]


def load_prompts(path: PathLike, field: str | None = None) -> Prompts:
    """Reads all prompts of one file into memory. Arguments and errors are those of `PromptReader`."""
    reader = PromptReader([path], field)
    prompts = list(reader)
    return Prompts(prompts, reader.dropped, reader.fingerprint)


class PromptReader:
    """An iterator of unique, non-empty, NFC-normalised prompts. It reads files once and counts the texts it drops.

    It needs about 0.15 GB of memory for each million prompts, for the hashes that find repeated prompts.

    Args:
        paths: files or folders, on this disk or in a bucket. Each is one of: UTF-8 text with a prompt a line; JSON
            lines (.jsonl, .json, .ndjson); a folder that tensorflow-datasets prepared (array_record or tfrecord),
            such as coco_captions. See `dataset_folder.open_builder` for the ones that are read.
        field: the path to the prompt, or to a list of prompts, with dots: "Task2.Caption" for JourneyDB,
            "captions.text" for coco_captions. None for text files. In JSON lines, upper and lower case and a colon at
            the end of a name do not matter, since JourneyDB has `Caption`, `Caption:` and `caption`. Rows without the
            field are dropped and counted.
        split: the split of a folder of tensorflow-datasets.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a line is not UTF-8, is not a JSON object, or its prompt is not text: the error names file and
            line. Or a file has no prompt, or `field` or `split` is missing or wrong: the error names the file.
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
        """The number of texts that were dropped until now, by reason."""
        return dict(self._dropped)

    @property
    def fingerprint(self) -> str:
        """A hash of all prompts that were read until now, in their order."""
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
        """Yields every text of one file or folder after its place, such as `prompts.txt:3`."""
        rows: Iterator[tuple[str, str | dict[str, Any]]]
        rows = _dataset_rows(path, str(self._field), self._split) if path.is_dir() else _lines(path)
        for where, row in rows:
            if isinstance(row, str):
                yield where, row
                continue
            found = _field(row, str(self._field))
            texts = found if isinstance(found, list) else [] if found is None else [found]
            if not texts:
                self._dropped[WITHOUT_FIELD] += 1
            for text in texts:
                if not isinstance(text, str):
                    expected = f"expected text or a list of texts in {self._field!r}"
                    raise ValueError(f"{where}: {expected}, got {type(text).__name__}")
                yield where, text


def _is_json_lines(path: epath.Path) -> bool:
    return path.suffix.lower() in JSON_LINES


def _lines(path: epath.Path) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """Yields the rows of a file after their places. A row is text, or an object of JSON lines."""
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


def _dataset_rows(folder: epath.Path, field: str, split: str) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """Yields the rows of a folder of tensorflow-datasets after their places, with only `field` in them, as text."""
    if not (folder / DATASET_INFO).is_file():
        raise ValueError(f"{folder}: no {DATASET_INFO} in it, expected a folder that tensorflow-datasets prepared")
    builder = open_builder(folder)
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
    """Yields the serialised rows of a folder of tensorflow-datasets in their order. Needs no TensorFlow."""
    file_format = builder.info.file_format.value
    if file_format == "array_record":
        records = builder.as_data_source(split=split).data_source
        for start in range(0, len(records), READ_AHEAD):
            yield from records.__getitems__(range(start, min(start + READ_AHEAD, len(records))))
    elif file_format == "tfrecord":  # the default format of tensorflow-datasets
        for path in builder.info.splits[split].filepaths:
            with path.open("rb") as file:
                while header := file.read(12):  # length, checksum
                    length = struct.unpack("<Q4x", header)[0] if len(header) == 12 else 0
                    body = file.read(length + 4)  # record, checksum
                    if not length or len(body) != length + 4:
                        raise ValueError(f"{path}: not a whole tfrecord file")
                    yield body[:-4]
    else:
        raise ValueError(f"{folder}: expected the file_format 'array_record' or 'tfrecord', got {file_format!r}")


def _only(feature: Any, names: list[str]) -> Any:
    """Returns a feature of tensorflow-datasets with only one field: decoding others, such as images, needs TensorFlow.

    Raises:
        KeyError: there is no such field.
    """
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Sequence):
        return tfds.features.Sequence(_only(feature.feature, names))
    if not names:
        return feature
    if not isinstance(feature, tfds.features.FeaturesDict) or names[0] not in feature:
        raise KeyError(names[0])
    return tfds.features.FeaturesDict({names[0]: _only(feature[names[0]], names[1:])})


def _plain_values(value: Any, where: str) -> Any:
    """Converts a value of tensorflow-datasets: arrays become lists, bytes become text."""
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
    """Returns the value at a path with dots, or None if there is none."""
    return _value_at(row, field.split("."))


def _value_at(value: Any, names: list[str]) -> Any:
    """Returns the value below nested names, or None. If a list is on the way, returns a list of its items' values.

    A name with the same spelling is preferred to one with another spelling, unless its value is empty.
    """
    if not names:
        return value
    if isinstance(value, list):
        values: list[Any] = []
        for item in value:
            found = _value_at(item, names)
            values += found if isinstance(found, list) else [found]
        return [found for found in values if found is not None]
    if not isinstance(value, dict):
        return None
    spellings = sorted((key for key in value if _spelling(key) == _spelling(names[0])), key=lambda key: key != names[0])
    candidates = [_value_at(value[key], names[1:]) for key in spellings]
    candidates = [candidate for candidate in candidates if candidate is not None]
    for candidate in candidates:
        if candidate:
            return candidate
    return candidates[0] if candidates else None


def _spelling(name: str) -> str:
    """Returns a name without the differences that do not matter: case, spaces and a colon at its end."""
    return name.strip().removesuffix(":").strip().casefold()


def _encode(prompt: str, where: str) -> bytes:
    try:
        return prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON allows half of a surrogate pair
        lone = ord(prompt[error.start])
        raise ValueError(f"{where}: expected Unicode text, got the lone surrogate U+{lone:04X}") from error


def describe(dropped: dict[str, int]) -> str:
    """Returns the numbers of dropped texts for a message, such as ", 3 left out: empty"."""
    return "".join(f", {count:,} left out: {reason}" for reason, count in dropped.items())
