"""TPU chips: their published peaks, and devices to compile for without the hardware.

Peaks are those of https://docs.cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e), read in November 2026. Some pages give the
bandwidth between chips as the sum of both directions. The table below has one direction: a chip can send so much while
it receives as much.
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
        kind: the name of the kind in a topology, such as "v5e".
        peak_flops: bfloat16 floating-point operations a second.
        hbm_bytes: bytes of memory that programs may use, according to the compiler: 15.75 GiB of the 16 GB of a v5e.
        hbm_bandwidth: bytes a second between the chip and its memory.
        ici_bandwidth: bytes a second that a chip sends to its neighbours over all its links.
        clock: cycles a second, computed as peak_flops over the operations of the matrix units in a cycle.
        topologies: shapes of one slice that can be rented, smallest first. The largest are left out.
        options: options of get_topology_desc that give one device for each chip.
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
        # 2 cores of 4 units of 128 x 128. "megacore" makes one device of the two cores, as on a real machine.
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


# With these, libtpu does not ask a metadata server about this machine, other processes may load it at the same time,
# and it does not warn that there is no TPU.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def parse(topology: str) -> tuple[Chip, int]:
    """Returns the kind of chip and the number of chips of a topology such as "v5e:4x4".

    Raises:
        ValueError: the topology is not known. The error lists the known ones.
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
    """Returns one device for each chip of a topology. Programs can be compiled for these devices, but not run on them.

    Raises:
        ValueError: the topology is not known.
        ModuleNotFoundError: libtpu, which contains the compiler, is not installed.
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
    """Returns the version of libtpu.

    Raises:
        ModuleNotFoundError: libtpu is not installed. The error says how to install it.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "compiling for a TPU needs libtpu, on a machine without one too: pip install 'tiue-jax[tpu]'"
        )
    return importlib.metadata.version("libtpu")
