"""Settings of the distillation."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax

from tiue_jax import losses, optim
from tiue_jax.models.lora import LoRAConfig
from tiue_jax.models.unet import REMAT_POLICIES
from tiue_jax.schedule import SPACINGS

COMPUTE_DTYPES = ("float32", "bfloat16")


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
    gradient_accumulation_steps: int = 1  # micro-batches, one after the other, that a batch is split into
    remat: str = "none"  # what the backward pass computes again: see models.unet.REMAT_POLICIES
    latent_size: int | None = None  # height and width of the latents; the UNet's own sample_size where None

    def __post_init__(self):
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        for name, known in (
            ("timestep_spacing", SPACINGS),
            ("timestep_weighting", losses.TIMESTEP_WEIGHTINGS),
            ("student_learning_rate_schedule", optim.LEARNING_RATE_SCHEDULES),
            ("lora_learning_rate_schedule", optim.LEARNING_RATE_SCHEDULES),
            ("compute_dtype", COMPUTE_DTYPES),
            ("remat", REMAT_POLICIES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be among {list(known)}, got {getattr(self, name)!r}")
        at_least = dict.fromkeys(("min_timestep", "kl_weight", "clip_weight", "warmup_steps"), 0)
        at_least |= dict.fromkeys(("num_inference_steps", "gradient_accumulation_steps"), 1)
        at_least |= dict.fromkeys(("teacher_guidance_scale", "lora_guidance_scale"), 1)
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
