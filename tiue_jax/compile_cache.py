"""XLA's compiled programs kept on disk from one run to the next: jax's persistent compilation cache, switched on."""

import os
import sys
import tempfile
from pathlib import Path

import jax

from tiue_jax.files import user_cache

MAX_BYTES = 4 * 2**30  # of the folder, from which jax removes what was not used for longest


def disable() -> None:
    """Neither reads nor keeps compiled programs, whatever the user's environment says."""
    jax.config.update("jax_enable_compilation_cache", False)


def enable() -> Path | None:
    """Keeps compiled programs in `$XDG_CACHE_HOME/tiue_jax/xla`, ~/.cache/tiue_jax/xla by default. For command lines.

    Where the user has told jax what to do, by JAX_COMPILATION_CACHE_DIR or JAX_ENABLE_COMPILATION_CACHE=false, that is
    left alone. A folder that cannot be written costs one line on stderr, and the time to compile.

    Returns:
        The folder that is in use from now on, None where there is none.
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
