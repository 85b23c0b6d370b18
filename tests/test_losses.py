"""losses.py: the losses against their formulas in numpy, and the properties that the method needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiue_jax.training import losses

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


def test_vsd_value_and_gradient():
    z0, teacher, lora = normal(2, 4, 4, 3), normal(2, 4, 4, 3), normal(2, 4, 4, 3)
    weight = np.array([0.2, 0.9], np.float32).reshape(2, 1, 1, 1)
    (loss, metrics), gradient = jax.value_and_grad(losses.vsd, has_aux=True)(jnp.asarray(z0), teacher, lora, weight)
    g = weight * (teacher - lora)
    np.testing.assert_allclose(loss, 0.5 * np.mean(g**2), rtol=1e-5)
    np.testing.assert_allclose(gradient, g / g.size, rtol=1e-4, atol=1e-8)
    assert metrics["vsd_nonfinite"] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_vsd_leaves_out_a_prediction_that_is_not_finite_and_reports_it(value):
    z0, teacher, lora = normal(1, 4, 4, 2), normal(1, 4, 4, 2), normal(1, 4, 4, 2)
    teacher[0, 0, 0, 0] = value
    (loss, metrics), gradient = jax.value_and_grad(losses.vsd, has_aux=True)(
        jnp.asarray(z0), teacher, lora, np.ones((1, 1, 1, 1), np.float32)
    )
    g = np.where(np.isfinite(teacher), teacher - lora, 0)
    np.testing.assert_allclose(loss, 0.5 * np.mean(g**2), rtol=1e-5)
    np.testing.assert_allclose(gradient, g / g.size, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(metrics["vsd_nonfinite"], 1 / 32)


def test_kl_is_the_references_sum_at_its_batch_of_8_and_does_not_depend_on_the_batch_size():
    epsilons = 1.5 * normal(8, 3, 4, 4, 2) + 0.1
    mean, var = epsilons.mean((2, 3, 4), dtype=np.float64), epsilons.var((2, 3, 4), ddof=1, dtype=np.float64)
    expected = np.sum(0.5 * (mean**2 + var - 1 - np.log(var)))
    np.testing.assert_allclose(losses.kl(jnp.asarray(epsilons))[0], expected, rtol=1e-5)
    twice = jnp.concatenate([epsilons, epsilons])
    np.testing.assert_allclose(losses.kl(twice)[0], expected, rtol=1e-5)


def test_clip_is_zero_above_the_threshold():
    features = jnp.asarray(normal(3, 5))
    loss, metrics = losses.clip(features, 2 * features, threshold=0.35)
    assert loss == 0
    np.testing.assert_allclose(metrics["clip_similarity"], 1, rtol=1e-6)
    loss, _ = losses.clip(features, -features, threshold=0.35)
    np.testing.assert_allclose(loss, 1.35, rtol=1e-6)


def test_clip_pixels_resizes_as_pil_does():
    image = pytest.importorskip("PIL.Image")
    pixels = RNG.integers(0, 256, (32, 32, 3), np.uint8)
    planes = [
        image.fromarray(pixels[..., c].astype(np.float32), "F").resize((14, 14), image.Resampling.BICUBIC)
        for c in range(3)
    ]
    expected = np.stack([np.asarray(plane) for plane in planes], -1) / 255
    got = losses.clip_pixels(jnp.asarray(pixels[None].astype(np.float32) / 127.5 - 1), 14, normalize=False)[0]
    np.testing.assert_allclose(got, expected, atol=1e-4)
    normalized = losses.clip_pixels(jnp.asarray(pixels[None].astype(np.float32) / 127.5 - 1), 14)[0]
    np.testing.assert_allclose(normalized * losses.CLIP_STD[None, None] + losses.CLIP_MEAN[None, None], got, atol=1e-5)


def test_lora_loss():
    prediction, noise = normal(2, 4, 4, 1), normal(2, 4, 4, 1)
    scale = np.array([0.3, 0.8], np.float32).reshape(2, 1, 1, 1)
    loss, _ = losses.lora(jnp.asarray(prediction), jnp.asarray(noise), jnp.asarray(scale))
    np.testing.assert_allclose(loss, np.mean((scale * prediction - scale * noise) ** 2), rtol=1e-5)


def test_losses_reduce_in_float32():
    x = jnp.asarray(normal(2, 2, 8, 8, 4), jnp.bfloat16)
    for loss, _ in (
        losses.kl(x),
        losses.vsd(x[:, 0], x[:, 1], x[:, 0], jnp.ones((2, 1, 1, 1))),
        losses.lora(x[:, 0], x[:, 1], jnp.ones((2, 1, 1, 1))),
        losses.clip(x[:, 0, 0, 0], x[:, 1, 0, 0]),
    ):
        assert loss.dtype == jnp.float32 and loss.shape == ()


def test_timestep_weight():
    sigma = jnp.asarray([0.5, 1.0]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(losses.timestep_weight("one_minus_alphas_cumprod", sigma).ravel(), [0.25, 1])
    np.testing.assert_allclose(losses.timestep_weight("uniform", sigma).ravel(), [1, 1])
    with pytest.raises(ValueError, match="timestep_weighting .* got 'snr'"):
        losses.timestep_weight("snr", sigma)
