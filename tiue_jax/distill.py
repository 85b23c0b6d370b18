"""Distillation of a diffusion teacher into the loop-free student: settings, state, and one pure training step.

The step is variational score distillation with a LoRA teacher (TiUE, arXiv 2505.21960; VSD is arXiv 2305.16213): the
student's images are judged by the difference between the frozen teacher and a LoRA copy of it that follows the
student's own distribution. The teacher is an argument of the step and no part of the state, so no checkpoint holds it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tiue_jax import losses, optim, student
from tiue_jax.models import functional, lora
from tiue_jax.models.functional import Params
from tiue_jax.models.lora import LoRAConfig
from tiue_jax.models.unet import UNet, UNetConfig
from tiue_jax.samplers import guided
from tiue_jax.schedule import SPACINGS, Schedule

COMPUTE_DTYPES = ("float32", "bfloat16")

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Settings of the distillation; the defaults are the reference recipe for an 866M-parameter UNet.

    Raises:
        ValueError: a setting out of its range, with its name, its value and what was expected.
    """

    num_inference_steps: int = 4  # K, decoder passes
    timestep_spacing: str = "leading"  # or "trailing", "linspace"; with "leading" the last pass weighs almost nothing
    teacher_guidance_scale: float = 4.5  # classifier-free guidance of the frozen teacher; 1 is none
    lora_guidance_scale: float = 4.5
    min_timestep: int = 20  # the teachers are compared at timesteps from here ...
    max_timestep: int = 980  # ... to here, included
    timestep_weighting: str = "one_minus_alphas_cumprod"  # of L_vsd; or "uniform"
    lora_rank: int = 64
    lora_alpha: float = 108.0  # the adapters' scale is alpha / rank
    lora_targets: tuple[str, ...] = ("to_q", "to_v")  # ends of the names of linear and convolution layers, as in peft
    kl_weight: float = 0.1  # lambda_kl; 0 leaves the term out
    kl_batch_size: float = 8.0  # the KL term is its mean over the batch times this, see losses.kl
    clip_weight: float = 0.0  # of L_clip at step 0, falling linearly to 0; 0 leaves the term out
    clip_decay_steps: int | None = None  # the step at which it is 0; max_train_steps where None
    clip_threshold: float = 0.35  # tau: the similarity above which CLIP is satisfied
    clip_normalize: bool = True  # CLIP's mean and standard deviation on its pictures, which the reference leaves out
    text_dropout: float = 0.1  # probability that the LoRA teacher's update uses the null prompt, for the whole batch
    ema_decay: float = 0.9999  # upper limit of the moving average's decay; 0 makes it a copy of the weights
    student_learning_rate: float = 1e-6
    student_learning_rate_schedule: str = "constant"  # or "linear", "cosine": both fall to 0 at max_train_steps
    lora_learning_rate: float = 1e-3
    lora_learning_rate_schedule: str = "constant"
    warmup_steps: int = 0  # linear warm-up of both rates
    max_train_steps: int | None = None
    max_grad_norm: float = 1.0  # global norm to which each of the two gradients is clipped
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    adam_eps: float = 1e-8
    compute_dtype: str = "bfloat16"  # of the networks; losses, schedule and trained weights are always float32
    remat: bool = False  # recompute each block in the backward pass instead of keeping its activations
    latent_size: int | None = None  # height and width of the latents; the UNet's own sample_size where None

    def __post_init__(self):
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        for name, known in (
            ("timestep_spacing", SPACINGS),
            ("timestep_weighting", losses.TIMESTEP_WEIGHTINGS),
            ("student_learning_rate_schedule", optim.LEARNING_RATE_SCHEDULES),
            ("lora_learning_rate_schedule", optim.LEARNING_RATE_SCHEDULES),
            ("compute_dtype", COMPUTE_DTYPES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be among {list(known)}, got {getattr(self, name)!r}")
        at_least = dict.fromkeys(("min_timestep", "kl_weight", "clip_weight", "warmup_steps"), 0)
        at_least |= dict.fromkeys(("num_inference_steps", "teacher_guidance_scale", "lora_guidance_scale"), 1)
        optional = ("clip_decay_steps", "max_train_steps", "latent_size")
        at_least |= {name: 1 for name in optional if getattr(self, name) is not None}
        for name, lowest in at_least.items():
            if not getattr(self, name) >= lowest:
                raise ValueError(f"{name} must be >= {lowest}, got {getattr(self, name)}")
        for name in ("kl_batch_size", "max_grad_norm", "adam_eps", "student_learning_rate", "lora_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("text_dropout", "ema_decay", "adam_b1", "adam_b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not self.max_timestep >= self.min_timestep:
            raise ValueError(f"max_timestep must be >= min_timestep = {self.min_timestep}, got {self.max_timestep}")
        if self.clip_weight and not (self.clip_decay_steps or self.max_train_steps):
            raise ValueError(f"clip_weight = {self.clip_weight} needs clip_decay_steps or max_train_steps, got neither")
        self.learning_rates()
        self.lora  # noqa: B018 (validates rank and targets)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """From a plain mapping; ValueError names each setting that does not exist."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"unknown distillation settings {unknown}, expected some of {sorted(known)}")
        return cls(**settings)

    @property
    def lora(self) -> LoRAConfig:
        return LoRAConfig(self.lora_rank, self.lora_alpha, self.lora_targets)

    def clip_weight_at(self, step: jax.Array) -> jax.Array:
        """The weight of L_clip at a step, float32 []."""
        end = self.clip_decay_steps or self.max_train_steps
        assert end is not None  # __post_init__ saw to it
        return self.clip_weight * jnp.maximum(0.0, 1 - step.astype(jnp.float32) / end)

    def learning_rates(self) -> tuple[optax.Schedule, optax.Schedule]:
        """Learning rates of the student and of the LoRA teacher by step."""
        rate = functools.partial(optim.learning_rate, warmup_steps=self.warmup_steps, total_steps=self.max_train_steps)
        return (
            rate(self.student_learning_rate_schedule, self.student_learning_rate),
            rate(self.lora_learning_rate_schedule, self.lora_learning_rate),
        )

    def optimizers(self) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
        """The optimizers of the student and of the LoRA teacher."""
        settings = {"b1": self.adam_b1, "b2": self.adam_b2, "eps": self.adam_eps, "max_grad_norm": self.max_grad_norm}
        of_student, of_lora = self.learning_rates()
        return optim.adam(of_student, **settings), optim.adam(of_lora, **settings)


class TrainState(NamedTuple):
    """All that training changes and a checkpoint holds. Every weight is float32, whatever the compute dtype."""

    step: jax.Array  # int32 [], updates done
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


# (frozen, batch) -> text embedding of the prompts [b l d] and of the null prompt [1 l d]
EncodeText = Callable[[Frozen, Batch], tuple[jax.Array, jax.Array]]
# (frozen, batch, latents [b h w c]) -> CLIP's features of the prompts and of the decoded latents, each [b p]
ClipFeatures = Callable[[Frozen, Batch, jax.Array], tuple[jax.Array, jax.Array]]
# (latents [b h w c], t [b], text [b l d]) -> predicted noise [b h w c]
Epsilon = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
TrainStep = Callable[[TrainState, Frozen, Batch, jax.Array], tuple[TrainState, Metrics]]


def init_state(config: DistillConfig, unet: UNetConfig, params: Params, seed: int) -> TrainState:
    """The state before the first step: the student starts as `params` (the teacher), the LoRA teacher likewise.

    Every leaf is a buffer of its own, so that the step may donate the state while the teacher lives on.
    """
    _, shapes = functional.abstract(UNet, unet, lora=config.lora)
    _, lora_shapes = lora.split(shapes)
    copy = lambda tree: jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), tree)
    adapters = copy(lora.init(lora_shapes, seed))
    of_student, of_lora = config.optimizers()
    start = copy(params)
    return TrainState(
        jnp.zeros((), jnp.int32), start, copy(params), adapters, of_student.init(start), of_lora.init(adapters)
    )


def make_encode_text(graphdef: nnx.GraphDef, null_input_ids: np.ndarray) -> EncodeText:
    """Text encoding inside the step, from `batch["input_ids"]` [b l]; `null_input_ids` [l] is the empty prompt."""

    def encode_text(frozen: Frozen, batch: Batch) -> tuple[jax.Array, jax.Array]:
        encoder = functional.bind(graphdef, frozen.text_encoder)
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
        self.teacher, _ = functional.abstract(UNet, unet)
        self.lora_teacher, _ = functional.abstract(UNet, unet, lora=config.lora, remat=config.remat)
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
        return Draws(
            noise=jax.random.normal(keys[0], shape),
            timesteps=jax.random.randint(keys[1], (batch_size,), config.min_timestep, config.max_timestep + 1),
            diffusion_noise=jax.random.normal(keys[2], shape),
            lora_timesteps=jax.random.randint(keys[3], (batch_size,), 0, self.schedule.num_train_timesteps),
            lora_noise=jax.random.normal(keys[4], shape),
            drop_text=jax.random.bernoulli(keys[5], config.text_dropout),
        )

    def update(self, state: TrainState, frozen: Frozen, batch: Batch, draws: Draws) -> tuple[TrainState, Metrics]:
        """One step with given random numbers: the new state and scalar metrics."""
        grads, lora_grads, metrics = self.gradients(state, frozen, batch, draws)
        rates = {"learning_rate": self.learning_rate, "lora_learning_rate": self.lora_learning_rate}
        metrics |= {name: jnp.asarray(rate(state.step), jnp.float32) for name, rate in rates.items()}
        metrics |= {"grad_norm": optax.tree.norm(grads), "lora_grad_norm": optax.tree.norm(lora_grads)}
        return self.apply_gradients(state, grads, lora_grads), metrics

    def apply_gradients(self, state: TrainState, grads: Params, lora_grads: Params) -> TrainState:
        """Both optimizers, each clipping its own gradient, and the moving average (steps 7 to 9)."""
        updates, optimizer = self.optimizer.update(grads, state.optimizer, state.params)
        lora_updates, lora_optimizer = self.lora_optimizer.update(lora_grads, state.lora_optimizer, state.lora)
        params = optax.apply_updates(state.params, updates)
        return TrainState(
            step=state.step + 1,
            params=params,
            ema=optim.ema(state.ema, params, state.step, self.config.ema_decay),
            lora=optax.apply_updates(state.lora, lora_updates),
            optimizer=optimizer,
            lora_optimizer=lora_optimizer,
        )

    def gradients(
        self, state: TrainState, frozen: Frozen, batch: Batch, draws: Draws
    ) -> tuple[Params, Params, Metrics]:
        """Gradients of the student's and of the LoRA teacher's loss, before clipping, and the losses by name."""
        text, null = self.encode_text(frozen, batch)
        frozen = frozen._replace(unet=functional.cast(frozen.unet, self.dtype))
        inputs = _Inputs(frozen, batch, text, jnp.broadcast_to(null, text.shape), draws)
        grads, (latents, metrics) = jax.grad(self._student_loss, has_aux=True)(state.params, state, inputs)
        latents = jax.lax.stop_gradient(latents)
        lora_grads, lora_metrics = jax.grad(self._lora_loss, has_aux=True)(state.lora, latents, inputs)
        return grads, lora_grads, metrics | lora_metrics

    def _student_loss(
        self, params: Params, state: TrainState, inputs: _Inputs
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        """L_vsd + L_kl + L_clip, and with it the student's latents z_0 [b h w c]."""
        config, noise = self.config, inputs.draws.noise
        unet = functional.bind(self.student, functional.cast(params, self.dtype))
        outputs = student.predict(unet, noise, inputs.text, self.form.timesteps)  # step 1, [b k h w c]
        latents = student.combine(noise, outputs, self.form)
        loss, metrics = self._vsd(latents, state.lora, inputs)  # steps 2 to 4
        if config.kl_weight:
            kl, kl_metrics = losses.kl(self._student_epsilons(noise, outputs), config.kl_batch_size)  # step 5
            loss, metrics = loss + config.kl_weight * kl, metrics | kl_metrics
        if config.clip_weight:
            assert self.clip_features is not None  # __init__ saw to it
            features = self.clip_features(inputs.frozen, inputs.batch, latents)
            clip, clip_metrics = losses.clip(*features, config.clip_threshold)  # step 6
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
        lora_teacher = self._epsilon(self._bind_lora_teacher(adapters, inputs))
        real = guided(teacher, noisy, t, *texts, config.teacher_guidance_scale)
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


def make_train_step(
    config: DistillConfig,
    unet: UNetConfig,
    schedule: Schedule,
    encode_text: EncodeText,
    clip_features: ClipFeatures | None = None,
) -> TrainStep:
    """The training step (state, frozen, batch, key) -> (state, metrics); jit it with donate_argnums=0."""
    return Distillation(config, unet, schedule, encode_text, clip_features).train_step
