"""Nearest-neighbour upsampling, alone or with a convolution after it, in less than half of the work."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from tiue_jax.models import chunks
from tiue_jax.models.convolution import xla
from tiue_jax.models.platforms import run_for_platform

PRODUCTS = 2**12  # pixels of a chunk of `sum_products`, at most; each has nine products


def upsample_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Nearest-neighbour upsampling x2, then a 3x3 convolution: x [b h w c], kernel [3 3 c d] -> [b 2h 2w d].

    The upsampled image is never made. Row 2i of the output reads the upsampled rows 2i-1, 2i and 2i+1, which are the
    rows i-1, i and i of x. With the rows k0, k1, k2 of the kernel it is

        y[2i] = k0 x[i-1] + (k1 + k2) x[i]  and likewise  y[2i+1] = (k0 + k1) x[i] + k2 x[i+1].

    The same holds for columns. So each of the four kinds of output pixels is a 2x2 convolution of x: together 16
    products of a pixel with a [c d] matrix instead of 36. Multiplied out, all outputs are sums of only 9 different
    products k_ij x. There are two ways to compute it:

    - `sum_kernels` adds taps of the kernel, then multiplies. It needs less memory if there are more pixels than
      channels.
    - `sum_products` multiplies, then adds products. It needs less memory if there are fewer pixels than channels. On a
      CPU it is used always: its 9 products are less work.

    Sums are float32 and rounded once.
    """
    b, h, w, c = x.shape
    if chunks.known(b) * h * w <= c:
        return sum_products(x, kernel)

    def choose(platform: str) -> str:
        return "products" if platform == "cpu" else "xla"

    def implementation(kind: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return sum_products if kind == "products" else sum_kernels

    return run_for_platform(choose, implementation, x, kernel)


def sum_kernels(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`upsample_convolve` as four 2x2 convolutions."""
    # taps that an even and an odd row (or column) of the output multiplies with each of the two rows of x that it reads
    taps = (((0,), (1, 2)), ((0, 1), (2,)))

    def total(rows: tuple[int, ...], columns: tuple[int, ...]) -> jax.Array:
        summed = sum(kernel[row, column].astype(jnp.float32) for row in rows for column in columns)
        return jnp.asarray(summed, kernel.dtype)

    def phase(i: int, j: int) -> jax.Array:
        summed = [[total(rows, columns) for columns in taps[j]] for rows in taps[i]]
        return xla(x, jnp.stack([jnp.stack(row) for row in summed]), padding=((1 - i, i), (1 - j, j)))

    return _interleave([[phase(i, j) for j in (0, 1)] for i in (0, 1)])


def sum_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`upsample_convolve` by sums of products of every pixel with every tap, in chunks of rows if there are many."""
    b, h, w, _ = x.shape
    pixels = chunks.known(b) * w  # in one row of all images
    if h * pixels <= PRODUCTS:
        return _sum_products(x, kernel)
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    rows = chunks.divisor(h, limit=PRODUCTS // pixels)
    return chunks.by_rows(lambda part: _sum_products(part, kernel)[:, 2:-2], x, rows)


def _sum_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`sum_products` of one chunk."""
    products = jnp.einsum("ijcd,bhwc->ijbhwd", kernel, x, preferred_element_type=jnp.float32)

    def halves(parts: jax.Array, axis: int) -> list[jax.Array]:
        """The sums of even and of odd rows (or columns), from the products with the kernel's three taps."""
        first, middle, last = parts
        return [_shift(first, 1, axis) + middle + last, first + middle + _shift(last, -1, axis)]

    rows = halves(products, axis=2)  # each [3 b h w d]
    return _interleave([[y.astype(x.dtype) for y in halves(row, axis=2)] for row in rows])


def _interleave(phases: list[list[jax.Array]]) -> jax.Array:
    """Puts pixels of even and odd rows and columns, `phases[row][column]` [b h w d], in order: [b 2h 2w d]."""
    y = jnp.stack([jnp.stack(row, axis=3) for row in phases], axis=2)  # [b h 2 w 2 d]
    b, h, _, w, _, d = y.shape
    return y.reshape(b, 2 * h, 2 * w, d)


def _shift(x: jax.Array, by: int, axis: int) -> jax.Array:
    """Moves x by `by` places along an axis and fills with zeros."""
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (by, -by, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), widths)


def resize_nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Nearest-neighbour resize of [b h w c] to `size` (h, w). As in torch, output i is input floor(i * in / out)."""
    for axis, out in zip((1, 2), size, strict=True):
        n = x.shape[axis]
        if out % n == 0:
            x = jnp.repeat(x, out // n, axis=axis)
        elif out != n:
            x = jnp.take(x, jnp.arange(out) * n // out, axis=axis)
    return x
