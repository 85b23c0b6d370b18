"""NVIDIA GPUs: what their compiler must know about a card, so that programs are compiled without one.

The numbers are those of XLA's descriptions of these cards, where there is one: github.com/openxla/xla, in the folder
xla/backends/gpu/target_config/specs, read in November 2026. XLA has none of the L4 and of the RTX 4090. Theirs are from
NVIDIA's "Ada GPU architecture" whitepaper, version 2.01, from the CUDA programming guide's table of compute capability
8.9, and, for the bytes of memory, from what the driver says of such a card.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Card:
    """One kind of card.

    Attributes:
        name: the name that its driver gives.
        capability: compute capability, major and minor.
        cores: streaming multiprocessors.
        units: float32 units of a core.
        threads: threads that a core holds, at most.
        shared_bytes: bytes of shared memory of a core.
        block_bytes: bytes of shared memory that a block may ask for.
        l2_bytes: bytes of the level 2 cache.
        memory_bytes: bytes of memory, as the driver gives it.
        bandwidth: bytes a second between the card and its memory.
        clock_ghz: cycles in a nanosecond.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    units: int
    threads: int
    shared_bytes: int
    block_bytes: int
    l2_bytes: int
    memory_bytes: int
    bandwidth: int
    clock_ghz: float


CARDS = {
    # h100_sxm.txtpb, h200.txtpb
    "h100": Card(
        "NVIDIA H100 80GB HBM3",
        (9, 0),
        cores=132,
        units=128,
        threads=2048,
        shared_bytes=233_472,
        block_bytes=232_448,
        l2_bytes=50 * 2**20,
        memory_bytes=84_942_979_072,
        bandwidth=3_352_320_000_000,
        clock_ghz=1.98,
    ),
    "h200": Card(
        "NVIDIA H200 141GB HBM3e",
        (9, 0),
        cores=132,
        units=128,
        threads=2048,
        shared_bytes=233_472,
        block_bytes=232_448,
        l2_bytes=50 * 2**20,
        memory_bytes=151_397_597_184,
        bandwidth=4_800_000_000_000,
        clock_ghz=1.98,
    ),
    # a100_sxm_80.txtpb, a100_sxm_40.txtpb
    "a100": Card(
        "NVIDIA A100-SXM4-80GB",
        (8, 0),
        cores=108,
        units=64,
        threads=2048,
        shared_bytes=167_936,
        block_bytes=166_912,
        l2_bytes=40 * 2**20,
        memory_bytes=85_100_068_864,
        bandwidth=2_039_040_000_000,
        clock_ghz=1.41,
    ),
    "a100-40gb": Card(
        "NVIDIA A100-SXM4-40GB",
        (8, 0),
        cores=108,
        units=64,
        threads=2048,
        shared_bytes=167_936,
        block_bytes=166_912,
        l2_bytes=40 * 2**20,
        memory_bytes=42_331_013_120,
        bandwidth=1_555_200_000_000,
        clock_ghz=1.41,
    ),
    # the whitepaper; 23,034 MiB and 24,563 MiB by the driver
    "l4": Card(
        "NVIDIA L4",
        (8, 9),
        cores=58,
        units=128,
        threads=1536,
        shared_bytes=102_400,
        block_bytes=101_376,
        l2_bytes=48 * 2**20,
        memory_bytes=23_034 * 2**20,
        bandwidth=300_000_000_000,
        clock_ghz=2.04,
    ),
    "rtx4090": Card(
        "NVIDIA GeForce RTX 4090",
        (8, 9),
        cores=128,
        units=128,
        threads=1536,
        shared_bytes=102_400,
        block_bytes=101_376,
        l2_bytes=72 * 2**20,
        memory_bytes=24_563 * 2**20,
        bandwidth=1_008_000_000_000,
        clock_ghz=2.52,
    ),
}

CUDNN = (9, 10)  # the version that the program is compiled for


def description(card: Card) -> str:
    """Returns the text of XLA's message `GpuTargetConfigProto` for a card."""
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_block_optin": card.block_bytes,
        "shared_memory_per_core": card.shared_bytes,
        "threads_per_core_limit": card.threads,
        "core_count": card.cores,
        "fpus_per_core": card.units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
        "memory_bandwidth": card.bandwidth,
        "l2_cache_size": card.l2_bytes,
        "clock_rate_ghz": card.clock_ghz,
        "device_memory_size": card.memory_bytes,
    }
    major, minor = card.capability
    device = "\n".join(f"  {name}: {value}" for name, value in fields.items())
    return f"""gpu_device_info {{
{device}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}
device_description_str: "{card.name}"
"""
