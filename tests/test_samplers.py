import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiue_jax import samplers
from tiue_jax.schedule import Schedule


class Linear:
    """A UNet whose output is a known function of its inputs, so that samplers can be checked by hand."""

    def encode(self, latents, t, text):
        return latents

    def decode(self, features, t, text):
        return (
            0.1 * features
            + (t.astype(jnp.float32) / 1000.0)[:, None, None, None] * text.mean((1, 2))[:, None, None, None]
        )

    def __call__(self, latents, t, text):
        return self.decode(self.encode(latents, t, text), t, text)


def test_image_noise_depends_on_seed_prompt_and_number_only():
    ids, numbers, shape = np.array([7, 7, 9], np.uint32), np.array([0, 1, 0]), (8, 8, 4)
    noise = samplers.image_noise(0, ids, numbers, shape)
    np.testing.assert_array_equal(samplers.image_noise(0, ids[::-1], numbers[::-1], shape), noise[::-1])
    np.testing.assert_array_equal(samplers.image_noise(0, ids[1:2], numbers[1:2], shape), noise[1:2])
    other = samplers.image_noise(1, ids, numbers, shape)
    everything = np.concatenate([noise, other]).reshape(6, -1)
    assert np.abs(np.corrcoef(everything) - np.eye(6)).max() < 0.3  # six different images, seed 0 among them
    assert abs(float(noise.std()) - 1) < 0.1


def test_image_noise_is_the_same_on_several_devices():
    """Sharded over a mesh or not, threefry gives every image the same numbers; here by jit against eager."""
    ids, numbers = np.arange(6, dtype=np.uint32), np.zeros(6, np.int32)
    jitted = jax.jit(lambda i, n: samplers.image_noise(3, i, n, (4, 4, 4)))(ids, numbers)
    np.testing.assert_array_equal(jitted, samplers.image_noise(3, ids, numbers, (4, 4, 4)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_ddim_equals_a_written_out_loop(prediction_type, guidance_scale):
    schedule = Schedule(prediction_type=prediction_type)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 4, 4, 4), np.float32)
    text, null = rng.standard_normal((2, 2, 3, 5), np.float32)
    ours = jax.jit(lambda w: samplers.ddim(Linear(), noise, text, null, schedule, 5, w))(guidance_scale)

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
    latents = samplers.one_step(Linear(), jnp.asarray(noise), jnp.asarray(text), Schedule())
    np.testing.assert_allclose(latents, np.full_like(noise, expected), rtol=1e-5)


def test_tiue_is_the_closed_form_at_k_timesteps():
    noise, text = np.ones((1, 2, 2, 4), np.float32), np.ones((1, 2, 3), np.float32)
    form = Schedule().closed_form(4)
    expected = form.scale + sum(e * (0.1 + t / 1000) for e, t in zip(form.weights, form.timesteps, strict=True))
    latents = samplers.tiue(Linear(), jnp.asarray(noise), jnp.asarray(text), Schedule(), 4)
    np.testing.assert_allclose(latents, np.full_like(noise, expected), rtol=1e-5)
