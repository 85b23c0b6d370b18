"""The machine and the versions that a figure was measured with, in one line."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
from pathlib import Path


def machine(*packages: str) -> str:
    """Returns the processors, the versions of Python and of those packages that are installed, and the date."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    parts = [f"{os.cpu_count()} x {model}", f"Python {platform.python_version()}"]
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            parts.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join([*parts, str(datetime.date.today())])
