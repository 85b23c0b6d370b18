"""Files and folders, on this disk or in a bucket (gs://): written whole or not at all, read with clear errors."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from etils import epath


def at(path: str | os.PathLike[str]) -> epath.Path:
    """A path on this disk or in a bucket. ValueError if the package that reads such buckets is not installed."""
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
def writing_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file on this disk, which becomes `path` when the block succeeds and is removed when it fails.

    `path` may lie in a bucket. An OSError of the operating system names `path`, not the temporary file.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="tiue-jax-") as folder:
            aside = Path(folder) / at(path).name
            yield aside
            copy(aside, at(path))
        return
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # of the user's umask; safetensors makes files that only their owner may read
        yield aside
        aside.chmod(mode)
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror and error.filename in (None, str(aside)):
            raise type(error)(error.errno, f"cannot write: {error.strerror}", str(path)) from error
        raise


@contextlib.contextmanager
def writing_folder_aside(
    path: str | os.PathLike[str], marker: str, own: Collection[str] = (), overwrite: bool = False
) -> Iterator[Path]:
    """A temporary folder on this disk, which becomes `path` when the block succeeds and is removed when it fails.

    With `overwrite` it replaces an older folder. Entries of the older folder that are not in `own` are kept. A bucket
    cannot rename a folder in one step: there `marker` is copied last, and a folder without it is no result.

    Args:
        path: does not exist, or is an empty folder. It may lie in a bucket.
        marker: the file that identifies an older folder. No folder without it is ever overwritten.
        own: names of the entries that the writer makes. Old entries of these names are removed.
        overwrite: `path` may also be a folder with `marker`; on this disk only.

    Raises:
        FileExistsError: `path` is something else; before the block runs.
    """
    target = check_new_folder(path, marker, overwrite)
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="tiue-jax-") as aside:
            yield Path(aside)
            files = [file for file in Path(aside).rglob("*") if file.is_file()]
            for file in sorted(files, key=lambda file: file.name == marker):
                copied = target / file.relative_to(aside).as_posix()
                copied.parent.mkdir(parents=True, exist_ok=True)
                copy(file, copied)
        return
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as aside:
        new, old = Path(aside) / "new", Path(aside) / "old"
        new.mkdir()
        yield new
        if not path.exists():
            new.rename(path)
            return
        for entry in path.iterdir():
            if entry.name in own:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, new / entry.name, symlinks=True)
            else:
                shutil.copy2(entry, new / entry.name, follow_symlinks=False)
        try:
            path.rename(old)
            new.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise


def check_new_folder(path: str | os.PathLike[str], marker: str, overwrite: bool = False) -> epath.Path:
    """The folder that `writing_folder_aside` may write, links followed. FileExistsError if it may not."""
    target = at(path) if is_remote(path) else epath.Path(expand(path).resolve())
    if target.is_dir() and any(target.iterdir()):
        if not (target / marker).exists():
            raise FileExistsError(f"{target}: not empty and no {marker} in it, expected a new folder")
        if not overwrite or is_remote(path):
            raise FileExistsError(f"{target}: exists, expected a new folder (or the option to overwrite)")
    elif target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: a file, expected a new folder")
    return target


@contextlib.contextmanager
def runtime_errors_as_os_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the RuntimeError that array_record raises, such as on a full disk, into an OSError that names `path`."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path}: cannot write: {error}") from error


def copy(source: os.PathLike[str], target: os.PathLike[str]) -> None:
    """Copies one file, from or to a bucket. If that fails, `target` is removed, so that no half file is left."""
    try:
        with epath.Path(source).open("rb") as read, epath.Path(target).open("wb") as write:
            shutil.copyfileobj(read, write, 2**24)
    except BaseException:  # in a bucket, closing has made a file of what was written so far
        with contextlib.suppress(Exception):
            epath.Path(target).unlink(missing_ok=True)
        raise


def read_text(path: str | os.PathLike[str]) -> str:
    """The UTF-8 text of a file. ValueError naming file and byte where it is something else; OSError as open()."""
    try:
        return epath.Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path}: expected UTF-8 text, got byte {byte:#04x} at offset {error.start}") from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
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


def user_cache() -> Path:
    """The folder of what can be made or downloaded again: tiue_jax in $XDG_CACHE_HOME, or in ~/.cache; not created.

    Errors as `expand`.
    """
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tiue_jax"


def expand(path: str | os.PathLike[str]) -> Path:
    """The path with ~ as the home folder. FileNotFoundError where there is none, as for some containers' users."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "no home folder for ~", os.fspath(path)) from error
