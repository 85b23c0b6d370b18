"""Distillation of a diffusion teacher into the loop-free student: one pure training step.

The step is variational score distillation with a LoRA teacher (TiUE, arXiv 2505.21960; VSD is arXiv 2305.16213). The
student's latents are judged by the difference between two noise predictions: that of the frozen teacher, and that of a
LoRA copy of the teacher which learns the distribution of the student's latents. The teacher is an argument of the step
and not part of the state, so no checkpoint holds it. docs/method.md, section 3, has the equations.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tiue_jax import sharding, student
from tiue_jax.models import functional, lora
from tiue_jax.models.functional import Params
from tiue_jax.models.platforms import loops_are_slow
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.sampling.samplers import guided
from tiue_jax.schedule import Schedule
from tiue_jax.training import losses, optim
from tiue_jax.training.distill_settings import DistillConfig
from tiue_jax.training.draws import KEYS, Draws, draw
from tiue_jax.training.train_state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Frozen(NamedTuple):
    """Parameters that training reads and never changes, in the compute dtype. A model that is not used is empty.

    The teacher and the LoRA teacher share `unet`.
    """

    unet: Params
    text_encoder: Params = {}
    tiny_vae: Params = {}
    clip: Params = {}


class _Inputs(NamedTuple):
    """The inputs of both losses, for a batch or a micro-batch."""

    frozen: Frozen
    batch: Batch
    text: jax.Array  # [b l d]
    null: jax.Array  # [b l d]
    draws: Draws
    clip_similarity: jax.Array | None = None  # float32 [], of the whole batch; given with a micro-batch


# (frozen, batch) -> text embedding of the prompts [b l d] and of the null prompt [1 l d]
EncodeText = Callable[[Frozen, Batch], tuple[jax.Array, jax.Array]]
# (frozen, batch, latents [b h w c]) -> CLIP features of the prompts and of the decoded latents, each [b p]
ClipFeatures = Callable[[Frozen, Batch, jax.Array], tuple[jax.Array, jax.Array]]
# (latents [b h w c], t [b], text [b l d]) -> predicted noise [b h w c]
Epsilon = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
TrainStep = Callable[[TrainState, Frozen, Batch, jax.Array], tuple[TrainState, Metrics]]


class Distillation:
    """One training step, `train_step`, in parts that can be tested one by one.

    The comments number the parts 1 to 9 as docs/method.md, section 3, does. Jit `train_step` with `donate_argnums=0`.

    Args:
        config: the settings.
        unet: the architecture of teacher and student.
        schedule: the teacher's noise schedule. The config's timestep spacing replaces the schedule's.
        encode_text: see EncodeText.
        clip_features: see ClipFeatures. Required if `config.clip_weight` is not 0.
        replicated: every device holds the whole teacher, even if the mesh axis `fsdp` is larger than 1.
        replicate_below: parameters of fewer elements are not sharded over `fsdp`.

    Raises:
        ValueError: settings that do not fit the schedule or the UNet, or a CLIP loss without CLIP.
    """

    def __init__(
        self,
        config: DistillConfig,
        unet: UNetConfig,
        schedule: Schedule,
        encode_text: EncodeText,
        clip_features: ClipFeatures | None = None,
        *,
        replicated: bool = False,
        replicate_below: int = sharding.REPLICATE_BELOW,
    ):
        size = unet.latent_size if config.latent_size is None else (config.latent_size,) * 2
        if size is None:
            raise ValueError("latent_size must be given, since the UNet's config has no sample_size, got None")
        if unet.time_cond_proj_dim is not None:
            raise ValueError(
                f"the teacher must take no guidance embedding, got time_cond_proj_dim {unet.time_cond_proj_dim}"
            )
        if config.max_timestep >= schedule.num_train_timesteps:
            limit = schedule.num_train_timesteps - 1
            raise ValueError(f"max_timestep must be at most the schedule's last, {limit}, got {config.max_timestep}")
        if config.clip_weight and clip_features is None:
            raise ValueError(f"clip_weight = {config.clip_weight} needs CLIP and a tiny autoencoder, got none")
        self.config, self.latent_shape = config, (*size, unet.in_channels)
        self.schedule = dataclasses.replace(
            schedule, timestep_spacing=config.timestep_spacing, custom_timesteps=config.timesteps
        )
        self.form = self.schedule.closed_form(config.num_inference_steps)
        self.encode_text, self.clip_features = encode_text, clip_features
        self.dtype = jnp.dtype(config.compute_dtype)
        network = functools.partial(functional.abstract, UNet, unet, replicate_below=replicate_below)
        teacher = functools.partial(network, replicated=replicated)
        self.student, _ = network(remat=config.remat)
        self.teacher, _ = teacher()
        self.lora_teacher, _ = teacher(lora=config.lora, remat=config.remat)
        self.optimizer, self.lora_optimizer = config.optimizers()
        self.learning_rate, self.lora_learning_rate = config.learning_rates()

    def train_step(self, state: TrainState, frozen: Frozen, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One step: the new state, and scalar metrics by name.

        `key` is one for the whole run. The step number is folded in here, so a resumed run draws the same numbers.
        """
        batch_size = jax.tree.leaves(batch)[0].shape[0]
        key = jax.random.fold_in(key, state.step)
        further = range(KEYS, KEYS + self.config.lora_updates_per_step - 1)  # keys that the first draw does not use
        more = [self.draw(jax.random.fold_in(key, i), batch_size) for i in further]
        return self.update(state, frozen, batch, self.draw(key, batch_size), more)

    def draw(self, key: jax.Array, batch_size: int) -> Draws:
        """The random numbers of a step. They are the same for every sharding of the batch (partitionable threefry)."""
        return draw(key, self.config, (batch_size, *self.latent_shape), self.schedule.num_train_timesteps)

    def update(
        self, state: TrainState, frozen: Frozen, batch: Batch, draws: Draws, more: Sequence[Draws] = ()
    ) -> tuple[TrainState, Metrics]:
        """One step with given random numbers: the new state, and scalar metrics by name, float32.

        `more` has the random numbers of further updates of the LoRA teacher, see `update_lora`. If a loss or a gradient
        is not finite, only the counters change. The metric `skipped_steps` counts such steps since the start of the
        run, `skipped_in_a_row` those since the last update.
        """
        grads, lora_grads, metrics = self.gradients(state, frozen, batch, draws)
        updates_done = state.step - state.skipped
        metrics |= {
            "learning_rate": jnp.asarray(self.learning_rate(updates_done), jnp.float32),
            "lora_learning_rate": jnp.asarray(self.lora_learning_rate(updates_done), jnp.float32),
            "grad_norm": optax.tree.norm(grads),
            "lora_grad_norm": optax.tree.norm(lora_grads),
        }
        checked = [metrics[name] for name in ("loss", "loss_lora", "grad_norm", "lora_grad_norm")]
        updated = self.apply_gradients(state, grads, lora_grads)
        if more:
            updated, losses_and_norms = self.update_lora(updated, state.params, frozen, batch, more)
            checked.append(jnp.max(losses_and_norms))
        finite = jnp.all(jnp.isfinite(jnp.stack(checked)))
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)._replace(
            step=state.step + 1,
            skipped=jnp.where(finite, state.skipped, state.skipped + 1),
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics |= {
            "skipped_steps": state.skipped.astype(jnp.float32),
            "skipped_in_a_row": state.skipped_in_a_row.astype(jnp.float32),
        }
        return state, metrics

    def apply_gradients(self, state: TrainState, grads: Params, lora_grads: Params) -> TrainState:
        """Updates student, LoRA and moving average. Each optimizer clips the gradient first (steps 7 to 9)."""
        updates, optimizer = self.optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        updates_done = state.step - state.skipped
        state = self.apply_lora_gradients(state, lora_grads, updates_done)
        return state._replace(
            step=state.step + 1,
            params=params,
            ema=optim.ema(state.ema, params, updates_done, self.config.ema_decay),
            optimizer=optimizer,
        )

    def apply_lora_gradients(self, state: TrainState, grads: Params, updates_done: jax.Array) -> TrainState:
        """Updates LoRA, at the rate of a step before which there were `updates_done` steps with an update."""
        updates, optimizer = self.lora_optimizer.update(grads, state.lora_optimizer, state.lora)
        rate = jnp.asarray(self.lora_learning_rate(updates_done), jnp.float32)
        updates = jax.tree.map(lambda update: rate.astype(update.dtype) * update, updates)
        return state._replace(lora=optax.apply_updates(state.lora, updates), lora_optimizer=optimizer)

    def update_lora(
        self, state: TrainState, student_params: Params, frozen: Frozen, batch: Batch, more: Sequence[Draws]
    ) -> tuple[TrainState, jax.Array]:
        """Updates the LoRA teacher once for each of `more`, on latents that the student makes of new noise.

        So the LoRA teacher follows the student more closely (two time-scales: DMD2, arXiv 2405.14867, section 4.2).

        Args:
            state: after the first update of the step.
            student_params: of the student that makes the latents: as before this step, for all updates of the step.
            frozen: see `update`.
            batch: see `update`.
            more: the random numbers, at least one.

        Returns:
            The state, and the loss and gradient norm of each update, float32 [n 2].
        """
        encoded, inputs_of = self._encode(frozen, batch)
        count = self.config.gradient_accumulation_steps

        def one(now: TrainState, draws: Draws) -> tuple[TrainState, jax.Array]:
            def of_rows(rows: Any) -> tuple[Params, jax.Array]:
                inputs = inputs_of(draws, rows)
                _, latents = self._student_outputs(student_params, inputs)
                latents = jax.lax.stop_gradient(latents)
                grads, metrics = jax.grad(self._lora_loss, has_aux=True)(now.lora, latents, inputs)
                return grads, metrics["loss_lora"]

            grads, loss = sharding.mean_over_micro_batches(of_rows, (*encoded, draws.by_row()), count)
            now = self.apply_lora_gradients(now, grads, now.step - 1 - now.skipped)
            return now, jnp.stack([loss, optax.tree.norm(grads)])

        every = jax.tree.map(lambda *draws: jnp.stack(draws), *more)
        return jax.lax.scan(one, state, every, unroll=loops_are_slow())

    def gradients(
        self, state: TrainState, frozen: Frozen, batch: Batch, draws: Draws
    ) -> tuple[Params, Params, Metrics]:
        """Gradients of the student's and of the LoRA teacher's loss, before clipping, and the losses by name.

        With `gradient_accumulation_steps` they are means over micro-batches, and the activations of one micro-batch at
        a time are in memory. Every loss is a mean over the batch and the draws are the same, so only rounding differs.
        """
        encoded, inputs_of = self._encode(frozen, batch)
        rows, count = (*encoded, draws.by_row()), self.config.gradient_accumulation_steps
        # L_clip is 0 above a threshold of the whole batch's mean similarity. So that mean comes before any gradient.
        similarity = None
        if self.config.clip_weight and count > 1:

            def similarity_of(rows: Any) -> jax.Array:
                return self._clip_similarity(state.params, inputs_of(draws, rows))

            similarity = sharding.mean_over_micro_batches(similarity_of, rows, count)

        def of_rows(rows: Any) -> tuple[Params, Params, Metrics]:
            return self._gradients(state, inputs_of(draws, rows)._replace(clip_similarity=similarity))

        return sharding.mean_over_micro_batches(of_rows, rows, count)

    def _encode(self, frozen: Frozen, batch: Batch) -> tuple[tuple[Batch, jax.Array], Callable[[Draws, Any], _Inputs]]:
        """Encodes the text of a batch.

        Returns:
            The rows that are split into micro-batches, without the draws: the batch and its text embedding. And a
            function from draws, and rows with `draws.by_row()`, to the inputs of the losses.
        """
        text, null = self.encode_text(frozen, batch)
        frozen = frozen._replace(unet=functional.cast(frozen.unet, self.dtype))

        def inputs_of(draws: Draws, rows: Any) -> _Inputs:
            batch, text, by_row = rows
            return _Inputs(frozen, batch, text, jnp.broadcast_to(null, text.shape), draws._replace(**by_row))

        return (batch, text), inputs_of

    def _gradients(self, state: TrainState, inputs: _Inputs) -> tuple[Params, Params, Metrics]:
        """The result of `gradients` for one batch or micro-batch."""
        grads, (latents, metrics) = jax.grad(self._student_loss, has_aux=True)(state.params, state, inputs)
        latents = jax.lax.stop_gradient(latents)
        grads, inputs = _then(grads, inputs)
        lora_grads, lora_metrics = jax.grad(self._lora_loss, has_aux=True)(state.lora, latents, inputs)
        return grads, lora_grads, metrics | lora_metrics

    def _student_outputs(self, params: Params, inputs: _Inputs) -> tuple[jax.Array, jax.Array]:
        """The decoder's outputs [b k h w c] and the student's latents z_0 [b h w c] (step 1)."""
        return self._run_student(params, inputs.draws.noise, inputs.text)

    def _run_student(self, params: Params, noise: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`_student_outputs` for noise [b h w c] and text [b l d]."""
        unet = functional.bind(self.student, functional.cast(params, self.dtype))
        if not self.config.shared_encoder:
            return student.unshared(unet, noise, text, self.form)
        outputs = student.predict(unet, noise, text, self.form.timesteps)
        return outputs, student.combine(noise, outputs, self.form)

    def _clip_similarity(self, params: Params, inputs: _Inputs) -> jax.Array:
        """The mean cosine similarity of prompts and decoded latents, which L_clip raises; float32 []."""
        assert self.clip_features is not None  # checked in __init__
        _, latents = self._student_outputs(params, inputs)
        features = self.clip_features(inputs.frozen, inputs.batch, latents)
        return losses.clip(*features, self.config.clip_threshold)[1]["clip_similarity"]

    def _student_loss(
        self, params: Params, state: TrainState, inputs: _Inputs
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        """The weighted sum of L_vsd, L_kl and L_clip; also the student's latents z_0 [b h w c] and the metrics."""
        config, noise = self.config, inputs.draws.noise
        outputs, latents = self._student_outputs(params, inputs)  # step 1
        loss, metrics = self._vsd(latents, state.lora, inputs)  # steps 2 to 4
        if config.kl_weight:
            kl, kl_metrics = losses.kl(self._student_epsilons(noise, outputs), config.kl_batch_size)  # step 5
            loss, metrics = loss + config.kl_weight * kl, metrics | kl_metrics
        if config.clip_weight:
            assert self.clip_features is not None  # checked in __init__
            features = self.clip_features(inputs.frozen, inputs.batch, latents)
            clip, clip_metrics = losses.clip(*features, config.clip_threshold, inputs.clip_similarity)  # step 6
            loss, metrics = loss + config.clip_weight_at(state.step) * clip, metrics | clip_metrics
        return loss, (latents, metrics | {"loss": loss})

    def _student_epsilons(self, noise: jax.Array, outputs: jax.Array) -> jax.Array:
        """The decoder's outputs as noise predictions [b k h w c], at the latents of each step of the DDIM recursion."""
        trajectory = student.trajectory(noise, outputs, self.form)
        steps = [
            self.schedule.to_epsilon(outputs[:, i], trajectory[:, i], jnp.full(noise.shape[:1], t))
            for i, t in enumerate(self.form.timesteps)
        ]
        return jnp.stack(steps, axis=1)

    def _vsd(self, latents: jax.Array, adapters: Params, inputs: _Inputs) -> losses.Loss:
        """L_vsd of the student's latents z_0."""
        config, t, texts = self.config, inputs.draws.timesteps, (inputs.text, inputs.null)
        noisy = jax.lax.stop_gradient(self.schedule.add_noise(latents, inputs.draws.diffusion_noise, t))
        teacher = self._epsilon(functional.bind(self.teacher, inputs.frozen.unet))
        scales = inputs.draws.guidance_scales
        scale = config.teacher_guidance_scale if scales is None else scales[:, None, None, None]
        real = guided(teacher, noisy, t, *texts, scale)
        real, inputs = _then(real, inputs)
        lora_teacher = self._epsilon(self._bind_lora_teacher(adapters, inputs))
        fake = guided(lora_teacher, noisy, t, *texts, config.lora_guidance_scale)
        _, sigma = self.schedule.signal_and_noise(t)
        return losses.vsd(latents, real, fake, losses.timestep_weight(config.timestep_weighting, sigma))

    def sample_student(self, params: Params, noise: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The student's outputs as noise predictions [b k h w c], and its latents z_0 [b h w c], without gradients."""
        outputs, latents = self._run_student(params, noise, text)
        return self._student_epsilons(noise, outputs), latents

    def predict_noise(
        self,
        adapters: Params,
        frozen: Frozen,
        latents: jax.Array,
        t: jax.Array,
        texts: tuple[jax.Array, jax.Array],
        guidance_scale: jax.Array,
    ) -> jax.Array:
        """The noise that the LoRA teacher predicts in latents z_t [b h w c], with guidance, float32 [b h w c].

        With adapters of zeros it is the teacher's prediction.

        Args:
            adapters: of the LoRA teacher.
            frozen: the teacher.
            latents: z_t [b h w c].
            t: int32 [b].
            texts: text embeddings of the prompts and of the null prompt, each [b l d].
            guidance_scale: float32 [].
        """
        unet = lora.merge(functional.cast(frozen.unet, self.dtype), functional.cast(adapters, self.dtype))
        return guided(self._epsilon(functional.bind(self.lora_teacher, unet)), latents, t, *texts, guidance_scale)

    def _lora_loss(self, adapters: Params, latents: jax.Array, inputs: _Inputs) -> losses.Loss:
        """The LoRA teacher's denoising loss on the student's latents (step 8)."""
        t, noise = inputs.draws.lora_timesteps, inputs.draws.lora_noise
        text = jnp.where(inputs.draws.drop_text, inputs.null, inputs.text)
        lora_teacher = self._epsilon(self._bind_lora_teacher(adapters, inputs))
        prediction = lora_teacher(self.schedule.add_noise(latents, noise, t), t, text)
        signal, _ = self.schedule.signal_and_noise(t)
        return losses.lora(prediction, noise, signal)

    def _bind_lora_teacher(self, adapters: Params, inputs: _Inputs) -> UNet:
        params = lora.merge(inputs.frozen.unet, functional.cast(adapters, self.dtype))
        return functional.bind(self.lora_teacher, params)

    def _epsilon(self, unet: UNet) -> Epsilon:
        """The network as a function to float32 noise predictions, for each prediction type of the schedule."""

        def epsilon(latents: jax.Array, t: jax.Array, text: jax.Array) -> jax.Array:
            return self.schedule.to_epsilon(unet(latents, t, text).astype(jnp.float32), latents, t)

        return epsilon


def _then(done: Any, inputs: _Inputs) -> tuple[Any, _Inputs]:
    """Makes everything that reads the returned inputs run after `done` is computed. Values do not change.

    Three evaluations gather the same frozen weights. Without this barrier XLA gathers them once, and every device holds
    the whole teacher from the first evaluation to the last, also during the student's backward pass.
    """
    done, unet = jax.lax.optimization_barrier((done, inputs.frozen.unet))
    return done, inputs._replace(frozen=inputs.frozen._replace(unet=unet))
