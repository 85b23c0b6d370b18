"""The convolutions of all models: `convolve` chooses the implementation that fits the platform and the shape.

| platform | kernel, float32 | implementation | why |
|---|---|---|---|
| CPU | 1x1; 3x3 with twice as many channels as pixels, or on 2x2 pixels | `patches` | one product of matrices |
| CPU | large 3x3 with 128 channels or more in and out, even height and width | `winograd` | 16 products instead of 36 |
| CPU | the same with 64 channels or more, up to 128 x 128 pixels | `winograd` | larger images exceed the cache |
| all others | | `xla` | |

benchmarks/convolution.py measures them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from tiue_jax.models import chunks, initial
from tiue_jax.models.platforms import run_for_platform
from tiue_jax.models.winograd import winograd

Implementation = Literal["xla", "patches", "winograd"]
WINOGRAD_FROM = 2**27  # multiply-adds; its loops take tenths of a second to compile
CHANNELS = 64  # with fewer channels Winograd's convolution is slower
PIXELS = 2**14  # images with more pixels need twice as many channels


class Conv(nnx.Conv):
    """A convolution whose linear part can be replaced, in order to compute it in parts or in another way."""

    def __init__(self, *args: Any, kernel_init: Callable[..., jax.Array] = initial.kernel, **kwargs: Any):
        super().__init__(*args, kernel_init=kernel_init, **kwargs)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        stride = self.strides
        same = tuple((size // 2, size // 2) for size in self.kernel_size)
        if not isinstance(stride, int) or self.padding != same or any(size % 2 == 0 for size in self.kernel_size):
            return super().__call__(inputs, out_sharding)
        return Conv.linear(self, lambda kernel: convolve(inputs, kernel, stride))

    def linear(self, apply: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """`apply(kernel)` plus the bias: [b h w cout]. `apply` must be linear in the kernel [kh kw cin cout]."""
        y = apply(self.kernel[...]).astype(self.kernel[...].dtype)
        return y if self.bias is None else y + self.bias[...][None, None, None]


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """The convolution of x [b h w c] with a kernel [kh kw c d] -> [b h/stride w/stride d].

    kh and kw are odd, and x is padded with zeros by half the kernel on each side. x and kernel have the same dtype,
    which the result has too.
    """

    def implementation(kind: Implementation) -> Callable[[jax.Array, jax.Array], jax.Array]:
        if kind == "winograd":
            return winograd
        return functools.partial(patches if kind == "patches" else xla, stride=stride)

    return run_for_platform(lambda platform: choose(platform, x, kernel, stride), implementation, x, kernel)


def choose(platform: str, x: jax.Array, kernel: jax.Array, stride: int = 1) -> Implementation:
    """The implementation for x [b h w c] and a kernel [kh kw c d] on a platform, by the table at the top of this file.

    `platform` is "tpu", "gpu" or "cpu". Of x and kernel only shapes and dtypes are read.
    """
    if platform != "cpu" or x.dtype != jnp.float32 or kernel.dtype != jnp.float32:
        return "xla"
    b, h, w, c = x.shape
    kernel_height, kernel_width, _, d = kernel.shape
    size = kernel_height, kernel_width
    pixels = chunks.known(b) * -(-h // stride) * -(-w // stride)
    if size == (1, 1) or (size == (3, 3) and (2 * pixels <= c or h * w <= 4)):
        return "patches"
    min_channels = CHANNELS if h * w <= PIXELS else 2 * CHANNELS
    worthwhile = 9 * pixels * c * d >= WINOGRAD_FROM and min(c, d) >= min_channels
    if size == (3, 3) and stride == 1 and worthwhile and h % 2 == 0 and w % 2 == 0:
        return "winograd"
    return "xla"


def xla(
    x: jax.Array,
    kernel: jax.Array,
    stride: int = 1,
    padding: Sequence[tuple[int, int]] | None = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`convolve` by XLA: x [b h w c], kernel [kh kw c d] -> [b h' w' d].

    Args:
        x, kernel: of one dtype.
        stride: along both axes.
        padding: zeros before and after, for height and width; by default half the kernel.
        preferred_element_type: dtype of the result, by default that of x.
    """
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding or [(size // 2, size // 2) for size in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=preferred_element_type,
    )


def patches(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """`convolve` as one product of matrices: the input pixels of each output pixel, and the kernel."""
    kh, kw, c, d = kernel.shape
    _, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
    seen = [x[:, i : i + h : stride, j : j + w : stride] for i in range(kh) for j in range(kw)]
    return jnp.concatenate(seen, axis=-1) @ kernel.reshape(kh * kw * c, d)


def convolve_unrounded(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve` with stride 1 and a float32 result, for sums that are rounded once.

    Its gradient is that of `convolve`, computed in the dtype of x.
    """
    if x.dtype == jnp.float32:
        return convolve(x, kernel)
    return _convolve_unrounded(x, kernel)


@jax.custom_vjp
def _convolve_unrounded(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return xla(x, kernel, preferred_element_type=jnp.float32)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve_unrounded(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    # By default JAX would cast activations and kernels to float32, and convolve them with float32 cotangents.
    x, _ = saved
    _, pull = jax.vjp(convolve, *saved)
    return pull(cotangent.astype(x.dtype))


_convolve_unrounded.defvjp(_forward, _backward)
