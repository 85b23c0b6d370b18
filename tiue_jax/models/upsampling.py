"""Nearest-neighbour upsampling, and a convolution after it at a fraction of the work."""

import jax
import jax.numpy as jnp
from jax import lax

from tiue_jax.models import chunks
from tiue_jax.models.convolution import xla
from tiue_jax.models.platforms import run_for_platform

PRODUCTS = 2**12  # pixels of a chunk, at most, each with nine products


def upsample_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Nearest x2, then a 3x3 convolution, on the pixels of x alone: [b h w c], [3 3 c d] -> [b 2h 2w d].

    Output row 2i sees the doubled rows 2i-1, 2i, 2i+1, which are the rows i-1, i, i of x: with the kernel's rows k it
    is k0 x[i-1] + (k1 + k2) x[i]. Output row 2i+1 sees i, i, i+1 and is (k0 + k1) x[i] + k2 x[i+1]. So with columns:
    each of four kinds of output pixel is a 2x2 convolution of x, 16 products of x with a [c d] matrix in place of 36.
    Multiplied out there are only 9 different ones, k_ij x, of which every output is a sum. Either the kernel's taps are
    added before the products or the products after them: the first is less to hold in memory where there are more
    pixels than channels, the second where there are fewer, and on a CPU, whose memory holds it, always less to do. Sums
    are float32 and rounded once.
    """
    b, h, w, c = x.shape
    if chunks.known(b) * h * w <= c:
        return sum_products(x, kernel)
    kinds = {"xla": sum_kernels, "products": sum_products}
    return run_for_platform(lambda platform: "products" if platform == "cpu" else "xla", kinds.__getitem__, x, kernel)


def sum_kernels(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`upsample_convolve` as four 2x2 convolutions."""
    taps = (((0,), (1, 2)), ((0, 1), (2,)))  # of an even and of an odd row or column, on its two neighbours in x

    def phase(i: int, j: int) -> jax.Array:
        total = lambda rows, columns: sum(kernel[r, c].astype(jnp.float32) for r in rows for c in columns)
        summed = [[jnp.asarray(total(rows, columns), kernel.dtype) for columns in taps[j]] for rows in taps[i]]
        return xla(x, jnp.stack([jnp.stack(row) for row in summed]), padding=((1 - i, i), (1 - j, j)))

    return _interleave([[phase(i, j) for j in (0, 1)] for i in (0, 1)])


def sum_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`upsample_convolve` from the products of every pixel with every tap, of some rows at a time if they are many."""
    b, h, w, _ = x.shape
    pixels = chunks.known(b) * w  # of a row, in all images
    if h * pixels <= PRODUCTS:
        return _sum_products(x, kernel)
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    rows = chunks.divisor(h, limit=PRODUCTS // pixels)
    return chunks.by_rows(lambda part: _sum_products(part, kernel)[:, 2:-2], x, rows)


def _sum_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    products = jnp.einsum("ijcd,bhwc->ijbhwd", kernel, x, preferred_element_type=jnp.float32)

    def halves(parts: jax.Array, axis: int) -> list[jax.Array]:
        first, middle, last = parts
        return [_shift(first, 1, axis) + middle + last, first + middle + _shift(last, -1, axis)]

    rows = halves(products, axis=2)  # each [3 b h w d]
    return _interleave([[y.astype(x.dtype) for y in halves(row, axis=2)] for row in rows])


def _interleave(phases: list[list[jax.Array]]) -> jax.Array:
    """Pixels of even and odd rows, of even and odd columns, each [b h w d], in their places: [b 2h 2w d]."""
    y = jnp.stack([jnp.stack(row, axis=3) for row in phases], axis=2)  # [b h 2 w 2 d]
    b, h, _, w, _, d = y.shape
    return y.reshape(b, 2 * h, 2 * w, d)


def _shift(x: jax.Array, by: int, axis: int) -> jax.Array:
    """x with what was at i at i + by, and zeros where nothing was."""
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (by, -by, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), widths)


def resize_nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Nearest-neighbour resize of [b h w c] to `size`, with torch's rule: source index floor(i * in / out)."""
    for axis, out in zip((1, 2), size, strict=True):
        n = x.shape[axis]
        if out % n == 0:
            x = jnp.repeat(x, out // n, axis=axis)
        elif out != n:
            x = jnp.take(x, jnp.arange(out) * n // out, axis=axis)
    return x
