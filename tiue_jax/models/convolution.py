"""Convolutions in parts, and after nearest-neighbour upsampling at a fraction of the work."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


class Conv(nnx.Conv):
    """A convolution that can also be had as the linear map it is, to compute it in parts or in another way."""

    def linear(self, apply: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """`apply(kernel)` of a function linear in the kernel [kh kw cin cout], plus the bias: [b h w cout]."""
        y = apply(self.kernel[...]).astype(self.kernel[...].dtype)
        return y if self.bias is None else y + self.bias[...][None, None, None]


def convolve(x: jax.Array, kernel: jax.Array, **kwargs: Any) -> jax.Array:
    """x [b h w c] with a kernel [kh kw c d]; stride 1 and the size kept unless `kwargs` of lax's say otherwise."""
    defaults: dict[str, Any] = {"window_strides": (1, 1), "padding": "SAME"}
    return lax.conv_general_dilated(x, kernel, **defaults | kwargs, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_vjp
def convolve_unrounded(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve` with a float32 result, to be added up; differentiated as `convolve` is, in the dtype of x."""
    return convolve(x, kernel, preferred_element_type=jnp.float32)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve_unrounded(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    # JAX itself would convolve float32 cotangents with activations and kernels cast to float32
    return jax.vjp(convolve, *saved)[1](cotangent.astype(saved[0].dtype))


convolve_unrounded.defvjp(_forward, _backward)


def upsample_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Nearest x2, then a 3x3 convolution, on the pixels of x alone: [b h w c], [3 3 c d] -> [b 2h 2w d].

    Output row 2i sees the doubled rows 2i-1, 2i, 2i+1, which are the rows i-1, i, i of x: with the kernel's rows k it
    is k0 x[i-1] + (k1 + k2) x[i]. Output row 2i+1 sees i, i, i+1 and is (k0 + k1) x[i] + k2 x[i+1]. So with columns:
    each of four kinds of output pixel is a 2x2 convolution of x, 16 products of x with a [c d] matrix in place of 36.
    Multiplied out there are only 9 different ones, k_ij x, of which every output is a sum. Either the kernel's taps are
    added before the products or the products after them: the first is less to hold in memory where there are more
    pixels than channels, the second where there are fewer. Sums are float32 and rounded once.
    """
    b, h, w, c = x.shape
    phases = _sum_of_products(x, kernel) if b * h * w <= c else _summed_kernels(x, kernel)
    rows = [jnp.stack(row, axis=3) for row in phases]
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, -1)  # of [b h 2 w 2 d]


def _summed_kernels(x: jax.Array, kernel: jax.Array) -> list[list[jax.Array]]:
    """Output pixels of even and odd rows, of even and odd columns, each [b h w d], as 2x2 convolutions."""
    taps = (((0,), (1, 2)), ((0, 1), (2,)))  # of an even and of an odd row or column, on its two neighbours in x

    def phase(i: int, j: int) -> jax.Array:
        total = lambda rows, columns: sum(kernel[r, c].astype(jnp.float32) for r in rows for c in columns)
        summed = [[jnp.asarray(total(rows, columns), kernel.dtype) for columns in taps[j]] for rows in taps[i]]
        return convolve(x, jnp.stack([jnp.stack(row) for row in summed]), padding=((1 - i, i), (1 - j, j)))

    return [[phase(i, j) for j in (0, 1)] for i in (0, 1)]


def _sum_of_products(x: jax.Array, kernel: jax.Array) -> list[list[jax.Array]]:
    """The same from the products of every pixel with every tap."""
    products = jnp.einsum("ijcd,bhwc->ijbhwd", kernel, x, preferred_element_type=jnp.float32)

    def halves(parts: jax.Array, axis: int) -> list[jax.Array]:
        first, middle, last = parts
        return [_shift(first, 1, axis) + middle + last, first + middle + _shift(last, -1, axis)]

    rows = halves(products, axis=2)  # each [3 b h w d]
    return [[y.astype(x.dtype) for y in halves(row, axis=2)] for row in rows]


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
