"""Compares what a GPU computes with what the CPU of the same machine computes, from the same weights and draws.

    python benchmarks/gpu_parity.py [--tiny] [--json FILE]

    images       the shipped student's images: float32, float32 with exact products, bfloat16; the CPU's are float32
    step         losses and gradients of one training step of the emoji recipe, float32 with exact products
    attention    every implementation of models/attention.py, forward and backward, at Stable Diffusion's shapes, in
                 bfloat16; the CPU's is the plain softmax in float32

The CPU computes in a process of its own, at the same time. "float32" is as JAX computes it by default: a GPU may round
the factors of products to TF32. Errors are relative: root mean squares of difference over reference. Prints a table
after each part, and ends with status 1 if an error is above its limit.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import table

PARTS = ("images", "step", "attention")
SEED, ROWS = 0, 4
PROMPTS = ["a red apple", "a dog face", "a sunflower", "a rocket"]
# Rows, heads, queries, keys and width of a head: Stable Diffusion 1.5 has heads of 40, 80 and 160, and 2.1 of 64.
SHAPES = (
    (2, 8, 4096, 4096, 40),
    (2, 8, 4096, 77, 40),
    (2, 8, 1024, 1024, 80),
    (2, 8, 1024, 77, 80),
    (2, 8, 256, 256, 160),
    (2, 8, 256, 77, 160),
    (2, 5, 4096, 4096, 64),
    (2, 5, 4096, 77, 64),
)
TINY_SHAPES = ((1, 2, 16, 16, 40), (1, 2, 16, 7, 64), (1, 1, 4, 7, 160))
# Of relative errors. bfloat16 has 8 bits; benchmarks/precision.py measured 1.5e-2 for the sampler on a CPU.
LIMITS = {"images, float32": 2e-2, "images, exact products": 1e-3, "images, bfloat16": 1e-1}
STEP_LIMIT, ATTENTION_LIMIT = 1e-3, 2e-2


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Returns the root mean square of the difference over that of `want`."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-30))


def images(dtype: str, precision: str | None) -> np.ndarray:
    """Returns images [n h w 3] of the shipped student, as floats in 0 to 255."""
    import jax

    from tiue_jax.pipeline import Pipeline

    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
        pipe = Pipeline.from_pretrained("emoji-tiue", dtype)
        return np.stack([np.asarray(image) for image in pipe(PROMPTS, seed=SEED)]).astype(np.float32)


def step(tiny: bool) -> dict[str, np.ndarray]:
    """Returns losses and gradients of one training step, by name."""
    import jax
    from shapes import shape
    from training import CONFIG, Case, distillation, texts

    from tiue_jax.models import functional
    from tiue_jax.models.unet import UNet
    from tiue_jax.training import distill, train_state

    case = Case(shape("tiny" if tiny else "emoji").unet, ROWS)
    params = functional.init(functional.abstract(UNet, case.unet)[1], seed=SEED)
    adapters = train_state.init_adapters(CONFIG, case.unet, seed=SEED)
    state = train_state.init_state(CONFIG, params, adapters)
    make = distillation(case)
    draws = make.draw(jax.random.key(SEED), ROWS)
    with jax.default_matmul_precision("highest"):
        gradients = jax.jit(make.gradients)
        grads, lora_grads, losses = gradients(state, distill.Frozen(unet=params), {"text": texts(case)[0]}, draws)
    found = {f"loss: {name}": np.asarray(x) for name, x in losses.items() if name.startswith("loss")}
    leaves = jax.tree.leaves_with_path({"student": grads, "LoRA": lora_grads})
    return found | {f"gradient: {jax.tree_util.keystr(path)}": np.asarray(x) for path, x in leaves}


def attention(tiny: bool, reference: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the results and the gradients of attention, by shape and implementation."""
    import jax
    import jax.numpy as jnp

    from tiue_jax.models import attention

    kinds = ("xla", "chunked", "cudnn") if jax.default_backend() == "gpu" else ("xla", "chunked")
    kinds = ("xla",) if reference else kinds
    for b, heads, n, m, width in TINY_SHAPES if tiny else SHAPES:
        rng = np.random.default_rng([n, m, width])
        lengths = (n, m, m, n)
        # Rounded to bfloat16 here, so that both devices start from the same numbers.
        rounded = [jnp.asarray(rng.standard_normal((b, heads, x, width), np.float32), jnp.bfloat16) for x in lengths]
        *inputs, cotangent = [x.astype(jnp.float32 if reference else jnp.bfloat16) for x in rounded]
        for kind in kinds:
            if kind == "cudnn" and width > attention.CUDNN_WIDTH:
                continue

            @jax.jit
            def both(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> Any:
                out, pull = jax.vjp(attention.attend, q, k, v)
                return out, *pull(cotangent)

            with attention.implementation(kind):
                found = both(*inputs, cotangent)
            for name, x in zip(("output", "gradient of q", "of k", "of v"), found, strict=True):
                yield f"{b}x{heads}x{n}x{m}x{width}|{kind}|{name}", np.asarray(x.astype(jnp.float32))


def results(part: str, tiny: bool, reference: bool) -> dict[str, np.ndarray]:
    """Returns the results of this process' device for one of PARTS."""
    if part == "images":
        found = {"exact products": images("float32", "highest")}
        if not reference and not tiny:
            found |= {"float32": images("float32", None), "bfloat16": images("bfloat16", None)}
        return found
    return step(tiny) if part == "step" else dict(attention(tiny, reference))


def compare(part: str, got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> list[tuple[str, float, float]]:
    """Returns rows of what is compared, its largest error, and the limit."""
    if part == "images":
        exact = want["exact products"]
        return [(f"images, {how}", error(x, exact), LIMITS[f"images, {how}"]) for how, x in got.items()]
    rows: dict[str, tuple[float, float]] = {}
    for name, x in got.items():
        if part == "step":
            row, reference, limit = name if name.startswith("loss") else "gradients, the worst array", name, STEP_LIMIT
        else:
            shape, kind, what = name.split("|")
            row, reference, limit = f"{kind}, {shape}", f"{shape}|xla|{what}", ATTENTION_LIMIT
        # an array that is zero but for rounding has no relative error
        largest = float(np.abs(want[reference]).max())
        found = error(x, want[reference]) if largest > 1e-6 else float(np.abs(x).max())
        before, _ = rows.get(row, (0.0, limit))
        rows[row] = float(np.maximum(before, found)), limit  # NaN is the worst
    return [(row, found, limit) for row, (found, limit) in rows.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to rehearse the script")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)  # the process of the CPU: folder for results
    args = parser.parse_args()
    if args.reference:
        for part in PARTS:
            np.savez(args.reference / "unfinished.npz", **results(part, args.tiny, True))
            (args.reference / "unfinished.npz").rename(args.reference / f"{part}.npz")
        return 0
    with tempfile.TemporaryDirectory(prefix="parity.") as folder:
        command = [sys.executable, __file__, "--reference", folder, *(["--tiny"] if args.tiny else [])]
        with subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}) as cpu:
            try:
                return report(Path(folder), cpu, args)
            finally:
                cpu.kill()


def wait_for(file: Path, cpu: subprocess.Popen[bytes]) -> None:
    """Waits until the process of the CPU has written a file. Ends this process if that one failed."""
    while not file.exists():
        with contextlib.suppress(subprocess.TimeoutExpired):
            if cpu.wait(0.2) and not file.exists():
                sys.exit(f"error: the process of the CPU ended with status {cpu.returncode}")


def report(folder: Path, cpu: subprocess.Popen[bytes], args: argparse.Namespace) -> int:
    """Computes on this process' device, and prints the table of each part. Returns the exit status."""
    import jax
    from machine import machine

    print(f"{jax.devices()[0].device_kind} beside the CPU; {machine('jax', 'jaxlib')}", flush=True)
    figures, failed = {}, False
    for part in PARTS:
        file = folder / f"{part}.npz"
        if args.tiny:  # one after the other: on the CPU the second finds the programs of the first in the cache
            wait_for(file, cpu)
        got = results(part, args.tiny, False)
        wait_for(file, cpu)
        with np.load(file) as want:
            rows = compare(part, got, dict(want))
        figures[part] = rows
        failed |= any(not found <= limit for _, found, limit in rows)  # NaN is a failure, too
        cells = [(row, f"{x:.1e}", f"{limit:.0e}", "" if x <= limit else "FAILED") for row, x, limit in rows]
        print(f"\n### {part}\n\n{table(('what', 'relative error', 'limit', 'result'), cells)}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
