"""Time from the start of the process to the first image, by stage, with an empty and a filled compilation cache.

    python benchmarks/startup.py [--models emoji-tiue] [--repeats 5] [--dtype float32]

Each repeat starts two processes that do the same as sample.py: the first with an empty cache of compiled programs
("cold"), the second with the cache of the first ("warm"). Prints the median of each stage over the repeats, in seconds
of the wall clock and of the processor (all threads). If other programs use the machine, the second are the useful ones.

    start      Python and the imports of this file
    imports    everything that sample.py imports
    backend    jax.devices()
    load       Pipeline.from_pretrained: tokenizer, structure of the models, weights
    compile    tracing, lowering and compiling the sampler, or reading it from the cache
    run        one image, with the transfers
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

STAGES = ("start", "imports", "backend", "load", "compile", "run")


def measure(model: str, dtype: str, spawned: float) -> None:
    """Runs all stages in this process. Prints their wall and processor seconds as JSON."""
    stages = [(time.time() - spawned, time.process_time())]
    since = time.perf_counter(), time.process_time()

    def done() -> None:
        nonlocal since
        now = time.perf_counter(), time.process_time()
        stages.append((now[0] - since[0], now[1] - since[1]))
        since = now

    import sample  # noqa: F401 (its imports are measured)

    done()
    import jax

    from tiue_jax import compile_cache
    from tiue_jax.pipeline import Pipeline

    compile_cache.enable()
    jax.devices()
    done()
    pipe = Pipeline.from_pretrained(model, dtype)
    jax.block_until_ready(pipe.unet.params)
    done()
    pipe(["a red apple"])
    first = time.perf_counter(), time.process_time()
    pipe(["a red apple"])
    second = time.perf_counter(), time.process_time()
    run = second[0] - first[0], second[1] - first[1]
    stages += [(first[0] - since[0] - run[0], first[1] - since[1] - run[1]), run]
    print(json.dumps(stages))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["emoji-tiue"], help="as sample.py --model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "DTYPE", "SPAWNED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        model, dtype, spawned = args.measure
        measure(model, dtype, float(spawned))
        return 0
    from machine import machine

    print(f"{machine('jax', 'jaxlib', 'flax', 'numpy')}; {args.repeats} repeats, {args.dtype}")
    print(f"load average at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print("| model | cache | clock | " + " | ".join(STAGES) + " | all |")
    print("|---|---|---|" + "---:|" * (len(STAGES) + 1))
    for model in args.models:
        found: dict[str, list[list[tuple[float, float]]]] = {"cold": [], "warm": []}
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory(prefix="startup.") as cache:
                for which in found:
                    command = [sys.executable, __file__, "--measure", model, args.dtype, str(time.time())]
                    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
                    found[which].append(json.loads(subprocess.check_output(command, env=env)))
        for which, repeats in found.items():
            for clock, name in enumerate(("wall", "processor")):
                medians = [statistics.median(stage[clock] for stage in stages) for stages in zip(*repeats, strict=True)]
                whole = statistics.median(sum(stage[clock] for stage in stages) for stages in repeats)
                row = " | ".join(f"{seconds:.2f}" for seconds in (*medians, whole))
                print(f"| {model} | {which} | {name} | {row} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
