"""Switches JAX's persistent compilation cache on or off: compiled programs on disk, for the next run of a command.

A compiled program is native code, and JAX runs what it finds in the folder. Therefore the folder must belong to the
user, and nobody else may read or write it.
"""

import glob
import os
import re
import stat
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TextIO

import jax

from tiue_jax.files import user_cache

_UNREADABLE = re.compile("Error reading persistent compilation cache entry for '([^']+)'")
MAX_BYTES = 4 * 2**30  # of the folder; JAX removes the programs that were not used for the longest time


def disable() -> None:
    """Switches the cache off, whatever the user's environment says: no compiled program is read or written."""
    jax.config.update("jax_enable_compilation_cache", False)


def enable() -> Path | None:
    """Switches the cache on, for commands: in `$XDG_CACHE_HOME/tiue_jax/xla`, by default ~/.cache/tiue_jax/xla.

    The user's environment comes first: JAX_COMPILATION_CACHE_DIR is the folder if it is set, and
    JAX_ENABLE_COMPILATION_CACHE=false leaves the cache off. If the folder cannot be written, or if other users could
    write to it, a warning of one line goes to stderr, and the cache stays off.

    A damaged program in the folder is compiled again and replaced.

    Returns:
        The folder that is used from now on. None if the cache is off.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    if chosen := jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return Path(chosen)
    try:
        folder = user_cache() / "xla"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if problem := untrusted(folder):
            print(f"warning: compiled programs are not kept: {problem}", file=sys.stderr)
            return None
        with tempfile.TemporaryFile(dir=folder):
            pass
        _remove_unfinished(folder)
    except OSError as error:
        print(f"warning: compiled programs are not kept: {error.filename}: {error.strerror}", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    _replace_damaged(folder)
    return folder


def untrusted(folder: Path) -> str | None:
    """Returns the reason for which other users could put a program into a folder. None if they cannot.

    A folder of this user that others may only read, as older versions made it, is closed for them.
    """
    user = os.geteuid()
    found = folder.stat()
    for owner in (folder.lstat().st_uid, found.st_uid):  # of a link, and of the folder that it leads to
        if owner != user:
            return f"{folder}: belongs to user {owner} and not to {user}, expected your own folder"
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o022:
        return f"{folder}: others may write to it (mode {mode:04o}), expected 0700: remove it"
    if mode != 0o700:
        folder.chmod(0o700)
    return None


def _remove_unfinished(folder: Path) -> None:
    """Removes the programs that a killed process had not written to their end.

    JAX writes the file `-atime` after the file `-cache`. It keeps no more programs if that file is missing. A program
    of the last minute may still be written by another process.
    """
    if "JAX_COMPILATION_CACHE_MAX_SIZE" in os.environ:  # JAX writes no `-atime` if there is no limit
        return
    for program in folder.glob("*-cache"):
        with_time = program.with_name(f"{program.name.removesuffix('-cache')}-atime")
        if not with_time.exists() and time.time() - program.stat().st_mtime > 60:
            program.unlink(missing_ok=True)


def _replace_damaged(folder: Path) -> None:
    """Removes a program from the folder when JAX warns that it cannot be read.

    JAX compiles it again then, but it would not write over the file that is there. So the program would be compiled in
    every run. JAX has no other hook than its warning, which names the function and not the file. Programs of the same
    name for other shapes are compiled once more, too.
    """
    show = warnings.showwarning

    def remove_or_show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        found = _UNREADABLE.match(str(message))
        if found is None:
            show(message, category, filename, lineno, file, line)
            return
        for kind in ("cache", "atime"):
            for path in folder.glob(f"{glob.escape(found[1])}-*{kind}"):
                path.unlink(missing_ok=True)

    warnings.showwarning = remove_or_show
