"""The rows of what has seen k timesteps: b*k on axis 0, k for each of the b rows of the batch.

Each device has its own samples at the first timestep, then the same ones at the second, and so on: with n devices
axis 0 is [n k b/n] in one. So the batch, and its sharding, stays where it is, and what is the same at every timestep is
added to whole blocks of rows. Were a sample's k rows neighbours, XLA for TPUs, which lays rows out in tiles of 8, would
first write what is added to memory k times.
"""

import jax
import jax.numpy as jnp

from tiue_jax import sharding


def repeat(x: jax.Array, rows: int) -> jax.Array:
    """The same at every timestep: [b ...] -> [rows ...]."""
    if x.shape[0] == rows:
        return x
    parts = _split(x, x.shape[0])
    n, _, m, *shape = parts.shape
    return jnp.broadcast_to(parts, (n, rows // (n * m), m, *shape)).reshape(rows, *shape)


def add(x: jax.Array, shared: jax.Array) -> jax.Array:
    """x + shared, which is the same at every timestep: [b*k ...], [b ...] -> [b*k ...]."""
    b = shared.shape[0]
    return (_split(x, b) + _split(shared, b)).reshape(x.shape)


def flatten(x: jax.Array) -> jax.Array:
    """[b k ...] -> [b*k ...]."""
    b, k, *shape = x.shape
    n = sharding.parts_of_rows(b)
    return x.reshape(n, b // n, k, *shape).swapaxes(1, 2).reshape(b * k, *shape)


def unflatten(x: jax.Array, b: int) -> jax.Array:
    """[b*k ...] -> [b k ...]."""
    return _split(x, b).swapaxes(1, 2).reshape(b, x.shape[0] // b, *x.shape[1:])


def _split(x: jax.Array, b: int) -> jax.Array:
    """[b*k ...] -> [n k b/n ...]."""
    n = sharding.parts_of_rows(b)
    return x.reshape(n, x.shape[0] // b, b // n, *x.shape[1:])
