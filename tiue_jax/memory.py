"""The memory of this machine, and a check before much of it is asked for."""

import contextlib
import os
from pathlib import Path

_LIMITS = (  # files with the limit of a container, in bytes or "max": of version 2 of control groups, and of version 1
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")


def total_bytes() -> int | None:
    """The memory that this process may use at most: that of the machine or of its container. None if unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a system without these names
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            found.append(int(path.read_text()))
    return min((size for size in found if size > 0), default=None)


def check_fits(what: str, needed: int) -> None:
    """Checks that something fits into the memory of this machine. Call it before anything is allocated.

    Args:
        what: names the arguments and what is made from them: "height 8 and width 8: an image".
        needed: a lower estimate, in bytes.

    Raises:
        ValueError: it cannot fit.
    """
    available = total_bytes()
    if available is not None and needed > available:
        raise ValueError(
            f"{what} needs at least {_readable(needed)} of memory, this machine has {_readable(available)}"
        )


def _readable(size: int) -> str:
    """A number of bytes with a unit."""
    if size >= 10**21:  # a float would lose what a very large integer says
        return "more than 1000 EB"
    value, unit = float(size), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"
