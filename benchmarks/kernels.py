"""The kernels that a program spends its time in, from a profile by `jax.profiler`."""

import collections
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from side_by_side import table

SHOWN = 10
_CONTAINERS = ("while", "call", "conditional")  # their time is that of the kernels inside
_HEADER = ("kernel", "seconds", "share", "calls")


class Kernel(NamedTuple):
    """All calls of one kernel in a profile."""

    name: str
    seconds: float
    calls: int


def kernels(run: Callable[[], Any], folder: Path | None = None) -> list[Kernel]:
    """Profiles one call of `run`, which was called before, so that it is compiled. Returns its kernels, slowest first.

    Args:
        run: computes with jax.
        folder: keeps the profile, which TensorBoard and xprof open. None keeps nothing.

    Raises:
        RuntimeError: the profile has no kernel.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory(prefix="kernels.") as aside:
        with jax.profiler.trace(str(folder or aside), profiler_options=options):
            jax.block_until_ready(run())
        newest = max(Path(folder or aside).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        return read(newest)


def read(path: Path) -> list[Kernel]:
    """Reads the kernels of a file `.xplane.pb`. Errors as `kernels`."""
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    on_gpu = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    seconds, calls = collections.Counter[str](), collections.Counter[str]()
    for plane in on_gpu or planes:
        for line in plane.lines:
            if on_gpu and not line.name.startswith("Stream"):  # other lines sum the kernels up
                continue
            for event in line.events:
                name = event.name
                is_kernel = on_gpu or "hlo_op" in dict(event.stats)
                if is_kernel and not name.startswith(("end:", *_CONTAINERS)):
                    seconds[name] += event.duration_ns / 1e9
                    calls[name] += 1
    if not seconds:
        raise RuntimeError(f"{path}: no kernel in the profile, expected some in {[plane.name for plane in planes]}")
    return [Kernel(name, taken, calls[name]) for name, taken in seconds.most_common()]


def summary(found: list[Kernel], shown: int = SHOWN) -> str:
    """Returns a table of the slowest kernels, with a row for the sum of the others."""
    whole = sum(kernel.seconds for kernel in found)
    others = found[shown:]
    rest = Kernel(f"{len(others)} others", sum(k.seconds for k in others), sum(k.calls for k in others))
    rows = [
        (kernel.name[:80], f"{kernel.seconds:.6f}", f"{kernel.seconds / whole:.1%}", str(kernel.calls))
        for kernel in [*found[:shown], *([rest] if others else [])]
    ]
    return table(_HEADER, rows)
