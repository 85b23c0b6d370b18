"""Settings of the distillation: the section `distill` of a recipe."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Self

import jax
import jax.numpy as jnp
import optax

from tiue_jax.checked_fields import Range, check_fields, one_of
from tiue_jax.models.lora import LoRAConfig
from tiue_jax.models.unet import REMAT_POLICIES
from tiue_jax.schedule import SPACINGS, CustomTimesteps, check_descending
from tiue_jax.training import losses, optim
from tiue_jax.training.setting_types import AtLeastZero, Count, Positive, list_as_tuple

COMPUTE_DTYPES = ("float32", "bfloat16")

Weight = Annotated[float, Range(0)]
GuidanceScale = Annotated[float, Range(1)]
Fraction = Annotated[float, Range(0, 1, below_high=True)]
Schedule = Annotated[str, one_of(optim.LEARNING_RATE_SCHEDULES)]
Spacing = Annotated[str, one_of(SPACINGS)]
Weighting = Annotated[str, one_of(losses.TIMESTEP_WEIGHTINGS)]
ComputeDtype = Annotated[str, one_of(COMPUTE_DTYPES)]
Remat = Annotated[str, one_of(list(REMAT_POLICIES))]
Size = Annotated[int, Range(1, 65_536)]


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The distillation. The defaults are the recipe of the paper for an 866M-parameter UNet.

    Raises:
        ValueError: a setting out of its range, with its name, its value and what was expected.
    """

    num_inference_steps: Count = 4  # K, the number of decoder passes
    timestep_spacing: Spacing = "leading"  # or "trailing", "linspace"; the last pass of "leading" weighs almost nothing
    timesteps: CustomTimesteps | None = None  # of the decoder passes, such as (999, 749, 499, 249), without a spacing
    shared_encoder: bool = True  # False runs the whole UNet at each timestep, to measure what sharing the encoder costs
    teacher_guidance_scale: GuidanceScale = 4.5  # classifier-free guidance of the frozen teacher; 1 is no guidance
    teacher_guidance_scale_max: GuidanceScale | None = None  # each sample's scale is drawn from the range up to this
    negative_prompt: str = ""  # what the guidance of both teachers leads away from, instead of the empty prompt
    lora_guidance_scale: GuidanceScale = 4.5  # classifier-free guidance of the LoRA teacher; 1 is no guidance
    min_timestep: AtLeastZero = 20  # the first timestep at which the teachers are compared
    max_timestep: AtLeastZero = 980  # the last timestep at which the teachers are compared
    timestep_weighting: Weighting = "one_minus_alphas_cumprod"  # of L_vsd; or "uniform"
    lora_rank: Size = 64  # of the LoRA teacher's adapters
    lora_alpha: Positive = 108.0  # the adapters' scale is alpha / rank
    lora_targets: tuple[str, ...] = ("to_q", "to_v")  # ends of the names of linear and convolution layers, as in peft
    kl_weight: Weight = 0.1  # lambda_kl; 0 leaves the term out
    kl_batch_size: Positive = 8.0  # the KL term is its mean over the batch times this number, see losses.kl
    clip_weight: Weight = 0.0  # of L_clip at step 0, from where it falls linearly to 0; 0 leaves the term out
    clip_decay_steps: Count | None = None  # the step at which the weight of L_clip is 0; None is max_train_steps
    clip_threshold: float = 0.35  # tau: the similarity above which L_clip is 0
    clip_normalize: bool = True  # apply CLIP's mean and standard deviation to its images; the reference does not
    text_dropout: Fraction = 0.1  # probability that the LoRA teacher's update uses the null prompt, for the whole batch
    ema_decay: Fraction = 0.9999  # upper limit of the moving average's decay; 0 makes it a copy of the weights
    student_learning_rate: Positive = 1e-6  # of Adam, after the warm-up
    student_learning_rate_schedule: Schedule = "constant"  # or "linear", "cosine": both fall to 0 at max_train_steps
    lora_learning_rate: Positive = 1e-3  # of Adam, after the warm-up
    lora_learning_rate_schedule: Schedule = "constant"  # see student_learning_rate_schedule
    lora_updates_per_step: Annotated[int, Range(1, 100)] = 1  # of the LoRA teacher, each on new latents of the student
    warmup_steps: AtLeastZero = 0  # linear warm-up of both learning rates
    max_train_steps: Count | None = None  # a recipe does not set it: it is train.max_train_steps
    max_grad_norm: Positive = 1.0  # global norm to which each of the two gradients is clipped
    adam_b1: Fraction = 0.9  # decay of the mean of the gradients, for both optimizers
    adam_b2: Fraction = 0.999  # decay of the mean of the squared gradients
    adam_eps: Positive = 1e-8  # added to the root of the mean of the squared gradients
    compute_dtype: ComputeDtype = "bfloat16"  # of the networks; losses, schedule and trained weights are always float32
    gradient_accumulation_steps: Count = 1  # micro-batches that a batch is split into, computed one after the other
    remat: Remat = "none"  # activations that the backward pass computes again: see models.unet.REMAT_POLICIES
    latent_size: Size | None = None  # height and width of the latents; None is the UNet's sample_size

    def __post_init__(self):
        object.__setattr__(self, "lora_targets", list_as_tuple(self.lora_targets))
        object.__setattr__(self, "timesteps", list_as_tuple(self.timesteps))
        check_fields(self, "distill")
        if self.timesteps is not None:
            check_descending(self.timesteps)
            if self.num_inference_steps != len(self.timesteps):
                raise ValueError(
                    f"distill.num_inference_steps must be the number of distill.timesteps {list(self.timesteps)}, "
                    f"got {self.num_inference_steps}"
                )
        if (most := self.teacher_guidance_scale_max) is not None and most < self.teacher_guidance_scale:
            least = f"teacher_guidance_scale = {self.teacher_guidance_scale}"
            raise ValueError(f"distill.teacher_guidance_scale_max must be >= {least}, got {most}")
        if not self.max_timestep >= self.min_timestep:
            raise ValueError(
                f"distill.max_timestep must be >= distill.min_timestep = {self.min_timestep}, got {self.max_timestep}"
            )
        if self.negative_prompt and not max(self.teacher_guidance_scale, self.teacher_guidance_scale_max or 0) > 1:
            raise ValueError(
                f"distill.negative_prompt = {self.negative_prompt!r} needs teacher_guidance_scale above 1, "
                f"got {self.teacher_guidance_scale}"
            )
        if self.clip_weight and not (self.clip_decay_steps or self.max_train_steps):
            raise ValueError(
                f"distill.clip_weight = {self.clip_weight} needs clip_decay_steps or max_train_steps, got neither"
            )
        try:
            self.learning_rates()
        except ValueError as error:
            raise ValueError(f"distill.warmup_steps or train.max_train_steps: {error}") from error
        if not all(self.lora_targets or [""]):
            raise ValueError(f"distill.lora_targets must be at least one name of a layer, got {self.lora_targets!r}")
        LoRAConfig(self.lora_rank, self.lora_alpha, self.lora_targets)  # raises ValueError on a wrong rank

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Reads a plain mapping. ValueError naming each setting that does not exist, or is out of its range."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"unknown distillation settings {unknown}, expected some of {sorted(known)}")
        return cls(**settings)

    @property
    def lora(self) -> LoRAConfig:
        """The adapters of the LoRA teacher."""
        return LoRAConfig(self.lora_rank, self.lora_alpha, self.lora_targets)

    def clip_weight_at(self, step: jax.Array) -> jax.Array:
        """The weight of L_clip at a step, float32 []."""
        end = self.clip_decay_steps or self.max_train_steps
        assert end is not None  # checked in __post_init__
        return self.clip_weight * jnp.maximum(0.0, 1 - step.astype(jnp.float32) / end)

    def learning_rates(self) -> tuple[optax.Schedule, optax.Schedule]:
        """Learning rates of the student and of the LoRA teacher, as functions of the number of steps with an update."""

        def schedule(kind: str, peak: float) -> optax.Schedule:
            return optim.learning_rate(kind, peak, warmup_steps=self.warmup_steps, total_steps=self.max_train_steps)

        return (
            schedule(self.student_learning_rate_schedule, self.student_learning_rate),
            schedule(self.lora_learning_rate_schedule, self.lora_learning_rate),
        )

    def optimizers(self) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
        """The optimizers of the student and of the LoRA teacher. The LoRA teacher's updates are those of the rate 1.

        Its rate falls with the steps, not with its updates: a run may go on with another number of updates in a step.
        """
        settings = {"b1": self.adam_b1, "b2": self.adam_b2, "eps": self.adam_eps, "max_grad_norm": self.max_grad_norm}
        student_rate, _ = self.learning_rates()
        return optim.adam(student_rate, **settings), optim.adam(optax.constant_schedule(1.0), **settings)
