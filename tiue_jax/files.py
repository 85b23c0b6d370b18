"""Files and folders on this disk or in a bucket (gs://), written completely or not at all, and read with clear errors.

`writing_aside` writes one file. `writing_folder_aside` writes a folder.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from tiue_jax.temporary import replace_folder, temporary_folder

MAX_JSON = 2**28  # bytes of a JSON file; the largest ones of known models are some MB
_COPIED_AT_ONCE = 2**24  # bytes


def at(path: str | os.PathLike[str]) -> epath.Path:
    """Returns a path on this disk or in a bucket, with ~ as the home folder.

    Raises:
        ValueError: the path is empty; or it is in a bucket of an unknown kind, or the package that reads such buckets
            is not installed.
        OSError: the path goes through a link to itself.
    """
    _check_not_empty(path)
    try:
        found = epath.Path(path).expanduser()
    except KeyError as error:
        raise ValueError(f"{path}: unknown kind of path {error}, expected a path on this disk or gs://") from error
    try:
        if not is_remote(path):
            resolve(found)
        found.exists()  # etils imports the bucket's package only when a path is used
    except (ImportError, NotImplementedError) as error:
        raise ValueError(f"{path}: cannot read such a path: {error} (pip install tiue-jax[gcs] for gs://)") from error
    return found


def resolve(path: str | os.PathLike[str]) -> Path:
    """Returns an absolute path on this disk with all links followed. It need not exist.

    Raises:
        OSError: a link leads to itself.
    """
    try:
        return expand(path).resolve()
    except RuntimeError as error:  # from Python 3.13 on an OSError
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path)) from error


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns True if a path is in a bucket."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def writing_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary file on this disk. It becomes `path` when the block succeeds and is removed when it fails.

    The temporary file lies in a folder with a random name beside `path`. If the process is killed, that folder stays,
    and the next process that writes there removes it (see temporary.py).

    Args:
        path: the file to write or to replace, on this disk or in a bucket. Its folder exists.

    Raises:
        OSError: the file cannot be written. The error names `path`, not the temporary file.
    """
    if is_remote(path):
        target = at(path)
        with temporary_folder(tempfile.gettempdir(), "tiue-jax") as folder:
            aside = folder / target.name
            yield aside
            copy(aside, target)
        return
    path = Path(path)
    try:
        with temporary_folder(path.parent, path.name) as folder:
            aside = folder / path.name
            mode = _create(aside)  # follows the user's umask; safetensors replaces it by a private mode
            yield aside
            aside.chmod(mode)
            os.replace(aside, path)
    except OSError as error:
        own = error.filename is None or str(error.filename).startswith(str(path.with_name(f".{path.name}.")))
        if error.strerror and own:
            raise type(error)(error.errno, f"cannot write: {error.strerror}", str(path)) from error
        raise


