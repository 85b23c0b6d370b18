"""Turns measured programs into times, images a second and days, as tables and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

from tiue_jax.plan.chips import Chip
from tiue_jax.plan.measure import Measured
from tiue_jax.training.settings import Settings


class Cost(NamedTuple):
    """The time of a program, computed from the published peaks of the chip or GPU.

    Attributes:
        compute_seconds: FLOPs over the peak.
        memory_seconds: bytes accessed over the memory's bandwidth. It is not part of step_seconds, because XLA counts
            too many bytes.
        collective_seconds: bytes sent over the bandwidth between chips.
        step_seconds: the time of computation plus the time of what is not sent in the background, or
            collective_seconds if that is longer. In full mode the time of computation is the longer one of
            compute_seconds and the compiler's estimate, which contains neither collectives nor Pallas kernels.
        collective_share: collective_seconds over step_seconds. The chip may compute during this time.
        images_per_second: images of all chips together.
        days, chip_hours: time of the whole run; None for a sampler.
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
    """Returns the cost of a program, and of a run with this number of images."""
    chips = measured.data * measured.fsdp
    compute = measured.flops_per_chip / chip.peak_flops
    collective = measured.collective_bytes / chip.ici_bandwidth
    memory = (measured.bytes_accessed or 0) / chip.hbm_bandwidth
    cycles = (measured.estimated_cycles or 0) / (chip.clock or 1)  # a GPU has neither
    waiting = (measured.collective_bytes - (measured.background_bytes or 0)) / chip.ici_bandwidth
    step = max(max(compute, cycles) + waiting, collective)
    rate = measured.batch_per_chip * chips / step
    days = None if images is None else images / rate / 86_400
    return Cost(
        compute_seconds=compute,
        memory_seconds=memory,
        collective_seconds=collective,
        step_seconds=step,
        collective_share=collective / step,
        images_per_second=rate,
        days=days,
        chip_hours=None if days is None else days * 24 * chips,
    )


def best(tried: Sequence[Measured], chip: Chip) -> Measured:
    """Returns the best of the programs that were tried.

    It is the fastest one that fits. Of those within 1% of its speed, it is the one that needs the least memory. If
    none fits, it is the one that needs the least memory of all.
    """
    fitting = [measured for measured in tried if measured.fits]
    if not fitting:
        return min(tried, key=lambda measured: measured.peak_bytes)
    fastest = max(cost(measured, chip).images_per_second for measured in fitting)
    good = [measured for measured in fitting if cost(measured, chip).images_per_second >= 0.99 * fastest]
    return min(good, key=lambda measured: measured.peak_bytes)


def as_json(chosen: Measured, tried: Sequence[Measured], chip: Chip, images: int | None) -> dict[str, Any]:
    """Returns the fields of `Measured` and `Cost` of the chosen program, and those of all programs under "tried"."""

    def fields(measured: Measured) -> dict[str, Any]:
        return dataclasses.asdict(measured) | cost(measured, chip, images)._asdict()

    return fields(chosen) | {"tried": [fields(measured) for measured in tried]}


def parts_table(measured: Measured) -> Table:
    """Returns a table of the memory of one chip by its contents."""
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
    """Returns a table with a row for each program that was tried, the chosen one in bold."""
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
        if measured.bytes_accessed is not None:  # None: the program does not fit
            seconds = cost(measured, chip, images)
            cells += [
                readable(measured.bytes_accessed),
                readable(measured.collective_bytes),
                f"{1e3 * seconds.step_seconds:.3g} ms",
                f"{100 * seconds.collective_share:.0f}%",
                f"{seconds.images_per_second:,.0f}",
            ]
            if seconds.days is not None and seconds.chip_hours is not None:
                cells += [f"{seconds.days:.2f}", f"{seconds.chip_hours:,.0f}"]
        rows.add_row(*cells, style="bold" if measured is chosen else None)
    return rows


def readable(size: float) -> str:
    """Returns a number of bytes as text with three digits."""
    for unit, unit_bytes in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= unit_bytes:
            value = size / unit_bytes
            decimals = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:.{decimals}f} {unit}"
    return f"{size:.0f} B"


def notes(chosen: Measured, chip: Chip, settings: Settings) -> list[str]:
    """Returns lines to print below the tables: if the program fits, its settings, and the meaning of the times."""
    limit = f"{readable(chosen.hbm_bytes)} of a {chip.kind} chip"
    if chip.card is not None:
        whole = readable(chip.card.memory_bytes)
        limit = f"{readable(chosen.hbm_bytes)} that JAX takes of the {whole} of a {chip.kind}"
    needs = f"{readable(chosen.peak_bytes)} of the {limit}"
    lines = [f"fits: {needs}" if chosen.fits else f"does not fit: it needs {needs}"]
    if chip.card is not None:
        lines.append("memory: without the workspaces of cuDNN and cuBLAS, which are chosen on a card")
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
    bound = "the compiler's estimate" if chosen.estimated_cycles is not None else "the shortest possible time"
    peaks = f"{chip.peak_flops / 1e12:.0f} TFLOP/s and {readable(chip.ici_bandwidth)}/s between chips"
    lines.append(f"step: {bound}, at {peaks}; links: the share of it in which chips send to each other")
    if chosen.collective_bytes:
        background, sent = readable(chosen.background_bytes or 0), readable(chosen.collective_bytes)
        lines.append(f"sent: {background} of {sent} while the chip computes, by the compiler's schedule")
    return lines
