"""32-bit checksums of what a checkpoint holds: orbax writes none, and a flipped bit would be read as a weight."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def of_arrays(tree: Any) -> dict[str, int]:
    """A checksum of every array, by its dotted path; the same however the array is sharded."""
    # one after the other: of hundreds at once each process might begin with another, and wait for the others' in vain
    return {dotted(path): int(jax.device_get(_sum(x))) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def of_json(value: Mapping[str, Any]) -> int:
    """A checksum of what can be written as JSON; the same after it was written and read."""
    return zlib.crc32(json.dumps(value).encode())


def dotted(path: tuple[Any, ...]) -> str:
    """The path of a leaf as text, the same for a tuple, a named tuple and orbax's record of them."""
    name = lambda part: str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))
    return ".".join(map(name, path))


@jax.jit
def _sum(x: jax.Array) -> jax.Array:
    """The sum of a hash of every element's bits and place; one-to-one for each, so that no single change is missed."""
    place = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
    mixed = x.view(f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32) + place * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the last steps of MurmurHash3
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
