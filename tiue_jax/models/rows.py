"""The rows of activations at k timesteps: b*k on axis 0, k rows for each of the b samples of the batch.

On n devices, axis 0 is [n k b/n] flattened: each device has its b/n samples at the first timestep, then the same
samples at the second, and so on. This order has two reasons:

- Each device keeps its samples, so the sharding of the batch does not change (sharding.parts_of_rows).
- An array that is the same at all timesteps is added to whole blocks of rows. If the k rows of a sample were adjacent,
  a TPU, whose tiles have 8 rows, would first write that array to memory k times.
"""

import jax
import jax.numpy as jnp

from tiue_jax import sharding


def repeat(x: jax.Array, rows: int) -> jax.Array:
    """Repeats an array that is the same at all timesteps: [b ...] -> [rows ...], where rows = b*k."""
    if x.shape[0] == rows:
        return x
    parts = _split(x, x.shape[0])
    n, _, m, *shape = parts.shape
    return jnp.broadcast_to(parts, (n, rows // (n * m), m, *shape)).reshape(rows, *shape)


def add(x: jax.Array, shared: jax.Array) -> jax.Array:
    """x + shared, where `shared` is the same at all timesteps: [b*k ...], [b ...] -> [b*k ...]."""
    b = shared.shape[0]
    return (_split(x, b) + _split(shared, b)).reshape(x.shape)


def flatten(x: jax.Array) -> jax.Array:
    """Puts timesteps into the rows: [b k ...] -> [b*k ...]."""
    b, k, *shape = x.shape
    n = sharding.parts_of_rows(b)
    return x.reshape(n, b // n, k, *shape).swapaxes(1, 2).reshape(b * k, *shape)


def unflatten(x: jax.Array, b: int) -> jax.Array:
    """The inverse of `flatten`: [b*k ...] -> [b k ...]."""
    return _split(x, b).swapaxes(1, 2).reshape(b, x.shape[0] // b, *x.shape[1:])


def _split(x: jax.Array, b: int) -> jax.Array:
    """[b*k ...] -> [n k b/n ...]."""
    n = sharding.parts_of_rows(b)
    return x.reshape(n, x.shape[0] // b, b // n, *x.shape[1:])
