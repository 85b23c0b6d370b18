"""Files and folders on this disk or in a bucket (gs://), read in place and written whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from tiue_jax import files


def at(path: str | os.PathLike[str]) -> epath.Path:
    """A path here or in a bucket. ValueError where the package that reads such buckets is not installed."""
    found = epath.Path(path).expanduser()
    try:
        found.exists()
    except (ImportError, NotImplementedError) as error:
        raise ValueError(f"{path}: cannot read such a path: {error} (pip install tiue-jax[gcs] for gs://)") from error
    return found


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in a bucket."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], marker: str) -> Iterator[Path]:
    """A folder on this disk to write in, which becomes `path` when the block succeeds and is removed when it fails.

    In a bucket, where a folder cannot be renamed in one go, `marker` is the file that is copied last: a folder without
    it is no result.

    Raises:
        FileExistsError: `path` exists and is no empty folder; before the block runs.
    """
    target = at(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: exists, expected a new folder")
    if not is_remote(target):
        with files.writing_folder_aside(os.fspath(target), marker, own=()) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="tiue-jax-") as aside:
        yield Path(aside)
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(Path(aside).iterdir(), key=lambda file: file.name == marker):
            copy(file, target / file.name)


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file on this disk to write, which becomes `path` when the block succeeds and is removed when it fails."""
    if not is_remote(path):
        with files.writing_aside(os.fspath(path)) as aside:
            yield aside
        return
    with tempfile.TemporaryDirectory(prefix="tiue-jax-") as folder:
        yield Path(folder) / at(path).name
        copy(Path(folder) / at(path).name, at(path))


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """array_record's RuntimeError, on a full disk for one, as an OSError that names what was to be written."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path}: cannot write: {error}") from error


def copy(source: os.PathLike[str], target: os.PathLike[str]) -> None:
    """Copies one file, from or to a bucket. Where that fails `target` is removed: half a file would look like one."""
    try:
        with epath.Path(source).open("rb") as read, epath.Path(target).open("wb") as write:
            shutil.copyfileobj(read, write, 2**24)
    except BaseException:  # in a bucket, closing has made a file of what was written so far
        with contextlib.suppress(Exception):
            epath.Path(target).unlink(missing_ok=True)
        raise
