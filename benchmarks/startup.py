"""Time from the start of the process to the first image, and to the first training step, by stage.

    python benchmarks/startup.py [--models emoji-tiue] [--repeats 5] [--dtype float32]
    python benchmarks/startup.py --models --training emoji reduced --repeats 1
    python benchmarks/startup.py --tree ../earlier      # another checkout of this repository, in turn with this one

Each repeat starts two processes: the first with an empty cache of compiled programs ("cold"), the second with the cache
of the first ("warm"). With `--tree` the processes of both trees take turns. Prints the median of each stage over the
repeats, in seconds of the wall clock and of the processor (all threads). If other programs use the machine, the second
are the useful ones, and the ratios of two trees more than either.

The first image does what `tiue sample` does:

    start      Python and the imports of this file
    imports    everything that `tiue sample` imports
    backend    jax.devices()
    load       Pipeline.from_pretrained: tokenizer, structure of the models, weights
    compile    tracing, lowering and compiling the sampler, or reading it from the cache
    run        one image, with the transfers

The training step is that of training.py, and does not run:

    imports    everything that the step imports
    models     the structure of the models and of the state
    trace      from Python to a jaxpr
    lower      from the jaxpr to StableHLO
    compile    XLA, or reading the program from the cache
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
sys.path[:0] = [os.environ.get("STARTUP_TREE", str(ROOT)), str(Path(__file__).parent)]

Stages = dict[str, tuple[float, float]]  # seconds of the wall clock and of the processor


class _Clock:
    """Counts the seconds of each stage from the end of the one before."""

    def __init__(self, spawned: float):
        self.stages: Stages = {"start": (time.time() - spawned, time.process_time())}
        self._last = time.perf_counter(), time.process_time()

    def done(self, stage: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.stages[stage] = now[0] - self._last[0], now[1] - self._last[1]
        self._last = now


def first_image(model: str, dtype: str, clock: _Clock) -> None:
    """Runs all stages up to one image in this process."""
    import sample  # noqa: F401 (its imports are measured)

    clock.done("imports")
    import jax

    from tiue_jax import compile_cache
    from tiue_jax.pipeline import Pipeline

    compile_cache.enable()
    jax.devices()
    clock.done("backend")
    pipe = Pipeline.from_pretrained(model, dtype)
    jax.block_until_ready(pipe.unet.params)
    clock.done("load")
    pipe(["a red apple"])
    clock.done("compile")
    pipe(["a red apple"])
    clock.done("run")
    both, run = clock.stages["compile"], clock.stages["run"]
    clock.stages["compile"] = both[0] - run[0], both[1] - run[1]


def first_step(case_name: str, clock: _Clock) -> None:
    """Runs all stages up to a compiled training step in this process."""
    import training

    clock.done("imports")
    import jax
    import jax.numpy as jnp

    from tiue_jax import compile_cache, sharding
    from tiue_jax.models import functional
    from tiue_jax.models.platforms import compiler_options
    from tiue_jax.models.unet import UNet
    from tiue_jax.training import distill, train_state

    compile_cache.enable()
    case = training.CASES[case_name]
    params = functional.abstract(UNet, case.unet)[1]
    state = train_state.state_shapes(training.CONFIG, case.unet)
    batch = {"text": jax.ShapeDtypeStruct(training.texts(case)[0].shape, jnp.float32)}
    options = compiler_options(jax.default_backend())
    train_step = training.distillation(case).train_step
    key = jax.random.key(0)
    clock.done("models")
    step = jax.jit(train_step, donate_argnums=0, compiler_options=options)
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):  # as in a run
        traced = step.trace(state, distill.Frozen(unet=params), batch, key)
    clock.done("trace")
    lowered = traced.lower()
    clock.done("lower")
    lowered.compile()
    clock.done("compile")


def spawn(what: str, name: str, dtype: str, cache: str, tree: Path) -> Stages:
    """Measures one start in a new process."""
    command = [sys.executable, __file__, "--measure", what, name, dtype, str(time.time())]
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": str(tree), "STARTUP_TREE": str(tree)}
    return json.loads(subprocess.check_output(command, env=env))


def row(about: str, repeats: list[Stages], clock: int) -> str:
    """Returns a row of the table: medians of the stages, and of their sum."""
    medians = [statistics.median(stages[stage][clock] for stages in repeats) for stage in repeats[0]]
    whole = statistics.median(sum(stage[clock] for stage in stages.values()) for stages in repeats)
    return f"| {about} | " + " | ".join(f"{seconds:.2f}" for seconds in (*medians, whole)) + " |"


def compare(what: str, name: str, dtype: str, trees: list[Path], count: int) -> None:
    """Measures one model or training step in all trees, in turn. Prints its table."""
    found: dict[tuple[Path, str], list[Stages]] = {(tree, which): [] for tree in trees for which in ("cold", "warm")}
    for _ in range(count):
        with tempfile.TemporaryDirectory(prefix="startup.") as caches:
            for which in ("cold", "warm"):
                for number, tree in enumerate(trees):
                    found[tree, which].append(spawn(what, name, dtype, f"{caches}/{number}", tree))
    stages = next(iter(found.values()))[0]
    print(f"\n| {what} | tree | cache | clock | " + " | ".join(stages) + " | all |")
    print("|---|---|---|---|" + "---:|" * (len(stages) + 1))
    for (tree, which), repeats in found.items():
        for clock, clock_name in enumerate(("wall", "processor")):
            print(row(f"{name} | {tree.resolve().name} | {which} | {clock_name}", repeats, clock), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["emoji-tiue"], help="as sample.py --model")
    parser.add_argument("--training", nargs="*", default=[], help="shapes of training.py")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the first image")
    parser.add_argument("--tree", type=Path, action="append", default=[], help="another checkout; may be repeated")
    parser.add_argument("--measure", nargs=4, metavar=("WHAT", "NAME", "DTYPE", "SPAWNED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, name, dtype, spawned = args.measure
        clock = _Clock(float(spawned))
        first_image(name, dtype, clock) if what == "first image" else first_step(name, clock)
        print(json.dumps(clock.stages))
        return 0
    from machine import machine

    trees = [*args.tree, ROOT]
    print(f"{machine('jax', 'jaxlib', 'flax', 'numpy')}; {args.repeats} repeats, {args.dtype}")
    print(f"load average at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for model in args.models:
        compare("first image", model, args.dtype, trees, args.repeats)
    for case in args.training:
        compare("training step", case, "float32", trees, args.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
