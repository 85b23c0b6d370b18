"""distill.py: the training step on a tiny UNet, what it changes and what it must not, and its settings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from tests.tiny_distillation import BATCH, CONFIG, NULL, RNG, UNET, adapted, distance, encode_text, initial, make, norm
from tiue_jax import sharding
from tiue_jax.models import functional
from tiue_jax.models.unet import REMAT_POLICIES, UNet
from tiue_jax.plan import flops
from tiue_jax.sampling import samplers
from tiue_jax.schedule import Schedule
from tiue_jax.training import train_state
from tiue_jax.training.distill import Distillation, Frozen
from tiue_jax.training.distill_settings import DistillConfig


@pytest.fixture(scope="module")
def params():
    _, shapes = functional.abstract(UNet, UNET)
    return functional.init(shapes, seed=0)


@pytest.fixture(scope="module")
def frozen(params):
    return Frozen(unet=jax.tree.map(jnp.asarray, params))


@pytest.fixture(scope="module")
def state(params):
    return initial(CONFIG, params)


@pytest.fixture(scope="module")
def distillation():
    return make()


@pytest.fixture(scope="module")
def update(distillation):
    return jax.jit(distillation.update)


def test_the_state_holds_the_student_its_average_and_the_adapters_but_no_teacher(state, params):
    student, adapters = functional.count(params), functional.count(state.lora)
    moments = 2 * (student + adapters)
    counters = [x for x in jax.tree.leaves(state) if x.ndim == 0]
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * student + adapters + moments + len(counters)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state) if x.ndim)
    assert distance(state.params, params) == 0 and distance(state.ema, params) == 0
    # rank 4 on to_q and to_v of self- and cross-attention in 4 transformers, all of width 16, as is the text
    assert adapters == 4 * 2 * 2 * 4 * (16 + 16)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)


def test_at_the_first_step_both_teachers_agree_and_the_score_is_zero(state, frozen, distillation, update):
    _, metrics = update(state, frozen, BATCH, distillation.draw(jax.random.key(0), 2))
    assert metrics["loss_vsd"] < 1e-10
    _, metrics = update(adapted(state), frozen, BATCH, distillation.draw(jax.random.key(0), 2))
    assert metrics["loss_vsd"] > 1e-6


def test_neither_loss_reaches_the_other_networks_weights(state, frozen, distillation, update):
    draws = distillation.draw(jax.random.key(0), 2)
    first, _ = update(adapted(state), frozen, BATCH, draws)
    other = draws._replace(lora_noise=-draws.lora_noise, lora_timesteps=draws.lora_timesteps // 2)
    second, _ = update(adapted(state), frozen, BATCH, other)
    assert distance(first.params, second.params) == 0
    assert distance(first.lora, second.lora) > 0
    other = draws._replace(diffusion_noise=-draws.diffusion_noise)
    third, _ = update(adapted(state), frozen, BATCH, other)
    assert distance(first.params, third.params) > 0
    assert distance(first.lora, third.lora) == 0


def test_the_moving_average_after_one_and_two_steps(state, frozen, distillation, update):
    first, _ = update(adapted(state), frozen, BATCH, distillation.draw(jax.random.key(0), 2))
    second, _ = update(first, frozen, BATCH, distillation.draw(jax.random.key(1), 2))
    assert int(second.step) == 2

    def mix(decay, old, new):
        return decay * np.asarray(old) + (1 - decay) * np.asarray(new)

    assert distance(first.ema, jax.tree.map(functools.partial(mix, 1 / 10), state.params, first.params)) < 1e-6
    assert distance(second.ema, jax.tree.map(functools.partial(mix, 2 / 11), first.ema, second.params)) < 1e-6
    assert distance(second.ema, second.params) > 0


def test_the_lora_teacher_learns_what_the_student_draws(state, frozen, distillation, update):
    draws = distillation.draw(jax.random.key(0), 2)
    losses = []
    for _ in range(20):
        new, metrics = update(state, frozen, BATCH, draws)
        state = state._replace(lora=new.lora, lora_optimizer=new.lora_optimizer)
        losses.append(float(metrics["loss_lora"]))
    assert losses[-1] < 0.9 * losses[0], losses


def test_dropped_text_is_the_null_prompt(state, frozen, distillation, update):
    draws = distillation.draw(jax.random.key(0), 2)
    nulls = {"text": jnp.broadcast_to(NULL, BATCH["text"].shape)}
    kept, dropped = (draws._replace(drop_text=jnp.asarray(flag)) for flag in (False, True))

    def loss(batch, draws):
        _, metrics = update(state, frozen, batch, draws)
        return float(metrics["loss_lora"])

    assert loss(BATCH, kept) != loss(BATCH, dropped)
    assert loss(nulls, kept) == loss(nulls, dropped)


@pytest.mark.slow
def test_bfloat16_moves_float32_master_weights_that_bfloat16_could_not_resolve(params):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16", student_learning_rate=1e-6, remat="full")
    state = adapted(initial(config, params))
    frozen = Frozen(jax.tree.map(jnp.asarray, functional.cast(params, jnp.bfloat16)))
    step = Distillation(config, UNET, Schedule(), encode_text).train_step
    with jax.numpy_dtype_promotion("standard"):  # flax's norms mix bfloat16 and float32 inside
        new, metrics = jax.jit(step)(state, frozen, BATCH, jax.random.key(0))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(new) if x.ndim)
    assert all(x.dtype == jnp.float32 and np.isfinite(x) for x in metrics.values())
    kernel = ("mid_block", "resnets", 0, "conv1", "kernel")
    before, after = state.params, new.params
    for part in kernel:
        before, after = before[part], after[part]
    before, after = np.asarray(before), np.asarray(after)
    moved = np.abs(after - before)
    assert np.mean(moved > 0) > 0.9 and moved.max() < 2e-6
    assert np.mean(after.astype(jnp.bfloat16) != before.astype(jnp.bfloat16)) < 0.05


def test_the_state_may_be_donated_and_the_teacher_lives_on(params, distillation, update):
    frozen = Frozen(jax.tree.map(jnp.asarray, params))
    state = adapted(initial(CONFIG, frozen.unet))
    key = jax.random.key(7)
    _, expected = update(state, frozen, BATCH, distillation.draw(jax.random.fold_in(key, 0), 2))
    # remat must change no gradient
    config = dataclasses.replace(CONFIG, remat="full")
    step = jax.jit(Distillation(config, UNET, Schedule(), encode_text).train_step, donate_argnums=0)
    new, first = step(state, frozen, BATCH, key)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    for name, value in expected.items():
        np.testing.assert_allclose(first[name], value, rtol=1e-5, err_msg=name)
    newer, second = step(new, frozen, BATCH, key)
    assert int(newer.step) == 2
    assert first["loss_lora"] != second["loss_lora"]  # the step's number is folded into the key
    assert distance(frozen.unet, params) == 0


@pytest.mark.slow
def test_no_remat_policy_changes_a_gradient(state, frozen, distillation):
    draws = distillation.draw(jax.random.key(3), 2)
    args = adapted(state), frozen, BATCH, draws
    *expected, _ = jax.jit(distillation.gradients)(*args)
    computed = []
    for policy in REMAT_POLICIES:
        gradients = make(remat=policy).gradients
        computed.append(flops.flops(gradients, *args))
        if policy != CONFIG.remat:
            *got, _ = jax.jit(gradients)(*args)
            assert distance(got, expected) < 1e-5 * max(norm(expected), 1), policy
    none, full, streams, attention = computed
    assert none < attention < streams < full


@pytest.mark.parametrize("remat", ["none", "full"])
def test_sharding_adds_no_work(state, frozen, distillation, remat):
    """Parameters are gathered block by block. No gradient of the frozen ones is computed, and nothing twice."""
    args = state, frozen, BATCH, distillation.draw(jax.random.key(3), 2)

    def count():
        return flops.flops(make(remat=remat).gradients, *args)

    alone = count()
    mesh = AbstractMesh((1, 2, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        assert count() == alone


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(state, frozen):
    rng = np.random.default_rng(3)
    batch = {"text": jnp.asarray(rng.standard_normal((4, 5, 16), np.float32))}

    def clip_features(frozen, batch, latents):
        image = jnp.mean(latents, axis=(1, 2))
        return batch["text"][:, 0, :4] + 1, image

    def run(count, threshold):
        settings = {"gradient_accumulation_steps": count, "clip_weight": 5.0, "clip_decay_steps": 100}
        config = dataclasses.replace(CONFIG, clip_threshold=threshold, text_dropout=0.5, **settings)
        distillation = Distillation(config, UNET, Schedule(), encode_text, clip_features)
        return jax.jit(distillation.gradients)(start, frozen, batch, draws)

    start, draws = adapted(state), make().draw(jax.random.key(5), 4)
    # A threshold just above the similarity of the batch is below that of one of the micro-batches.
    above = float(run(1, 0.0)[2]["clip_similarity"]) + 1e-3
    *expected, losses = run(1, above)
    *got, averaged = run(2, above)
    assert losses["loss_clip"] > 0 and averaged.keys() == losses.keys()
    for name, value in losses.items():
        np.testing.assert_allclose(averaged[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    for one, other in zip(expected, got, strict=True):
        assert norm(one) > 1e-3 and distance(one, other) < 1e-4 * norm(one)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(state, frozen, distillation, update):
    state = adapted(state)
    draws = distillation.draw(jax.random.key(0), 2)
    broken = draws._replace(lora_noise=draws.lora_noise.at[0, 0, 0, 0].set(jnp.nan))  # only the LoRA teacher's loss
    skipped, metrics = update(state, frozen, BATCH, broken)
    skipped, metrics = update(skipped, frozen, BATCH, draws._replace(noise=jnp.full_like(draws.noise, jnp.inf)))
    assert (int(skipped.step), int(skipped.skipped), int(skipped.skipped_in_a_row)) == (2, 2, 2)
    assert (metrics["skipped_steps"], metrics["skipped_in_a_row"]) == (2, 2) and not np.isfinite(metrics["loss"])
    kept = ("params", "ema", "lora", "optimizer", "lora_optimizer")
    for name in kept:
        assert distance(getattr(skipped, name), getattr(state, name)) == 0, name
    after, metrics = update(skipped, frozen, BATCH, draws)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (3, 2, 0)
    expected, _ = update(state, frozen, BATCH, draws)  # as without the two skipped steps
    for name in kept:
        assert distance(getattr(after, name), getattr(expected, name)) == 0, name


def test_draws_cover_their_ranges():
    distillation = make(min_timestep=20, max_timestep=22, text_dropout=0.5)
    draws = distillation.draw(jax.random.key(0), 4096)
    assert set(np.unique(draws.timesteps)) == {20, 21, 22}
    assert draws.lora_timesteps.min() < 5 and 994 < draws.lora_timesteps.max() <= 999
    assert draws.noise.shape == (4096, 8, 8, 4)
    for noise in (draws.noise, draws.diffusion_noise, draws.lora_noise):
        assert abs(float(noise.mean())) < 5e-3 and abs(float(noise.std()) - 1) < 5e-3
    assert not np.array_equal(draws.noise, draws.diffusion_noise)
    drops = [bool(distillation.draw(jax.random.key(seed), 1).drop_text) for seed in range(64)]
    assert 16 < sum(drops) < 48
    assert jax.config.jax_threefry_partitionable  # the numbers do not depend on the sharding


def test_guidance_folds_both_branches_into_one_batch():
    calls = []

    def epsilon(latents, t, text):
        calls.append(latents.shape[0])
        scale = jnp.sum(text, axis=(1, 2)) + t.astype(jnp.float32)
        return latents * scale[:, None, None, None]

    z, t = jnp.asarray(RNG.standard_normal((3, 2, 2, 1), np.float32)), jnp.asarray([1, 2, 3])
    text = jnp.asarray(RNG.standard_normal((3, 2, 2), np.float32))
    null = jnp.ones_like(text)
    got = samplers.guided(epsilon, z, t, text, null, 4.5)
    assert calls == [6]
    expected = epsilon(z, t, null) + 4.5 * (epsilon(z, t, text) - epsilon(z, t, null))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    scales = jnp.array([1.0, 4.5, 2.0])[:, None, None, None]  # one for each sample
    got = samplers.guided(epsilon, z, t, text, null, scales)
    expected = epsilon(z, t, null) + scales * (epsilon(z, t, text) - epsilon(z, t, null))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    calls.clear()
    np.testing.assert_array_equal(samplers.guided(epsilon, z, t, text, null, 1.0), epsilon(z, t, text))
    assert calls == [3, 3]


def test_the_clip_loss_fades_out_and_pulls_on_the_student(state, frozen):
    def clip_features(frozen, batch, latents):
        assert not frozen.clip and latents.shape == (2, 8, 8, 4)
        return -jnp.ones((2, 4)), jnp.mean(latents, axis=(1, 2)) + 3

    config = dataclasses.replace(CONFIG, clip_weight=0.1, clip_decay_steps=100, kl_weight=0.0)
    distillation = Distillation(config, UNET, Schedule(), encode_text, clip_features)
    run = jax.jit(distillation.gradients)
    draws = distillation.draw(jax.random.key(0), 2)
    norms = []
    for step, weight in ((0, 0.1), (50, 0.05), (100, 0.0), (200, 0.0)):
        grads, lora_grads, metrics = run(state._replace(step=jnp.asarray(step, jnp.int32)), frozen, BATCH, draws)
        expected = metrics["loss_vsd"] + weight * metrics["loss_clip"]
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5, atol=1e-7)
        norms.append(norm(grads))
    assert "loss_kl" not in metrics
    assert norms[0] > 1e-4 and max(norms[2:]) < 1e-2 * norms[0]  # B is 0, so only L_clip has a gradient
    np.testing.assert_allclose(norms[1], norms[0] / 2, rtol=1e-2)
    for path, grad in jax.tree_util.tree_leaves_with_path(lora_grads):
        assert np.any(np.asarray(grad)) == (path[-2].key == "lora_B"), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer between 1 and .*, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be an integer between 1 and .*, got 0"),
        ({"timestep_spacing": "log"}, "timestep_spacing must be among .* got 'log'"),
        ({"teacher_guidance_scale": 0.5}, "teacher_guidance_scale must be a finite number >= 1, got 0.5"),
        ({"lora_guidance_scale": float("nan")}, "lora_guidance_scale must be a finite number >= 1, got nan"),
        ({"min_timestep": -1}, "min_timestep must be an integer between 0 and .*, got -1"),
        ({"max_timestep": 10}, "max_timestep must be >= distill.min_timestep = 20, got 10"),
        ({"timestep_weighting": "snr"}, "timestep_weighting must be among .* got 'snr'"),
        ({"lora_rank": 0}, "lora_rank must be an integer between 1 and 65536, got 0"),
        ({"lora_targets": []}, "targets must be at least one name of a layer"),
        ({"kl_weight": -1.0}, "kl_weight must be a finite number >= 0, got -1.0"),
        ({"kl_batch_size": 0}, "kl_batch_size must be a finite number > 0, got 0"),
        ({"clip_weight": 0.1}, "needs clip_decay_steps or max_train_steps"),
        ({"text_dropout": 1.0}, r"text_dropout must be a finite number in \[0, 1\), got 1.0"),
        ({"ema_decay": 1.0}, r"ema_decay must be a finite number in \[0, 1\), got 1.0"),
        ({"compute_dtype": "float16"}, "compute_dtype must be among .* got 'float16'"),
        ({"remat": True}, "remat must be among \\['none', 'full', 'streams', 'attention'\\], got True"),
        ({"student_learning_rate": 0.0}, "student_learning_rate must be a finite number > 0, got 0.0"),
        ({"lora_learning_rate": -1.0}, "lora_learning_rate must be a finite number > 0, got -1.0"),
        ({"student_learning_rate_schedule": "cosine"}, "needs total_steps > warmup_steps"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a finite number > 0, got 0.0"),
        (
            {"teacher_guidance_scale_max": 4.0},
            "teacher_guidance_scale_max must be >= teacher_guidance_scale = 4.5, got 4",
        ),
        ({"timesteps": (900, 300)}, r"num_inference_steps must be the number of distill.timesteps \[900, 300\], got 4"),
        ({"timesteps": (9, 9, 5, 1)}, r"timesteps must descend, .*, got \[9, 9, 5, 1\]"),
        ({"lora_updates_per_step": 0}, "lora_updates_per_step must be an integer between 1 and 100, got 0"),
        ({"num_inference_step": 4}, "unknown distillation settings .'num_inference_step'."),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        DistillConfig.from_dict(settings)
    assert "\n" not in str(error.value)


def test_settings_that_do_not_fit_the_models():
    with pytest.raises(ValueError, match="num_inference_steps .* got 1001"):
        make(num_inference_steps=1001)
    with pytest.raises(ValueError, match="max_timestep must be at most .* 999, got 1000"):
        make(max_timestep=1000)
    with pytest.raises(ValueError, match="clip_weight = 0.1 needs CLIP"):
        make(clip_weight=0.1, clip_decay_steps=10)
    with pytest.raises(ValueError, match="latent_size must be given"):
        Distillation(CONFIG, dataclasses.replace(UNET, sample_size=None), Schedule(), encode_text)
    with pytest.raises(ValueError, match="no guidance embedding, got time_cond_proj_dim 8"):
        Distillation(CONFIG, dataclasses.replace(UNET, time_cond_proj_dim=8), Schedule(), encode_text)
    with pytest.raises(ValueError, match="LoRA targets .*to_z.* match no linear or convolution layer of the UNet"):
        train_state.init_adapters(dataclasses.replace(CONFIG, lora_targets=("to_q", "to_z")), UNET, seed=0)
