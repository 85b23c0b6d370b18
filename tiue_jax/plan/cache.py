"""Results of compilations, kept in the user's cache folder under a hash of everything they depend on."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiue_jax.files import read_json, user_cache, write_json

PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Returns the folder of the results: `$XDG_CACHE_HOME/tiue_jax/plan`, or `~/.cache/tiue_jax/plan` by default."""
    return user_cache() / "plan"


def key(inputs: Mapping[str, Any]) -> str:
    """Returns a hash of `inputs`, which are values that JSON can hold, and of the sources of this package."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"\0{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def load(name: str) -> dict[str, Any] | None:
    """Returns the result that `save` wrote under a key, or None if there is no such file or it cannot be read."""
    try:
        return read_json(folder() / f"{name}.json")
    except (OSError, ValueError):
        return None


def save(name: str, result: Mapping[str, Any]) -> None:
    """Writes a result under a key. OSError if the folder cannot be written."""
    folder().mkdir(parents=True, exist_ok=True)
    write_json(folder() / f"{name}.json", dict(result))
