"""Convolutions on this machine: each implementation of models/convolution.py, and of upsampling.py, beside PyTorch's.

    python benchmarks/convolution.py [--rounds 9]

Shapes of Stable Diffusion 2.1 at 64 x 64 latents, of its VAE, and of the emoji models, in float32. They alternate
within a round; medians, and the FLOPs that the definition has (upsampled: on the pixels of the input) by the time.
PyTorch is `conv2d` on the CPU, in the same process, with its tensors in the order that it keeps them in.
"""

import argparse
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

# batch * k, height and width, channels in and out, size of the kernel, stride; a stride of 1/2 is nearest x2 before it
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
    if stride == 0.5:
        return {"xla": upsampling.sum_kernels, "sum_products": upsampling.sum_products}
    strided = {kind: getattr(convolution, kind) for kind in ("xla", "patches")}
    found = {kind: lambda x, kernel, run=run: run(x, kernel, int(stride)) for kind, run in strided.items()}
    return found | ({"winograd": winograd} if stride == 1 else {})


def programs(x: np.ndarray, kernel: np.ndarray, stride: float) -> dict[str, Callable[[], Any]]:
    on_device = jax.device_put((x, kernel))
    found: dict[str, Callable[[], Any]] = {}
    for kind, run in candidates(stride).items():
        if kernel.shape[0] == 3 or kind != "winograd":
            compiled = jax.jit(run).lower(*on_device).compile()
            found[kind] = lambda compiled=compiled: jax.block_until_ready(compiled(*on_device))
    image, weight = torch.tensor(x.transpose(0, 3, 1, 2).copy()), torch.tensor(kernel.transpose(3, 2, 0, 1).copy())
    resized = lambda: interpolate(image, scale_factor=2.0) if stride == 0.5 else image
    return found | {"PyTorch": lambda: conv2d(resized(), weight, stride=max(int(stride), 1), padding=len(kernel) // 2)}


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
        how = {0.5: ", upsampled", 1: "", 2: ", stride 2"}[stride]
        rows.append((f"{b} x {n} x {n}, {c:,} to {d:,}, {size}x{size}{how}", *cells))
    print(table(("shape", *(f"{name}, GFLOP/s" for name in COLUMNS)), rows))
    print(f"\n{machine('jax', 'torch')}; medians of {args.rounds} rounds.")


if __name__ == "__main__":
    main()
