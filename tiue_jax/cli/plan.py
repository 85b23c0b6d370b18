"""Plans a training run on TPUs or GPUs before they are rented: the memory that it needs, and a bound on its speed.

    tiue plan --config sd21_tiue --topology v5e:4x4
    tiue plan --config sd21_tiue --topology v5e:4x4 --batch_per_chip max
    tiue plan --config sd21_tiue --topology v5e:4x4 --search --json
    tiue plan --config sd21_tiue --topology v5e:2x2 --sampler --batch_per_chip 8
    tiue plan --config sd21_tiue --topology h100:8 --config.train.mesh_data=8 --config.train.mesh_fsdp=1

It runs on any Linux machine and needs neither a TPU, nor a GPU, nor weights. The compilers are in wheels: pip install
'tiue-jax[tpu]' for TPUs, and 'tiue-jax[cuda-plan]' for NVIDIA GPUs. It compiles the same step as `tiue train`. Other
settings are given as to `tiue train` (--config.distill.remat=...).

By default, one program is compiled, with batch size, mesh and remat policy of the config. These flags try more:

    --batch_per_chip 4,8   these batch sizes; max finds the largest that fits
    --fsdp 4,8,all         these sizes of the mesh axis that shards the state
    --remat none,full      these remat policies
    --search               every mesh and policy, each with its largest batch

The best of those that fit is in bold. A compilation takes minutes. Its result is kept in ~/.cache/tiue_jax/plan, so
that the same plan takes seconds the next time. --json prints one object instead of tables.

--mode quick (the default) stops the compiler when it knows the program's schedule and memory, before it makes machine
code. The time is then the shortest possible one, computed from the chip's published peaks. --mode full waits for the
compiler to end and adds its estimate of the time, which there is for TPUs. This takes tens of times as long.

Exit status: 0; 1 if no program that was tried fits; 2 for a wrong setting, without the wheels, or if the compiler
failed; 130 after Ctrl-C.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from absl import flags
from rich.console import Console

from tiue_jax import sharding
from tiue_jax.cli import config_flags
from tiue_jax.cli.command_line import BAD_INPUT, INTERRUPTED, print_error
from tiue_jax.models.unet import REMAT_POLICIES
from tiue_jax.plan import chips, report, search
from tiue_jax.plan.compiler import MODES
from tiue_jax.plan.measure import Measured
from tiue_jax.plan.planner import Choice, Planner
from tiue_jax.training.settings import Settings

DOES_NOT_FIT = 1  # an exit status
FSDP = (4, 8, 16)  # sizes of the mesh axis that a search tries besides the number of chips


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this command, except `config`."""
    flags.DEFINE_string("topology", None, "TPU slice or GPUs, such as v5e:4x4 or h100:8", flag_values=values)
    flags.DEFINE_bool("sampler", False, "plan the student's sampler, not the training step", flag_values=values)
    flags.DEFINE_string("batch_per_chip", None, "batch sizes to try, with commas, or max", flag_values=values)
    flags.DEFINE_string("fsdp", None, "sizes of the mesh axis fsdp to try, with commas, or all", flag_values=values)
    flags.DEFINE_string(
        "remat", None, f"remat policies to try, with commas: {', '.join(REMAT_POLICIES)}", flag_values=values
    )
    flags.DEFINE_bool("search", False, "try every mesh and policy, each with its largest batch", flag_values=values)
    flags.DEFINE_enum(
        "mode",
        "quick",
        MODES,
        "quick: schedule and memory; full: also the compiler's estimate of the time, much slower",
        flag_values=values,
    )
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)


class Choices(NamedTuple):
    """The programs to try.

    Attributes:
        batches: batch sizes per chip; None to find the largest that fits.
        bases: the combinations of mesh and policy. Each has the first batch size to try.
    """

    batches: list[int] | None
    bases: list[Choice]


