"""TPU chips: their published peaks, and topologies of them that exist without the hardware.

Peaks are those of https://docs.cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e), read in November 2026. Where the pages
give the interconnect in both directions, half of it is here: what a chip can send while it receives as much.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
        kind: as a topology names it.
        peak_flops: bfloat16 operations a second.
        hbm_bytes: memory that the compiler gives to programs: of 16 GB, on v5e, it says that 15.75 GiB are there.
        hbm_bandwidth: bytes a second.
        ici_bandwidth: bytes a second that a chip sends to its neighbours, over all its links.
        clock: cycles a second: the peak over the multiply-adds that its matrix units do in a cycle.
        topologies: those of one slice that can be rented and are not too large to name, smallest first.
        options: of get_topology_desc, so that there is one device for each chip.
    """

    kind: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    clock: float
    topologies: tuple[str, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _gib(size: float) -> int:
    return int(size * 2**30)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

CHIPS = {
    chip.kind: chip
    for chip in (
        # 2 cores of 4 units of 128 x 128; "megacore" makes the two one device, as on a real machine
        Chip(
            "v4",
            275e12,
            _gib(30.75),
            1200e9,
            300e9,
            275e12 / (2 * 8 * 128**2),
            _CUBES,
            {"chip_config_name": "megacore"},
        ),
        Chip("v5e", 197e12, _gib(15.75), 819e9, 200e9, 197e12 / (2 * 4 * 128**2), _FLAT),
        Chip("v5p", 459e12, _gib(95.74), 2765e9, 600e9, 459e12 / (2 * 8 * 128**2), _CUBES),
        Chip("v6e", 918e12, _gib(31.25), 1640e9, 400e9, 918e12 / (2 * 4 * 256**2), _FLAT),
    )
}


# libtpu asks nobody what machine this is, lets other processes load it too, and warns of nothing that is missing.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def parse(topology: str) -> tuple[Chip, int]:
    """The chip of a topology such as "v5e:4x4", and how many of them there are.

    Raises:
        ValueError: it is none, naming those that are known.
    """
    kind, _, shape = topology.partition(":")
    if (chip := CHIPS.get(kind)) is None or shape not in chip.topologies:
        known = "; ".join(f"{chip.kind}: {', '.join(chip.topologies)}" for chip in CHIPS.values())
        hint = "" if kind not in ("cpu", "gpu", "cuda", "rocm") else f": there is nothing to plan for a {kind.upper()}"
        raise ValueError(f"unknown topology {topology!r}{hint}, expected kind:shape among {known}")
    count = 1
    for side in re.findall(r"\d+", shape):
        count *= int(side)
    return chip, count


def devices(topology: str) -> list[jax.Device]:
    """Devices that stand for a topology's chips, which one can compile for but not run on.

    Raises:
        ValueError: see `parse`.
        ModuleNotFoundError: libtpu, which holds the compiler, is not installed.
    """
    chip, count = parse(topology)
    libtpu_version()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = chip.options | ({"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {})
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    assert len(found) == count, f"{topology}: {len(found)} devices"
    return list(found)


def libtpu_version() -> str:
    """The installed libtpu's. ModuleNotFoundError, saying what to install, where there is none."""
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "compiling for a TPU needs libtpu, on a machine without one too: pip install 'tiue-jax[tpu]'"
        )
    return importlib.metadata.version("libtpu")
