"""Computing in chunks of rows or tokens, so that only the intermediate arrays of one chunk are in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def known(n: Any) -> int:
    """n if it is a number; 1 if it is a variable, such as the batch size of an exported program."""
    return n if isinstance(n, int) else 1


def divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`, or 1."""
    return next(size for size in range(max(min(n, limit), 1), 0, -1) if n % size == 0)


def size(n: int, limit: int) -> int:
    """The size of chunks of n rows or tokens: from 1 to `limit`.

    It is the largest divisor of n in that range if this is more than half of the largest possible size. Otherwise, for
    example if n is a prime number, n is cut into as few chunks of one size as possible, and the last is padded (`pad`).
    """
    limit = max(limit, 1)
    whole = divisor(n, limit)
    if 2 * whole > min(n, limit):
        return whole
    count = -(-n // limit)
    return -(-n // count)


def pad(x: jax.Array, axis: int, chunk: int) -> jax.Array:
    """x with zeros at the end of an axis, so that its length is a multiple of `chunk`."""
    widths = [(0, 0)] * x.ndim
    missing = -x.shape[axis] % chunk
    widths[axis] = 0, missing
    return jnp.pad(x, widths) if missing else x


def by_rows(function: Callable[[jax.Array], jax.Array], x: jax.Array, rows: int) -> jax.Array:
    """Applies `function` to chunks of rows, each with the row before and the row after it.

    Args:
        function: [b rows+2 w c] -> [b r w' d].
        x: [b h+2 w c]; its first and its last row are padding.
        rows: number of rows in a chunk, a divisor of h.

    Returns:
        [b r*h/rows w' d].
    """
    n = (x.shape[1] - 2) // rows
    if n == 1:
        return function(x)

    def one_chunk(i: jax.Array) -> jax.Array:
        return function(lax.dynamic_slice_in_dim(x, i * rows, rows + 2, axis=1))

    y = lax.map(one_chunk, jnp.arange(n))  # [n b r w' d]
    return y.swapaxes(0, 1).reshape(y.shape[1], n * y.shape[2], *y.shape[3:])


def by_tokens(function: Callable[[jax.Array], jax.Array], x: jax.Array, tokens: int) -> jax.Array:
    """Applies `function`, [b tokens c] -> [b tokens d], to one chunk of x [b l c] after the other -> [b l d].

    `tokens` is the size of a chunk, see `size`. The last chunk may be padded with zeros.
    """
    b, length, c = x.shape
    if tokens == length:
        return function(x)
    y = lax.map(function, pad(x, 1, tokens).reshape(b, -1, tokens, c).swapaxes(0, 1))  # [n b tokens d]
    return y.swapaxes(0, 1).reshape(b, -1, y.shape[-1])[:, :length]
