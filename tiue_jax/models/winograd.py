"""3x3 convolutions with 16 multiplications for every 2x2 pixels of output where the definition has 36.

Winograd's minimal filtering F(2x2, 3x3), with the matrices of arXiv 1509.09308, section 4.1: two rows of output are
A^T [(G k) * (B^T x)] of the four rows x that they see and the three rows k of the kernel, * being elementwise; columns
the same. Over all channels and tiles of 2x2 pixels each of the 16 elements is a product of two matrices.

There are fewer and larger arrays here than one would write first, for XLA's sake: every elementwise loop that it makes
takes 20 ms to compile, and a UNet has sixty convolutions.
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
TILES = 1024  # of a chunk, at most: what was transformed should be in the cache when it is multiplied


@jax.custom_vjp
def winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The 3x3 convolution that keeps the size: x [b h w c], h and w even, kernel [3 3 c d] -> [b h w d].

    Its gradients are Winograd's too: that of x is a convolution by the kernel turned around.

    Raises:
        ValueError: an odd height or width.
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
    (of_kernel,) = jax.linear_transpose(lambda kernel: winograd.fun(x, kernel), kernel)(cotangent)
    return winograd(cotangent, kernel[::-1, ::-1].swapaxes(2, 3)), of_kernel


winograd.defvjp(_forward, _backward)


def _transform(kernel: jax.Array, column: int) -> jax.Array:
    """A column of G k G^T, as a product, which needs no loop to be compiled: [3 3 c d] -> [4 c d]."""
    weights = np.einsum("ir,s->irs", G, G[column]).astype(kernel.dtype)
    return (weights.reshape(4, 9) @ kernel.reshape(9, -1)).reshape(4, *kernel.shape[2:])


def _some_rows(x: jax.Array, transformed: Sequence[jax.Array]) -> jax.Array:
    """Rows with their neighbours, x [b r+2 w+2 c], by the four columns of the transformed kernel: [b r w d]."""
    b, r, w, c = (n - 2 * (axis in (1, 2)) for axis, n in enumerate(x.shape))
    every_second = lambda y, axis: [lax.slice_in_dim(y, i, y.shape[axis] - 3 + i, 2, axis) for i in range(4)]
    rows = jnp.stack(_combine(B_T, every_second(x, 1)))  # [4 b r/2 w+2 c]
    columns = [y.reshape(4, -1, c) for y in _combine(B_T, every_second(rows, 3))]  # of [4 tiles c]
    products = [jnp.einsum("itc,icd->itd", y, k) for y, k in zip(columns, transformed, strict=True)]
    of_output = [y.reshape(4, b, r // 2, w // 2, -1) for y in _combine(A_T, products)]  # 2 columns
    pixels = [jnp.stack(_combine(A_T, list(y)), axis=2) for y in of_output]  # 2 columns of [b r/2 2 w/2 d]
    return jnp.stack(pixels, axis=4).reshape(b, r, w, -1)


def _combine(matrix: Sequence[Sequence[float]], parts: Sequence[jax.Array]) -> list[jax.Array]:
    """A matrix by a vector of arrays, with additions alone where it has 0, 1 and -1."""

    def row(weights: Sequence[float]) -> jax.Array:
        first, *rest = ((weight, part) for weight, part in zip(weights, parts, strict=True) if weight)
        total = first[1] * first[0]
        for weight, part in rest:
            total = total + part * weight
        return total

    return [row(weights) for weights in matrix]
