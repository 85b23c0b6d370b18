"""Measures what a run's health panels and their numbers cost, as shares of the time of the training.

    python benchmarks/health.py [--only_count] [--batch_size 16] [--steps 12] [--rounds 5]

The shipped emoji model with the recipe `emoji_tiue`. It times the training step, and then a health panel (its programs,
the decoding of its images and the PNG file) and the numbers of a logged step. The share is that of the recipe, which
validates every 100 steps. Steps and panels alternate, so that other load on the machine affects both. Programs are
compiled before anything is timed. It also counts the operations of both, which no other load changes.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from machine import machine
from side_by_side import table

from tiue_jax import sharding
from tiue_jax.cli import config_flags
from tiue_jax.cli.validation import make_panel
from tiue_jax.data import corpus
from tiue_jax.models import functional
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.plan.flops import flops
from tiue_jax.training import compiled_step, health, train_state
from tiue_jax.training.metrics import MetricsWriter
from tiue_jax.training.preview import StudentSampler, load_teacher
from tiue_jax.training.settings import Settings
from tiue_jax.training.teacher import read_teacher
from tiue_jax.weights import pipeline_folder

LIMIT = 0.02  # of the time of the steps between two panels


def seconds(function: Any) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def count(batch_size: int, images: int) -> dict[str, float]:
    """Returns the GFLOP of a training step and of a health panel with its images. Nothing is compiled."""
    settings = read_settings(batch_size, images)
    mesh = sharding.make_mesh(1, -1)
    teacher = read_teacher(settings)
    program = compiled_step.make(settings, mesh, teacher.models, teacher.schedule, teacher.null_input_ids)
    distillation = program.distillation
    text = teacher.models.text_encoder.cfg
    noise = jax.ShapeDtypeStruct((images, *distillation.latent_shape), jnp.float32)
    embedding = jax.ShapeDtypeStruct((images, text.max_position_embeddings, text.hidden_size), jnp.float32)
    t, scale = jax.ShapeDtypeStruct((images,), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    vae_cfg = pipeline_folder.read_configs(teacher.folder).vae
    graph, vae = functional.abstract(AutoencoderKL, vae_cfg)

    def decode(vae: Any, latents: Any) -> Any:
        return functional.bind(graph, vae).decode(latents)

    state, frozen = program.state, program.frozen
    predict = flops(distillation.predict_noise, state.lora, frozen, noise, t, (embedding, embedding), scale)
    parts = {
        "student": flops(distillation.sample_student, state.params, noise, embedding),
        "teachers": 2 * health.BANDS * predict,
        "images": (1 + 2 * health.BANDS) * flops(decode, vae, noise),
    }
    step = flops(program.step, state, frozen, program.batch, jax.random.key(0))
    return {name: value / 1e9 for name, value in ({"step": step} | parts).items()}


def read_settings(batch_size: int, images: int) -> Settings:
    """Returns the settings of the emoji recipe with this batch size and number of images in a panel."""
    config = config_flags.load_recipe("emoji_tiue")
    config.train.update({"batch_size": batch_size, "health_images": images})
    return Settings.from_config(config.to_dict())


def measure(batch_size: int, steps: int, rounds: int, images: int) -> dict[str, Any]:
    """Returns the seconds of each part: lists by name."""
    settings = read_settings(batch_size, images)
    mesh = sharding.make_mesh(1, -1)
    teacher = read_teacher(settings)
    program = compiled_step.make(settings, mesh, teacher.models, teacher.schedule, teacher.null_input_ids)
    adapters = train_state.init_adapters(settings.distill, teacher.models.unet.cfg, 0)
    state = program.init_state(teacher.load_student(program.state.params), adapters)
    frozen = teacher.load_frozen(program.frozen)
    prompts = corpus.open_prompts("emoji", None, "train", 0.0).read(range(batch_size))
    batch = sharding.place_rows({"input_ids": teacher.tokenize(prompts)}, batch_size, mesh)
    key = program.make_key(0)
    began = time.perf_counter()
    step = program.trace().lower().compile()
    compiled = {"the training step": time.perf_counter() - began}
    panel = make_panel(settings, teacher, program, frozen)
    compiled["the health panel"] = panel.compile_seconds
    sampler = StudentSampler(load_teacher(teacher.folder, settings), settings)
    values = {"grad_norm": 2.0, "lora_grad_norm": 2.0}

    def run_steps() -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, frozen, batch, key)
        jax.block_until_ready(metrics)

    with tempfile.TemporaryDirectory() as folder, MetricsWriter(Path(folder)) as writer:
        number = 0

        def make_one() -> None:
            nonlocal number
            number += 1
            found = panel(state, frozen)
            writer.scalars(number, found.scalars)
            writer.image(number, "health", health.picture(sampler.decode(found.latents), found.rows))

        def log() -> None:
            for _ in range(100):
                writer.scalars(1, health.clipped_share(values, 1.0))

        run_steps()
        make_one()
        measured: dict[str, list[float]] = {"step": [], "panel": [], "log": []}
        for _ in range(rounds):
            measured["step"].append(seconds(run_steps) / steps)
            measured["panel"].append(seconds(make_one))
            measured["log"].append(seconds(log) / 100)
    return {"seconds": measured, "compile_seconds": compiled, "settings": settings.to_dict()["train"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12, help="steps that are timed in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=8, help="of the panel, train.health_images")
    parser.add_argument("--only_count", action="store_true", help="count operations, and measure no time")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    counted = count(args.batch_size, args.images)
    every = read_settings(args.batch_size, args.images).train.validation_every
    panel = sum(counted.values()) - counted["step"]
    text = ", ".join(f"{name} {value:.2f}" for name, value in counted.items())
    print(f"GFLOP: {text}; a panel every {every} steps is {panel / (every * counted['step']):.2%} of the training")
    if args.only_count:
        return
    found = measure(args.batch_size, args.steps, args.rounds, args.images)
    medians = {name: statistics.median(values) for name, values in found["seconds"].items()}
    log_every = found["settings"]["log_every"]
    shares = {
        "panel": medians["panel"] / (every * medians["step"]),
        "log": medians["log"] / (log_every * medians["step"]),
    }
    rows = [
        (f"a training step, batch of {args.batch_size}", f"{medians['step']:.3f}", ""),
        (
            f"a health panel of {args.images} images, every {every} steps",
            f"{medians['panel']:.3f}",
            f"{shares['panel']:.2%}",
        ),
        (f"the numbers of a logged step, every {log_every}", f"{medians['log']:.6f}", f"{shares['log']:.4%}"),
    ]
    print(table(("what", "seconds", "share of the training time"), rows))
    whole = sum(shares.values())
    print(
        f"\nin all {whole:.2%} of the training time; the limit is {LIMIT:.0%}: {'met' if whole < LIMIT else 'NOT met'}"
    )
    for name, value in found["compile_seconds"].items():
        print(f"compiling {name}: {value:.0f} s")
    print(f"{machine('jax')}; medians of {args.rounds} rounds of {args.steps} steps, float32")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine("jax"), **found}, indent=1))


if __name__ == "__main__":
    main()
