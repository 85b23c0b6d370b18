"""Compilations as numbers one decides by: times, images a second, days; as tables and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

from tiue_jax.plan.chips import Chip
from tiue_jax.plan.measure import Measured
from tiue_jax.training.settings import Settings


class Cost(NamedTuple):
    """What a program costs in time, from the chip's published peaks.

    Attributes:
        compute_seconds: FLOPs at the peak.
        memory_seconds: bytes accessed at the memory's bandwidth. Not part of step_seconds: XLA counts too many.
        collective_seconds: bytes between chips at the links' bandwidth.
        step_seconds: computation, and what is not sent in the background on top; or the links, where they take longer.
            In full mode computation is the longer of it and of the compiler's cycles, in which neither collectives nor
            Pallas kernels are.
        collective_share: of step_seconds, that the links are busy; computation may run at the same time.
        images_per_second: of all chips.
        days, chip_hours: for the run's images; None for a sampler.
    """

    compute_seconds: float
    memory_seconds: float
    collective_seconds: float
    step_seconds: float
    collective_share: float
    images_per_second: float
    days: float | None
    chip_hours: float | None


def cost(measured: Measured, chip: Chip, images: int | None = None) -> Cost:
    """The cost of a program, and of a run of so many images."""
    chips = measured.data * measured.fsdp
    compute = measured.flops_per_chip / chip.peak_flops
    collective = measured.collective_bytes / chip.ici_bandwidth
    memory = (measured.bytes_accessed or 0) / chip.hbm_bandwidth
    cycles = (measured.estimated_cycles or 0) / chip.clock
    waiting = (measured.collective_bytes - (measured.background_bytes or 0)) / chip.ici_bandwidth
    step = max(max(compute, cycles) + waiting, collective)
    rate = measured.batch_per_chip * chips / step
    days = None if images is None else images / rate / 86_400
    return Cost(
        compute, memory, collective, step, collective / step, rate, days, None if days is None else days * 24 * chips
    )


def best(tried: Sequence[Measured], chip: Chip) -> Measured:
    """The fastest that fits; of those within a hundredth of it the one that needs least memory. Else the smallest."""
    fitting = [measured for measured in tried if measured.fits]
    if not fitting:
        return min(tried, key=lambda measured: measured.peak_bytes)
    fastest = max(cost(measured, chip).images_per_second for measured in fitting)
    good = [measured for measured in fitting if cost(measured, chip).images_per_second >= 0.99 * fastest]
    return min(good, key=lambda measured: measured.peak_bytes)


def as_json(chosen: Measured, tried: Sequence[Measured], chip: Chip, images: int | None) -> dict[str, Any]:
    """The chosen program with its cost, and all that were tried."""
    one = lambda measured: dataclasses.asdict(measured) | cost(measured, chip, images)._asdict()
    return one(chosen) | {"tried": [one(measured) for measured in tried]}


def parts_table(measured: Measured) -> Table:
    """Memory of one chip, by what is in it."""
    rows = Table(box=None, pad_edge=False)
    rows.add_column("part")
    rows.add_column("per chip", justify="right")
    rest = measured.peak_bytes - measured.state_bytes - measured.temp_bytes
    contents = measured.parts | {"batch, outputs": max(rest, 0), "temporaries": measured.temp_bytes}
    for name, size in contents.items():
        rows.add_row(name, readable(size))
    rows.add_row("peak", readable(measured.peak_bytes), style="bold")
    rows.add_row("memory", readable(measured.hbm_bytes))
    return rows


def table(tried: Sequence[Measured], chosen: Measured, chip: Chip, images: int | None) -> Table:
    """One row for each program that was tried, the chosen one in bold."""
    rows = Table(box=None, pad_edge=False)
    names = "batch/chip data fsdp remat state peak fits TFLOP memory sent step links images/s".split()
    for name in [*names, *([] if images is None else ["days", "chip-hours"])]:
        rows.add_column(name, justify="right")
    for measured in tried:
        cells = [
            f"{measured.batch_per_chip}",
            f"{measured.data}",
            f"{measured.fsdp}",
            "" if measured.remat is None else str(measured.remat),
            readable(measured.state_bytes),
            readable(measured.peak_bytes),
            "yes" if measured.fits else "no",
            f"{measured.flops_per_chip / 1e12:.3g}",
        ]
        if measured.bytes_accessed is not None:  # else it does not fit
            its = cost(measured, chip, images)
            cells += [
                readable(measured.bytes_accessed),
                readable(measured.collective_bytes),
                f"{1e3 * its.step_seconds:.3g} ms",
                f"{100 * its.collective_share:.0f}%",
                f"{its.images_per_second:,.0f}",
            ]
            if its.days is not None and its.chip_hours is not None:
                cells += [f"{its.days:.2f}", f"{its.chip_hours:,.0f}"]
        rows.add_row(*cells, style="bold" if measured is chosen else None)
    return rows


def readable(size: float) -> str:
    """A number of bytes to three digits."""
    for unit, of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= of:
            return f"{size / of:.{2 if size < 10 * of else 1 if size < 100 * of else 0}f} {unit}"
    return f"{size:.0f} B"


def notes(chosen: Measured, chip: Chip, settings: Settings) -> list[str]:
    """What the tables leave to say: whether it fits, the settings of the chosen program, what the times are."""
    needs = f"{readable(chosen.peak_bytes)} of the {readable(chosen.hbm_bytes)} of a {chip.kind} chip"
    lines = [f"fits: {needs}" if chosen.fits else f"does not fit: it needs {needs}"]
    if not chosen.fits:
        return lines
    if chosen.program == "train":
        rows = chosen.batch_per_chip * chosen.data * chosen.fsdp
        asked = {
            "train.batch_size": (rows, settings.train.batch_size),
            "train.mesh_data": (chosen.data, settings.train.mesh_data),
            "train.mesh_fsdp": (chosen.fsdp, settings.train.mesh_fsdp),
            "distill.remat": (chosen.remat, settings.distill.remat),
        }
        given = " ".join(f"--config.{name}={new}" for name, (new, old) in asked.items() if new != old and old != -1)
        lines.append(f"settings: {given or 'as in the config'}")
        train = settings.train
        lines.append(
            f"days and chip-hours are for {train.max_train_steps:,} steps of {train.batch_size}, "
            f"{train.max_train_steps * train.batch_size:,} images in all"
        )
    bound = "the compiler's estimate" if chosen.mode == "full" else "a bound that this program does not beat"
    peaks = f"{chip.peak_flops / 1e12:.0f} TFLOP/s and {readable(chip.ici_bandwidth)}/s between chips"
    lines.append(f"step: {bound}, at {peaks}; links: the share of it that they are busy with what is sent")
    if chosen.collective_bytes:
        background, sent = readable(chosen.background_bytes or 0), readable(chosen.collective_bytes)
        lines.append(f"sent: {background} of {sent} while the chip computes, by the compiler's schedule")
    return lines
