"""What suits the platform: one of several implementations of a function, and the options to compile a network with."""

from collections.abc import Callable
from typing import Any

import jax

_OPTIONS = {
    "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    "tpu": {
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    },
}


def run_for_platform(
    choose: Callable[[str], str], run: Callable[[Any], Callable[..., jax.Array]], *args: jax.Array
) -> jax.Array:
    """`run(kind)(*args)` where kind = `choose(platform)` of "tpu", "gpu" or "cpu"; one kind is "xla", for all others.

    The platform is that of the ambient mesh (`jax.set_mesh`), which may be one that is only compiled for; without one
    it is whichever the program is lowered for.
    """
    if (device := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        return run(choose(device.platform))(*args)
    kinds = {"tpu": choose("tpu"), "cuda": choose("gpu"), "cpu": choose("cpu")}
    special = {platform: run(kind) for platform, kind in kinds.items() if kind != "xla"}
    return jax.lax.platform_dependent(*args, **special, default=run("xla")) if special else run("xla")(*args)


def compiler_options(platform: str) -> dict[str, str]:
    """What `jax.jit(compiler_options=...)` of a whole network takes on a platform.

    On a CPU XLA would begin with all that depends on parameters alone, every kernel cut, transposed or transformed, and
    hold it until it is needed: 2 GB more for Stable Diffusion 2.1's student, which the system must clear.

    On a TPU parameters are gathered while the chip computes. That is a v5e's default, and not a v6e's: of the training
    step there nothing at all was sent in the background.
    """
    return _OPTIONS.get(platform, {})
