"""Rows of a data set on the Hugging Face hub, with the `datasets` library, which is an extra."""

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from typing import Any

from tiue_jax.data.fields import Value, listed, named_column, usual_field

_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?", re.ASCII)
INSTALL = "pip install 'tiue-jax[datasets]'"


def is_name(text: str) -> bool:
    """Returns True if a text has the form of a data set's name on the hub: owner/name, or owner/name:config."""
    return _NAME.fullmatch(text) is not None and not text.startswith((".", "~"))


def check_installed(name: str) -> None:
    """Raises FileNotFoundError if the library is not installed: a name may also be a file that is missing."""
    if importlib.util.find_spec("datasets") is None:
        raise FileNotFoundError(
            f"no prompt file at {name}; if it is the name of a data set on the Hugging Face hub: {INSTALL}"
        )


def rows(name: str, field: str | None, split: str) -> Iterator[tuple[object, Value]]:
    """Yields {column: value} of every row of a data set after its number, from 1. Rows are streamed.

    Raises:
        ValueError: the library cannot read the data set, or there is no such column.
    """
    import datasets

    parts = _NAME.fullmatch(name)
    assert parts is not None, name
    with _errors_named(name):
        found: Any = datasets.load_dataset(parts["repository"], parts["config"], split=split, streaming=True)
        first: dict[str, Any] = next(iter(found), {})
    column = named_column(list(first), usual_field(first) if field is None else field)
    if column is None:
        raise ValueError(f"{name}: no field {field!r}; {listed(first)}")
    with _errors_named(name):
        yield from enumerate(found.select_columns([column]), start=1)


@contextlib.contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """Turns the errors of the library, and those of its connection, into a ValueError that names the data set."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name}: cannot be read from the Hugging Face hub: {error}") from error
