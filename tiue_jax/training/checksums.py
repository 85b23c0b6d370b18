"""32-bit checksums of the contents of a checkpoint. Orbax writes none, and a flipped bit would be read as a weight."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def of_arrays(tree: Any) -> dict[str, int]:
    """A checksum of every array, by dotted path. It does not depend on the array's sharding."""
    # One array at a time. Of hundreds at once, each process might begin with another array and wait for the others.
    return {dotted(path): int(jax.device_get(_sum(x))) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def of_json(value: Mapping[str, Any]) -> int:
    """A checksum of a value that can be written as JSON. It is the same after the value was written and read."""
    return zlib.crc32(json.dumps(value).encode())


def of_json_items(items: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Checksums of the items of a checkpoint that are JSON, by the names of their files."""
    return {f"{name}/metadata": of_json(value) for name, value in items.items()}


def dotted(path: tuple[Any, ...]) -> str:
    """The path of a leaf as text: the same for a tuple, a named tuple, and orbax's record of either."""
    return ".".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


@jax.jit
def _sum(x: jax.Array) -> jax.Array:
    """The sum of a hash of each element's bits and position. The hash is one-to-one, so any single change is seen."""
    place = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
    mixed = x.view(f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32) + place * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the last steps of MurmurHash3
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