def choices(values: flags.FlagValues, settings: Settings, chip_count: int) -> Choices:
    """Returns the programs that the command line asks for.

    Raises:
        ValueError: a flag is wrong. The error has the flag, its value and what was expected.
    """
    micro_batches = micro_batches_of(values, settings)
    batches = _batches(values, settings, chip_count)
    if batches is None:
        first = max(settings.train.batch_size // chip_count // micro_batches, 1) * micro_batches
    else:
        first = batches[0]
    if values.sampler:
        for name in ("fsdp", "remat", "search"):
            if given := getattr(values, name):
                raise ValueError(f"{name} is for the training step, got {given} with --sampler")
        return Choices(batches, [Choice(first, 1, None)])
    sizes, policies = _fsdp_sizes(values, settings, chip_count), _policies(values, settings)
    return Choices(batches, [Choice(first, size, policy) for policy in policies for size in sizes])


def micro_batches_of(values: flags.FlagValues, settings: Settings) -> int:
    """The number of parts of a batch, one after the other. The sampler takes the whole batch at once."""
    return 1 if values.sampler else settings.distill.gradient_accumulation_steps


def _batches(values: flags.FlagValues, settings: Settings, chip_count: int) -> list[int] | None:
    micro_batches = micro_batches_of(values, settings)
    if values.batch_per_chip == "max" or (values.batch_per_chip is None and values.search):
        return None
    if values.batch_per_chip is None:
        rows = settings.train.batch_size
        if rows % (chip_count * micro_batches):
            raise ValueError(
                f"train.batch_size {rows} does not split over {chip_count} chips x {micro_batches} micro-batches: "
                "give --batch_per_chip, a number or max"
            )
        return [rows // chip_count]
    batches = [_integer("batch_per_chip", text) for text in values.batch_per_chip.split(",")]
    for batch in batches:
        if batch % micro_batches:
            raise ValueError(f"batch_per_chip must be a multiple of the {micro_batches} micro-batches, got {batch}")
    return batches


def _fsdp_sizes(values: flags.FlagValues, settings: Settings, chip_count: int) -> list[int]:
    if values.fsdp:
        sizes = [chip_count if text == "all" else _integer("fsdp", text) for text in values.fsdp.split(",")]
        for size in sizes:
            if chip_count % size:
                raise ValueError(f"fsdp must divide the number of chips, {chip_count}, got {size}")
        return sizes
    if values.search:
        return [size for size in dict.fromkeys((*FSDP, chip_count)) if chip_count % size == 0]
    train = settings.train
    return [sharding.mesh_shape(train.mesh_data, train.mesh_fsdp, chip_count)["fsdp"]]


def _policies(values: flags.FlagValues, settings: Settings) -> list[str]:
    if not values.remat:
        return list(REMAT_POLICIES) if values.search else [settings.distill.remat]
    policies = values.remat.split(",")
    for policy in policies:
        if policy not in REMAT_POLICIES:
            raise ValueError(f"remat must be among {list(REMAT_POLICIES)}, got {policy!r}")
    return policies


def run(argv: Sequence[str], values: flags.FlagValues) -> int:
    """Plans as the command line asks, and prints the result. Returns the exit status.

    Args:
        argv: the command and its arguments.
        values: the flags that `define_flags` defined.

    Raises:
        ValueError, OSError, ModuleNotFoundError: a wrong setting or file, or a wheel is missing.
        RuntimeError: the compiler failed.
    """
    settings = config_flags.parse(argv, values, required=("config", "topology"))
    jax.config.update("jax_platforms", "cpu")  # does not occupy a TPU or GPU of this machine
    chip, chip_count = chips.parse(values.topology)
    to_try = choices(values, settings, chip_count)
    planner = Planner(settings, values.topology, values.mode, values.sampler)
    tried = measure_all(planner.measure, to_try, micro_batches_of(values, settings), chip.hbm_bytes)
    images = None if values.sampler else settings.train.max_train_steps * settings.train.batch_size
    chosen = report.best(tried, chip)
    if values.json:
        print(json.dumps(report.as_json(chosen, tried, chip, images), indent=2))
    else:
        show(tried, chosen, settings, images)
    return 0 if chosen.fits else DOES_NOT_FIT


def measure_all(
    measure: Callable[[Choice], Measured], to_try: Choices, micro_batches: int, hbm_bytes: int
) -> list[Measured]:
    """Measures all choices. A mesh that is not possible for the model is left out, with a line on stderr.

    Raises:
        ValueError: no mesh is possible.
    """
    tried: list[Measured] = []
    first = to_try.bases[0].batch_per_chip // micro_batches
    for base in to_try.bases:
        try:
            if to_try.batches is None:
                found = search.largest_batch(
                    functools.partial(_measure, measure, base, micro_batches), first, hbm_bytes
                )
                # the largest batch of this mesh and policy is the best guess for the next
                first = max([one.batch_per_chip // micro_batches for one in found if one.fits], default=1)
                tried += found
            else:
                for batch in to_try.batches:
                    tried.append(measure(dataclasses.replace(base, batch_per_chip=batch)))
        except ValueError as error:  # such as a parameter that the mesh does not divide
            if base is to_try.bases[-1] and not tried:
                raise
            print(f"left out fsdp={base.fsdp}, remat={base.remat}: {error}", file=sys.stderr)
    return tried


def _measure(measure: Callable[[Choice], Measured], base: Choice, micro_batches: int, rows: int) -> Measured:
    """Measures `base` with `rows` rows of each micro-batch on a chip."""
    return measure(dataclasses.replace(base, batch_per_chip=rows * micro_batches))


def show(tried: Sequence[Measured], chosen: Measured, settings: Settings, images: int | None) -> None:
    """Prints the tables, and the settings to give to `tiue train`."""
    chip, chip_count = chips.parse(chosen.topology)
    out = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    out.print(f"{chosen.topology}: memory of one of {chip_count} chips\n")
    out.print(report.parts_table(chosen))
    out.print()
    out.print(report.table(tried, chosen, chip, images))
    out.print()
    for line in report.notes(chosen, chip, settings):
        out.print(line)


def _integer(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {text!r}")
    return int(text)


def main(argv: Sequence[str]) -> int:
    """Runs the command. Returns the exit status: 2 after an error, which is one line on stderr."""
    values = flags.FlagValues()
    define_flags(values)
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n{config_flags.describe(values)}")
        return 0
    try:
        return run(argv, values)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:  # RuntimeError: the compiler failed
        print_error(error)
        return BAD_INPUT
