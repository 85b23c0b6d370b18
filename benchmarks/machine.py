"""The machine and the versions that a figure was measured with, in one line."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path


def machine(*packages: str) -> str:
    """Returns the processors, the version of Python, the versions of these packages, and the date."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{os.cpu_count()} x {model}, Python {platform.python_version()}, {versions}, {datetime.date.today()}"
