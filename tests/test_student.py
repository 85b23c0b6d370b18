"""The student against its definition, a loop over timesteps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import UNET
from tiue_jax import student
from tiue_jax.models import functional
from tiue_jax.models.unet import UNet
from tiue_jax.sampling import samplers
from tiue_jax.schedule import SPACINGS, Schedule


@pytest.fixture(scope="module")
def model():
    graphdef, shapes = functional.abstract(UNet, UNET)
    return graphdef, functional.init(shapes, 0)


@pytest.fixture(scope="module")
def generate(model):
    """The student's latents at a closed form; a form with the same arguments is compiled once."""
    graphdef, params = model

    @functools.cache
    def compiled(k, spacing, prediction_type):
        form = closed_form(k, spacing, prediction_type)

        def run(params, noise, text):
            return student.generate(functional.bind(graphdef, params), noise, text, form)

        return jax.jit(run)

    def run(noise, text, *form):
        return compiled(*form)(params, noise, text)

    return run


def closed_form(k, spacing, prediction_type):
    return Schedule(timestep_spacing=spacing, prediction_type=prediction_type).closed_form(k)


def inputs(batch: int):
    rng = np.random.default_rng(batch)
    return rng.standard_normal((batch, 8, 8, 4), np.float32), rng.standard_normal((batch, 5, 8), np.float32)


@pytest.fixture(scope="module")
def sequential(model):
    """The definition: one encoder pass, then DDIM steps one by one."""
    graphdef, params = model
    encode = jax.jit(lambda params, x, t, text: functional.bind(graphdef, params).encode(x, t, text))
    decode = jax.jit(lambda params, features, t, text: functional.bind(graphdef, params).decode(features, t, text))

    def run(noise, text, form):
        timesteps = np.repeat(form.timesteps[:, None], len(noise), axis=1)  # [k b]
        features = encode(params, noise, timesteps[0], text)
        x = noise
        for t, c, d in zip(timesteps, form.c, form.d, strict=True):
            x = np.float32(c) * x + np.float32(d) * decode(params, features, t, text)
        return x

    return run


@pytest.mark.parametrize(
    "form",
    [
        (1, "trailing", "epsilon"),
        (3, "linspace", "v_prediction"),
        (4, "leading", "epsilon"),
        (8, "trailing", "v_prediction"),
    ],
)
def test_equals_the_sequential_loop(generate, sequential, form):
    noise, text = inputs(3)
    loop = sequential(noise, text, closed_form(*form))
    np.testing.assert_allclose(generate(noise, text, *form), loop, atol=1e-5 * float(jnp.abs(loop).max()))


@pytest.mark.parametrize("form", [(1, "trailing", "epsilon"), (3, "linspace", "v_prediction")])
def test_without_sharing_it_is_ddim_with_the_whole_unet(model, generate, form):
    """Against the sampler "ddim", which other tests compare with diffusers. At one step, sharing changes nothing."""
    graphdef, params = model
    noise, text = inputs(2)
    (k, spacing, prediction_type), unet = form, functional.bind(graphdef, params)
    outputs, latents = jax.jit(lambda: student.unshared(unet, noise, text, closed_form(*form)))()
    schedule = Schedule(timestep_spacing=spacing, prediction_type=prediction_type)
    settings = samplers.Inputs(unet, noise, text, schedule, k, guidance_scale=1.0)
    ddim = jax.jit(lambda: samplers.ddim(settings))()
    assert outputs.shape == (2, k, 8, 8, 4)
    np.testing.assert_allclose(latents, ddim, atol=1e-5 * float(jnp.abs(ddim).max()))
    np.testing.assert_allclose(latents, student.combine(noise, outputs, closed_form(*form)), rtol=1e-4, atol=1e-4)
    shared = generate(noise, text, *form)
    assert (float(jnp.abs(latents - shared).max()) < 1e-4) == (k == 1)


def test_any_batch_size_gives_the_same_latents(generate):
    noise, text = inputs(3)
    form = (4, "leading", "epsilon")
    np.testing.assert_allclose(generate(noise[:1], text[:1], *form), generate(noise, text, *form)[:1], atol=1e-5)


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
