import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import UNET
from tiue_jax import student
from tiue_jax.models import functional
from tiue_jax.models.unet import UNet
from tiue_jax.schedule import SPACINGS, Schedule


@pytest.fixture(scope="module")
def model():
    graphdef, shapes = functional.abstract(UNet, UNET)
    return graphdef, functional.init(shapes, 0)


def inputs(batch: int):
    rng = np.random.default_rng(batch)
    return rng.standard_normal((batch, 8, 8, 4), np.float32), rng.standard_normal((batch, 5, 8), np.float32)


def sequential(unet, noise, text, form):
    """The definition: one shared encoder pass, then DDIM steps one by one."""
    full = lambda t: jnp.full(noise.shape[:1], t)
    features = unet.encode(noise, full(form.timesteps[0]), text)
    x = noise
    for t, c, d in zip(form.timesteps, form.c, form.d, strict=True):
        x = float(c) * x + float(d) * unet.decode(features, full(t), text)
    return x


@pytest.mark.parametrize(
    ("k", "spacing", "prediction_type"),
    [
        (1, "trailing", "epsilon"),
        (3, "linspace", "v_prediction"),
        (4, "leading", "epsilon"),
        (8, "trailing", "v_prediction"),
    ],
)
def test_equals_the_sequential_loop(model, k, spacing, prediction_type):
    graphdef, params = model
    form = Schedule(timestep_spacing=spacing, prediction_type=prediction_type).closed_form(k)
    noise, text = inputs(2)
    both = jax.jit(
        lambda params: [f(functional.bind(graphdef, params), noise, text, form) for f in (student.generate, sequential)]
    )
    ours, loop = both(params)
    np.testing.assert_allclose(ours, loop, atol=1e-5 * float(jnp.abs(loop).max()))


@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch_size_gives_the_same_latents(model, batch):
    graphdef, params = model
    form = Schedule().closed_form(4)
    noise, text = inputs(3)
    generate = jax.jit(lambda noise, text: student.generate(functional.bind(graphdef, params), noise, text, form))
    part = generate(noise[:batch], text[:batch])
    np.testing.assert_allclose(part, generate(noise, text)[:batch], atol=1e-5)


def test_encoder_runs_once(model):
    graphdef, params = model

    class Spy:
        def __init__(self, unet):
            self.unet, self.calls = unet, []

        def encode(self, latents, t, text):
            self.calls.append(t)
            return self.unet.encode(latents, t, text)

        def decode_steps(self, features, t, text):
            return self.unet.decode_steps(features, t, text)

    spy = Spy(functional.bind(graphdef, params))
    outputs = jax.eval_shape(lambda: student.predict(spy, *inputs(2), Schedule().timesteps(4)))
    assert len(spy.calls) == 1
    assert outputs.shape == (2, 4, 8, 8, 4)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_trajectory_ends_where_the_closed_form_does(spacing):
    form = dataclasses.replace(Schedule(), timestep_spacing=spacing).closed_form(4)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 3, 3, 4), np.float32)
    outputs = jnp.asarray(rng.standard_normal((2, 4, 3, 3, 4), np.float32))
    latents = student.trajectory(noise, outputs, form)
    np.testing.assert_array_equal(latents[:, 0], noise)
    last = float(form.c[-1]) * latents[:, -1] + float(form.d[-1]) * outputs[:, -1]
    np.testing.assert_allclose(last, student.combine(noise, outputs, form), rtol=1e-4, atol=1e-4)
