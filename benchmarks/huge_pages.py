"""The speed of a training on the CPU with memory in huge pages, and without, side by side.

    python benchmarks/huge_pages.py [--steps 30] [--repeats 3]

XLA takes and gives back its memory at every step. By default each return goes to the kernel, and each take costs a page
fault for every 4 KiB. `HUGE` has glibc keep what it has, and ask for pages of 2 MiB. It must be set before Python
starts, and needs Linux with glibc 2.35 or newer, where /sys/kernel/mm/transparent_hugepage/enabled is "madvise" or
"always".

Each repeat trains the shipped emoji model with the recipe `emoji_tiue` in two processes, one after the other, after one
that fills the cache of compiled programs. Prints the median images per second of both, without the first rows of the
log.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import machine

from tiue_jax.training import events

ROOT = Path(__file__).parents[1]
HUGE = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
    "MALLOC_ARENA_MAX": "1",
}
LOG_EVERY = 5  # steps


def train(workdir: Path, steps: int, extra: dict[str, str]) -> float:
    """Trains in a process of its own. Returns the median of the images per second that it logged."""
    shutil.rmtree(workdir, ignore_errors=True)
    settings = {
        "max_train_steps": steps,
        "log_every": LOG_EVERY,
        "checkpoint_every": steps,
        "validation_prompts": "()",
        "health_images": 0,
    }
    flags = [f"--config.train.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "tiue_jax", "train", "--config=emoji_tiue", f"--workdir={workdir}", *flags]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **extra}, stdout=subprocess.DEVNULL)
    logged = events.read_run(workdir)["perf/images_per_sec"]
    return statistics.median([value for step, value in sorted(logged.items())][2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.steps < 4 * LOG_EVERY:
        parser.error(f"--steps must be at least {4 * LOG_EVERY}, got {args.steps}")
    rates: dict[str, list[float]] = {"plain": [], "huge pages": []}
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "cache")}
        train(Path(folder) / "run", 4 * LOG_EVERY, cache)
        for _ in range(args.repeats):
            for name, extra in (("plain", {}), ("huge pages", HUGE)):
                rates[name].append(train(Path(folder) / "run", args.steps, cache | extra))
                print(f"{name}: {rates[name][-1]:.3f} images/s", flush=True)
    plain, huge = (statistics.median(values) for values in rates.values())
    print(f"medians of {args.repeats}: {plain:.3f} and {huge:.3f} images/s, a ratio of {huge / plain:.2f}")
    print(machine("jax"))


if __name__ == "__main__":
    main()
