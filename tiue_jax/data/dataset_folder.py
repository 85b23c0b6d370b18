"""Opens folders that tensorflow-datasets prepared, without running code that they name."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from tiue_jax import files

DATASET_INFO = "dataset_info.json"  # the file that identifies a folder of tensorflow-datasets
METADATA = "metadata.json"  # what the program that made the folder wrote about it
FEATURES = "features.json"  # names the Python class of every feature
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
    for path in (folder / DATASET_INFO, folder / METADATA):
        if path.exists():
            files.read_json(path)  # for its errors, which have one line
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
