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


def test_a_metric_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0)
    optimizer, numbers = training.adamw(), iter(range(1, 6))

    def loss(params, batch, key):
        return (batch @ params["kernel"]).mean() * jnp.where(batch[0, 0] == 3, jnp.nan, 1.0), {}

    def start():
        return training.create({"kernel": jnp.ones((3, 2))}, optimizer)

    step = training.make_step(loss, optimizer, 1e-2, steps=5)
    with pytest.raises(FloatingPointError, match="'loss': nan.* at step 3 of "):
        training.train(tmp_path, start(), step, lambda rng: np.full((4, 3), next(numbers), np.float32), steps=5)
    saved, _ = training.restore(tmp_path / "state.safetensors", start())
    assert int(saved.step) == 2 and np.isfinite(saved.params["kernel"]).all()


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    optimizer = training.adamw()
    training.save(tmp_path / "state.safetensors", training.create({"kernel": jnp.ones((3, 2))}, optimizer), 0.0)
    message = r"is the checkpoint of another model: \.ema\['kernel'\] has the shape \[3, 2\], expected \[3, 4\]; give"
    with pytest.raises(ValueError, match=message):
        training.restore(tmp_path / "state.safetensors", training.create({"kernel": jnp.ones((3, 4))}, optimizer))


def test_a_run_leaves_the_weights_that_it_starts_from(tmp_path):
    def loss(params, batch, key):
        return ((batch @ params["kernel"]) ** 2).mean(), {}

    weights, optimizer = {"kernel": jnp.ones((3, 2))}, training.adamw()
    step, state = training.make_step(loss, optimizer, 1e-2, steps=1), training.create(weights, optimizer)
    training.train(tmp_path, state, step, lambda rng: np.ones((4, 3), np.float32), steps=1)
    np.testing.assert_array_equal(weights["kernel"], 1)  # a deleted array would raise
