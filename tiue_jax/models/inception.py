"""Inception-v3 as the Fréchet inception distance defines it: the TensorFlow graph `classify_image` of 2015-12-05.

It differs from the Inception-v3 of torchvision and of the paper (arXiv 1512.00567) in three places: average pooling
does not count the padding; the last block pools with the maximum; the classifier has 1,008 classes. The input is
resized to 299 x 299 as TensorFlow 1 did it, without aligned centres. Names are those of torch-fidelity's and
pytorch-fid's checkpoints, whose weights are converted from that graph.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from tiue_jax.models import initial

SIZE = 299
FEATURES = 2048
CLASSES = 1008
Pair = tuple[int, int]


class InceptionOutput(NamedTuple):
    """Features and class scores of images."""

    features: jax.Array  # [b 2048], after the last pooling
    logits: jax.Array  # [b 1008], without the bias of the classifier, as the inception score takes them


class BatchNorm(nnx.Module):
    """Batch normalisation (arXiv 1502.03167) of x [b h w c] with the statistics of the training."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.running_mean = nnx.Param(jnp.zeros(channels))
        self.running_var = nnx.Param(jnp.ones(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        factor = self.scale[...] * lax.rsqrt(self.running_var[...] + 0.001)
        shift = self.bias[...] - self.running_mean[...] * factor
        return x * factor[None, None, None] + shift[None, None, None]


class BasicConv2d(nnx.Module):
    """Convolution, batch normalisation and ReLU: [b h w c] -> [b h' w' d]. `same` pads by half the kernel."""

    def __init__(self, cin: int, cout: int, kernel: int | Pair, stride: int = 1, *, same: bool = False, rngs: nnx.Rngs):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        pad = tuple((size // 2, size // 2) if same else (0, 0) for size in kernel)
        self.conv = initial.conv(cin, cout, kernel, stride, padding=pad, use_bias=False, rngs=rngs)
        self.bn = BatchNorm(cout)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.bn(self.conv(x)))


def max_pool(x: jax.Array, stride: int = 2, padding: int = 0) -> jax.Array:
    """The maximum of 3x3 windows: [b h w c] -> [b h' w' c]. Padding is never the maximum."""
    pad = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), pad)


def average_pool(x: jax.Array) -> jax.Array:
    """The mean of 3x3 windows with stride 1: [b h w c] -> the same. The padding is not counted."""
    pad = ((0, 0), (1, 1), (1, 1), (0, 0))

    def total(values: jax.Array) -> jax.Array:
        return lax.reduce_window(values, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), pad)

    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


class InceptionA(nnx.Module):
    """Block at 35 x 35: [b h w c] -> [b h w 224 + pool_features]."""

    def __init__(self, cin: int, pool_features: int, *, rngs: nnx.Rngs):
        self.branch1x1 = BasicConv2d(cin, 64, 1, rngs=rngs)
        self.branch5x5_1 = BasicConv2d(cin, 48, 1, rngs=rngs)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, same=True, rngs=rngs)
        self.branch3x3dbl_1 = BasicConv2d(cin, 64, 1, rngs=rngs)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, same=True, rngs=rngs)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, same=True, rngs=rngs)
        self.branch_pool = BasicConv2d(cin, pool_features, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branches = [self.branch1x1(x), branch5x5, branch3x3dbl, self.branch_pool(average_pool(x))]
        return jnp.concatenate(branches, axis=-1)


class InceptionB(nnx.Module):
    """Reduction from 35 x 35 to 17 x 17: [b h w c] -> [b h' w' 480 + c]."""

    def __init__(self, cin: int, *, rngs: nnx.Rngs):
        self.branch3x3 = BasicConv2d(cin, 384, 3, stride=2, rngs=rngs)
        self.branch3x3dbl_1 = BasicConv2d(cin, 64, 1, rngs=rngs)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, same=True, rngs=rngs)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([self.branch3x3(x), branch3x3dbl, max_pool(x)], axis=-1)


