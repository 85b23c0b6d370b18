"""Options of the training step: more updates of the LoRA teacher, and guidance drawn from a range."""

import contextlib
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny_distillation import BATCH, CONFIG, NULL, UNET, adapted, distance, initial, make, norm
from tiue_jax import sharding, student
from tiue_jax.models import functional, lora, platforms
from tiue_jax.models.unet import UNet
from tiue_jax.sampling.settings import Sampling
from tiue_jax.training import losses
from tiue_jax.training.distill import Frozen
from tiue_jax.training.settings import DataConfig, ModelConfig, Settings, TrainConfig, student_sampling


@pytest.fixture(scope="module")
def params():
    return functional.init(functional.abstract(UNet, UNET)[1], seed=0)


@pytest.fixture(scope="module")
def frozen(params):
    return Frozen(unet=jax.tree.map(jnp.asarray, params))


@pytest.fixture(scope="module")
def state(params):
    return initial(CONFIG, params)


@pytest.mark.parametrize("unrolled", [False, True])
def test_more_updates_of_the_lora_teacher_are_on_new_latents_of_the_same_student(state, frozen, unrolled):
    """Against the updates one by one, of the whole batch, written out. In a mesh of CPUs the loop is unrolled."""
    distillation = make(lora_updates_per_step=3, gradient_accumulation_steps=2)
    more = [distillation.draw(key, 2) for key in jax.random.split(jax.random.key(7), 2)]
    start = adapted(state)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])) if unrolled else contextlib.nullcontext():
        assert platforms.loops_are_slow() == unrolled
        got, losses_and_norms = jax.jit(distillation.update_lora)(start, start.params, frozen, BATCH, more)

    plain, _ = functional.abstract(UNet, UNET)
    adapted_unet, _ = functional.abstract(UNet, UNET, lora=CONFIG.lora)
    text = BATCH["text"]

    def loss(adapters, draws):
        latents = student.generate(functional.bind(plain, start.params), draws.noise, text, distillation.form)
        t, noise = draws.lora_timesteps, draws.lora_noise
        signal, sigma = distillation.schedule.signal_and_noise(t)
        network = functional.bind(adapted_unet, lora.merge(frozen.unet, adapters))
        prompts = jnp.where(draws.drop_text, jnp.broadcast_to(NULL, text.shape), text)
        return jnp.mean((signal * (network(signal * latents + sigma * noise, t, prompts) - noise)) ** 2)

    gradient = jax.jit(jax.value_and_grad(loss))
    adapters, optimizer = start.lora, start.lora_optimizer
    for draws, (found_loss, found_norm) in zip(more, losses_and_norms, strict=True):
        value, grads = gradient(adapters, draws)
        np.testing.assert_allclose((found_loss, found_norm), (value, norm(grads)), rtol=1e-4)
        updates, optimizer = distillation.lora_optimizer.update(grads, optimizer, adapters)
        adapters = jax.tree.map(lambda x, update: x + CONFIG.lora_learning_rate * update, adapters, updates)
    moved = distance(adapters, start.lora)
    assert moved > 1e-3 and distance(got.lora, adapters) < 1e-2 * moved
    assert distance(got.params, start.params) == 0


@pytest.mark.slow
def test_a_step_with_more_updates_is_skipped_whole(state, frozen):
    """If the last update of the LoRA teacher is not finite, the step changes nothing."""
    distillation = make(lora_updates_per_step=3)
    draws, *more = (distillation.draw(key, 2) for key in jax.random.split(jax.random.key(7), 3))
    start = adapted(state)
    update = jax.jit(distillation.update)
    done, metrics = update(start, frozen, BATCH, draws, more)
    assert int(done.step) == 1 and metrics["skipped_steps"] == 0
    assert distance(done.params, start.params) > 0 and distance(done.lora, start.lora) > 0
    broken = more[1]._replace(lora_noise=jnp.full_like(more[1].lora_noise, jnp.nan))
    skipped, metrics = update(start, frozen, BATCH, draws, [more[0], broken])
    assert int(skipped.step) == 1 and metrics["skipped_steps"] == 1
    assert distance(skipped.params, start.params) == 0 and distance(skipped.lora, start.lora) == 0


