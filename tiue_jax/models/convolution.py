"""Convolutions: a layer that can be computed in parts, and the implementation that fits the platform and the shape.

| platform | kernel, float32 | implementation | why |
|---|---|---|---|
| CPU | 1x1; 3x3 with twice as many channels as pixels, or on 2x2 pixels | `patches` | one product of matrices |
| CPU | 3x3, of much work, 128 channels or more in and out, even height and width | `winograd` | 16 products for 36 |
| CPU | the same with 64 channels or more, up to 128 x 128 pixels | `winograd` | larger ones leave the cache |
| all others | | `xla` | |

benchmarks/convolution.py times them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from tiue_jax.models import chunks
from tiue_jax.models.platforms import run_for_platform
from tiue_jax.models.winograd import winograd

Implementation = Literal["xla", "patches", "winograd"]
WINOGRAD_FROM = 2**27  # multiply-adds: its loops take tenths of a second to compile
CHANNELS, PIXELS = 64, 2**14  # with fewer it is slow, and so are larger images unless they have twice as many


class Conv(nnx.Conv):
    """A convolution that can also be had as the linear map it is, to compute it in parts or in another way."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        stride = self.strides
        same = tuple((size // 2, size // 2) for size in self.kernel_size)
        if not isinstance(stride, int) or self.padding != same or any(size % 2 == 0 for size in self.kernel_size):
            return super().__call__(inputs, out_sharding)
        return Conv.linear(self, lambda kernel: convolve(inputs, kernel, stride))

    def linear(self, apply: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """`apply(kernel)` of a function linear in the kernel [kh kw cin cout], plus the bias: [b h w cout]."""
        y = apply(self.kernel[...]).astype(self.kernel[...].dtype)
        return y if self.bias is None else y + self.bias[...][None, None, None]


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """x [b h w c], padded by half the kernel at each side, with a kernel [kh kw c d], both odd -> [b h/s w/s d]."""
    kinds: dict[str, Callable[..., jax.Array]] = {
        "xla": lambda x, kernel: xla(x, kernel, stride),
        "patches": lambda x, kernel: patches(x, kernel, stride),
        "winograd": winograd,
    }
    return run_for_platform(lambda platform: choose(platform, x, kernel, stride), kinds.__getitem__, x, kernel)


def choose(platform: str, x: jax.Array, kernel: jax.Array, stride: int = 1) -> Implementation:
    """The implementation for x [b h w c] and a kernel [kh kw c d] on a platform: the table above."""
    if platform != "cpu" or x.dtype != jnp.float32 or kernel.dtype != jnp.float32:
        return "xla"
    (b, h, w, c), size, d = x.shape, kernel.shape[:2], kernel.shape[3]
    pixels = chunks.known(b) * -(-h // stride) * -(-w // stride)
    if size == (1, 1) or (size == (3, 3) and (2 * pixels <= c or h * w <= 4)):
        return "patches"
    much = 9 * pixels * c * d >= WINOGRAD_FROM and min(c, d) >= CHANNELS * (1 if h * w <= PIXELS else 2)
    if size == (3, 3) and stride == 1 and much and not (h % 2 or w % 2):
        return "winograd"
    return "xla"


def xla(
    x: jax.Array,
    kernel: jax.Array,
    stride: int = 1,
    padding: Sequence[tuple[int, int]] | None = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`convolve` by XLA's own convolution; with other padding, and a result of another dtype, if asked for."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding or [(size // 2, size // 2) for size in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=preferred_element_type,
    )


def patches(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """`convolve` as one product of matrices, of the pixels that each pixel of the output sees with the kernel."""
    kh, kw, c, d = kernel.shape
    _, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
    seen = [x[:, i : i + h : stride, j : j + w : stride] for i in range(kh) for j in range(kw)]
    return jnp.concatenate(seen, axis=-1) @ kernel.reshape(kh * kw * c, d)


def convolve_unrounded(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve` with a float32 result, to be added up; differentiated as `convolve` is, in the dtype of x."""
    return convolve(x, kernel) if x.dtype == jnp.float32 else _convolve_unrounded(x, kernel)


@jax.custom_vjp
def _convolve_unrounded(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return xla(x, kernel, preferred_element_type=jnp.float32)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve_unrounded(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    # JAX itself would convolve float32 cotangents with activations and kernels cast to float32
    return jax.vjp(convolve, *saved)[1](cotangent.astype(saved[0].dtype))


_convolve_unrounded.defvjp(_forward, _backward)
