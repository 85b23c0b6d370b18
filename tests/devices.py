"""Starts programs on several simulated devices of this machine."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(devices: int) -> dict[str, str]:
    """The environment of a process with this many simulated CPU devices, which imports from this repository."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # after those of conftest.py
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}


def run_program(name: str, *args: str | Path, devices: int) -> str:
    """Runs tests/programs/<name>.py on this many simulated CPU devices. Returns its output; shows its errors."""
    argv = [sys.executable, "-m", f"tests.programs.{name}", *map(str, args)]
    done = subprocess.run(argv, cwd=ROOT, env=environment(devices), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
