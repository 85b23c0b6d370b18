"""Settings of a training run, read once from a config file into frozen dataclasses.

The four sections are those of the files in configs/. Below train.py nobody sees a config object.
"""

import dataclasses
import functools
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

# What a run measures of its student at every validation, and which end is the better one.
EVAL_METRICS = {"eval/teacher_distance": "min"}
COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Where the weights come from.

    Attributes:
        pretrained_model_name_or_path: the teacher, which the student starts from: what hub.resolve takes.
        clip_model_name_or_path: a CLIP in transformers' layout, tokenizer included, for L_clip, such as
            "clip-vit-base-patch32": what hub.resolve takes, and so the next.
        tiny_vae_name_or_path: an AutoencoderTiny, which decodes the student's latents for L_clip, such as "taesd".
    """

    pretrained_model_name_or_path: str
    clip_model_name_or_path: str | None = None
    tiny_vae_name_or_path: str | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The prompts.

    Attributes:
        prompts: a file of them, text or JSON lines, or a folder that data.prepare made, for millions of them.
        field: the prompt's field in JSON lines, such as "Task2.Caption"; None for text.
        embeddings: a folder that data.embed made of these prompts, read instead of encoding them in the step.
    """

    prompts: str
    field: str | None = None
    embeddings: str | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
        seed: of the student's noise, the timesteps, the LoRA teacher's start and the order of the prompts.
        batch_size: prompts a step, on all devices together.
        max_train_steps: number of updates of the whole run.
        max_train_minutes: stop after so long, even if max_train_steps are not done; None is no limit.
        log_every: steps between scalars in TensorBoard.
        checkpoint_every: steps between checkpoints.
        checkpoints_total_limit: how many of the newest to keep; None is all.
        checkpoints_best_metric: also keep the checkpoint that is best by this, one of EVAL_METRICS; None keeps none.
            The training losses are no choice: L_vsd starts at 0 and says nothing about quality.
        max_skipped_steps: stop after so many steps in a row whose loss or gradient is not finite. Their updates are
            skipped. Looked at when something is logged.
        validation_every: steps between grids of student beside teacher.
        validation_prompts: what they show.
        validation_num_inference_steps: the teacher's DDIM steps in them.
        validation_guidance_scale: and its guidance.
        mesh_data, mesh_fsdp: sizes of the mesh axes; -1 takes the devices that the other leaves.
        mesh_replicate_below: arrays of fewer elements are not sharded over fsdp.
        mesh_replicate_frozen: every device holds the whole teacher and text encoder, which then need no gathering.
    """

    seed: int = 0
    batch_size: int = 64
    max_train_steps: int = 66_500
    max_train_minutes: float | None = None
    log_every: int = 50
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
        every = ("log_every", "checkpoint_every", "validation_every")
        for name in ("batch_size", "max_train_steps", "max_skipped_steps", "validation_num_inference_steps", *every):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"train.{name} must be an integer >= 1, got {value!r}")
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


_DERIVED = ("distill", "max_train_steps")  # follows the train section's

# What may change when a run is resumed, since it changes no update.
_FREE = {
    *("data.prompts", "data.field"),  # they may have moved; the data position knows them by their fingerprint
    *(f"train.{name}" for name in ("max_train_steps", "max_train_minutes", "log_every")),
    *(f"train.checkpoint{name}" for name in ("_every", "s_total_limit", "s_best_metric")),
    "train.max_skipped_steps",
    *(f"train.mesh_{name}" for name in ("data", "fsdp", "replicate_below", "replicate_frozen")),
    *(f"train.validation_{name}" for name in ("every", "prompts", "num_inference_steps", "guidance_scale")),
    "distill.gradient_accumulation_steps",
    "distill.remat",
}
# Known by a hash too, so they may move; but with a path in the place of None, or the reverse, another step is compiled.
_FREE_TO_MOVE = {"data.embeddings": str}


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run; `distill.max_train_steps` is always `train.max_train_steps`."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    distill: DistillConfig

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Reads a plain nested mapping. ValueError naming what is missing, unknown or out of range."""
        sections: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
        if set(config) != set(sections):
            raise ValueError(f"expected the config sections {sorted(sections)}, got {sorted(config)}")
        for name, section in config.items():
            fields = [f for f in dataclasses.fields(sections[name]) if (name, f.name) != _DERIVED]
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
        """The inverse of `to_dict`, such as a run's config.json. ValueError as `from_config`."""
        section, derived = _DERIVED
        as_written = {name: value for name, value in config.get(section, {}).items() if name != derived}
        return cls.from_config({**config, section: as_written})

    def to_dict(self) -> dict[str, Any]:
        """As JSON: sections of plain values."""
        as_json = lambda value: list(value) if isinstance(value, tuple) else value
        return {
            section: {name: as_json(value) for name, value in fields.items()}
            for section, fields in dataclasses.asdict(self).items()
        }

    @property
    def free_on_resume(self) -> dict[str, type]:
        """The settings, with dots, that a resumed run may have changed, and among what type of value: object is any.

        The length of the run is among them only where no learning rate and no loss weight falls towards its end.
        """
        distill = self.distill
        schedules = {distill.student_learning_rate_schedule, distill.lora_learning_rate_schedule}
        clip_falls = bool(distill.clip_weight) and distill.clip_decay_steps is None
        free = _FREE | {"distill.max_train_steps"}
        if schedules != {"constant"} or clip_falls:
            free -= {"train.max_train_steps", "distill.max_train_steps"}
        types: dict[str, type] = dict.fromkeys(free, object)
        return types | _FREE_TO_MOVE


def default_config() -> ml_collections.ConfigDict:
    """Every setting with its default, in the sections that Settings has; locked. A recipe changes it and returns it.

    A setting that must be given is None here. So is an optional one; its type is known, so that a command line can set
    it. `distill.max_train_steps` is left out, since it always is `train.max_train_steps`.
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
                kind = next(kind for kind in typing.get_args(types[field.name]) or (types[field.name],))
                value = config_dict.placeholder(kind)
            values[field.name] = value
        config[section.name] = ml_collections.ConfigDict(values)
    return config.lock()


def student_sampling(settings: Settings) -> Sampling:
    """How a run's student is sampled."""
    distill = settings.distill
    return Sampling("tiue", distill.num_inference_steps, timestep_spacing=distill.timestep_spacing)


def student_config(settings: Settings, unet: UNetConfig) -> UNetConfig:
    """The UNet's configuration of a run's student: the teacher's, with the size that the run trains at."""
    size = settings.distill.latent_size
    return unet if size is None else dataclasses.replace(unet, sample_size=size)
