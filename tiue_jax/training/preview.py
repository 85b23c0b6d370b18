"""The images that a run shows: the student's above the teacher's, for the same prompts and noise."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiue_jax import images, sharding
from tiue_jax.models import functional
from tiue_jax.pipeline import Pipeline
from tiue_jax.training.settings import Settings, student_config, student_sampling

GRID_COLUMNS = 8
GRID_PIXELS = 128  # smaller images are enlarged to about this size


class StudentSampler:
    """Samples a run's student on the devices of this process, and decodes latents.

    Between calls nothing stays on the devices, since training needs their memory. The text encoder and the VAE wait in
    the memory of the host.

    Args:
        teacher: the teacher's pipeline, see `load_teacher`. It must not be used any more.
        settings: of the run.
    """

    def __init__(self, teacher: Pipeline, settings: Settings):
        self._dtype = settings.distill.compute_dtype
        self._pipeline = dataclasses.replace(teacher, sampling=student_sampling(settings))
        for name in ("text_encoder", "vae"):
            part = getattr(self._pipeline, name)
            setattr(self._pipeline, name, part._replace(params=jax.device_get(part.params)))
        self._pipeline.unet = self._pipeline.unet._replace(params={})
        self._mesh = sharding.make_mesh(devices=jax.local_devices())
        self._decode = jax.jit(self._to_images)

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """The shape [h w c] of the latents of an image."""
        return self._pipeline.latents_shape()

    def __call__(self, unet: functional.Params, prompts: Sequence[str], **arguments: Any) -> np.ndarray:
        """The student's images, uint8 [n h w 3].

        Args:
            unet: the student's parameters, numpy arrays.
            prompts, arguments: as for Pipeline.

        Raises:
            FloatingPointError: an image has values that are NaN or infinite.
        """
        graph = self._pipeline.unet
        self._pipeline.unet = graph._replace(params=functional.cast(unet, self._dtype))
        try:
            return self._pipeline(prompts, **arguments)
        finally:
            self._pipeline.unet = graph

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """The images of latents z_0 [m n h w c], uint8 [m n H W 3]. m times, n images are decoded at once."""
        count = latents.shape[1]
        rows = -(-count // self._mesh.size) * self._mesh.size
        filled = np.concatenate([latents, np.repeat(latents[:, -1:], rows - count, axis=1)], axis=1)
        params = jax.device_put(self._pipeline.vae.params, sharding.replicated(self._mesh))
        with jax.set_mesh(self._mesh):
            decoded = [
                np.asarray(self._decode(params, jax.device_put(part, sharding.batch_sharding(self._mesh))))
                for part in filled.astype(jnp.dtype(self._dtype))
            ]
        return np.stack(decoded)[:, :count]

    def _to_images(self, params: functional.Params, latents: jax.Array) -> jax.Array:
        """Latents [n h w c] as images, uint8 [n H W 3]."""
        vae = self._pipeline.vae
        decoded = vae.bind(params).decode(latents / vae.cfg.scaling_factor)
        return images.to_uint8(decoded.astype(jnp.float32))


def load_teacher(folder: Path, settings: Settings) -> Pipeline:
    """The pipeline of a run's teacher, for images of the size that is trained."""
    teacher = Pipeline.from_pretrained(folder, settings.distill.compute_dtype, clip_skip=settings.model.clip_skip)
    teacher.unet = teacher.unet._replace(cfg=student_config(settings, teacher.unet.cfg))
    return teacher


class Preview:
    """Samples the run's validation prompts. The teacher's images are sampled once, here.

    Args:
        teacher: the teacher's pipeline, see `load_teacher`.
        settings: of the run.

    Raises:
        FloatingPointError: an image of the teacher has values that are NaN or infinite.
        ValueError: the teacher cannot be sampled with these settings.
    """

    def __init__(self, teacher: Pipeline, settings: Settings):
        train = settings.train
        self._prompts, self._seed = list(train.validation_prompts), train.seed
        self._of_teacher = teacher(
            self._prompts,
            seed=self._seed,
            sampler="ddim",
            num_inference_steps=train.validation_num_inference_steps,
            guidance_scale=train.validation_guidance_scale,
            negative_prompt=settings.distill.negative_prompt if train.validation_guidance_scale > 1 else None,
        )

    def __call__(self, student: StudentSampler, unet: functional.Params) -> tuple[np.ndarray, float]:
        """Samples a student. Returns a grid, see `side_by_side`, and the distance to the teacher (images.distance).

        Args:
            student: of the run.
            unet: the student's parameters, numpy arrays.

        Raises:
            FloatingPointError: an image has values that are NaN or infinite.
        """
        of_student = student(unet, self._prompts, seed=self._seed)
        return side_by_side(of_student, self._of_teacher), images.distance(of_student, self._of_teacher)


def side_by_side(students: np.ndarray, teachers: np.ndarray) -> np.ndarray:
    """A grid of images, uint8 [h w 3]: each row of the student's above the row of the teacher's.

    Args:
        students: the student's images, uint8 [n h w 3].
        teachers: the teacher's images of the same prompts, uint8 [n h w 3].
    """
    columns = min(GRID_COLUMNS, len(students))
    rows = []
    for start in range(0, len(students), columns):
        for row in (students[start : start + columns], teachers[start : start + columns]):
            blank = np.full((columns - len(row), *row.shape[1:]), 255, np.uint8)
            rows += [row, blank]
    return images.grid(np.concatenate(rows), columns, upscale=max(1, GRID_PIXELS // students.shape[1]))
