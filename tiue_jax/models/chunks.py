"""Some rows or tokens at a time: of what is computed on the way, a chunk's share is all that there ever is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def known(n: Any) -> int:
    """A number of rows, or 1 where it is a variable: an exported program's batch."""
    return n if isinstance(n, int) else 1


def divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`, or 1."""
    return next(size for size in range(max(min(n, limit), 1), 0, -1) if n % size == 0)


def size(n: int, limit: int) -> int:
    """How many of n make a chunk: at most `limit`, and 1 where that is 0.

    A divisor of n, unless the largest is less than half of what could be, as of a prime number; then chunks of one size
    that n nearly fills, see `pad`.
    """
    limit = max(limit, 1)
    whole = divisor(n, limit)
    return whole if 2 * whole > min(n, limit) else -(-n // -(-n // limit))


def pad(x: jax.Array, axis: int, chunk: int) -> jax.Array:
    """x with zeros at the end of an axis, so that whole chunks fill it."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = 0, -x.shape[axis] % chunk
    return jnp.pad(x, widths) if widths[axis][1] else x


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


def by_tokens(function: Callable[[jax.Array], jax.Array], x: jax.Array, tokens: int) -> jax.Array:
    """`function`, [b tokens c] -> [b tokens d], of so many tokens of x [b l c] after the others; see `size`."""
    b, length, c = x.shape
    if tokens == length:
        return function(x)
    y = lax.map(function, pad(x, 1, tokens).reshape(b, -1, tokens, c).swapaxes(0, 1))  # [n b tokens d]
    return y.swapaxes(0, 1).reshape(b, -1, y.shape[-1])[:, :length]