class InceptionC(nnx.Module):
    """Block at 17 x 17 with 1x7 and 7x1 kernels: [b h w 768] -> the same."""

    def __init__(self, cin: int, channels_7x7: int, *, rngs: nnx.Rngs):
        c = channels_7x7
        across, down = (1, 7), (7, 1)
        self.branch1x1 = BasicConv2d(cin, 192, 1, rngs=rngs)
        self.branch7x7_1 = BasicConv2d(cin, c, 1, rngs=rngs)
        self.branch7x7_2 = BasicConv2d(c, c, across, same=True, rngs=rngs)
        self.branch7x7_3 = BasicConv2d(c, 192, down, same=True, rngs=rngs)
        self.branch7x7dbl_1 = BasicConv2d(cin, c, 1, rngs=rngs)
        self.branch7x7dbl_2 = BasicConv2d(c, c, down, same=True, rngs=rngs)
        self.branch7x7dbl_3 = BasicConv2d(c, c, across, same=True, rngs=rngs)
        self.branch7x7dbl_4 = BasicConv2d(c, c, down, same=True, rngs=rngs)
        self.branch7x7dbl_5 = BasicConv2d(c, 192, across, same=True, rngs=rngs)
        self.branch_pool = BasicConv2d(cin, 192, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        branches = [self.branch1x1(x), branch7x7, branch7x7dbl, self.branch_pool(average_pool(x))]
        return jnp.concatenate(branches, axis=-1)


class InceptionD(nnx.Module):
    """Reduction from 17 x 17 to 8 x 8: [b h w c] -> [b h' w' 512 + c]."""

    def __init__(self, cin: int, *, rngs: nnx.Rngs):
        self.branch3x3_1 = BasicConv2d(cin, 192, 1, rngs=rngs)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2, rngs=rngs)
        self.branch7x7x3_1 = BasicConv2d(cin, 192, 1, rngs=rngs)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), same=True, rngs=rngs)
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), same=True, rngs=rngs)
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        branch7x7x3 = self.branch7x7x3_2(self.branch7x7x3_1(x))
        branch7x7x3 = self.branch7x7x3_4(self.branch7x7x3_3(branch7x7x3))
        return jnp.concatenate([self.branch3x3_2(self.branch3x3_1(x)), branch7x7x3, max_pool(x)], axis=-1)


class InceptionE(nnx.Module):
    """Block at 8 x 8: [b h w c] -> [b h w 2048]. The last of the two pools with the maximum, as in the graph."""

    def __init__(self, cin: int, *, pools_maximum: bool, rngs: nnx.Rngs):
        across, down = (1, 3), (3, 1)
        self.pools_maximum = pools_maximum
        self.branch1x1 = BasicConv2d(cin, 320, 1, rngs=rngs)
        self.branch3x3_1 = BasicConv2d(cin, 384, 1, rngs=rngs)
        self.branch3x3_2a = BasicConv2d(384, 384, across, same=True, rngs=rngs)
        self.branch3x3_2b = BasicConv2d(384, 384, down, same=True, rngs=rngs)
        self.branch3x3dbl_1 = BasicConv2d(cin, 448, 1, rngs=rngs)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, same=True, rngs=rngs)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, across, same=True, rngs=rngs)
        self.branch3x3dbl_3b = BasicConv2d(384, 384, down, same=True, rngs=rngs)
        self.branch_pool = BasicConv2d(cin, 192, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        branch3x3 = self.branch3x3_1(x)
        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = max_pool(x, stride=1, padding=1) if self.pools_maximum else average_pool(x)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(branch3x3),
            self.branch3x3_2b(branch3x3),
            self.branch3x3dbl_3a(branch3x3dbl),
            self.branch3x3dbl_3b(branch3x3dbl),
            self.branch_pool(pooled),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV3(nnx.Module):
    """The whole network: images uint8 or float in [0, 255], [b h w 3] of any size -> InceptionOutput."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2, rngs=rngs)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, rngs=rngs)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, same=True, rngs=rngs)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1, rngs=rngs)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, rngs=rngs)
        self.Mixed_5b = InceptionA(192, 32, rngs=rngs)
        self.Mixed_5c = InceptionA(256, 64, rngs=rngs)
        self.Mixed_5d = InceptionA(288, 64, rngs=rngs)
        self.Mixed_6a = InceptionB(288, rngs=rngs)
        self.Mixed_6b = InceptionC(768, 128, rngs=rngs)
        self.Mixed_6c = InceptionC(768, 160, rngs=rngs)
        self.Mixed_6d = InceptionC(768, 160, rngs=rngs)
        self.Mixed_6e = InceptionC(768, 192, rngs=rngs)
        self.Mixed_7a = InceptionD(768, rngs=rngs)
        self.Mixed_7b = InceptionE(1280, pools_maximum=False, rngs=rngs)
        self.Mixed_7c = InceptionE(2048, pools_maximum=True, rngs=rngs)
        self.fc = initial.linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> InceptionOutput:
        x = (resize_like_tensorflow(images.astype(jnp.float32), SIZE) - 128) / 128
        x = max_pool(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = max_pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features = x.mean((1, 2))
        return InceptionOutput(features, features @ self.fc.kernel[...])


def resize_like_tensorflow(x: jax.Array, size: int) -> jax.Array:
    """Resizes float32 x [b h w c] to [b size size c] bilinearly, as `tf.image.resize_bilinear` of TensorFlow 1.

    The position of output pixel i is i h / size, without aligned corners or centres, and without anti-aliasing.
    """
    return _resize_axis(_resize_axis(x, 1, size), 2, size)


def _resize_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Resizes one axis, see `resize_like_tensorflow`."""
    length = x.shape[axis]
    position = jnp.arange(size, dtype=jnp.float32) * jnp.float32(length / size)
    low = position.astype(jnp.int32)
    high = jnp.minimum(low + 1, length - 1)
    shape = [1] * x.ndim
    shape[axis] = size
    weight = (position - low.astype(jnp.float32)).reshape(shape)
    below, above = jnp.take(x, low, axis=axis), jnp.take(x, high, axis=axis)
    return below + (above - below) * weight
