"""examples/emoji/train_lcm.py: the consistency loss."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiue_jax.schedule import LCM_STEPS, Schedule

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "emoji"))

import train_lcm

SCHEDULE = Schedule()
CLEAN = np.random.default_rng(0).standard_normal((1, 2, 2, 3), np.float32)  # the one image of this world
TEXT = jnp.zeros((64, 1, 1))


def network_of(scale):
    """The noise that is in the latents if the image is `scale` times CLEAN: the exact teacher for scale 1."""

    def network(latents, t, text):
        signal, sigma = SCHEDULE.signal_and_noise(t)
        return (latents - signal * scale * CLEAN) / sigma

    return network


def run(student, average, teacher=1.0, guidance_scale=3.0):
    loss_fn = train_lcm.make_loss(network_of, SCHEDULE, teacher, TEXT[:1], guidance_scale)
    latents = jnp.broadcast_to(CLEAN, (64, *CLEAN.shape[1:]))
    return loss_fn(jnp.float32(student), jnp.float32(average), (latents, TEXT), jax.random.key(0))


def test_the_exact_network_is_consistent():
    loss, metrics = run(1.0, 1.0)
    assert loss < 1e-4 and metrics["mse"] < 1e-5


def test_the_loss_pulls_the_student_to_the_average_and_never_moves_the_target():
    loss, _ = run(0.5, 1.0)
    assert loss > 0.05
    slope = jax.grad(lambda student: run(student, 1.0)[0])(0.5)
    assert slope < -1e-2
    assert jax.grad(lambda average: run(0.5, average)[0])(1.0) == 0


def test_the_solver_has_the_timesteps_of_the_sampler():
    timesteps = train_lcm.solver_timesteps(SCHEDULE)
    assert len(timesteps) == LCM_STEPS and timesteps[0] == 19 and timesteps[-1] == 999
    assert set(SCHEDULE.lcm_timesteps(4)) <= set(timesteps)
    skip, out = train_lcm.boundary(SCHEDULE, jnp.array([0, 19, 999]))
    np.testing.assert_allclose(skip.ravel()[0], 1, atol=1e-6)
    assert out.ravel()[2] == pytest.approx(1, abs=1e-4)
