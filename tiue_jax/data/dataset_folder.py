"""Opens and reads folders that tensorflow-datasets prepared, without running code that they name."""

import contextlib
import itertools
import json
import os
import struct
from collections.abc import Callable, Iterator
from typing import IO, Any

from etils import epath

from tiue_jax import files
from tiue_jax.data.fields import Value, usual_field
from tiue_jax.data.shards import naming_damaged_file

DATASET_INFO = "dataset_info.json"  # the file that identifies a folder of tensorflow-datasets
METADATA = "metadata.json"  # what the program that made the folder wrote about it
FEATURES = "features.json"  # names the Python class of every feature
READ_AHEAD = 256  # rows
REMEDY = "copy the data set from its source again"
_HUGGING_FACE = "state.json"
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # the last one in files of old versions


def open_builder(folder: epath.Path) -> Any:
    """Opens a folder that tensorflow-datasets prepared, as a builder of tensorflow-datasets.

    tensorflow-datasets imports the Python module of every class that `features.json` names, so that a data set could
    run any code. Therefore the names are read first. Only the feature classes of tensorflow-datasets itself are
    accepted.

    Raises:
        ValueError: `features.json` or `dataset_info.json` is missing or damaged, or names another class.
    """
    import tensorflow_datasets as tfds  # takes a second

    path = folder / FEATURES
    if not path.is_file():
        raise ValueError(f"{folder}: no {FEATURES} in it, expected a folder that tensorflow-datasets prepared")
    allowed = _feature_classes(tfds.features)
    for name in _class_names(files.read_json(path)):
        if name not in allowed:
            raise ValueError(
                f"{path}: names the class {name[:200]!r}: only the features of tensorflow_datasets are read, "
                "since another class would run code"
            )
    for name in (DATASET_INFO, METADATA):
        if (folder / name).is_file():
            files.read_json(folder / name)  # for its errors, which have one line
    try:
        return tfds.builder_from_directory(os.fspath(folder))
    except Exception as error:  # KeyError, TypeError, ParseError and others, by the field that is wrong
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise ValueError(f"{folder}: tensorflow-datasets cannot read it: {reason}") from error


def _feature_classes(features: Any) -> set[str]:
    """Returns the full names of the feature classes of tensorflow-datasets, with the names they had before."""
    names: set[str] = set()
    for feature in vars(features).values():
        if isinstance(feature, type) and issubclass(feature, features.FeatureConnector):
            names |= {f"{feature.__module__}.{feature.__name__}", *getattr(feature, "ALIASES", ())}
    return names


