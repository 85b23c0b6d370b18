"""The images that a run shows: the student's above the teacher's, for the same prompts and noise."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from tiue_jax import images
from tiue_jax.models import functional
from tiue_jax.pipeline import Pipeline
from tiue_jax.training.settings import Settings, student_config, student_sampling

GRID_COLUMNS = 8
GRID_PIXELS = 128  # smaller images are enlarged to about this size


class Preview:
    """Samples the run's validation prompts, on the devices of this process. The teacher's are sampled once, here.

    Between calls nothing stays on the devices, since training needs their memory. The text encoder and the VAE wait in
    the memory of the host.

    Args:
        folder: the teacher's pipeline folder.
        settings: of the run.
    """

    def __init__(self, folder: Path, settings: Settings):
        train = settings.train
        self._dtype = settings.distill.compute_dtype
        self._prompts, self._seed = list(train.validation_prompts), train.seed
        teacher = Pipeline.from_pretrained(folder, self._dtype, clip_skip=settings.model.clip_skip)
        teacher.unet = teacher.unet._replace(cfg=student_config(settings, teacher.unet.cfg))
        self._of_teacher = teacher(
            self._prompts,
            seed=self._seed,
            sampler="ddim",
            num_inference_steps=train.validation_num_inference_steps,
            guidance_scale=train.validation_guidance_scale,
            negative_prompt=settings.distill.negative_prompt if train.validation_guidance_scale > 1 else None,
        )
        self._student = dataclasses.replace(teacher, sampling=student_sampling(settings))
        for name in ("text_encoder", "vae"):
            part = getattr(self._student, name)
            setattr(self._student, name, part._replace(params=jax.device_get(part.params)))
        self._student.unet = self._student.unet._replace(params={})

    def __call__(self, unet: functional.Params) -> tuple[np.ndarray, float]:
        """Samples a student. Returns a grid, see `side_by_side`, and the distance to the teacher (images.distance).

        Args:
            unet: the student's parameters, numpy arrays.
        """
        graph = self._student.unet
        self._student.unet = graph._replace(params=functional.cast(unet, self._dtype))
        try:
            of_student = self._student(self._prompts, seed=self._seed)
        finally:
            self._student.unet = graph
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
