"""preview.py: the images of student and teacher, their layout, and that nothing stays on the devices."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import tiny
from tiue_jax import images
from tiue_jax.models.unet import UNet
from tiue_jax.pipeline import Pipeline
from tiue_jax.sampling.settings import Sampling
from tiue_jax.training.distill_settings import DistillConfig
from tiue_jax.training.preview import GRID_PIXELS, Preview, StudentSampler, load_teacher, side_by_side
from tiue_jax.training.settings import DataConfig, ModelConfig, Settings, TrainConfig

PROMPTS = ("a red apple", "b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("preview") / "teacher")


def on_devices() -> int:
    return sum(x.nbytes for x in jax.live_arrays())


def test_images_are_the_pipelines_and_nothing_stays_on_the_devices(folder):
    train = TrainConfig(
        seed=3, validation_prompts=PROMPTS, validation_num_inference_steps=2, validation_guidance_scale=3.0
    )
    distill = DistillConfig(
        num_inference_steps=2, timestep_spacing="trailing", compute_dtype="float32", negative_prompt="a pear"
    )
    settings = Settings(ModelConfig(str(folder)), DataConfig("p.txt"), train, distill)
    before = on_devices()
    teacher = load_teacher(folder, settings)
    preview, sampler = Preview(teacher, settings), StudentSampler(teacher, settings)
    del teacher
    params = tiny.random_params(UNet, tiny.UNET, 7)
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    assert on_devices() - before < whole / 20
    first, distance = preview(sampler, params)
    again, _ = preview(sampler, params)
    np.testing.assert_array_equal(first, again)
    assert on_devices() - before < whole / 20

    pipe = Pipeline.from_pretrained(folder)
    of_teacher = pipe(
        PROMPTS, seed=3, sampler="ddim", num_inference_steps=2, guidance_scale=3.0, negative_prompt="a pear"
    )
    sampling = Sampling("tiue", 2, timestep_spacing="trailing")
    student = dataclasses.replace(pipe, unet=pipe.unet._replace(params=params), sampling=sampling)
    of_student = student(PROMPTS, seed=3)
    np.testing.assert_array_equal(first, side_by_side(of_student, of_teacher))
    assert distance == images.distance(of_student, of_teacher) > 0


def test_images_are_of_the_size_that_is_trained(folder):
    train = TrainConfig(validation_prompts=PROMPTS, validation_num_inference_steps=1)
    distill = DistillConfig(num_inference_steps=2, compute_dtype="float32", latent_size=6)
    settings = Settings(ModelConfig(str(folder)), DataConfig("p.txt"), train, distill)
    teacher = load_teacher(folder, settings)
    preview, sampler = Preview(teacher, settings), StudentSampler(teacher, settings)
    grid, _ = preview(sampler, tiny.random_params(UNet, tiny.UNET, 7))
    black = np.zeros((len(PROMPTS), 12, 12, 3), np.uint8)
    assert grid.shape == side_by_side(black, black).shape


def test_each_row_of_students_is_above_its_teachers():
    shades = np.arange(10, dtype=np.uint8)[:, None, None, None]
    size = (10, GRID_PIXELS, GRID_PIXELS, 3)
    grid = side_by_side(np.broadcast_to(shades, size), np.broadcast_to(100 + shades, size))
    step = GRID_PIXELS + 2
    centres = grid[GRID_PIXELS // 2 :: step, GRID_PIXELS // 2 :: step, 0]
    white = [255] * 6
    expected = [[*range(8)], [*range(100, 108)], [8, 9, *white], [108, 109, *white]]
    assert centres.tolist() == expected
