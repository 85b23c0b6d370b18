"""The training step of a recipe on one GPU: images a second, share of the rate of products, memory beside the plan.

    python benchmarks/gpu_training.py [--config sd21_tiue] [--batch_sizes 8 16] [--rounds 5] [--kernels] [--json FILE]
    python benchmarks/gpu_training.py --tiny      # a tiny model, to rehearse the program

Weights and token ids are random. "plan" is the peak that `tiue plan` computes, here from the program that the card
runs. "of a product's rate" is the step's FLOPs a second over those of one large matrix product in the same dtype.
Prints the row of a batch size as soon as it is measured.
"""

import argparse
import dataclasses
import importlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernels import kernels, summary
from machine import machine
from product import product_side
from shapes import shape
from side_by_side import medians, table

from tiue_jax import sharding
from tiue_jax.models import functional
from tiue_jax.models.clip import CLIPTextConfig
from tiue_jax.models.presets import Configs
from tiue_jax.plan import architecture, flops
from tiue_jax.schedule import Schedule
from tiue_jax.training import compiled_step, memory_table, step_inputs, train_state
from tiue_jax.training.settings import Settings

HEADER = (
    *("batch", "TFLOP a step", "seconds", "images/s", "of a product's rate", "peak GB", "plan GB"),
    *("arguments GB", "compiled in, s", "loss"),
)


def read_settings(config: str, batch_size: int) -> Settings:
    """Returns the settings of a recipe for one device."""
    recipe = importlib.import_module(f"tiue_jax.recipes.{config}").get_config()
    recipe.train.batch_size, recipe.train.mesh_data, recipe.train.mesh_fsdp = batch_size, 1, 1
    return Settings.from_config(recipe.to_dict())


def tiny_models() -> architecture.Architecture:
    tiny = shape("tiny")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=100, bos_token_id=98, eos_token_id=99, **sizes)
    return architecture.Architecture(Configs(tiny.unet, tiny.vae, text, Schedule()))


def product_rate(dtype: Any) -> float:
    """Returns the FLOPs a second of one large matrix product."""
    side = product_side()
    matrix = jnp.ones((side, side), dtype)
    multiply = jax.jit(lambda a: a @ a)
    return 2 * side**3 / medians({"product": lambda: jax.block_until_ready(multiply(matrix))}, 9)["product"]


class Step:
    """A compiled training step with its state on the device. `run` makes one step, and returns the loss."""

    def __init__(self, settings: Settings, models: architecture.Architecture):
        mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
        teacher, config = models.pipeline, settings.distill
        frozen = step_inputs.abstract_models(teacher.unet, teacher.text_encoder, models.tiny_vae, models.clip)
        program = compiled_step.make(settings, mesh, frozen, teacher.schedule)
        began = time.perf_counter()
        traced = program.trace()
        self.flops = flops.count(traced.jaxpr)
        self.compiled = traced.lower().compile()
        self.compile_seconds = time.perf_counter() - began

        adapters = train_state.init_adapters(config, teacher.unet, seed=0)
        wanted = {name: shapes for name, shapes in program.frozen._asdict().items() if shapes}
        weights = {name: functional.init(getattr(frozen, name).params, seed=0) for name in wanted}
        student = sharding.place(weights["unet"], sharding.of(program.state.params))
        self.state = program.init_state(student, adapters)
        cast = {
            name: jax.tree.map(lambda x, like: jax.device_put(x.astype(like.dtype), like.sharding), tree, wanted[name])
            for name, tree in weights.items()
        }
        self.frozen = program.frozen._replace(**cast)
        rng = np.random.default_rng(0)
        vocabulary = teacher.text_encoder.vocab_size
        self.batch = {
            name: jax.device_put(rng.integers(0, vocabulary, like.shape, np.int32), like.sharding)
            for name, like in program.batch.items()
        }
        self.key = program.make_key(0)
        arrays = memory_table.arrays(program.state, program.frozen)
        self.state_bytes = sum(part.bytes_per_device for part in memory_table.parts(arrays))

    def run(self) -> jax.Array:
        self.state, metrics = self.compiled(self.state, self.frozen, self.batch, self.key)
        return metrics["loss"]

    @property
    def planned_bytes(self) -> int:
        """Arguments, temporaries and outputs, without the outputs that take the place of an argument."""
        memory = self.compiled.memory_analysis()
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs


def peak_bytes() -> int | None:
    """Returns the peak of the device's memory since the start of this process. None if the platform does not say."""
    statistics_of_memory = jax.local_devices()[0].memory_stats() or {}
    return statistics_of_memory.get("peak_bytes_in_use")


def measure(step: Step, batch_size: int, rounds: int, rate: float) -> dict[str, Any]:
    """Runs a step that was compiled. Returns its figures."""
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        loss = float(step.run())
        seconds.append(time.perf_counter() - began)
    taken = statistics.median(seconds[1:])
    return {
        "batch_size": batch_size,
        "flops": step.flops,
        "seconds": taken,
        "images_per_second": batch_size / taken,
        "of_product": step.flops / taken / rate,
        "peak_bytes": peak_bytes(),
        "planned_bytes": step.planned_bytes,
        "state_bytes": step.state_bytes,
        "compile_seconds": step.compile_seconds,
        "loss": loss,
    }


def row(found: dict[str, Any]) -> tuple[str, ...]:
    peak = found["peak_bytes"]
    return (
        *(str(found["batch_size"]), f"{found['flops'] / 1e12:.3g}", f"{found['seconds']:.3f}"),
        *(f"{found['images_per_second']:.2f}", f"{found['of_product']:.2f}"),
        *("" if peak is None else f"{peak / 1e9:.2f}", f"{found['planned_bytes'] / 1e9:.2f}"),
        *(f"{found['state_bytes'] / 1e9:.2f}", f"{found['compile_seconds']:.1f}", f"{found['loss']:.3g}"),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="sd21_tiue", help="name of a recipe")
    parser.add_argument("--tiny", action="store_true", help="tiny networks instead of the recipe's models")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kernels", action="store_true", help="profile a step of each batch size, too")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    results, failed = [], False
    for batch_size in args.batch_sizes:
        settings = read_settings(args.config, batch_size)
        if args.tiny:
            distill = dataclasses.replace(settings.distill, latent_size=None, clip_weight=0.0)
            settings = dataclasses.replace(settings, distill=distill)
        models = tiny_models() if args.tiny else architecture.read(settings)
        rate = product_rate(settings.distill.compute_dtype)
        step = Step(settings, models)
        found = measure(step, batch_size, args.rounds, rate)
        results.append(found)
        failed |= not np.isfinite(found["loss"])
        print(
            f"\n### training step of {args.config}, batch of {batch_size}\n\n{table(HEADER, [row(found)])}", flush=True
        )
        if args.kernels:
            print(f"\n### kernels of the training step, batch of {batch_size}\n")
            print(summary(kernels(step.run)), flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
        del step  # its memory, before the next batch size
    print(f"\n{jax.devices()[0].device_kind}, {machine('jax', 'jaxlib', 'flax')}; medians of {args.rounds} steps.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
