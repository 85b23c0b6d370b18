"""The loop and the optimizers of the emoji trainings."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "examples" / "emoji"))

import training  # noqa: E402


@pytest.fixture(autouse=True)
def standard_promotion():
    """As in the programs: optax's Muon mixes types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_muon_turns_the_gradients_of_kernels_into_matrices_of_equal_singular_values():
    rng = np.random.default_rng(0)
    shapes = {"conv": {"kernel": (3, 3, 4, 8), "bias": (8,)}, "token_embedding": {"embedding": (10, 4)}}
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    grads = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), params)
    optimizer = training.muon(0.0)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    kernel = np.asarray(updates["conv"]["kernel"])
    assert np.sqrt((kernel**2).mean()) == pytest.approx(0.2, rel=0.2)  # as large as an update of Adam
    values = np.linalg.svd(kernel.reshape(-1, 8), compute_uv=False)
    assert values.min() > 0.5 * values.max()
    assert (kernel * np.asarray(grads["conv"]["kernel"])).sum() < 0
    # Adam's first step, with Nesterov's momentum, has one size for all
    for update, gradient in (
        (updates["conv"]["bias"], grads["conv"]["bias"]),
        (updates["token_embedding"]["embedding"], grads["token_embedding"]["embedding"]),
    ):
        np.testing.assert_allclose(update, -np.sign(gradient) * np.abs(update).max(), atol=1e-3)


def test_a_run_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    """With every step saved, two runs of 3 and 5 steps end as one of 5."""
    monkeypatch.setattr(training, "SAVE_EVERY", 0)

    def loss(params, batch, key):
        error = batch @ params["kernel"] + jax.random.normal(key, (4, 2))
        return (error**2).mean(), {"size": jnp.abs(error).max()}

    def run(folder, steps):
        optimizer = training.muon()
        step = training.make_step(loss, optimizer, 1e-2, steps=5)
        state = training.create({"kernel": jnp.ones((3, 2))}, optimizer)
        return training.train(folder, state, step, lambda rng: rng.standard_normal((4, 3), np.float32), steps=steps)

    whole = run(tmp_path / "whole", 5)
    run(tmp_path / "parts", 3)
    parts = run(tmp_path / "parts", 5)
    assert int(parts.step) == 5
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(whole.params["kernel"], whole.ema["kernel"])
