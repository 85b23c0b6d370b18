"""The student's timesteps split over devices."""

import pytest
from jax.sharding import AbstractMesh

from tests import devices, tiny
from tiue_jax.pipeline import Pipeline, check_mesh_step
from tiue_jax.sampling.settings import Sampling


def test_four_devices_give_the_same_images_and_send_only_latents(tmp_path):
    settings = {"sampler": "tiue", "num_inference_steps": 4, "timestep_spacing": "trailing"}
    print(devices.run_program("split_timesteps", tiny.write_pipeline(tmp_path / "student", settings), devices=4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Sampling("tiue", 6), "num_inference_steps must be a multiple of the mesh axis step=4, got 6"),
        (Sampling("ddim", 8), "mesh_step is for sampler 'tiue', got 4 with 'ddim'"),
    ],
)
def test_settings_that_cannot_be_split_are_named(settings, message):
    mesh = AbstractMesh((1, 1, 4), ("data", "fsdp", "step"))
    check_mesh_step(Sampling("tiue", 8), mesh)
    with pytest.raises(ValueError, match=message):
        check_mesh_step(settings, mesh)


def test_a_mesh_of_more_devices_than_there_are_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="must multiply to the number of devices, 1, got data=-1, fsdp=1, step=2"):
        Pipeline.from_pretrained(tmp_path / "not looked at", mesh_step=2)