def _create(path: Path) -> int:
    """Creates an empty file and returns its mode. FileExistsError if there is anything of this name, such as a link."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing_folder_aside(
    path: str | os.PathLike[str],
    marker: str,
    own: Collection[str] = (),
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> Iterator[Path]:
    """Yields a temporary folder on this disk. It becomes `path` when the block succeeds and is removed when it fails.

    With `overwrite` it replaces an older folder. Entries of the older folder that are not in `own` are kept.
    A bucket cannot rename a folder in one step. Therefore `marker` is copied last there: a folder in a bucket without
    it is not complete.

    Args:
        path: a new or empty folder, on this disk or in a bucket.
        marker: the name of the file that identifies an older folder. A folder without it is never overwritten.
        own: names of the entries that the block writes. Older entries of these names are removed.
        overwrite: allows `path` to be a folder on this disk that has `marker`.
        inputs: files and folders that the block reads. None of them may lie in the older folder.

    Raises:
        FileExistsError: `path` is something else, or holds an input. The block does not run then.
        OSError: the folder cannot be written.
    """
    target = check_new_folder(path, marker, overwrite, inputs)
    if is_remote(path):
        with temporary_folder(tempfile.gettempdir(), "tiue-jax") as folder:
            aside = folder / "new"
            aside.mkdir()
            yield aside
            written = [file for file in aside.rglob("*") if file.is_file()]
            for file in sorted(written, key=lambda file: file.name == marker):
                copied = target / file.relative_to(aside).as_posix()
                copied.parent.mkdir(parents=True, exist_ok=True)
                copy(file, copied)
        return
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path.parent, path.name) as folder:
        new = folder / "new"
        new.mkdir()
        yield new
        if path.exists():
            _copy_entries(path, new, own)
            replace_folder(path, new, folder)
        else:
            new.rename(path)


def _copy_entries(source: Path, target: Path, own: Collection[str]) -> None:
    """Copies the entries of a folder that are not in `own`."""
    for entry in source.iterdir():
        if entry.name in own:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, target / entry.name, follow_symlinks=False)


def check_new_folder(
    path: str | os.PathLike[str],
    marker: str,
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> epath.Path:
    """Returns the folder that `writing_folder_aside` would write, with symbolic links followed.

    A command calls it before long work. Arguments are those of `writing_folder_aside`.

    Raises:
        FileExistsError: the folder must not be written: it is a file, or holds other files, or exists without
            `overwrite`, or holds one of `inputs`.
    """
    target = at(path) if is_remote(path) else epath.Path(resolve(path))
    if target.is_dir() and any(target.iterdir()):
        if not (target / marker).exists():
            raise FileExistsError(f"{target}: not empty and no {marker} in it, expected a new folder")
        if not overwrite or is_remote(path):
            raise FileExistsError(f"{target}: exists, expected a new folder (or the option to overwrite)")
        for name in inputs:
            if found := _held(Path(target), name):
                raise FileExistsError(f"{target}: holds the input {found}, expected another folder to write")
    elif target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: a file, expected a new folder")
    return target


def _held(folder: Path, path: str | os.PathLike[str]) -> Path | None:
    """Returns `path`, or a link in the folder `path`, if it lies in another folder with all links followed."""
    if is_remote(path):
        return None
    path = expand(path)
    links = [entry for entry in path.iterdir() if entry.is_symlink()] if path.is_dir() else []
    for candidate in (path, *links):
        if candidate.exists() and candidate.resolve().is_relative_to(folder):
            return candidate
    return None


@contextlib.contextmanager
def runtime_errors_as_os_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the RuntimeError that array_record raises, such as on a full disk, into an OSError that names `path`."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path}: cannot write: {error}") from error


def copy(source: os.PathLike[str], target: os.PathLike[str]) -> None:
    """Copies one file from or to a bucket. If that fails, `target` is removed."""
    try:
        with epath.Path(source).open("rb") as read, epath.Path(target).open("wb") as write:
            shutil.copyfileobj(read, write, _COPIED_AT_ONCE)
    except BaseException:  # closing has made a file in the bucket of the bytes that were written until then
        with contextlib.suppress(Exception):
            epath.Path(target).unlink(missing_ok=True)
        raise


def check_readable(path: str | os.PathLike[str]) -> None:
    """Checks that a path is a regular file or a folder, so that reading it ends.

    A pipe gives nothing until another program writes to it, and a device such as /dev/zero never ends.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: it is a pipe, a device, or a socket.
        OSError: the path cannot be looked at.
    """
    if is_remote(path):
        return
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kinds = {"a pipe": stat.S_ISFIFO, "a device": stat.S_ISCHR, "a block device": stat.S_ISBLK}
        kind = next((name for name, is_kind in kinds.items() if is_kind(mode)), "a special file")
        raise ValueError(f"{path}: expected a regular file, got {kind}: write its content to a file first")


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads a UTF-8 text file, with or without a byte order mark.

    Raises:
        ValueError: the file is not UTF-8, or is no regular file. The error names the byte and its offset.
        OSError: as open().
    """
    check_readable(path)
    try:
        return epath.Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path}: expected UTF-8 text, got byte {byte:#04x} at offset {error.start}") from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
        ValueError: the file is not UTF-8, is larger than MAX_JSON, is not valid JSON, or holds something other than an
            object.
        OSError: as open().
    """
    check_readable(path)
    if (size := epath.Path(path).stat().length) > MAX_JSON:
        raise ValueError(f"{path}: expected JSON of at most {MAX_JSON >> 20} MB, got {size >> 20} MB")
    return parse_json(read_text(path), str(path))


def parse_json(text: str, source: str) -> dict[str, Any]:
    """Reads the object in a JSON text.

    Args:
        text: the JSON.
        source: begins the error, such as the name of the file.

    Raises:
        ValueError: the text is not valid JSON, or holds something other than an object.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{source}: not valid JSON: too many levels of brackets") from error
    except ValueError as error:  # an integer of too many digits is a plain ValueError
        raise ValueError(f"{source}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: str | os.PathLike[str], value: dict[str, Any]) -> None:
    """Writes an object as indented JSON with `writing_aside`."""
    with writing_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def user_cache() -> Path:
    """Returns the folder of files that can be made or downloaded again. It may not exist yet.

    It is `tiue_jax` in $XDG_CACHE_HOME, or in ~/.cache by default.

    Raises:
        FileNotFoundError: as `expand`.
    """
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tiue_jax"


def expand(path: str | os.PathLike[str]) -> Path:
    """Returns a path on this disk with ~ as the home folder.

    Raises:
        ValueError: the path is empty, as from a variable of a shell that is not set.
        FileNotFoundError: the user has no home folder, as in some containers.
    """
    _check_not_empty(path)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "no home folder for ~", os.fspath(path)) from error


def _check_not_empty(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for "", which would stand for the current folder."""
    if not os.fspath(path):
        raise ValueError("expected the path of a file or folder, got '' (. is the current folder)")
