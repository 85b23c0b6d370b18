"""Settings of a training run, with their defaults: four frozen dataclasses, one for each section of a recipe.

A recipe changes `default_config()`. The command line reads it once into `Settings`, and no other module sees the
ml_collections config.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import ml_collections
import optax
from ml_collections import config_dict

from tiue_jax.models.lora import LoRAConfig
from tiue_jax.models.unet import REMAT_POLICIES, UNetConfig
from tiue_jax.sampling.settings import Sampling
from tiue_jax.schedule import SPACINGS
from tiue_jax.sharding import REPLICATE_BELOW
from tiue_jax.training import losses, optim

# Metrics of the student that a run measures at every validation, and whether the smallest or largest value is best.
EVAL_METRICS = {"eval/teacher_distance": "min"}
COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The models. Each is the name of a known model, a repository on the hub or a folder, see hub.resolve.

    Attributes:
        pretrained_model_name_or_path: the teacher, from which the student starts.
        clip_model_name_or_path: a CLIP in transformers' layout with its tokenizer, for L_clip, such as
            "clip-vit-base-patch32".
        tiny_vae_name_or_path: an AutoencoderTiny, which decodes the student's latents for L_clip, such as "taesd".
    """

    pretrained_model_name_or_path: str
    clip_model_name_or_path: str | None = None
    tiny_vae_name_or_path: str | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The prompts.

    Attributes:
        prompts: a file of prompts, as text or JSON lines; a folder that `tiue data prepare` made, for millions of
            prompts; or the name of a model that comes with prompts.
        field: the prompt's field in JSON lines, such as "Task2.Caption"; None for text.
        embeddings: a folder that `tiue data embed` made of these prompts. The step reads the text embeddings from it
            and does not encode text. None encodes the prompts in the step.
    """

    prompts: str
    field: str | None = None
    embeddings: str | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Attributes:
        seed: of the student's noise, the timesteps, the LoRA teacher's first adapters and the order of the prompts.
        batch_size: prompts per step, on all devices together.
        max_train_steps: number of steps of the whole run.
        max_train_minutes: stop after this time, even if max_train_steps are not done; None sets no limit.
        log_every: steps between scalars in TensorBoard.
        profile_steps: write a JAX profile of this many steps to `tensorboard/` in the run's folder; None writes none.
            It begins with the third step after each start of the run, when nothing is compiled any more. See
            training/profile.py.
        checkpoint_every: steps between checkpoints.
        checkpoints_total_limit: how many of the newest checkpoints are kept; None keeps all.
        checkpoints_best_metric: also keep the best checkpoint by this metric, one of EVAL_METRICS; None keeps none.
            A training loss cannot be chosen: L_vsd starts at 0 and says nothing about quality.
        max_skipped_steps: stop after this many steps in a row whose loss or gradient is not finite. Such steps make no
            update. They are counted when something is logged.
        validation_every: steps between grids that show the student's images above the teacher's.
        validation_prompts: the prompts of the grids; without any there are no grids.
        validation_num_inference_steps: the teacher's DDIM steps in the grids.
        validation_guidance_scale: the teacher's guidance scale in the grids.
        mesh_data: size of the mesh axis that repeats the parameters; -1 takes the devices that mesh_fsdp leaves.
        mesh_fsdp: size of the mesh axis that shards the parameters; -1 takes the devices that mesh_data leaves.
        mesh_replicate_below: arrays of fewer elements are not sharded over fsdp.
        mesh_replicate_frozen: every device holds the whole teacher and text encoder, so that they are never gathered.
    """

    seed: int = 0
    batch_size: int = 64
    max_train_steps: int = 66_500
    max_train_minutes: float | None = None
    log_every: int = 50
    profile_steps: int | None = None
    checkpoint_every: int = 1_000
    checkpoints_total_limit: int | None = 3
    checkpoints_best_metric: str | None = None
    max_skipped_steps: int = 10
    validation_every: int = 1_000
    validation_prompts: tuple[str, ...] = ()
    validation_num_inference_steps: int = 25
    validation_guidance_scale: float = 7.5
    mesh_data: int = -1
    mesh_fsdp: int = 1
    mesh_replicate_below: int = REPLICATE_BELOW
    mesh_replicate_frozen: bool = False

    def __post_init__(self):
        prompts: Any = self.validation_prompts
        if isinstance(prompts, str):
            raise ValueError(f"train.validation_prompts must be a tuple of texts, got {prompts!r}")
        object.__setattr__(self, "validation_prompts", tuple(prompts))
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"train.seed must be between 0 and {2**32 - 1}, got {self.seed}")
        for name in (
            "batch_size",
            "max_train_steps",
            "max_skipped_steps",
            "log_every",
            "checkpoint_every",
            "validation_every",
            "validation_num_inference_steps",
        ):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"train.{name} must be an integer >= 1, got {value!r}")
        if self.profile_steps is not None and (type(self.profile_steps) is not int or self.profile_steps < 1):
            raise ValueError(f"train.profile_steps must be an integer >= 1 or None, got {self.profile_steps!r}")
        if not math.isfinite(self.validation_guidance_scale):
            raise ValueError(f"train.validation_guidance_scale must be finite, got {self.validation_guidance_scale}")
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            limit = self.checkpoints_total_limit
            raise ValueError(f"train.checkpoints_total_limit must be >= 1 or None, got {limit}")
        if (metric := self.checkpoints_best_metric) is not None:
            if metric not in EVAL_METRICS:
                raise ValueError(f"train.checkpoints_best_metric must be among {list(EVAL_METRICS)}, got {metric!r}")
            if not self.validation_prompts:
                raise ValueError(f"train.checkpoints_best_metric = {metric!r} needs validation_prompts, got none")
            if self.checkpoint_every % self.validation_every:
                every_two = f"{self.checkpoint_every} and {self.validation_every}"
                raise ValueError(
                    f"train.checkpoints_best_metric = {metric!r} needs a validation at each checkpoint: expected "
                    f"checkpoint_every to be a multiple of validation_every, got {every_two}"
                )
        if self.max_train_minutes is not None and not self.max_train_minutes > 0:
            raise ValueError(f"train.max_train_minutes must be > 0 or None, got {self.max_train_minutes}")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The distillation. The defaults are the recipe of the paper for an 866M-parameter UNet.

    Raises:
        ValueError: a setting out of its range, with its name, its value and what was expected.
    """

    num_inference_steps: int = 4  # K, the number of decoder passes
    timestep_spacing: str = "leading"  # or "trailing", "linspace"; with "leading" the last pass weighs almost nothing
    teacher_guidance_scale: float = 4.5  # classifier-free guidance of the frozen teacher; 1 is no guidance
    lora_guidance_scale: float = 4.5  # classifier-free guidance of the LoRA teacher; 1 is no guidance
    min_timestep: int = 20  # the first timestep at which the teachers are compared
    max_timestep: int = 980  # the last timestep at which the teachers are compared
    timestep_weighting: str = "one_minus_alphas_cumprod"  # of L_vsd; or "uniform"
    lora_rank: int = 64
    lora_alpha: float = 108.0  # the adapters' scale is alpha / rank
    lora_targets: tuple[str, ...] = ("to_q", "to_v")  # ends of the names of linear and convolution layers, as in peft
    kl_weight: float = 0.1  # lambda_kl; 0 leaves the term out
    kl_batch_size: float = 8.0  # the KL term is its mean over the batch times this number, see losses.kl
    clip_weight: float = 0.0  # of L_clip at step 0, from where it falls linearly to 0; 0 leaves the term out
    clip_decay_steps: int | None = None  # the step at which the weight of L_clip is 0; None is max_train_steps
    clip_threshold: float = 0.35  # tau: the similarity above which L_clip is 0
    clip_normalize: bool = True  # apply CLIP's mean and standard deviation to its images; the reference does not
    text_dropout: float = 0.1  # probability that the LoRA teacher's update uses the null prompt, for the whole batch
    ema_decay: float = 0.9999  # upper limit of the moving average's decay; 0 makes it a copy of the weights
    student_learning_rate: float = 1e-6
    student_learning_rate_schedule: str = "constant"  # or "linear", "cosine": both fall to 0 at max_train_steps
    lora_learning_rate: float = 1e-3
    lora_learning_rate_schedule: str = "constant"  # see student_learning_rate_schedule
    warmup_steps: int = 0  # linear warm-up of both learning rates
    max_train_steps: int | None = None  # a recipe does not set it: it is train.max_train_steps
    max_grad_norm: float = 1.0  # global norm to which each of the two gradients is clipped
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    adam_eps: float = 1e-8
    compute_dtype: str = "bfloat16"  # of the networks; losses, schedule and trained weights are always float32
    gradient_accumulation_steps: int = 1  # micro-batches that a batch is split into, computed one after the other
    remat: str = "none"  # activations that the backward pass computes again: see models.unet.REMAT_POLICIES
    latent_size: int | None = None  # height and width of the latents; None is the UNet's sample_size

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
        self.learning_rates()  # raises ValueError on a wrong rate or schedule
        LoRAConfig(self.lora_rank, self.lora_alpha, self.lora_targets)  # raises ValueError on a wrong rank or target

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
        """Learning rates of the student and of the LoRA teacher, as functions of the number of updates."""

        def schedule(kind: str, peak: float) -> optax.Schedule:
            return optim.learning_rate(kind, peak, warmup_steps=self.warmup_steps, total_steps=self.max_train_steps)

        return (
            schedule(self.student_learning_rate_schedule, self.student_learning_rate),
            schedule(self.lora_learning_rate_schedule, self.lora_learning_rate),
        )

    def optimizers(self) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
        """The optimizers of the student and of the LoRA teacher."""
        settings = {"b1": self.adam_b1, "b2": self.adam_b2, "eps": self.adam_eps, "max_grad_norm": self.max_grad_norm}
        student_rate, lora_rate = self.learning_rates()
        return optim.adam(student_rate, **settings), optim.adam(lora_rate, **settings)


_DERIVED = ("distill", "max_train_steps")  # section and name of the setting that repeats train.max_train_steps


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run; `distill.max_train_steps` is always `train.max_train_steps`."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    distill: DistillConfig

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Reads a nested mapping of plain values, without `distill.max_train_steps`.

        Raises:
            ValueError: naming the sections or settings that are missing, unknown or out of range.
        """
        sections: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
        if set(config) != set(sections):
            raise ValueError(f"expected the config sections {sorted(sections)}, got {sorted(config)}")
        for name, section in config.items():
            fields = [field for field in dataclasses.fields(sections[name]) if (name, field.name) != _DERIVED]
            if unknown := sorted(set(section) - {field.name for field in fields}):
                raise ValueError(f"unknown settings {unknown} in section {name!r}")
            required = {field.name for field in fields if field.default is dataclasses.MISSING}
            if missing := sorted(required - set(section)):
                raise ValueError(f"settings {missing} are missing in section {name!r}")
        train = TrainConfig(**config["train"])
        distill = DistillConfig.from_dict({**config["distill"], "max_train_steps": train.max_train_steps})
        return cls(ModelConfig(**config["model"]), DataConfig(**config["data"]), train, distill)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads the result of `to_dict`, such as a run's config.json.

        A setting that was added later, and so is not in an old file, gets its default. ValueError as `from_config`.
        """
        section, derived = _DERIVED
        given = {name: value for name, value in config.get(section, {}).items() if name != derived}
        return cls.from_config({**config, section: given})

    def to_dict(self) -> dict[str, Any]:
        """The sections as nested mappings of plain values, for JSON."""
        return {
            section: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
            for section, values in dataclasses.asdict(self).items()
        }


def default_config() -> ml_collections.ConfigDict:
    """Every setting with its default, in the sections of Settings. A recipe changes it and returns it.

    The config is locked: a setting that does not exist cannot be set. A setting without a default, and one whose
    default is None, is an empty placeholder of its type, so that a command line can set it. `distill.max_train_steps`
    is left out, since it is always `train.max_train_steps`.
    """
    config = ml_collections.ConfigDict()
    for section in dataclasses.fields(Settings):
        assert isinstance(section.type, type)
        types = typing.get_type_hints(section.type)
        values = {}
        for field in dataclasses.fields(section.type):
            if (section.name, field.name) == _DERIVED:
                continue
            value = None if field.default is dataclasses.MISSING else field.default
            if value is None:
                optional_of = typing.get_args(types[field.name])  # (int, NoneType) of `int | None`
                value = config_dict.placeholder(optional_of[0] if optional_of else types[field.name])
            values[field.name] = value
        config[section.name] = ml_collections.ConfigDict(values)
    return config.lock()


def student_sampling(settings: Settings) -> Sampling:
    """The sampling settings of a run's student."""
    distill = settings.distill
    return Sampling("tiue", distill.num_inference_steps, timestep_spacing=distill.timestep_spacing)


def student_config(settings: Settings, unet: UNetConfig) -> UNetConfig:
    """The configuration of a run's student: that of the teacher's UNet, with the latent size of the training."""
    size = settings.distill.latent_size
    return unet if size is None else dataclasses.replace(unet, sample_size=size)
