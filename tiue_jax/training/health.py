"""The health panel of a run: what the student and the two teachers make of the same noise, as images and as numbers.

The student's losses say little. This module asks, for fixed prompts and fixed noise, what drives the student: how far
the two teachers are apart, and what each would make of the student's noisy latents. docs/health.md shows healthy and
sick runs, and says what to do.

Two programs are compiled before the first step: the student, and the LoRA teacher, which is the teacher if its adapters
are zeros. They run on all devices, without gradients. benchmarks/health.py measures their share of the time.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageDraw, ImageFont

from tiue_jax import images, sharding
from tiue_jax.models.functional import Params
from tiue_jax.models.lora import ADAPTERS
from tiue_jax.models.platforms import compiler_options
from tiue_jax.schedule import Schedule
from tiue_jax.training import losses
from tiue_jax.training.compiled_step import TrainProgram
from tiue_jax.training.distill import Batch, Frozen
from tiue_jax.training.distill_settings import DistillConfig
from tiue_jax.training.settings import Settings
from tiue_jax.training.train_state import TrainState

BANDS = 3  # of timesteps, each with the timestep in its middle
PIXELS = 96  # smaller images are enlarged to about this size
_MARGIN = 110  # pixels left of the images, for the names of the rows


class Health(NamedTuple):
    """The result of a panel. The latents are those of the images that are shown.

    Attributes:
        scalars: by name, such as "health/z0_std". See docs/health.md.
        latents: float32 [rows n h w c], before the division by the VAE's scaling factor.
        rows: the name of each row, such as "teacher t=500".
    """

    scalars: dict[str, float]
    latents: np.ndarray
    rows: list[str]


class HealthPanel:
    """Examines the student of a run. All processes make it and call it together.

    Args:
        settings: of the run. `train.health_images` images of `train.validation_prompts` are examined, or more, so that
            they split over the devices.
        program: of the run.
        schedule: the teacher's noise schedule.
        columns: the columns of a batch of these prompts, such as {"input_ids": int32 [n l]}; see `prompts_of`.
        frozen: the teacher.

    Attributes:
        timesteps: int [3], at which the two teachers are compared.
        compile_seconds: how long the programs took to compile.
    """

    def __init__(
        self,
        settings: Settings,
        program: TrainProgram,
        schedule: Schedule,
        columns: Mapping[str, np.ndarray],
        frozen: Frozen,
    ):
        self.timesteps = band_timesteps(settings.distill)
        self._settings, self._distillation, self._mesh = settings, program.distillation, program.mesh
        shape = count_images(settings, program.mesh), *program.distillation.latent_shape
        rng = np.random.default_rng(settings.train.seed)
        by_row = sharding.batch_sharding(program.mesh)
        self._noise = sharding.place(rng.standard_normal(shape, np.float32), by_row)
        self._more_noise = sharding.place(rng.standard_normal(shape, np.float32), by_row)
        batch = sharding.place(dict(columns), by_row)
        began = time.monotonic()
        with jax.set_mesh(program.mesh):  # attention is chosen by the mesh's platform
            self._compile(program, frozen, batch)
            adapters = program.state.lora
            zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
            self._no_adapters = jax.jit(zeros, out_shardings=sharding.of(adapters))(adapters)
        self.compile_seconds = time.monotonic() - began
        self._of_teacher = self._sample_teacher(frozen, schedule)

    def _compile(self, program: TrainProgram, frozen: Frozen, batch: Batch) -> None:
        """Encodes the prompts, whose embeddings stay on the devices, and compiles the two programs of a panel."""
        distillation = self._distillation
        by_row, everywhere = sharding.batch_sharding(program.mesh), sharding.replicated(program.mesh)
        options = compiler_options(program.mesh.devices.flat[0].platform)
        jit = functools.partial(jax.jit, out_shardings=by_row, compiler_options=options)

        def encode(frozen: Frozen, batch: Batch) -> tuple[jax.Array, jax.Array]:
            text, null = distillation.encode_text(frozen, batch)
            return text, jnp.broadcast_to(null, text.shape)

        self._texts = jit(encode)(frozen, batch)
        rows = self._texts[0].shape[0]
        t = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)

        def predict(adapters: Any, frozen: Frozen, latents: Any, t: Any, texts: Any, scale: Any) -> jax.Array:
            return distillation.predict_noise(adapters, frozen, latents, jnp.broadcast_to(t, rows), texts, scale)

        traced = [
            jit(distillation.sample_student).trace(program.state.params, self._noise, self._texts[0]),
            jit(predict).trace(program.state.lora, program.frozen, self._noise, t, self._texts, scale),
        ]
        with ThreadPoolExecutor() as pool:  # on machines with many cores both at once
            self._student, self._predict = pool.map(jax.stages.Lowered.compile, [x.lower() for x in traced])

        schedule, shown = distillation.schedule, self._settings.train.health_images

        def compare(noisy: Any, teacher: Any, lora: Any, t: Any) -> tuple[list[jax.Array], dict[str, jax.Array]]:
            signal, sigma = schedule.signal_and_noise(jnp.broadcast_to(t, rows))
            return [(noisy - sigma * epsilon) / signal for epsilon in (teacher, lora)], _of_teachers(teacher, lora)

        # small programs, compiled when they are used first
        self._add_noise = jit(lambda latents, noise, t: schedule.add_noise(latents, noise, jnp.broadcast_to(t, rows)))
        self._compare = jax.jit(compare, out_shardings=(by_row, everywhere))
        self._add = jit(lambda x, epsilon, c, d: c * x + d * epsilon)
        self._gather = jax.jit(lambda rows: jnp.stack(rows)[:, :shown], out_shardings=everywhere)
        self._moments = jax.jit(_moments, out_shardings=everywhere)
        self._of_student = jax.jit(_of_student, out_shardings=everywhere)
        self._of_weights = jax.jit(_of_weights, out_shardings=everywhere)

    def __call__(self, state: TrainState, frozen: Frozen) -> Health:
        """Examines the weights of `state`. All processes must call it."""
        config = self._settings.distill
        epsilons, latents = self._student(state.params, self._noise, self._texts[0])
        numbers = self._of_student(epsilons, latents) | self._of_weights(state.params, state.ema, state.lora)
        rows = [latents]
        for timestep in self.timesteps:
            t = self._everywhere(np.int32(timestep))
            noisy = self._add_noise(latents, self._more_noise, t)
            teacher = self._epsilon(self._no_adapters, frozen, noisy, t, config.teacher_guidance_scale)
            lora = self._epsilon(state.lora, frozen, noisy, t, config.lora_guidance_scale)
            clean, of_teachers = self._compare(noisy, teacher, lora, t)
            numbers |= {f"{name}_t{timestep}": value for name, value in of_teachers.items()}
            rows += clean
        found = self._names(jax.device_get(numbers)) | self._of_teacher
        found["z0_std_ratio"] = found["z0_std"] / max(found["teacher_z0_std"], 1e-12)
        scalars = {f"health/{name}": value for name, value in found.items()}
        return Health(scalars, np.asarray(self._gather(rows)), row_names(self.timesteps))

    def _everywhere(self, value: np.generic) -> jax.Array:
        """A number on every device."""
        placed: jax.Array = sharding.place(value, sharding.replicated(self._mesh))
        return placed

    def _epsilon(self, adapters: Params, frozen: Frozen, latents: jax.Array, t: jax.Array, scale: float) -> jax.Array:
        """The noise that the LoRA teacher with these adapters predicts in latents z_t [b h w c]."""
        return self._predict(adapters, frozen, latents, t, self._texts, self._everywhere(np.float32(scale)))

    def _sample_teacher(self, frozen: Frozen, schedule: Schedule) -> dict[str, float]:
        """The mean and deviation of the latents that the teacher makes of the student's noise, with DDIM."""
        train = self._settings.train
        # predict_noise predicts the noise for every teacher
        form = dataclasses.replace(schedule, prediction_type="epsilon").closed_form(
            train.validation_num_inference_steps
        )
        x = self._noise
        for timestep, c, d in zip(form.timesteps, form.c, form.d, strict=True):
            t = self._everywhere(np.int32(timestep))
            epsilon = self._epsilon(self._no_adapters, frozen, x, t, train.validation_guidance_scale)
            x = self._add(x, epsilon, self._everywhere(np.float32(c)), self._everywhere(np.float32(d)))
        return {f"teacher_{name}": float(value) for name, value in self._moments(x).items()}

    def _names(self, numbers: Mapping[str, Any]) -> dict[str, float]:
        """Numbers by name. An array of one number for each output of the student has one name for each."""
        named: dict[str, float] = {}
        for name, value in numbers.items():
            if np.ndim(value):
                named |= {
                    f"{name}_t{t}": float(x) for t, x in zip(self._distillation.form.timesteps, value, strict=True)
                }
            else:
                named[name] = float(value)
        return named