def _class_names(value: Any) -> Iterator[str]:
    """Yields every text in a value of JSON that tensorflow-datasets may take for the name of a class.

    A text may itself be JSON, as in the fields `content` and `json`, and tensorflow-datasets reads it as such.
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            inner = json.loads(value)
            if not isinstance(inner, str):
                yield from _class_names(inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in _CLASS_KEYS and isinstance(inner, str):
                yield inner
            yield from _class_names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _class_names(inner)


def is_dataset_folder(folder: epath.Path) -> bool:
    """Returns True for a folder of tensorflow-datasets. The datasets library writes a file of the same name, too."""
    return (folder / FEATURES).is_file() or (
        (folder / DATASET_INFO).is_file() and not (folder / _HUGGING_FACE).is_file()
    )


def rows(folder: epath.Path, field: str | None, split: str) -> Iterator[tuple[object, Value]]:
    """Yields the rows of a folder of tensorflow-datasets after their numbers from 0, with only `field` in them.

    Raises:
        ValueError: as `open_builder`, or there is no such field or split, or a file is damaged.
    """
    builder = open_builder(folder)
    _check_split(builder, split, folder)
    if field is None:
        field = usual_field(dict.fromkeys(builder.info.features, ""))
    try:
        features = _only(builder.info.features, field.split("."))
    except KeyError as error:
        described = " ".join(str(builder.info.features).split())
        raise ValueError(f"{folder}: expected a field of {described}, got {field!r}") from error
    for number, row in enumerate(_deserialized(builder, split, folder, features)):
        yield number, _plain_values(row)


def images(folder: epath.Path, split: str) -> tuple[int, Callable[[], Iterator[bytes]]]:
    """Finds the images of a split of a folder of tensorflow-datasets.

    Returns:
        Their number, and a function that yields the file of each image (PNG or JPEG), as it was stored.

    Raises:
        ValueError: as `open_builder`, or there is no such split, or not one feature of images. The iterator raises it
            for a damaged file.
    """
    import tensorflow_datasets as tfds

    builder = open_builder(folder)
    _check_split(builder, split, folder)
    features = builder.info.features
    fields = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
    if len(fields) != 1:
        described = " ".join(str(features).split())[:300]
        raise ValueError(f"{folder}: expected one feature of images, got {len(fields)} in {described}")
    only, encoded = _only(features, fields), {fields[0]: tfds.decode.SkipDecoding()}

    def files_of_images() -> Iterator[bytes]:
        for row in _deserialized(builder, split, folder, only, decoders=encoded):
            yield row[fields[0]]

    return builder.info.splits[split].num_examples, files_of_images


def _check_split(builder: Any, split: str, folder: epath.Path) -> None:
    """Raises ValueError unless a data set has a split of this name."""
    if split not in builder.info.splits:
        raise ValueError(f"{folder}: expected one of the splits {sorted(builder.info.splits)}, got {split!r}")


def _deserialized(builder: Any, split: str, folder: epath.Path, features: Any, **how: Any) -> Iterator[Any]:
    """Yields the rows of a split, read by `features`. ValueError naming the file of a row that cannot be read."""
    for number, (path, record) in enumerate(_records(builder, split, folder)):
        try:
            row = features.deserialize_example_np(record, **how)
        except Exception as error:  # DecodeError, KeyError, TypeError and others, by what is wrong in the row
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            what = f"row {number} of {split!r}"
            raise ValueError(f"{path}: damaged, {what} cannot be read: {reason}; {REMEDY}") from error
        yield row


def _records(builder: Any, split: str, folder: epath.Path) -> Iterator[tuple[epath.Path, bytes]]:
    """Yields the serialised rows of a folder of tensorflow-datasets in their order, each after its file's path.

    It needs no TensorFlow. It finds damage in an array_record file by the checksums in it. Those of the rows in a
    tfrecord file are not compared: without TensorFlow that would take a second for 3 MB.

    Raises:
        ValueError: another file format, or a file is damaged.
    """
    file_format = builder.info.file_format.value
    paths, lengths = builder.info.splits[split].filepaths, builder.info.splits[split].shard_lengths
    if file_format == "array_record":
        ends = list(itertools.accumulate(lengths))
        shards = {path: range(end - length, end) for path, length, end in zip(paths, lengths, ends, strict=True)}
        records = builder.as_data_source(split=split).data_source
        for path, numbers in shards.items():
            for start in range(numbers.start, numbers.stop, READ_AHEAD):
                some = range(start, min(start + READ_AHEAD, numbers.stop))
                with naming_damaged_file(shards, some, folder, REMEDY):
                    found = records.__getitems__(some)
                yield from ((path, record) for record in found)
    elif file_format == "tfrecord":  # the default format of tensorflow-datasets
        for path in paths:
            with path.open("rb") as file:
                while header := file.read(12):  # length, checksum
                    yield path, _tfrecord(path, file, header)
    else:
        raise ValueError(f"{folder}: expected the file_format 'array_record' or 'tfrecord', got {file_format!r}")


def _tfrecord(path: epath.Path, file: IO[bytes], header: bytes) -> bytes:
    """Reads the row after `header`. Its length has a checksum: of a wrong one, this would read gigabytes.

    Raises:
        ValueError: the file ends before, or the length is damaged.
    """
    from tensorboardX.record_writer import masked_crc32c  # it imports torch, where that is installed

    if len(header) == 12:
        length, checksum = struct.unpack("<QI", header)
        if checksum != masked_crc32c(header[:8]):
            raise ValueError(f"{path}: damaged, the length of a row has another checksum; {REMEDY}")
        body = file.read(length + 4)  # row, checksum
        if len(body) == length + 4:
            return body[:-4]
    raise ValueError(f"{path}: not a whole tfrecord file; {REMEDY}")


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


def _plain_values(value: Any) -> Any:
    """Converts a value of tensorflow-datasets: arrays become lists, bytes become text."""
    if isinstance(value, dict):
        return {name: _plain_values(inner) for name, inner in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain_values(inner) for inner in value] if isinstance(value, list) else value
