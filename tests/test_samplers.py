"""Samplers on networks of which the result is known; tests/parity/test_samplers.py compares them with PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import UNET
from tiue_jax.models import functional
from tiue_jax.models.unet import UNet
from tiue_jax.sampling import samplers
from tiue_jax.schedule import Schedule


class Linear:
    """A UNet with an output that is a simple function of its inputs, so that samplers can be checked by hand."""

    def encode(self, latents, t, text):
        return latents

    def decode(self, features, t, text):
        return (
            0.1 * features
            + (t.astype(jnp.float32) / 1000.0)[:, None, None, None] * text.mean((1, 2))[:, None, None, None]
        )

    def decode_steps(self, features, t, text):
        return jax.vmap(self.decode, in_axes=(None, 1, None), out_axes=1)(features, t, text)

    def __call__(self, latents, t, text):
        return self.decode(self.encode(latents, t, text), t, text)


def test_image_noise_depends_on_seed_prompt_and_number_only():
    ids, numbers, shape = np.array([7, 7, 9], np.uint32), np.array([0, 1, 0]), (8, 8, 4)
    noise = samplers.normal(samplers.image_keys(0, ids, numbers), shape)
    np.testing.assert_array_equal(samplers.normal(samplers.image_keys(0, ids[::-1], numbers[::-1]), shape), noise[::-1])
    np.testing.assert_array_equal(samplers.normal(samplers.image_keys(0, ids[1:2], numbers[1:2]), shape), noise[1:2])
    other = samplers.normal(samplers.image_keys(1, ids, numbers), shape)
    everything = np.concatenate([noise, other]).reshape(6, -1)
    assert np.abs(np.corrcoef(everything) - np.eye(6)).max() < 0.3  # six different images, seed 0 among them
    assert abs(float(noise.std()) - 1) < 0.1


def test_step_noise_is_different_for_each_image_and_step():
    keys = samplers.image_keys(0, np.array([7, 9], np.uint32), np.array([0, 0]))
    noise = samplers.step_noise(keys, 3, (8, 8, 4))
    assert noise.shape == (2, 3, 8, 8, 4) and samplers.step_noise(keys, 0, (8, 8, 4)).shape == (2, 0, 8, 8, 4)
    np.testing.assert_array_equal(samplers.step_noise(keys[1:], 2, (8, 8, 4)), noise[1:, :2])
    initial = samplers.normal(samplers.image_keys(0, np.array([7, 9], np.uint32), np.array([0, 0])), (8, 8, 4))
    everything = np.concatenate([noise, initial[:, None]], axis=1).reshape(8, -1)
    assert np.abs(np.corrcoef(everything) - np.eye(8)).max() < 0.3


def test_guidance_keeps_the_two_halves_of_a_sample_side_by_side():
    seen = []

    def network(latents, t, text):
        seen.append((latents, t, text))
        return jnp.stack([latents * text[:, :1, :1, None]] * 3, axis=1)  # [b k h w c], as from several timesteps

    latents = np.array([1, 2], np.float32).reshape(2, 1, 1, 1)
    text = np.array([5, 6], np.float32).reshape(2, 1, 1)
    null = np.array([9, 10], np.float32).reshape(2, 1, 1)
    got = samplers.guided(network, latents, np.array([3, 4]), text, null, 2.0)
    ((twice, t, texts),) = seen
    assert twice.ravel().tolist() == [1, 1, 2, 2] and t.tolist() == [3, 3, 4, 4]
    assert texts.ravel().tolist() == [5, 9, 6, 10]
    assert got.shape == (2, 3, 1, 1, 1)
    np.testing.assert_array_equal(got[:, 0].ravel(), [9 + 2 * (5 - 9), 2 * (10 + 2 * (6 - 10))])
    for scale in (1.0, 0.5, -3.0):  # traced: no guidance, which is o(text)
        got = samplers.guided(network, latents, np.array([3, 4]), text, null, jnp.float32(scale))
        np.testing.assert_array_equal(got[:, 0].ravel(), [5, 2 * 6])


@pytest.mark.parametrize(("guidance_scale", "rows"), [(1, 2), (1.0, 2), (0, 2), (-3.0, 2), (1.5, 4)])
def test_no_guidance_evaluates_no_second_branch(guidance_scale, rows):
    calls = []

    def network(latents, t, text):
        calls.append(len(latents))
        return latents

    latents, text = np.zeros((2, 1, 1, 1), np.float32), np.zeros((2, 1, 1), np.float32)
    samplers.guided(network, latents, np.zeros(2), text, text, guidance_scale)
    assert calls == [rows]


@pytest.fixture(scope="module")
def unet():
    graphdef, shapes = functional.abstract(UNet, UNET)
    return functional.bind(graphdef, jax.tree.map(jnp.asarray, functional.init(shapes, 0)))


def batch(n=2):
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, 8, 8, 4), np.float32), *rng.standard_normal((2, n, 5, 8), np.float32)


def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_faster_diffusion_with_every_step_a_key_is_ddim(unet):
    noise, text, null = batch()

    @jax.jit
    def both(w):
        inputs = samplers.Inputs(unet, noise, text, Schedule(), 4, null, w, key_steps=tuple(range(4)))
        return samplers.faster_diffusion(inputs, noise_injection=0), samplers.ddim(inputs)

    close(*both(3.0))


def test_faster_diffusion_with_one_key_and_no_guidance_is_the_student(unet):
    noise, text, _ = batch()
    inputs = samplers.Inputs(unet, noise, text, Schedule(timestep_spacing="trailing"), 4, key_steps=(0,))
    close(*jax.jit(lambda: (samplers.faster_diffusion(inputs, noise_injection=0), samplers.tiue(inputs)))())


def test_faster_diffusion_runs_the_encoder_at_key_steps_only(unet):
    """Counts the scans of the traced function: one for neighbouring spans of one length, with one encoder in each."""
    noise, text, null = batch()
    key_steps = samplers.SAMPLERS["faster_diffusion"].key_steps
    inputs = samplers.Inputs(unet, noise, text, Schedule(), 50, null, 7.5, key_steps=key_steps)
    traced = jax.make_jaxpr(lambda: samplers.faster_diffusion(inputs))()
    scans = [eqn for eqn in traced.eqns if eqn.primitive.name == "scan"]
    assert [eqn.params["length"] for eqn in scans] == [3, 1, 2, 2, 1]  # spans 1 1 1 2 5 5 10 10 15
    assert sum(eqn.params["length"] for eqn in scans) == len(key_steps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_ddim_equals_a_written_out_loop(prediction_type, guidance_scale):
    schedule = Schedule(prediction_type=prediction_type)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 4, 4, 4), np.float32)
    text, null = rng.standard_normal((2, 2, 3, 5), np.float32)
    ours = jax.jit(lambda w: samplers.ddim(samplers.Inputs(Linear(), noise, text, schedule, 5, null, w)))(
        guidance_scale
    )

    abar, x = schedule.alphas_cumprod, jnp.asarray(noise)
    for t in schedule.timesteps(5):
        ts = jnp.full(2, int(t))
        cond, uncond = Linear()(x, ts, text), Linear()(x, ts, null)
        output = uncond + guidance_scale * (cond - uncond)
        eps, z0 = schedule.to_epsilon(output, x, ts), schedule.to_original(output, x, ts)
        a = abar[t - 200] if t >= 200 else abar[0]
        x = np.float32(np.sqrt(a)) * z0 + np.float32(np.sqrt(1 - a)) * eps
    np.testing.assert_allclose(ours, x, rtol=1e-4, atol=1e-4)


def test_one_step_is_the_original_predicted_from_the_last_timestep():
    noise, text = np.ones((1, 2, 2, 4), np.float32), np.zeros((1, 2, 3), np.float32)
    a = Schedule().alphas_cumprod[999]
    expected = (1 - np.sqrt(1 - a) * 0.1) / np.sqrt(a)
    latents = samplers.one_step(samplers.Inputs(Linear(), jnp.asarray(noise), jnp.asarray(text), Schedule(), 1))
    np.testing.assert_allclose(latents, np.full_like(noise, expected), rtol=1e-5)


def test_tiue_is_the_closed_form_at_k_timesteps():
    noise, text = np.ones((1, 2, 2, 4), np.float32), np.ones((1, 2, 3), np.float32)
    form = Schedule().closed_form(4)
    expected = form.scale + sum(e * (0.1 + t / 1000) for e, t in zip(form.weights, form.timesteps, strict=True))
    latents = samplers.tiue(samplers.Inputs(Linear(), jnp.asarray(noise), jnp.asarray(text), Schedule(), 4))
    np.testing.assert_allclose(latents, np.full_like(noise, expected), rtol=1e-5)
