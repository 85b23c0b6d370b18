"""Distillation of a diffusion teacher into the loop-free student: the state, and one pure training step.

The step is variational score distillation with a LoRA teacher (TiUE, arXiv 2505.21960; VSD is arXiv 2305.16213): the
student's images are judged by the difference between the frozen teacher and a LoRA copy of it that follows the
student's own distribution. The teacher is an argument of the step and no part of the state, so no checkpoint holds it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tiue_jax import sharding, student
from tiue_jax.models import functional, lora
from tiue_jax.models.functional import Params
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.sampling.samplers import guided
from tiue_jax.schedule import Schedule
from tiue_jax.training import losses, optim
from tiue_jax.training.settings import DistillConfig

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that training changes and a checkpoint holds. Every weight is float32, whatever the compute dtype."""

    step: jax.Array  # int32 [], steps done: updates and skipped ones
    skipped: jax.Array  # int32 [], steps whose loss or gradient was not finite
    skipped_in_a_row: jax.Array  # int32 [], those since the last update
    params: Params  # the student
    ema: Params  # its moving average: the product
    lora: Params  # the LoRA teacher's adapters
    optimizer: optax.OptState
    lora_optimizer: optax.OptState


class Frozen(NamedTuple):
    """Parameters that training reads and never changes, best kept in the compute dtype. Empty where not used.

    The teacher and the LoRA teacher share `unet`.
    """

    unet: Params
    text_encoder: Params = {}
    tiny_vae: Params = {}
    clip: Params = {}


class Draws(NamedTuple):
    """The random numbers of one step."""

    noise: jax.Array  # float32 [b h w c], the student's input
    timesteps: jax.Array  # int32 [b], where the teachers are compared
    diffusion_noise: jax.Array  # float32 [b h w c], added to the student's latents there
    lora_timesteps: jax.Array  # int32 [b], the same for the LoRA teacher's update
    lora_noise: jax.Array  # float32 [b h w c]
    drop_text: jax.Array  # bool [], the LoRA teacher's update uses the null prompt


class _Inputs(NamedTuple):
    """What both losses of one step read."""

    frozen: Frozen
    batch: Batch
    text: jax.Array  # [b l d]
    null: jax.Array  # [b l d]
    draws: Draws
    clip_similarity: jax.Array | None = None  # float32 [], of the whole batch, where this is a part of it


# (frozen, batch) -> text embedding of the prompts [b l d] and of the null prompt [1 l d]
EncodeText = Callable[[Frozen, Batch], tuple[jax.Array, jax.Array]]
# (frozen, batch, latents [b h w c]) -> CLIP's features of the prompts and of the decoded latents, each [b p]
ClipFeatures = Callable[[Frozen, Batch, jax.Array], tuple[jax.Array, jax.Array]]
# (latents [b h w c], t [b], text [b l d]) -> predicted noise [b h w c]
Epsilon = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
TrainStep = Callable[[TrainState, Frozen, Batch, jax.Array], tuple[TrainState, Metrics]]


def init_adapters(config: DistillConfig, unet: UNetConfig, seed: int) -> Params:
    """The LoRA teacher's adapters before the first step, float32 numpy: with them it is the teacher."""
    _, shapes = functional.abstract(UNet, unet, lora=config.lora)
    return lora.init(lora.split(shapes)[1], seed)


def init_state(config: DistillConfig, params: Params, adapters: Params) -> TrainState:
    """The state before the first step; jit it with `out_shardings`, and no device ever holds the whole of it.

    Every leaf is a buffer of its own, so that the step may donate the state while the teacher lives on.

    Args:
        config: the settings.
        params: of the teacher, which the student starts as; float32.
        adapters: as `init_adapters` makes them.
    """
    copy = lambda tree: jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), tree)
    of_student, of_lora = config.optimizers()
    start, adapters = copy(params), copy(adapters)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        params=start,
        ema=copy(params),
        lora=adapters,
        optimizer=of_student.init(start),
        lora_optimizer=of_lora.init(adapters),
    )


def state_shapes(config: DistillConfig, unet: UNetConfig) -> TrainState:
    """The state as ShapeDtypeStructs."""
    shapes = lora.split(functional.abstract(UNet, unet, lora=config.lora)[1])
    return jax.eval_shape(functools.partial(init_state, config), *shapes)


