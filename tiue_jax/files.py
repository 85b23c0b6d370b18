"""Files that appear whole or not at all, JSON and text read with errors that name the file, the folder for caches."""

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


@contextlib.contextmanager
def writing_aside(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block succeeds and removed when it fails.

    An OSError of the operating system comes out naming `path`, not the temporary name.
    """
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
    path: str | Path, marker: str, own: Collection[str], overwrite: bool = False
) -> Iterator[Path]:
    """A new folder beside `path`, renamed to it when the block succeeds and removed when it fails.

    With `overwrite` it takes the place of an older one, of which the entries not in `own` are copied over first.

    Args:
        path: does not exist, or is an empty folder.
        marker: the file by which an older one is known: nothing else is ever overwritten.
        own: names in the folder that are the writer's, so that none of them outlives what it belonged to.
        overwrite: `path` may also be a folder with `marker`.

    Raises:
        FileExistsError: `path` is something else; before the block runs.
    """
    path = check_new_folder(path, marker, overwrite)
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


def check_new_folder(path: str | Path, marker: str, overwrite: bool = False) -> Path:
    """The folder that `writing_folder_aside` may write, links followed. FileExistsError where it may not."""
    path = expand(path).resolve()
    if path.is_dir() and any(path.iterdir()):
        if not (path / marker).is_file():
            raise FileExistsError(f"{path}: not empty and no {marker} in it, expected a new folder")
        if not overwrite:
            raise FileExistsError(f"{path}: exists, expected a new folder (or the option to overwrite)")
    elif path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: a file, expected a new folder")
    return path


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
