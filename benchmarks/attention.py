"""Attention on this machine: the implementations of models/attention.py that run here, and PyTorch's.

    python benchmarks/attention.py [--dtype float32] [--rounds 9]

The shapes are those of the UNet's levels at K = 4 and of the VAE's attention. Each round runs every implementation
once. Prints the median time, and the rate of the two matrix products. PyTorch's is `scaled_dot_product_attention` on
the CPU, in the same process.
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

from tiue_jax.models import attention

# batch * k, heads, queries, keys, width of a head
SHAPES = (
    (4, 1, 4096, 4096, 64),
    (4, 1, 4096, 77, 64),
    (4, 2, 1024, 1024, 64),
    (4, 4, 256, 256, 64),
    (4, 4, 64, 64, 64),
    (4, 4, 256, 256, 32),  # the largest of the emoji models
    (1, 1, 4096, 4096, 512),  # a VAE
)
HERE = {"cpu": ("xla", "chunked"), "gpu": ("xla", "cudnn"), "tpu": ("xla", "splash")}


def programs(arrays: list[np.ndarray], dtype: str, kinds: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
    """Returns functions that compute attention once, by the name of the implementation."""
    on_device = [jax.numpy.asarray(x, dtype) for x in arrays]
    found: dict[str, Callable[[], Any]] = {}
    for kind in kinds:
        with attention.implementation(kind):
            compiled = jax.jit(attention.attend).lower(*on_device).compile()
        found[kind] = functools.partial(run, compiled, on_device)
    tensors = [torch.tensor(x, dtype=getattr(torch, dtype)) for x in arrays]
    return found | {"PyTorch": functools.partial(torch.nn.functional.scaled_dot_product_attention, *tensors)}


def run(compiled: Any, arrays: list[jax.Array]) -> jax.Array:
    return jax.block_until_ready(compiled(*arrays))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    kinds, rng, rows = HERE[jax.default_backend()], np.random.default_rng(0), []
    for b, heads, n, m, width in SHAPES:
        arrays = [rng.standard_normal((b, heads, length, width), np.float32) for length in (n, m, m)]
        seconds = medians(programs(arrays, args.dtype, kinds), args.rounds)
        gflop = 4 * b * heads * n * m * width / 1e9
        cells = (f"{1e3 * taken:.2f} ms, {gflop / taken:.0f}" for taken in seconds.values())
        rows.append((f"{b} x {heads} x {n:,} on {m:,}, {width}", *cells))
    header = ("rows x heads x queries on keys, width", *(f"{name}, GFLOP/s" for name in (*kinds, "PyTorch")))
    print(table(header, rows))
    print(f"\n{args.dtype}; {machine('jax', 'torch')}; medians of {args.rounds} rounds.")


if __name__ == "__main__":
    main()
