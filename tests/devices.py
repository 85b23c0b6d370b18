"""Processes of several devices on this machine."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many simulated CPU devices, which imports what is in this repository."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # and conftest.py's
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
