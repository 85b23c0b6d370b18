"""TPU chips and NVIDIA GPUs: their published peaks, and devices to compile for without the hardware.

The peaks of TPUs are those of https://docs.cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e), read in November 2026. Those
of GPUs are from NVIDIA's datasheets: bfloat16 without sparsity, summed in float32. Some pages give the bandwidth
between chips as the sum of both directions. The table below has one direction: a chip can send so much while it
receives as much. GPUs are joined by NVLink, L4 and RTX 4090 by PCI Express 4.0 with 16 lanes.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from tiue_jax.plan import gpus


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
        kind: the name of the kind in a topology, such as "v5e".
        peak_flops: bfloat16 floating-point operations a second.
        hbm_bytes: bytes of memory that programs may use. According to a TPU's compiler, these are 15.75 GiB of the 16
            GB of a v5e. Of a GPU, JAX takes three quarters, or XLA_PYTHON_CLIENT_MEM_FRACTION in the environment.
        hbm_bandwidth: bytes a second between the chip and its memory.
        ici_bandwidth: bytes a second that a chip sends to its neighbours over all its links.
        clock: cycles a second, computed as peak_flops over the operations of the matrix units in a cycle. None for a
            GPU, whose compiler estimates no cycles.
        topologies: shapes of one slice that can be rented, smallest first. The largest are left out.
        options: options of get_topology_desc that give one device for each chip of a TPU slice.
        card: the description of a GPU; None for a TPU.
    """

    kind: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    clock: float | None
    topologies: tuple[str, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    card: gpus.Card | None = None


def _gib(size: float) -> int:
    return int(size * 2**30)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

_ONE_HOST = ("1", "2", "4", "8")  # GPUs

# peak and bandwidth to other GPUs
_GPUS = {
    "h100": (989.4e12, 450e9),
    "h200": (989.4e12, 450e9),
    "a100": (312e12, 300e9),
    "a100-40gb": (312e12, 300e9),
    "l4": (121e12, 31.5e9),
    "rtx4090": (165.2e12, 31.5e9),
}
MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def _gpu(kind: str) -> Chip:
    card, (peak, links) = gpus.CARDS[kind], _GPUS[kind]
    return Chip(kind, peak, card.memory_bytes, card.bandwidth, links, None, _ONE_HOST, card=card)


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
        *(_gpu(kind) for kind in gpus.CARDS),
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


# For CUDA 12 and 13: the compiler, JAX' side of it, NVIDIA's assembler, and cuDNN, whose version JAX asks for when it
# traces attention.
CUDA_WHEELS = (
    ("jax-cuda12-pjrt", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12", "nvidia-cudnn-cu12"),
    ("jax-cuda13-pjrt", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-cudnn-cu13"),
)


def parse(topology: str) -> tuple[Chip, int]:
    """Returns the kind of chip and the number of chips of a topology such as "v5e:4x4" or "h100:8".

    Raises:
        ValueError: the topology is not known, with a list of the known ones, or the environment has a wrong
            XLA_PYTHON_CLIENT_MEM_FRACTION.
    """
    kind, _, shape = topology.partition(":")
    if (chip := CHIPS.get(kind)) is None or shape not in chip.topologies:
        tpus = "; ".join(f"{chip.kind}: {', '.join(chip.topologies)}" for chip in CHIPS.values() if chip.card is None)
        cards = f"{', '.join(gpus.CARDS)}: {', '.join(_ONE_HOST)}"
        raise ValueError(f"unknown topology {topology!r}, expected kind:shape among {tpus}; {cards}")
    if chip.card is not None:
        chip = dataclasses.replace(chip, hbm_bytes=int(memory_fraction() * chip.hbm_bytes))
    count = 1
    for side in re.findall(r"\d+", shape):
        count *= int(side)
    return chip, count


def memory_fraction() -> float:
    """Returns the share of a GPU's memory that JAX takes, by XLA_PYTHON_CLIENT_MEM_FRACTION or by default 0.75.

    Raises:
        ValueError: the variable is not a number between 0 and 1.
    """
    text = os.environ.get(MEMORY_FRACTION) or "0.75"
    if not re.fullmatch(r"0?\.\d+|1(\.0*)?", text) or float(text) == 0:
        raise ValueError(f"{MEMORY_FRACTION} must be a number above 0 and at most 1, got {text!r}")
    return float(text)


def devices(topology: str) -> list[jax.Device]:
    """Returns one device for each chip of a topology. Programs can be compiled for these devices, but not run on them.

    Raises:
        ValueError: the topology is not known.
        ModuleNotFoundError: the wheels that contain the compiler are not installed.
    """
    chip, count = parse(topology)
    compiler_versions(chip)
    if chip.card is not None:  # partitions x hosts x GPUs of a host
        found = topologies.get_topology_desc(
            chip.kind, platform="cuda", topology=f"1x1x{count}", target_config=gpus.description(chip.card)
        ).devices
    else:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        options = chip.options | ({"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {})
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    assert len(found) == count, f"{topology}: {len(found)} devices"
    return list(found)


def compiler_versions(chip: Chip) -> list[str]:
    """Returns the versions of the wheels that compile for a kind of chip.

    Raises:
        ModuleNotFoundError: a wheel is not installed. The error says how to install it.
    """
    if chip.card is None:
        if importlib.util.find_spec("libtpu") is None:
            raise ModuleNotFoundError(
                "compiling for a TPU needs libtpu, on a machine without one too: pip install 'tiue-jax[tpu]'"
            )
        return [importlib.metadata.version("libtpu")]
    for wheels in CUDA_WHEELS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return [importlib.metadata.version(wheel) for wheel in wheels]
    raise ModuleNotFoundError(
        f"compiling for a GPU needs {', '.join(CUDA_WHEELS[0])}, on a machine without one too: "
        "pip install 'tiue-jax[cuda-plan]'"
    )