def make_encode_text(graphdef: nnx.GraphDef, null_input_ids: np.ndarray) -> EncodeText:
    """Text encoding inside the step, from `batch["input_ids"]` [b l]; `null_input_ids` [l] is the empty prompt."""

    def encode_text(frozen: Frozen, batch: Batch) -> tuple[jax.Array, jax.Array]:
        encoder = functional.bind(graphdef, sharding.gathered(frozen.text_encoder))
        null = jnp.asarray(null_input_ids, jnp.int32)[None]
        return encoder(batch["input_ids"]).last_hidden_state, encoder(null).last_hidden_state

    return encode_text


def make_read_text(null_text: np.ndarray) -> EncodeText:
    """Text embeddings that were made beforehand: `batch["text"]` [b l d]; `null_text` [l d] is the empty prompt's."""

    def read_text(frozen: Frozen, batch: Batch) -> tuple[jax.Array, jax.Array]:
        dtype = jax.tree.leaves(frozen.unet)[0].dtype  # as the text encoder's, kept in the compute dtype
        return batch["text"].astype(dtype), jnp.asarray(null_text).astype(dtype)[None]

    return read_text


def make_clip_features(
    tiny_vae: nnx.GraphDef, clip: nnx.GraphDef, image_size: int, *, normalize: bool = True
) -> ClipFeatures:
    """What L_clip compares: `batch["clip_input_ids"]` [b l], and the latents decoded by the tiny autoencoder.

    `normalize` is the setting `clip_normalize`.
    """

    def clip_features(frozen: Frozen, batch: Batch, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = functional.bind(tiny_vae, frozen.tiny_vae).decode(latents)
        model = functional.bind(clip, frozen.clip)
        pixels = losses.clip_pixels(images, image_size, normalize)
        return model.text_features(batch["clip_input_ids"]), model.image_features(pixels)

    return clip_features


class Distillation:
    """One training step, in parts that can be tested one by one; method.md numbers the steps as the comments do.

    Args:
        config: the settings.
        unet: architecture of teacher and student.
        schedule: the teacher's noise schedule; its timestep spacing is replaced by the config's.
        encode_text: see EncodeText.
        clip_features: see ClipFeatures; required where `config.clip_weight` is not 0.
        replicated: every device has the whole teacher, whatever the mesh's axis `fsdp`.

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
    ):
        size = config.latent_size or unet.sample_size
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
        self.config, self.latent_shape = config, (size, size, unet.in_channels)
        self.schedule = dataclasses.replace(schedule, timestep_spacing=config.timestep_spacing)
        self.form = self.schedule.closed_form(config.num_inference_steps)
        self.encode_text, self.clip_features = encode_text, clip_features
        self.dtype = jnp.dtype(config.compute_dtype)
        self.student, _ = functional.abstract(UNet, unet, remat=config.remat)
        teacher = functools.partial(functional.abstract, UNet, unet, replicated=replicated)
        self.teacher, _ = teacher()
        self.lora_teacher, _ = teacher(lora=config.lora, remat=config.remat)
        self.optimizer, self.lora_optimizer = config.optimizers()
        self.learning_rate, self.lora_learning_rate = config.learning_rates()

    def train_step(self, state: TrainState, frozen: Frozen, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One step. `key` is the run's: the step number is folded in here, so a resumed run draws the same numbers."""
        batch_size = jax.tree.leaves(batch)[0].shape[0]
        return self.update(state, frozen, batch, self.draw(jax.random.fold_in(key, state.step), batch_size))

    def draw(self, key: jax.Array, batch_size: int) -> Draws:
        """The random numbers of a step; they do not depend on how the batch is sharded (partitionable threefry)."""
        config, shape = self.config, (batch_size, *self.latent_shape)
        keys = jax.random.split(key, len(Draws._fields))
        draws = Draws(
            noise=jax.random.normal(keys[0], shape),
            timesteps=jax.random.randint(keys[1], (batch_size,), config.min_timestep, config.max_timestep + 1),
            diffusion_noise=jax.random.normal(keys[2], shape),
            lora_timesteps=jax.random.randint(keys[3], (batch_size,), 0, self.schedule.num_train_timesteps),
            lora_noise=jax.random.normal(keys[4], shape),
            drop_text=jax.random.bernoulli(keys[5], config.text_dropout),
        )
        by_row = {name: value for name, value in draws._asdict().items() if value.ndim}
        return draws._replace(**sharding.split_rows(by_row))

    def update(self, state: TrainState, frozen: Frozen, batch: Batch, draws: Draws) -> tuple[TrainState, Metrics]:
        """One step with given random numbers: the new state and scalar metrics, float32.

        Where a loss or a gradient is not finite, only the counters change. `skipped_steps` counts such steps of the
        run, `skipped_in_a_row` those since its last update.
        """
        grads, lora_grads, metrics = self.gradients(state, frozen, batch, draws)
        rates = {"learning_rate": self.learning_rate, "lora_learning_rate": self.lora_learning_rate}
        updates = state.step - state.skipped
        metrics |= {name: jnp.asarray(rate(updates), jnp.float32) for name, rate in rates.items()}
        metrics |= {"grad_norm": optax.tree.norm(grads), "lora_grad_norm": optax.tree.norm(lora_grads)}
        judged = [metrics[name] for name in ("loss", "loss_lora", "grad_norm", "lora_grad_norm")]
        finite = jnp.all(jnp.isfinite(jnp.stack(judged)))
        updated = self.apply_gradients(state, grads, lora_grads)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)._replace(
            step=state.step + 1,
            skipped=jnp.where(finite, state.skipped, state.skipped + 1),
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        counters = {"skipped_steps": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
        return state, metrics | {name: count.astype(jnp.float32) for name, count in counters.items()}

    def apply_gradients(self, state: TrainState, grads: Params, lora_grads: Params) -> TrainState:
        """Both optimizers, each clipping its own gradient, and the moving average (steps 7 to 9)."""
        updates, optimizer = self.optimizer.update(grads, state.optimizer, state.params)
        lora_updates, lora_optimizer = self.lora_optimizer.update(lora_grads, state.lora_optimizer, state.lora)
        params = optax.apply_updates(state.params, updates)
        return state._replace(
            step=state.step + 1,
            params=params,
            ema=optim.ema(state.ema, params, state.step - state.skipped, self.config.ema_decay),
            lora=optax.apply_updates(state.lora, lora_updates),
            optimizer=optimizer,
            lora_optimizer=lora_optimizer,
        )

    def gradients(
        self, state: TrainState, frozen: Frozen, batch: Batch, draws: Draws
    ) -> tuple[Params, Params, Metrics]:
        """Gradients of the student's and of the LoRA teacher's loss, before clipping, and the losses by name.

        With `gradient_accumulation_steps` they are means over micro-batches, one of which is in memory at a time. The
        draws are those of the whole batch and all losses are means over it, so nothing but rounding changes.
        """
        text, null = self.encode_text(frozen, batch)
        frozen = frozen._replace(unet=functional.cast(frozen.unet, self.dtype))
        count = self.config.gradient_accumulation_steps
        if count == 1:
            return self._gradients(state, _Inputs(frozen, batch, text, jnp.broadcast_to(null, text.shape), draws))

        by_row = {name: value for name, value in draws._asdict().items() if value.ndim}  # drop_text is one for all
        parts = sharding.micro_batches((batch, text, by_row), count)

        def inputs(part: tuple[Batch, jax.Array, dict[str, jax.Array]]) -> _Inputs:
            batch, text, by_row = part
            return _Inputs(frozen, batch, text, jnp.broadcast_to(null, text.shape), draws._replace(**by_row))

        # L_clip bends at the mean similarity of the whole batch, which must be known before its first gradient
        similarity = None
        if self.config.clip_weight:
            of_part = lambda part: self._clip_similarity(state.params, inputs(part))
            similarity = jnp.mean(jax.lax.map(of_part, parts))

        def add(total: list[Params], part: Any) -> tuple[list[Params], Metrics]:
            *grads, metrics = self._gradients(state, inputs(part)._replace(clip_similarity=similarity))
            return jax.tree.map(jnp.add, total, grads), metrics

        zeros = jax.tree.map(jnp.zeros_like, [state.params, state.lora])
        totals, metrics = jax.lax.scan(add, zeros, parts)
        grads, lora_grads = jax.tree.map(lambda x: x / count, totals)
        return grads, lora_grads, {name: jnp.mean(values) for name, values in metrics.items()}

    def _gradients(self, state: TrainState, inputs: _Inputs) -> tuple[Params, Params, Metrics]:
        """What `gradients` returns, of one batch or micro-batch."""
        grads, (latents, metrics) = jax.grad(self._student_loss, has_aux=True)(state.params, state, inputs)
        latents = jax.lax.stop_gradient(latents)
        grads, inputs = _then(grads, inputs)
        lora_grads, lora_metrics = jax.grad(self._lora_loss, has_aux=True)(state.lora, latents, inputs)
        return grads, lora_grads, metrics | lora_metrics

    def _student_outputs(self, params: Params, inputs: _Inputs) -> tuple[jax.Array, jax.Array]:
        """The decoder's outputs [b k h w c] and the student's latents z_0 [b h w c] (step 1)."""
        unet = functional.bind(self.student, functional.cast(params, self.dtype))
        outputs = student.predict(unet, inputs.draws.noise, inputs.text, self.form.timesteps)
        return outputs, student.combine(inputs.draws.noise, outputs, self.form)

    def _clip_similarity(self, params: Params, inputs: _Inputs) -> jax.Array:
        """The mean cosine similarity that L_clip judges, float32 []."""
        assert self.clip_features is not None  # __init__ saw to it
        _, latents = self._student_outputs(params, inputs)
        features = self.clip_features(inputs.frozen, inputs.batch, latents)
        return losses.clip(*features, self.config.clip_threshold)[1]["clip_similarity"]

    def _student_loss(
        self, params: Params, state: TrainState, inputs: _Inputs
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        """L_vsd + L_kl + L_clip, and with it the student's latents z_0 [b h w c]."""
        config, noise = self.config, inputs.draws.noise
        outputs, latents = self._student_outputs(params, inputs)  # step 1
        loss, metrics = self._vsd(latents, state.lora, inputs)  # steps 2 to 4
        if config.kl_weight:
            kl, kl_metrics = losses.kl(self._student_epsilons(noise, outputs), config.kl_batch_size)  # step 5
            loss, metrics = loss + config.kl_weight * kl, metrics | kl_metrics
        if config.clip_weight:
            assert self.clip_features is not None  # __init__ saw to it
            features = self.clip_features(inputs.frozen, inputs.batch, latents)
            clip, clip_metrics = losses.clip(*features, config.clip_threshold, inputs.clip_similarity)  # step 6
            loss, metrics = loss + config.clip_weight_at(state.step) * clip, metrics | clip_metrics
        return loss, (latents, metrics | {"loss": loss})

    def _student_epsilons(self, noise: jax.Array, outputs: jax.Array) -> jax.Array:
        """The decoder's outputs [b k h w c] as noise predictions, at the latents that the DDIM recursion passes."""
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
        real = guided(teacher, noisy, t, *texts, config.teacher_guidance_scale)
        real, inputs = _then(real, inputs)
        lora_teacher = self._epsilon(self._bind_lora_teacher(adapters, inputs))
        fake = guided(lora_teacher, noisy, t, *texts, config.lora_guidance_scale)
        _, sigma = self.schedule.signal_and_noise(t)
        return losses.vsd(latents, real, fake, losses.timestep_weight(config.timestep_weighting, sigma))

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
        """The network as a float32 noise prediction of (latents, t, text), whatever it was trained to predict."""
        return lambda latents, t, text: self.schedule.to_epsilon(unet(latents, t, text).astype(jnp.float32), latents, t)


def _then(done: Any, inputs: _Inputs) -> tuple[Any, _Inputs]:
    """`inputs` for what is to follow `done`, not to run beside it.

    Three evaluations gather the same frozen weights. Left to itself XLA gathers once, and so keeps them whole on every
    device from the first evaluation to the last, and through the student's backward pass in between.
    """
    done, unet = jax.lax.optimization_barrier((done, inputs.frozen.unet))
    return done, inputs._replace(frozen=inputs.frozen._replace(unet=unet))


def make_train_step(
    config: DistillConfig,
    unet: UNetConfig,
    schedule: Schedule,
    encode_text: EncodeText,
    clip_features: ClipFeatures | None = None,
    *,
    replicated: bool = False,
) -> TrainStep:
    """The training step (state, frozen, batch, key) -> (state, metrics); jit it with donate_argnums=0."""
    return Distillation(config, unet, schedule, encode_text, clip_features, replicated=replicated).train_step
