"""Switches JAX's persistent compilation cache on or off: compiled programs on disk, for the next run of a command."""

import os
import sys
import tempfile
from pathlib import Path

import jax

from tiue_jax.files import user_cache

MAX_BYTES = 4 * 2**30  # of the folder; JAX removes the programs that were not used for the longest time


def disable() -> None:
    """Switches the cache off, whatever the user's environment says: no compiled program is read or written."""
    jax.config.update("jax_enable_compilation_cache", False)


def enable() -> Path | None:
    """Switches the cache on, for commands: in `$XDG_CACHE_HOME/tiue_jax/xla`, by default ~/.cache/tiue_jax/xla.

    The user's environment comes first: JAX_COMPILATION_CACHE_DIR is the folder if it is set, and
    JAX_ENABLE_COMPILATION_CACHE=false leaves the cache off. If the folder cannot be written, a warning of one line goes
    to stderr, and the cache stays off.

    Returns:
        The folder that is used from now on. None if the cache is off.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    if chosen := jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return Path(chosen)
    try:
        folder = user_cache() / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        print(f"warning: compiled programs are not kept: {error.filename}: {error.strerror}", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    return folder
