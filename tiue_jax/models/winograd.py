"""3x3 convolutions with 16 multiplications for every 2x2 pixels of output. The definition needs 36.

This is Winograd's minimal filtering F(2x2, 3x3) with the matrices of arXiv 1509.09308, section 4.1. Two rows of output
are A^T [(G k) * (B^T x)], where x are the four input rows that they read, k the three rows of the kernel, and * is
elementwise. The same holds for columns. Over all channels and all tiles of 2x2 pixels, each of the 16 elements is a
product of two matrices.

The code makes few large arrays, because XLA takes 20 ms to compile each elementwise loop, and a UNet has sixty
convolutions.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tiue_jax.models import chunks

B_T = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
A_T = ((1, 1, 1, 0), (0, 1, -1, -1))
TILES = 1024  # tiles of a chunk, at most, so that transformed tiles are in the cache when they are multiplied


@jax.custom_vjp
def winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The 3x3 convolution with padding 1: x [b h w c], kernel [3 3 c d] -> [b h w d]; h and w are even.

    Its gradients use the same method. That of x is a convolution with the kernel turned by 180 degrees.

    Raises:
        ValueError: the height or the width is odd.
    """
    b, h, w, _ = x.shape
    if h % 2 or w % 2:
        raise ValueError(f"Winograd's convolution needs an even height and width, got {h} x {w}")
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    transformed = [_transform(kernel, column) for column in range(4)]
    pairs = chunks.divisor(h // 2, limit=TILES // (chunks.known(b) * w // 2))
    return chunks.by_rows(lambda part: _some_rows(part, transformed), x, rows=2 * pairs)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return winograd(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    (kernel_gradient,) = jax.linear_transpose(lambda kernel: winograd.fun(x, kernel), kernel)(cotangent)
    return winograd(cotangent, kernel[::-1, ::-1].swapaxes(2, 3)), kernel_gradient


winograd.defvjp(_forward, _backward)


def _transform(kernel: jax.Array, column: int) -> jax.Array:
    """One column of G k G^T: [3 3 c d] -> [4 c d]. It is one product of matrices, so XLA has no loop to compile."""
    weights = np.einsum("ir,s->irs", G, G[column]).astype(kernel.dtype)
    return (weights.reshape(4, 9) @ kernel.reshape(9, -1)).reshape(4, *kernel.shape[2:])


def _some_rows(x: jax.Array, transformed: Sequence[jax.Array]) -> jax.Array:
    """The convolution of a chunk of rows, x [b r+2 w+2 c], with the columns of the transformed kernel: [b r w d]."""
    b, r, w, c = x.shape[0], x.shape[1] - 2, x.shape[2] - 2, x.shape[3]

    def every_second(y: jax.Array, axis: int) -> list[jax.Array]:
        return [lax.slice_in_dim(y, i, y.shape[axis] - 3 + i, 2, axis) for i in range(4)]

    rows = jnp.stack(_combine(B_T, every_second(x, 1)))  # [4 b r/2 w+2 c]
    columns = [y.reshape(4, -1, c) for y in _combine(B_T, every_second(rows, 3))]  # of [4 tiles c]
    products = [jnp.einsum("itc,icd->itd", y, k) for y, k in zip(columns, transformed, strict=True)]
    output_columns = [y.reshape(4, b, r // 2, w // 2, -1) for y in _combine(A_T, products)]  # 2 columns
    pixels = [jnp.stack(_combine(A_T, list(y)), axis=2) for y in output_columns]  # 2 columns of [b r/2 2 w/2 d]
    return jnp.stack(pixels, axis=4).reshape(b, r, w, -1)


def _combine(matrix: Sequence[Sequence[float]], parts: Sequence[jax.Array]) -> list[jax.Array]:
    """The product of a matrix with a vector of arrays. Zeros in the matrix cost nothing."""

    def row(weights: Sequence[float]) -> jax.Array:
        used = [(weight, part) for weight, part in zip(weights, parts, strict=True) if weight]
        weight, part = used[0]
        total = part * weight
        for weight, part in used[1:]:
            total = total + part * weight
        return total

    return [row(weights) for weights in matrix]
