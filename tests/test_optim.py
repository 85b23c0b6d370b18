"""optim.py: learning rates, Adam and the moving average against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tiue_jax.training import optim


def rates(schedule, steps):
    return np.array([schedule(jnp.asarray(step)) for step in steps])


def test_constant_learning_rate():
    np.testing.assert_allclose(rates(optim.learning_rate("constant", 1e-3), [0, 5, 10**6]), 1e-3)


@pytest.mark.parametrize("kind", optim.LEARNING_RATE_SCHEDULES)
def test_warmup_rises_to_the_peak_and_loses_no_step(kind):
    schedule = optim.learning_rate(kind, 1.0, warmup_steps=4, total_steps=20)
    np.testing.assert_allclose(rates(schedule, range(5)), [0.25, 0.5, 0.75, 1, 1], rtol=1e-6)


@pytest.mark.parametrize(("kind", "half"), [("linear", 0.5), ("cosine", 0.5)])
def test_falling_learning_rates_end_at_zero(kind, half):
    schedule = optim.learning_rate(kind, 2.0, warmup_steps=10, total_steps=30)
    np.testing.assert_allclose(rates(schedule, [10, 20, 30, 40]), [2, 2 * half, 0, 0], atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "step", "peak": 1.0}, "got 'step'"),
        ({"kind": "constant", "peak": 0.0}, "learning rate must be > 0, got 0.0"),
        ({"kind": "constant", "peak": 1.0, "warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        ({"kind": "cosine", "peak": 1.0}, "needs total_steps > warmup_steps = 0, got None"),
        ({"kind": "linear", "peak": 1.0, "warmup_steps": 5, "total_steps": 5}, "got 5"),
    ],
)
def test_bad_learning_rates(settings, message):
    with pytest.raises(ValueError, match=message):
        optim.learning_rate(**settings)


def test_adam_clips_to_the_global_norm_and_follows_the_paper():
    rng = np.random.default_rng(0)
    params = {"a": jnp.ones((3,)), "b": {0: jnp.ones((2, 2))}}
    optimizer = optim.adam(1e-2, max_grad_norm=1.0)
    state = optimizer.init(params)
    expected = {"a": np.ones(3), "b": np.ones((2, 2))}
    m = {name: 0.0 for name in expected}
    v = {name: 0.0 for name in expected}
    for step, size in enumerate((10.0, 0.01, 3.0), start=1):  # clipped, not clipped, clipped
        g = {"a": size * rng.standard_normal(3), "b": size * rng.standard_normal((2, 2))}
        norm = np.sqrt(sum(np.sum(x**2) for x in g.values()))
        grads = {"a": jnp.asarray(g["a"], jnp.float32), "b": {0: jnp.asarray(g["b"], jnp.float32)}}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name in expected:
            clipped = g[name] * min(1, 1 / norm)
            m[name] = 0.9 * m[name] + 0.1 * clipped
            v[name] = 0.999 * v[name] + 0.001 * clipped**2
            update = m[name] / (1 - 0.9**step) / (np.sqrt(v[name] / (1 - 0.999**step)) + 1e-8)
            expected[name] = expected[name] - 1e-2 * update
    np.testing.assert_allclose(params["a"], expected["a"], rtol=1e-5)
    np.testing.assert_allclose(params["b"][0], expected["b"], rtol=1e-5)


def test_ema_warms_up_and_saturates():
    decays = np.array([optim.ema_decay(jnp.asarray(step, jnp.int32)) for step in (0, 1, 90, 10**6)])
    np.testing.assert_allclose(decays, [0.1, 2 / 11, 91 / 100, 0.9999], rtol=1e-6)
    average, params = {"w": jnp.asarray([0.0, 2.0])}, {"w": jnp.asarray([1.0, 2.0])}
    got = jax.jit(optim.ema)(average, params, jnp.asarray(1, jnp.int32))
    np.testing.assert_allclose(got["w"], [9 / 11, 2.0], rtol=1e-6)
    np.testing.assert_allclose(optim.ema(average, params, jnp.asarray(10**6, jnp.int32), 0.5)["w"], [0.5, 2.0])
