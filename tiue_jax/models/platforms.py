"""Choices by platform: the implementation of a function, and the compiler options of a network."""

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.extend.backend import get_backend

# `with target_capability((9, 0)):` around tracing says that a program is for NVIDIA GPUs of this compute capability,
# whichever GPUs this process has.
target_capability = jax.make_user_context(None)

_OPTIONS = {
    "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    "tpu": {
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    },
}


def leave_out_missing_tpu() -> None:
    """Tells jax to use the CPU if libtpu is installed, and the machine has no TPU. Call it before jax has devices.

    Otherwise libtpu prints five lines of errors. Nothing is changed if the user chose platforms, or if plug-ins for
    GPUs are installed.
    """
    if jax.config.jax_platforms or "JAX_FORCE_TPU_INIT" in os.environ:  # type: ignore[attr-defined]
        return
    is_installed = "TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu") is not None
    has_gpu_plugin = importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(group="jax_plugins")
    if is_installed and not has_gpu_plugin and not tpu_devices():
        jax.config.update("jax_platforms", "cpu")


def tpu_devices(root: Path = Path("/")) -> list[Path]:
    """The files of this machine's TPUs: /dev/accel0 up to TPU v4, and /dev/vfio/0 since TPU v5."""
    vfio = (path for path in (root / "dev" / "vfio").glob("*") if path.name != "vfio")  # that one is no device
    return sorted([*(root / "dev").glob("accel*"), *vfio])


def run_for_platform(
    choose: Callable[[str], str], run: Callable[[Any], Callable[..., jax.Array]], *args: jax.Array
) -> jax.Array:
    """Calls the implementation of a function that fits the platform.

    The platform is that of the ambient mesh (`jax.set_mesh`), whose devices may be only compiled for. Without an
    ambient mesh, it is the platform for which the program is lowered.

    Args:
        choose: the name of the implementation for a platform "tpu", "gpu" or "cpu". "xla" is an implementation that
            runs on all platforms.
        run: the implementation with a name, a function of `args`.
        args: the arguments of the function.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return run(choose(device.platform))(*args)
    kinds = {"tpu": choose("tpu"), "cuda": choose("gpu"), "cpu": choose("cpu")}
    special = {platform: run(kind) for platform, kind in kinds.items() if kind != "xla"}
    if not special:
        return run("xla")(*args)
    return jax.lax.platform_dependent(*args, **special, default=run("xla"))


def loops_are_slow() -> bool:
    """Whether `lax.scan` over a whole network should be unrolled.

    That is so on CPUs, where XLA's code of the same network took three times as long inside a loop (jax 0.10.2). The
    platform is that of the ambient mesh. Without one, the answer is no.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "cpu"


def cuda_capability() -> tuple[int, int] | None:
    """The compute capability of the NVIDIA GPUs that the traced program is for, such as (9, 0) of an H100.

    It is that of `target_capability`, and otherwise the least of this process' GPUs. None without an NVIDIA GPU.
    """
    if target_capability.value is not None:
        return target_capability.value
    return _attached_capability()


@functools.cache
def _attached_capability() -> tuple[int, int] | None:
    """The least compute capability of the NVIDIA GPUs of this process; None without one."""
    if "cuda" not in get_backend().platform_version:
        return None
    major, minor = min(tuple(map(int, gpu.compute_capability.split("."))) for gpu in jax.local_devices())
    return major, minor


def compiler_options(platform: str) -> dict[str, str]:
    """The `compiler_options` of `jax.jit` for a whole network on a platform.

    - CPU: by default XLA first computes everything that depends on parameters alone, such as kernels that are cut,
      transposed or transformed, and keeps it. For the student of Stable Diffusion 2.1 that takes 2 GB more.
    - TPU: gather parameters while the chip computes. That is the default for a v5e but not for a v6e, which gathered
      nothing in the background in the training step.
    """
    return _OPTIONS.get(platform, {})
