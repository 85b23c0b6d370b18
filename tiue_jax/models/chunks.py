"""Images some rows at a time: of what is computed on the way, a chunk's share is all that there ever is."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`, or 1."""
    return next(size for size in range(max(min(n, limit), 1), 0, -1) if n % size == 0)


def by_rows(function: Callable[[jax.Array], jax.Array], x: jax.Array, rows: int) -> jax.Array:
    """`function` of so many rows, with the rows before and after them, as often as it takes for all.

    x is [b h+2 w c], its first and last row padding, and `rows` a divisor of h; function: [b rows+2 w c] -> [b r w' d].
    Returns [b r*h/rows w' d].
    """
    n = (x.shape[1] - 2) // rows
    if n == 1:
        return function(x)
    some = lambda i: function(lax.dynamic_slice_in_dim(x, i * rows, rows + 2, axis=1))
    y = lax.map(some, jnp.arange(n))  # [n b r w' d]
    return y.swapaxes(0, 1).reshape(y.shape[1], n * y.shape[2], *y.shape[3:])
