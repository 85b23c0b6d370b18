"""Files that appear whole or not at all, and JSON and text read with errors that name the file."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def writing_aside(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block succeeds and removed when it fails.

    An OSError of the operating system comes out naming `path`, not the temporary name.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror and error.filename in (None, str(aside)):
            raise type(error)(error.errno, f"cannot write: {error.strerror}", str(path)) from error
        raise


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a file. ValueError naming file and byte where it is something else; OSError as open()."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path}: expected UTF-8 text, got byte {byte:#04x} at offset {error.start}") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError naming the file where it is not JSON or not an object."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: str | Path, value: dict[str, Any]) -> None:
    """Writes an object as indented JSON, aside and then renamed."""
    with writing_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