def test_the_learning_rate_of_the_lora_teacher_falls_with_the_steps(state):
    """Also in a run that goes on with another number of updates in a step."""
    falls = {"lora_learning_rate_schedule": "linear", "max_train_steps": 10}
    now, ones = adapted(state), jax.tree.map(jnp.ones_like, (state.params, state.lora))
    for step, updates in enumerate((1, 1, 1, 4, 2, 4)):
        distillation, before = make(lora_updates_per_step=updates, **falls), now
        now = distillation.apply_gradients(now, *ones)
        for _ in range(updates - 1):
            now = distillation.apply_lora_gradients(now, ones[1], now.step - 1 - now.skipped)
        # of constant gradients, each update of Adam is as large as the rate
        rate = CONFIG.lora_learning_rate * (10 - step) / 10
        np.testing.assert_allclose(distillation.lora_learning_rate(step), rate, rtol=1e-6)
        for old, new in zip(jax.tree.leaves(before.lora), jax.tree.leaves(now.lora), strict=True):
            np.testing.assert_allclose(old - new, updates * rate, rtol=1e-3)


def test_the_teachers_guidance_is_drawn_for_each_sample(state, frozen):
    """The gradient of L_vsd is affine in the guidance scale of each sample."""
    distillation = make(teacher_guidance_scale=2.0, teacher_guidance_scale_max=6.0, kl_weight=0.0)
    many = distillation.draw(jax.random.key(0), 4096)
    assert 2 <= many.guidance_scales.min() < 2.1 and 5.9 < many.guidance_scales.max() <= 6
    fixed = make().draw(jax.random.key(0), 4096)
    assert fixed.guidance_scales is None
    assert (fixed.noise == many.noise).all() and (fixed.timesteps == many.timesteps).all()
    draws, start = distillation.draw(jax.random.key(1), 2), adapted(state)
    run = jax.jit(distillation.gradients)

    def at(*scales):
        grads, *_ = run(start, frozen, BATCH, draws._replace(guidance_scales=jnp.array(scales, jnp.float32)))
        return grads

    low, high, first, second = at(2, 2), at(6, 6), at(6, 2), at(2, 6)
    both = jax.tree.map(jnp.add, first, second)
    assert distance(both, jax.tree.map(jnp.add, low, high)) < 1e-4 * norm(high)
    assert distance(first, low) > 1e-3 * norm(low) and distance(second, low) > 1e-3 * norm(low)


def test_no_two_draws_of_a_step_come_from_one_key(monkeypatch):
    """Those of further updates of the LoRA teacher included."""
    used = []

    def keep(key, *args, **settings):
        used.append(tuple(jax.random.key_data(key).tolist()))
        return jnp.zeros(())

    for name in ("normal", "randint", "bernoulli", "uniform"):
        monkeypatch.setattr(jax.random, name, keep)
    distillation = make(teacher_guidance_scale=2.0, teacher_guidance_scale_max=6.0, lora_updates_per_step=3)
    monkeypatch.setattr(distillation, "update", lambda *args: None)
    distillation.train_step(SimpleNamespace(step=0), None, BATCH, jax.random.key(3))
    assert len(used) == 3 * 7 and len(set(used)) == len(used)


def test_a_student_without_a_shared_encoder_learns_through_all_its_steps(state, frozen):
    """The gradient of a KL term so large that nothing else counts, against that of the term written out."""
    weight = 1e6
    distillation = make(shared_encoder=False, kl_weight=weight)
    draws, start = distillation.draw(jax.random.key(3), 2), adapted(state)
    plain, _ = functional.abstract(UNet, UNET)

    def kl(params):
        unet = functional.bind(plain, params)
        outputs, _ = student.unshared(unet, draws.noise, BATCH["text"], distillation.form)
        return losses.kl(outputs, CONFIG.kl_batch_size)[0]

    value, expected = jax.jit(jax.value_and_grad(kl))(start.params)
    grads, _, metrics = jax.jit(distillation.gradients)(start, frozen, BATCH, draws)
    np.testing.assert_allclose(metrics["loss_kl"], value, rtol=1e-4)
    assert distance(jax.tree.map(lambda x: x / weight, grads), expected) < 1e-3 * norm(expected)


def test_a_student_without_a_shared_encoder_is_sampled_as_ddim_without_guidance():
    config = dataclasses.replace(CONFIG, shared_encoder=False, timestep_spacing="trailing")
    settings = Settings(ModelConfig("emoji"), DataConfig("emoji"), TrainConfig(), config)
    sampling = student_sampling(settings)
    assert sampling == Sampling("ddim", 2, guidance_scale=1.0, timestep_spacing="trailing")
    free = dataclasses.replace(config, timesteps=(751, 251))
    assert student_sampling(dataclasses.replace(settings, distill=free)).timesteps == (751, 251)
