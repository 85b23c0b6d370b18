"""One function, computed by the implementation that suits the platform."""

from collections.abc import Callable
from typing import Any

import jax


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
