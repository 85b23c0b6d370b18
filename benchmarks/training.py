"""The training step of this package and of PyTorch: the same formulas and shapes on one machine, in float32.

    python benchmarks/training.py [--shapes emoji reduced] [--rounds 5] [--json FILE]

    emoji     the shipped teacher's UNet, 8 x 8 latents, batch of 16
    reduced   Stable Diffusion 2.1 at a fifth of its width, 64 x 64 latents, batch of 1

The step is that of docs/method.md: the student forward and backward, teacher and LoRA teacher with guidance, the LoRA
teacher forward and backward, both Adam updates, the moving average. PyTorch's step is in pytorch_training_step.py:
diffusers' UNet, peft's LoRA, torch's Adam, eager. tests/parity/test_train_step.py shows that both compute the same.
Weights are random; text embeddings are given. It runs on the CPU only, since PyTorch's step does not use a GPU.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machine import machine
from sampling import K
from shapes import TOKENS, shape
from side_by_side import Programs, Worker, alternate, table

from tiue_jax import sharding
from tiue_jax.models import functional
from tiue_jax.models.platforms import compiler_options
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.plan.flops import flops
from tiue_jax.schedule import Schedule
from tiue_jax.training.distill_settings import DistillConfig

OURS, EAGER = "tiue_jax", "PyTorch"
STEP = "training step"
CONFIG = DistillConfig(num_inference_steps=K, compute_dtype="float32", max_train_steps=1_000)


class Case(NamedTuple):
    """The size of a step."""

    unet: UNetConfig
    batch_size: int


CASES = {"emoji": Case(shape("emoji").unet, 16), "reduced": Case(shape("reduced").unet, 1)}


def texts(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Returns embeddings of the prompts [b l d] and of the null prompt [1 l d]."""
    rng, width = np.random.default_rng(0), case.unet.per_block("cross_attention_dim")[0]
    return rng.standard_normal((case.batch_size, TOKENS, width), np.float32), np.zeros((1, TOKENS, width), np.float32)


def distillation(case: Case) -> Any:
    import jax.numpy as jnp

    from tiue_jax.training import distill

    null = texts(case)[1]

    def encode_text(frozen: Any, batch: Any) -> Any:
        return batch["text"], jnp.asarray(null)

    return distill.Distillation(CONFIG, case.unet, Schedule(), encode_text)


def ours(case: Case) -> Programs:
    """Makes our step. Runs in a new process."""
    import jax

    from tiue_jax.training import distill, train_state

    params = functional.init(functional.abstract(UNet, case.unet)[1], seed=0)
    state = train_state.init_state(CONFIG, params, train_state.init_adapters(CONFIG, case.unet, seed=0))
    frozen = distill.Frozen(unet=jax.device_put(params))
    batch, key = {"text": jax.device_put(texts(case)[0])}, jax.random.key(0)
    options = compiler_options(jax.default_backend())
    step = jax.jit(distillation(case).train_step, donate_argnums=0, compiler_options=options)

    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])

    def run() -> np.ndarray:
        nonlocal state
        with jax.set_mesh(mesh):  # as in a run: only what the mesh's platform computes is traced
            state, metrics = step(state, frozen, batch, key)
        return np.asarray(metrics["loss"])

    return {STEP: run}


def theirs(case: Case) -> Programs:
    """Makes PyTorch's step. Runs in a new process."""
    import jax
    import torch
    from diffusers import UNet2DConditionModel
    from pytorch_training_step import PyTorchTrainingStep

    torch.manual_seed(0)
    teacher = UNet2DConditionModel.from_config(case.unet.to_dict()).eval()
    them = PyTorchTrainingStep(teacher, "epsilon", CONFIG)
    draws = distillation(case).draw(jax.random.key(0), case.batch_size)
    arrays = {name: torch.from_numpy(np.array(x)) for name, x in draws._asdict().items() if x is not None}
    arrays = {name: x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x for name, x in arrays.items()}
    text, null = (torch.from_numpy(x) for x in texts(case))
    null = null.expand_as(text)

    def run() -> np.ndarray:
        losses = them.gradients(arrays, text, null)
        them.step()
        return losses["loss"].detach().numpy()

    return {STEP: run}


def counted(case: Case) -> int:
    """Returns the FLOPs of our step."""
    import jax
    import jax.numpy as jnp

    from tiue_jax.training import distill, train_state

    params = functional.abstract(UNet, case.unet)[1]
    state = train_state.state_shapes(CONFIG, case.unet)
    batch = {"text": jax.ShapeDtypeStruct(texts(case)[0].shape, jnp.float32)}
    return flops(distillation(case).train_step, state, distill.Frozen(unet=params), batch, jax.random.key(0))


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Measures one shape. Prints its table and returns the figures."""
    case = CASES[name]
    workers = {OURS: Worker(ours, case), EAGER: Worker(theirs, case)}

    def say(text: str) -> None:
        print(f"  {name}: {text}", file=sys.stderr, flush=True)

    measured = alternate(workers, rounds, say)
    for worker in workers.values():
        worker.close()
    gflop = counted(case) / 1e9
    results = [
        {
            "library": library,
            "seconds": m.median,
            "rounds": m.seconds,
            "first_seconds": m.first,
            "peak_gib": m.peak / 2**30,
        }
        for (library, _), m in measured.items()
    ]
    rows = [
        (
            r["library"],
            f"{r['seconds']:.3f}",
            f"{gflop / r['seconds']:.0f}",
            f"{r['peak_gib']:.2f}",
            f"{r['first_seconds']:.1f}",
        )
        for r in results
    ]
    print(f"\n### {name}, batch of {case.batch_size}, {gflop:.1f} GFLOP a step as ours is written\n")
    print(table(("library", "seconds", "GFLOP/s", "peak GiB", "first step, seconds"), rows), "\n")
    pairs = zip(measured[EAGER, STEP].seconds, measured[OURS, STEP].seconds, strict=True)
    ratio = float(np.median([a / b for a, b in pairs]))
    print(f"- PyTorch eager's time over ours: {ratio:.2f}")
    return {"shape": name, "batch_size": case.batch_size, "gflop": gflop, "results": results, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    import jax

    if (backend := jax.default_backend()) != "cpu":
        sys.exit(f"error: PyTorch's step runs on the CPU, expected JAX_PLATFORMS=cpu, got the backend {backend}")
    versions = machine("jax", "torch", "diffusers", "peft")
    found = [compare(name, args.rounds) for name in args.shapes]
    print(f"\n{versions}; medians of {args.rounds} rounds, float32.")
    if args.json:
        args.json.write_text(json.dumps({"machine": versions, "shapes": found}, indent=1))


if __name__ == "__main__":
    main()
