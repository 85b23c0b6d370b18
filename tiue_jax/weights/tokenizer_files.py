"""Reads the files of a tokenizer, to copy them into a folder that may be published."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from tiue_jax.files import user_cache
from tiue_jax.weights.layout import TOKENIZER_FILES

MAX_BYTES = 50 * 2**20  # of one file; the largest of Stable Diffusion's tokenizers has 4 MB


def read(folder: str | Path) -> dict[str, bytes]:
    """Reads the files of a tokenizer by name, and no others.

    A model folder may come from anybody, and a link in it may lead to a private file. Therefore only files with one of
    the names in TOKENIZER_FILES are read. Each must be a regular file of at most MAX_BYTES. A link is followed if the
    file that it leads to lies in one of these folders:

    - the tokenizer's folder, or the model's folder around it;
    - `blobs`, in which the hub's cache keeps the content of that model;
    - the cache of the hub or of this package.

    The folder of the tokenizer may itself be a link, as in the folders that `hub.resolve` puts together.

    Args:
        folder: of the tokenizer.

    Raises:
        ValueError: names a file that is too large, is no regular file, or is a link out of these folders.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    here = folder.resolve()
    allowed = [here, here.parent, *_caches()]
    if here.parents[1:2] and here.parents[1].name == "snapshots":  # <repository>/snapshots/<commit>/tokenizer
        allowed.append(here.parents[2] / "blobs")
    return {name: _read(folder / name, allowed) for name in TOKENIZER_FILES if os.path.lexists(folder / name)}


def _read(path: Path, allowed: Sequence[Path]) -> bytes:
    """Reads one file. Errors as `read`."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: Python 3.11 and 3.12, for a link to itself
        raise ValueError(f"{path}: a link to nowhere, expected a file of a tokenizer") from error
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise ValueError(
            f"{path}: a link to {target}, outside of the model's folder and the caches, so not copied: "
            "put the file itself there if it is the tokenizer's"
        )
    if not target.is_file():
        raise ValueError(f"{path}: expected a regular file")
    with target.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: expected a tokenizer's file of at most {MAX_BYTES >> 20} MB, got a larger one")
    return content


def _caches() -> list[Path]:
    """The caches of the hub and of this package, with links followed."""
    from huggingface_hub import constants  # here, since the import takes time

    caches = [Path(constants.HF_HUB_CACHE).resolve()]
    with contextlib.suppress(OSError):  # the user has no home folder
        caches.append(user_cache().resolve())
    return caches