def count_images(settings: Settings, mesh: jax.sharding.Mesh) -> int:
    """The number of images that a panel examines: `train.health_images`, rounded up to what the devices split."""
    parts = sharding.batch_parts(mesh)
    return -(-settings.train.health_images // parts) * parts


def prompts_of(settings: Settings, mesh: jax.sharding.Mesh) -> list[str]:
    """The prompts of a panel: those of the validation, repeated or cut to `count_images`."""
    prompts = settings.train.validation_prompts
    return [prompts[i % len(prompts)] for i in range(count_images(settings, mesh))]


def band_timesteps(config: DistillConfig) -> list[int]:
    """The middle of each third of the timesteps at which the teachers are compared: 180, 500 and 820 by default."""
    edges = np.linspace(config.min_timestep, config.max_timestep, BANDS + 1)
    return [int(t) for t in np.round((edges[:-1] + edges[1:]) / 2)]


def row_names(timesteps: Sequence[int]) -> list[str]:
    """The names of a panel's rows, from the top."""
    return ["student", *(f"{who} t={t}" for t in timesteps for who in ("teacher", "LoRA teacher"))]


def clipped_share(values: Mapping[str, float], max_grad_norm: float) -> dict[str, float]:
    """The share of each gradient's norm that clipping takes away, 0 to 1, from the metrics of a step."""
    return {
        f"health/{name}_clipped": max(0.0, 1 - max_grad_norm / values[name]) if values[name] > 0 else 0.0
        for name in ("grad_norm", "lora_grad_norm")
    }


def picture(shown: np.ndarray, rows: Sequence[str]) -> np.ndarray:
    """A panel as one image, uint8 [H W 3]: a row of images for each name, with the name at its left.

    Args:
        shown: uint8 [rows n h w 3].
        rows: the names.
    """
    _, count, height, _, _ = shown.shape
    upscale = max(1, PIXELS // height)
    grid = images.grid(shown.reshape(-1, *shown.shape[2:]), count, upscale=upscale)
    canvas = Image.new("RGB", (_MARGIN + grid.shape[1], grid.shape[0]), "white")
    canvas.paste(Image.fromarray(grid), (_MARGIN, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    step = height * upscale + 2
    for i, name in enumerate(rows):
        draw.text((4, i * step + step // 2), name.replace(" t=", "\nt = "), "black", font, anchor="lm")
    return np.asarray(canvas)


def _moments(latents: jax.Array) -> dict[str, jax.Array]:
    """The mean and the standard deviation of all elements of latents, float32 []."""
    return {"z0_mean": jnp.mean(latents), "z0_std": jnp.std(latents)}


def _of_student(epsilons: jax.Array, latents: jax.Array) -> dict[str, jax.Array]:
    """The numbers about the student's outputs [b k h w c] and its latents [b h w c]: float32 [] or [k]."""
    return _moments(latents) | {
        "output_kl": jax.vmap(lambda x: losses.kl(x[:, None], batch_size=1)[0], in_axes=1)(epsilons),
        "output_std": jnp.mean(jnp.std(epsilons, axis=(2, 3, 4)), axis=0),
    }


def _of_teachers(teacher: jax.Array, lora: jax.Array) -> dict[str, jax.Array]:
    """The numbers about the predictions of the two teachers at one timestep [b h w c]: float32 []."""
    teacher, lora = (x.reshape(x.shape[0], -1) for x in (teacher, lora))
    norms = jnp.linalg.norm(teacher, axis=1) * jnp.linalg.norm(lora, axis=1)
    return {
        "score_difference": jnp.sqrt(jnp.mean(jnp.square(teacher - lora))),
        "teachers_cosine": jnp.mean(jnp.sum(teacher * lora, axis=1) / jnp.maximum(norms, 1e-12)),
    }


def _of_weights(params: Params, average: Params, adapters: Params) -> dict[str, jax.Array]:
    """The numbers about the weights, the average and the adapters: float32 []."""
    leaves = jax.tree_util.tree_leaves_with_path(adapters)
    of_b = [leaf for path, leaf in leaves if any(getattr(part, "key", None) == ADAPTERS[1] for part in path)]
    difference = jax.tree.map(jnp.subtract, average, params)
    return {
        "lora_norm": optax.tree.norm(adapters),
        "lora_b_norm": optax.tree.norm(of_b),  # 0 before the first step
        "ema_distance": optax.tree.norm(difference) / jnp.maximum(optax.tree.norm(params), 1e-12),
    }
