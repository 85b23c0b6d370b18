"""Will a training run fit on a TPU pod, and how fast can it be? Asked on any machine, before the pod is rented.

    tiue plan --config sd21_tiue --topology v5e:4x4
    tiue plan --config sd21_tiue --topology v5e:4x4 --batch_per_chip max
    tiue plan --config sd21_tiue --topology v5e:4x4 --search --json
    tiue plan --config sd21_tiue --topology v5e:2x2 --sampler --batch_per_chip 8

The very step that train.py runs is compiled by the TPU's own compiler, libtpu, which needs no TPU: pip install
'tiue-jax[tpu]'. Weights are not needed either. Other settings are given as to train.py (--config.distill.remat=...).

By default that is one compilation, of the config's own batch, mesh and remat policy. More are tried with

    --batch_per_chip 4,8   these batches; max looks for the largest that fits
    --fsdp 4,8,all         these sizes of the mesh axis that shards the state
    --remat none,full      these policies
    --search               all of it: every mesh and policy, each with its largest batch

and the best that fits is in bold. A compilation takes minutes; its result is kept in ~/.cache/tiue_jax/plan and costs
nothing the second time. --json prints one object in place of the tables.

--mode quick (the default) stops the compiler where the program's schedule and memory are known, before it makes machine
code: the time is then one that no program beats, from the chip's published peaks. --mode full lets it end, which takes
tens of times as long, and has its own estimate of the time. Exit status: 0; 1 where nothing that was tried fits; 2 a
wrong setting, no libtpu, or a compiler that failed.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence

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
FSDP = (4, 8, 16)  # sizes of the mesh axis that a search tries, besides all chips


def choices(values: flags.FlagValues, settings: Settings, chips_count: int) -> tuple[list[int] | None, list[Choice]]:
    """The batches per chip to try, None to look for the largest, and each mesh and policy to try them with.

    In these the batch is the first to try. Raises ValueError naming the flag, its value and what was expected.
    """
    train, micro = settings.train, settings.distill.gradient_accumulation_steps
    batches: list[int] | None = None
    first = max(train.batch_size // chips_count // micro, 1) * micro
    if values.batch_per_chip not in (None, "max"):
        batches = [_integer("batch_per_chip", text) for text in values.batch_per_chip.split(",")]
        first = batches[0]
    elif values.batch_per_chip is None and not values.search:
        if train.batch_size % (chips_count * micro):
            raise ValueError(
                f"train.batch_size {train.batch_size} does not split over {chips_count} chips x {micro} micro-batches: "
                "give --batch_per_chip, a number or max"
            )
        batches = [first]
    for batch in batches or []:
        if batch % micro:
            raise ValueError(f"batch_per_chip must be a multiple of the {micro} micro-batches, got {batch}")
    if values.sampler:
        for name in ("fsdp", "remat", "search"):
            if given := getattr(values, name):
                raise ValueError(f"{name} is for the training step, got {given} with --sampler")
        return batches, [Choice(first, 1, None)]
    shape = sharding.mesh_shape(train.mesh_data, train.mesh_fsdp, chips_count)
    sizes, policies = [shape["fsdp"]], [settings.distill.remat]
    if values.search:
        sizes = [size for size in dict.fromkeys((*FSDP, chips_count)) if chips_count % size == 0]
        policies = list(REMAT_POLICIES)
    if values.fsdp:
        sizes = [chips_count if t == "all" else _integer("fsdp", t) for t in values.fsdp.split(",")]
    for size in sizes:
        if chips_count % size:
            raise ValueError(f"fsdp must divide the number of chips, {chips_count}, got {size}")
    if values.remat:
        policies = values.remat.split(",")
        if unknown := [policy for policy in policies if policy not in REMAT_POLICIES]:
            raise ValueError(f"remat must be among {list(REMAT_POLICIES)}, got {unknown[0]!r}")
    return batches, [Choice(first, size, policy) for policy in policies for size in sizes]


def run(argv: Sequence[str]) -> int:
    """Plans as the command line says. Returns the exit status. Errors: see main."""
    values = flags.FlagValues()
    flags.DEFINE_string("topology", None, "kind:shape of the TPU slice, such as v5e:4x4.", flag_values=values)
    flags.DEFINE_bool("sampler", False, "Plan the student's sampler, not the training step.", flag_values=values)
    flags.DEFINE_string("batch_per_chip", None, "Batches to try, with commas, or max.", flag_values=values)
    flags.DEFINE_string("fsdp", None, "Sizes of the mesh axis fsdp to try, with commas, or all.", flag_values=values)
    flags.DEFINE_string("remat", None, "Remat policies to try, with commas.", flag_values=values)
    flags.DEFINE_bool("search", False, "Try every mesh and policy, each with its largest batch.", flag_values=values)
    flags.DEFINE_enum("mode", "quick", MODES, "Whether the compiler is let to its end.", flag_values=values)
    flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=values)
    settings = config_flags.parse(argv, values, required=("config", "topology"))
    jax.config.update("jax_platforms", "cpu")  # a TPU that may be here is not touched
    chip, count = chips.parse(values.topology)
    batches, bases = choices(values, settings, count)
    planner = Planner(settings, values.topology, values.mode, values.sampler)
    micro = settings.distill.gradient_accumulation_steps
    tried: list[Measured] = []
    first = bases[0].batch_per_chip // micro
    for base in bases:

        def of(batch: int, base: Choice = base) -> Measured:
            return planner(dataclasses.replace(base, batch_per_chip=batch))

        try:
            if batches is None:
                found = search.largest_batch(lambda size: of(size * micro), first, chip.hbm_bytes)
                # what fits with one mesh and policy is the best guess for the next
                first = max([one.batch_per_chip // micro for one in found if one.fits], default=1)
                tried += found
            else:
                tried += [of(batch) for batch in batches]
        except ValueError as error:  # such as of a mesh that a parameter does not split over
            if base is bases[-1] and not tried:
                raise
            print(f"left out fsdp={base.fsdp}, remat={base.remat}: {error}", file=sys.stderr)
    images = None if values.sampler else settings.train.max_train_steps * settings.train.batch_size
    chosen = report.best(tried, chip)
    if values.json:
        print(json.dumps(report.as_json(chosen, tried, chip, images), indent=2))
    else:
        show(tried, chosen, settings, images)
    return 0 if chosen.fits else DOES_NOT_FIT


def show(tried: Sequence[Measured], chosen: Measured, settings: Settings, images: int | None) -> None:
    """Prints the tables, and what to give to train.py."""
    chip, count = chips.parse(chosen.topology)
    out = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    out.print(f"{chosen.topology}: what one of {count} chips holds\n")
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
    """Returns the exit status: 2 after one line on stderr about what was wrong."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        return run(argv)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:  # the last: the compiler failed
        print_error(error)
        return BAD_INPUT
