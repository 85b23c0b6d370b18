"""Samplers compiled for TPU chips without the hardware: FLOPs, memory traffic, shortest time and memory.

    python benchmarks/tpu_aot.py [--chips v5e v6e v5p] [--batch_size 1] [--mode quick] [--programs ...] [--json FILE]

The models are Stable Diffusion 2.1 in bfloat16, 64 x 64 latents, from noise and text embedding to latents: the programs
of benchmarks/sampling.py on one chip, and TiUE on four chips that share its timesteps ("step-parallel"). Needs libtpu.

"ms at least" is the longest of three times: FLOPs over the chip's published peak, the parameters over the bandwidth of
its memory, and the bytes that four chips send each other over the bandwidth between them. `--mode full` takes several
times as long and adds the compiler's estimate of the time.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from machine import machine
from sampling import LOOP, ONE_STEP, REPEATED, TIUE, K, our_functions
from shapes import inputs, shape
from side_by_side import table

from tiue_jax import sharding, student
from tiue_jax.models import functional
from tiue_jax.models.unet import UNet
from tiue_jax.plan import chips
from tiue_jax.plan.compiler import MODES
from tiue_jax.plan.measure import Measured, measure
from tiue_jax.plan.programs import Program
from tiue_jax.schedule import Schedule

STEP_PARALLEL = "TiUE, step-parallel"
PROGRAMS = (ONE_STEP, TIUE, REPEATED, LOOP, STEP_PARALLEL)
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "v4": "v4:2x2x1"}  # four chips each


class Row(NamedTuple):
    """A row of the table."""

    program: str
    chip: str
    chips: int
    seconds: float  # the shortest possible time
    measured: Measured


def build(program: str, kind: str, batch_size: int) -> Program:
    """Traces one program for one chip of a kind, or for four if it is step-parallel."""
    this, topology, step = shape("sd21"), TOPOLOGIES[kind], steps(program)
    mesh = sharding.make_mesh(1, 1, step, devices=chips.devices(topology)[: step if step > 1 else 1])
    everywhere = sharding.replicated(mesh)
    graphdef, params = functional.abstract(UNet, this.unet)

    def place(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=everywhere)

    def step_parallel(params: Any, noise: Any, text: Any, null: Any) -> Any:
        return student.generate(functional.bind(graphdef, params), noise, text, Schedule().closed_form(K), mesh)

    function = step_parallel if program == STEP_PARALLEL else our_functions(this)[program]
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        traced = jax.jit(function).trace(*jax.tree.map(place, (params, *inputs(this, batch_size))))
    return Program(traced, {"unet": 2 * functional.count(params)})


def steps(program: str) -> int:
    """Returns the number of chips that share the timesteps of a program."""
    return K if program == STEP_PARALLEL else 1


def compile_for(program: str, kind: str, batch_size: int, mode: str) -> Row:
    """Compiles a program for a kind of chip and measures it."""
    chip = chips.CHIPS[kind]
    about = {
        "topology": TOPOLOGIES[kind],
        "program": program,
        "batch_per_chip": batch_size,
        "data": 1,
        "fsdp": 1,
        "remat": None,
    }
    make = functools.partial(build, program, kind, batch_size)
    found = measure(make, chip, steps(program), mode, **about)
    sent = found.collective_bytes / chip.ici_bandwidth
    bound = max(found.flops_per_chip / chip.peak_flops, found.state_bytes / chip.hbm_bandwidth, sent)
    return Row(program, kind, steps(program), bound, found)


def cells(row: Row) -> tuple[str, ...]:
    found, chip = row.measured, chips.CHIPS[row.chip]
    cycles = found.estimated_cycles
    estimate = "" if cycles is None else f"{1e3 * cycles / chip.clock:.1f}"
    return (
        f"{row.program}, {row.chip}" + (f" x {row.chips}" if row.chips > 1 else ""),
        f"{found.flops_per_chip / 1e9:.0f}",
        f"{(found.bytes_accessed or 0) / 1e9:.1f}",
        f"{found.collective_bytes / 1e6:.2f}",
        f"{1e3 * row.seconds:.1f}",
        estimate,
        f"{found.temp_bytes / 1e9:.2f}",
        f"{found.compile_seconds:.0f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=list(TOPOLOGIES), default=["v5e", "v6e", "v5p"])
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--mode", choices=MODES, default="quick")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows, began = [], time.monotonic()
    for kind in args.chips:
        for program in args.programs:
            rows.append(compile_for(program, kind, args.batch_size, args.mode))
            line = f"  [{time.monotonic() - began:5.0f} s] {' | '.join(cells(rows[-1]))}"
            print(line, file=sys.stderr, flush=True)
    header = (
        *("program", "GFLOP a chip", "GB of memory traffic", "MB sent", "ms at least", "ms estimated"),
        *("GB of temporaries", "s to compile"),
    )
    versions = machine("jax", "libtpu")
    print(table(header, [cells(row) for row in rows]))
    print(f"\nbatch of {args.batch_size}, {args.mode} mode; compiled on {versions}")
    if args.json:
        found = [{**row._asdict(), "measured": vars(row.measured)} for row in rows]
        args.json.write_text(json.dumps({"machine": versions, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
