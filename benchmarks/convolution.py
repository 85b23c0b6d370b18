"""Convolutions on this machine: the implementations of models/convolution.py and upsampling.py, and PyTorch's.

    python benchmarks/convolution.py [--rounds 9]

The shapes are those of Stable Diffusion 2.1 at 64 x 64 latents, of its VAE, and of the emoji models, in float32. Each
round runs every implementation once. Prints the median time, and the rate: the FLOPs of the direct convolution (for an
upsampled one, on the pixels of the input) over the time. PyTorch's is `conv2d` on the CPU, in the same process, with
contiguous NCHW tensors.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from machine import machine
from side_by_side import medians, table
from torch.nn.functional import conv2d, interpolate

from tiue_jax.models import convolution, upsampling
from tiue_jax.models.winograd import winograd

# batch * k, height and width, channels in and out, kernel size, stride; 0.5 means nearest-neighbour upsampling by 2
SHAPES = (
    (1, 64, 320, 320, 3, 1),
    (4, 64, 640, 320, 3, 1),
    (4, 32, 640, 640, 3, 1),
    (4, 16, 1280, 1280, 3, 1),
    (4, 8, 1280, 1280, 3, 1),
    (1, 8, 1280, 1280, 3, 1),
    (1, 16, 1280, 1280, 3, 2),
    (4, 64, 640, 320, 1, 1),
    (4, 8, 1280, 1280, 3, 0.5),
    (4, 32, 640, 640, 3, 0.5),
    (1, 256, 256, 256, 3, 1),  # a VAE
    (1, 256, 256, 256, 3, 0.5),
    (1, 256, 64, 64, 3, 1),  # a tiny autoencoder
    (4, 8, 64, 64, 3, 1),  # the emoji models
    (64, 8, 64, 64, 3, 1),
    (64, 2, 192, 192, 3, 1),
)
COLUMNS = ("xla", "patches", "winograd", "sum_products", "PyTorch")


def candidates(stride: float) -> dict[str, Callable[..., jax.Array]]:
    """Returns functions of image and kernel by the name of the implementation."""
    if stride == 0.5:
        return {"xla": upsampling.sum_kernels, "sum_products": upsampling.sum_products}
    found: dict[str, Callable[..., jax.Array]] = {
        "xla": lambda x, kernel: convolution.xla(x, kernel, int(stride)),
        "patches": lambda x, kernel: convolution.patches(x, kernel, int(stride)),
    }
    if stride == 1:
        found["winograd"] = winograd
    return found


def programs(x: np.ndarray, kernel: np.ndarray, stride: float) -> dict[str, Callable[[], Any]]:
    """Returns functions that run a convolution once, by the name of the implementation."""
    on_device = jax.device_put((x, kernel))
    found: dict[str, Callable[[], Any]] = {}
    for kind, convolve in candidates(stride).items():
        if kernel.shape[0] == 3 or kind != "winograd":
            compiled = jax.jit(convolve).lower(*on_device).compile()
            found[kind] = functools.partial(run, compiled, on_device)
    image, weight = torch.tensor(x.transpose(0, 3, 1, 2).copy()), torch.tensor(kernel.transpose(3, 2, 0, 1).copy())

    def theirs() -> torch.Tensor:
        resized = interpolate(image, scale_factor=2.0) if stride == 0.5 else image
        return conv2d(resized, weight, stride=max(int(stride), 1), padding=len(kernel) // 2)

    return found | {"PyTorch": theirs}


def run(compiled: Any, arrays: tuple[jax.Array, ...]) -> jax.Array:
    return jax.block_until_ready(compiled(*arrays))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    rng, rows = np.random.default_rng(0), []
    for b, n, c, d, size, stride in SHAPES:
        x, kernel = (rng.standard_normal(shape, np.float32) for shape in ((b, n, n, c), (size, size, c, d)))
        with torch.no_grad():
            seconds = medians(programs(x, kernel, stride), args.rounds)
        taps, pixels = (16, n * n) if stride == 0.5 else (size * size, (n // stride) ** 2)
        gflop = 2 * taps * b * pixels * c * d / 1e9
        cells = (
            f"{1e3 * seconds[name]:.2f} ms, {gflop / seconds[name]:.0f}" if name in seconds else "" for name in COLUMNS
        )
        suffix = {0.5: ", upsampled", 1: "", 2: ", stride 2"}[stride]
        rows.append((f"{b} x {n} x {n}, {c:,} to {d:,}, {size}x{size}{suffix}", *cells))
    print(table(("shape", *(f"{name}, GFLOP/s" for name in COLUMNS)), rows))
    print(f"\n{machine('jax', 'torch')}; medians of {args.rounds} rounds.")


if __name__ == "__main__":
    main()
