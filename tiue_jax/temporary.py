"""Temporary folders that a killed process may leave behind, and that a later one removes.

A temporary folder lies beside the file or folder that it will become. Its name is `.<name>.<16 random digits>.tmp`, so
that nobody can lay a link under that name beforehand. While its process lives, the file `lock` in it is locked. The
operating system unlocks it when the process ends, in whatever way. So a folder whose lock is free is dead, and the next
process that makes a temporary folder at the same place removes it.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".tmp"
LOCK = "lock"
REPLACED = "replaced"  # the older folder, while `replace_folder` cannot exchange it in one step
FOREIGN_AFTER = 7 * 24 * 3600.0  # seconds; some file systems do not show one host the locks of another
UNLOCKED_AFTER = 3600.0  # seconds; a process locks a new folder at once

_UNNAMED = f"{LOCK}.new"
_NAME = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp", re.DOTALL)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux
_swept: set[str] = set()  # the folders in which this process has removed what is dead


@contextlib.contextmanager
def temporary_folder(parent: str | os.PathLike[str], name: str) -> Iterator[Path]:
    """Yields a new folder in `parent`, which only this user can enter. It is removed at the end.

    The first call for a `parent` also removes what killed processes of this program left there.

    Args:
        parent: an existing folder on this disk.
        name: what the folder is for; a part of its name.

    Raises:
        OSError: the folder cannot be made.
    """
    parent = Path(parent)
    if (place := os.path.abspath(parent)) not in _swept:
        _swept.add(place)
        remove_dead(parent)
    folder = parent / f".{name}.{secrets.token_hex(8)}{SUFFIX}"
    folder.mkdir(mode=0o700)  # FileExistsError for a link of this name
    descriptor = _lock(folder)
    try:
        yield folder
    finally:
        _remove(folder)
        if descriptor is not None:
            os.close(descriptor)


def is_temporary(path: str | os.PathLike[str]) -> bool:
    """Returns True if a path lies in a temporary folder."""
    return any(_NAME.fullmatch(part) for part in Path(path).parts)


def remove_dead(parent: Path) -> None:
    """Removes the temporary folders in `parent` whose processes have ended. Does nothing about those that it cannot.

    A folder is left alone if its process lives, if another user owns it, or if nothing shows that this program made it.
    """
    with contextlib.suppress(OSError):
        for folder in [Path(entry) for entry in os.scandir(parent) if _NAME.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                _remove_if_dead(folder)


def replace_folder(path: Path, new: Path, temporary: Path) -> None:
    """Puts the folder `new` in the place of the folder `path`, whose older content is in `temporary` afterwards.

    On Linux the two names are exchanged in one step, so that a process which is killed leaves the older folder or the
    new one. Other systems, and file systems that cannot exchange, need two steps. If the process is killed between
    them, the older folder is in `temporary`, and `remove_dead` puts it back.

    Raises:
        OSError: the folder could not be replaced. The older one is under its name.
    """
    if _exchange(path, new):
        return
    old = temporary / REPLACED
    try:
        path.rename(old)
        new.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step. Returns False where the system or the file system cannot.

    Raises:
        OSError: the names cannot be exchanged for another reason.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _lock(folder: Path) -> int | None:
    """Makes the locked file of a new folder. Returns its descriptor; None on a file system that has no locks.

    The file gets its name after it is locked, so that nobody finds it unlocked.
    """
    unnamed = folder / _UNNAMED
    descriptor = None
    try:
        descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, socket.gethostname().encode())
        unnamed.rename(folder / LOCK)
    except OSError:
        with contextlib.suppress(OSError):
            unnamed.unlink()
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _remove_if_dead(folder: Path) -> None:
    """Removes a temporary folder if its process has ended. OSError if it cannot be removed, or lives."""
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
        return
    age = time.time() - about.st_mtime
    if age > UNLOCKED_AFTER and {path.name for path in folder.iterdir()} <= {_UNNAMED}:
        _remove(folder)  # its process was killed before it had the lock
        return
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its process lives
        here = os.read(descriptor, 256) == socket.gethostname().encode()
        if not here and age < FOREIGN_AFTER:
            return
        original = _NAME.fullmatch(folder.name)
        if original and (folder / REPLACED).is_dir() and not (folder.parent / original[1]).exists():
            (folder / REPLACED).rename(folder.parent / original[1])
        _remove(folder)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Removes a temporary folder, the lock last, so that a process which is killed meanwhile leaves a dead folder."""
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != LOCK:
                entry.unlink()
    shutil.rmtree(folder, ignore_errors=True)
