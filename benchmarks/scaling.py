"""The time of the student over batch size, resolution and K, compared with its FLOPs.

    python benchmarks/scaling.py [--shape reduced] [--rounds 5] [--json FILE] [--plot FILE]

Measures from noise and text embedding to latents, in float32, on this machine. Varies one of the three at a time; the
others stay at batch 1, 64 x 64 latents, K = 4. Each round runs every point once. Prints medians. `--plot` needs
matplotlib: pip install 'tiue-jax[plots]'.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from machine import machine
from shapes import SHAPES, TOKENS, shape
from side_by_side import table

from tiue_jax import student
from tiue_jax.models import functional
from tiue_jax.models.platforms import compiler_options
from tiue_jax.models.unet import UNet
from tiue_jax.plan.flops import flops
from tiue_jax.schedule import Schedule


class Point(NamedTuple):
    """The size of a program."""

    batch_size: int = 1
    latent_size: int = 64
    k: int = 4


VARIED = {
    "batch": [Point(batch_size=b) for b in (1, 2, 4, 8)],
    "latents": [Point(latent_size=n) for n in (32, 64, 96, 128)],
    "K": [Point(k=k) for k in (1, 2, 4, 8)],
}


def sampler(graphdef: Any, k: int) -> Callable[..., jax.Array]:
    """Returns a function of (parameters, noise, text embedding) that samples with K = k."""
    form = Schedule().closed_form(k)

    def sample(params: Any, noise: jax.Array, text: jax.Array) -> jax.Array:
        return student.generate(functional.bind(graphdef, params), noise, text, form)

    return sample


def plot(found: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draws a panel for each size that is varied: time and FLOPs over those of the base, on logarithmic axes."""
    from matplotlib import pyplot

    base = next(one for one in found if one["varied"] == "K" and one["value"] == Point().k)
    figure, panels = pyplot.subplots(1, len(VARIED), figsize=(11, 3.6), sharey=True, layout="constrained")
    for panel, what in zip(panels, VARIED, strict=True):
        ones = [one for one in found if one["varied"] == what]
        values = [one["value"] for one in ones]
        for name, label, style in (("seconds", "time", "o-"), ("gflop", "FLOPs", "s--")):
            panel.plot(values, [one[name] / base[name] for one in ones], style, label=label)
        panel.set(xscale="log", yscale="log", xlabel=what, xticks=values, xticklabels=values)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set(ylabel=f"over batch {Point().batch_size}, {Point().latent_size} latents, K = {Point().k}")
    panels[0].legend()
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=110)


def run(compiled: Callable[..., jax.Array], *args: Any) -> jax.Array:
    return jax.block_until_ready(compiled(*args))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="reduced")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="PNG file for a plot of them")
    args = parser.parse_args()
    if args.plot is not None:
        import matplotlib  # noqa: F401 (raises before the minutes of measuring if it is missing)
    cfg = shape(args.shape).unet
    graphdef, shapes = functional.abstract(UNet, cfg)
    params = jax.device_put(functional.init(shapes, seed=0))
    rng, width = np.random.default_rng(0), cfg.per_block("cross_attention_dim")[0]

    points = sorted({point for points in VARIED.values() for point in points})
    work, runs, seconds = {}, {}, {point: [] for point in points}
    for point in points:
        size = (point.batch_size, point.latent_size, point.latent_size, cfg.in_channels)
        arrays = rng.standard_normal(size, np.float32), rng.standard_normal((size[0], TOKENS, width), np.float32)
        function = sampler(graphdef, point.k)
        work[point] = flops(function, params, *arrays) / 1e9
        options = compiler_options(jax.default_backend())
        compiled = jax.jit(function, compiler_options=options).lower(params, *arrays).compile()
        runs[point] = functools.partial(run, compiled, params, *arrays)
        runs[point]()
        print(f"  {point}: compiled", file=sys.stderr, flush=True)
    for _ in range(args.rounds):
        for point in points:
            started = time.perf_counter()
            runs[point]()
            seconds[point].append(time.perf_counter() - started)

    median = {point: statistics.median(taken) for point, taken in seconds.items()}
    found = []
    for what, varied in VARIED.items():
        rows, base = [], Point()
        for point in varied:
            value = {"batch": point.batch_size, "latents": point.latent_size, "K": point.k}[what]
            growth = (median[point] / median[base], work[point] / work[base])
            numbers = (
                median[point],
                median[point] / point.batch_size,
                work[point],
                *growth,
                work[point] / median[point],
            )
            formats = (".3f", ".3f", ".1f", ".2f", ".2f", ".0f")
            rows.append((str(value), *(format(x, f) for x, f in zip(numbers, formats, strict=True))))
            found.append({"varied": what, "value": value, "seconds": median[point], "gflop": work[point]})
        header = (what, "seconds", "an image", "GFLOP", "time / base", "GFLOP / base", "GFLOP/s")
        print(f"\n{table(header, rows)}")
    versions = machine("jax", "flax")
    print(f"\n{args.shape}, float32; {versions}; medians of {args.rounds} rounds.")
    if args.plot:
        plot(found, f"{args.shape}, float32, {versions}", args.plot)
    if args.json:
        args.json.write_text(json.dumps({"machine": versions, "points": found}, indent=1))


if __name__ == "__main__":
    main()
