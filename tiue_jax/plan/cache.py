"""Results of compilations kept on disk, in the user's cache folder, by a hash of all that went into them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiue_jax.files import user_cache, write_json

PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Where results are kept: `$XDG_CACHE_HOME/tiue_jax/plan`, below ~/.cache by default."""
    return user_cache() / "plan"


def key(inputs: Mapping[str, Any]) -> str:
    """A hash of `inputs`, plain values as JSON has them, and of this package's sources."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"\0{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def load(name: str) -> dict[str, Any] | None:
    """What `save` wrote under a key; None where there is nothing, or nothing that can be read."""
    try:
        kept = json.loads((folder() / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, dict) else None


def save(name: str, result: Mapping[str, Any]) -> None:
    """Keeps a result under a key; never half-written."""
    folder().mkdir(parents=True, exist_ok=True)
    write_json(folder() / f"{name}.json", dict(result))
