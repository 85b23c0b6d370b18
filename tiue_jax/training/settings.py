"""Settings of a training run, with their defaults: four frozen dataclasses, one for each section of a recipe.

A recipe changes `default_config()`. The command line reads it once into `Settings`, and no other module sees the
ml_collections config.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Self

import jax
import jax.numpy as jnp
import ml_collections
import optax
from ml_collections import config_dict

from tiue_jax.checked_fields import Range, check_fields, one_of, shown, without_none
from tiue_jax.models.lora import LoRAConfig
from tiue_jax.models.unet import REMAT_POLICIES, UNetConfig
from tiue_jax.sampling.settings import Sampling
from tiue_jax.schedule import SPACINGS
from tiue_jax.sharding import REPLICATE_BELOW
from tiue_jax.training import eval_metrics, losses, optim
from tiue_jax.training.eval_metrics import EVAL_METRICS

COMPUTE_DTYPES = ("float32", "bfloat16")

_INT32 = 2**31 - 1  # the counters of steps are int32 on the devices
Count = Annotated[int, Range(1, _INT32)]
AtLeastZero = Annotated[int, Range(0, _INT32)]
Positive = Annotated[float, Range(0, above_low=True)]
Weight = Annotated[float, Range(0)]
GuidanceScale = Annotated[float, Range(1)]
Fraction = Annotated[float, Range(0, 1, below_high=True)]
Schedule = Annotated[str, one_of(optim.LEARNING_RATE_SCHEDULES)]
Spacing = Annotated[str, one_of(SPACINGS)]
Weighting = Annotated[str, one_of(losses.TIMESTEP_WEIGHTINGS)]
ComputeDtype = Annotated[str, one_of(COMPUTE_DTYPES)]
Remat = Annotated[str, one_of(list(REMAT_POLICIES))]
Size = Annotated[int, Range(1, 65_536)]


def _list_as_tuple(value: Any) -> Any:
    """A list, which JSON has for a tuple, as a tuple. Other values as they are."""
    return tuple(value) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The models. Each is the name of a known model, a repository on the hub or a folder, see hub.resolve.

    Attributes:
        pretrained_model_name_or_path: the teacher.
        clip_model_name_or_path: a CLIP in transformers' layout with its tokenizer, for L_clip, such as
            "clip-vit-base-patch32".
        embeddings: textual inversion embeddings that the teacher's vocabulary and the student's have: names for
            embedding_files.read, such as "<cat>=cat.safetensors".
        tiny_vae_name_or_path: an AutoencoderTiny, which decodes the student's latents for L_clip, such as "taesd".
        clip_skip: the number of the last layers of the text encoder that are left out, for teacher and student: 0 or 1
            for most models. It is diffusers' clip_skip, one less than "Clip skip" in programs that count from 1. The
            exported student has a text encoder without these layers.
        student_name_or_path: the pipeline from whose UNet the student starts, such as the student of an earlier run;
            None starts from the teacher's. The UNet must be like the teacher's, and is read before the first step only.
    """

    pretrained_model_name_or_path: str
    clip_model_name_or_path: str | None = None
    tiny_vae_name_or_path: str | None = None
    embeddings: tuple[str, ...] = ()
    clip_skip: AtLeastZero = 0
    student_name_or_path: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "embeddings", _list_as_tuple(self.embeddings))
        check_fields(self, "model")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The prompts.

    Attributes:
        prompts: a file, folder or data set of prompts, in one of the formats of docs/prompts.md; a folder that `tiue
            data prepare` made, for millions of prompts; or the name of a model that comes with prompts.
        field: the prompt's field or column, such as "Task2.Caption"; None for text, and for a usual name such as
            caption.
        split: the split of a data set of tensorflow-datasets or of the hub.
        max_bad_share: the share of bad rows that may be left out, such as a number instead of a text.
        embeddings: a folder that `tiue data embed` made of these prompts. The step reads the text embeddings from it
            and does not encode text. None encodes the prompts in the step.
    """

    prompts: str
    field: str | None = None
    split: str = "train"
    max_bad_share: Annotated[float, Range(0, 1)] = 0.01
    embeddings: str | None = None

    def __post_init__(self):
        check_fields(self, "data")


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
            update.
        validation_every: steps between grids that show the student's images above the teacher's.
        validation_prompts: the prompts of the grids; without any there are no grids.
        validation_num_inference_steps: the teacher's DDIM steps in the grids.
        validation_guidance_scale: the teacher's guidance scale in the grids. Its negative prompt is that of `distill`.
        mesh_data: size of the mesh axis that repeats the parameters; -1 takes the devices that mesh_fsdp leaves.
        mesh_fsdp: size of the mesh axis that shards the parameters; -1 takes the devices that mesh_data leaves.
        mesh_replicate_below: arrays of fewer elements are not sharded over fsdp.
        mesh_replicate_frozen: every device holds the whole teacher and text encoder, so that they are never gathered.
        health_images: the number of images of the health panel, which is made at every validation, see docs/health.md;
            0 makes no panel.
        evaluation_metrics: the metrics of a small evaluation within the run, some of EVALUATION_METRICS; none makes no
            evaluation. docs/evaluation.md says what they are.
        evaluation_every: steps between evaluations.
        evaluation_images: the number of images of an evaluation. An image has the same prompt and noise every time.
        evaluation_images_per_prompt: "diversity" needs at least 2.
        evaluation_prompts: the prompts of the images, as a file that `tiue sample --prompt_file` takes; None takes
            some of the run's prompts.
        evaluation_extractor: the network of the metrics, as for `tiue evaluate --extractor`.
        evaluation_reference: real images, as for `tiue evaluate --reference`, for the metrics that compare with them.
    """

    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    batch_size: Count = 64
    max_train_steps: Count = 66_500
    max_train_minutes: Positive | None = None
    log_every: Count = 50
    profile_steps: Count | None = None
    checkpoint_every: Count = 1_000
    checkpoints_total_limit: Count | None = 3
    checkpoints_best_metric: Annotated[str, one_of(list(EVAL_METRICS))] | None = None
    max_skipped_steps: Count = 10
    validation_every: Count = 1_000
    validation_prompts: tuple[str, ...] = ()
    validation_num_inference_steps: Count = 25
    validation_guidance_scale: float = 7.5
    mesh_data: Annotated[int, Range(-1, _INT32)] = -1
    mesh_fsdp: Annotated[int, Range(-1, _INT32)] = 1
    mesh_replicate_below: AtLeastZero = REPLICATE_BELOW
    mesh_replicate_frozen: bool = False
    health_images: Annotated[int, Range(0, 1024)] = 8
    evaluation_metrics: tuple[str, ...] = ()
    evaluation_every: Count = 1_000
    evaluation_images: Count = 256
    evaluation_images_per_prompt: Count = 1
    evaluation_prompts: str | None = None
    evaluation_extractor: str | None = None
    evaluation_reference: str | None = None

    def __post_init__(self):
        for name in ("validation_prompts", "evaluation_metrics"):
            object.__setattr__(self, name, _list_as_tuple(getattr(self, name)))
        check_fields(self, "train")
        eval_metrics.check(self)


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The distillation. The defaults are the recipe of the paper for an 866M-parameter UNet.

    Raises:
        ValueError: a setting out of its range, with its name, its value and what was expected.
    """

    num_inference_steps: Count = 4  # K, the number of decoder passes
    timestep_spacing: Spacing = "leading"  # or "trailing", "linspace"; the last pass of "leading" weighs almost nothing
    teacher_guidance_scale: GuidanceScale = 4.5  # classifier-free guidance of the frozen teacher; 1 is no guidance
    negative_prompt: str = ""  # what the guidance of both teachers leads away from, instead of the empty prompt
    lora_guidance_scale: GuidanceScale = 4.5  # classifier-free guidance of the LoRA teacher; 1 is no guidance
    min_timestep: AtLeastZero = 20  # the first timestep at which the teachers are compared
    max_timestep: AtLeastZero = 980  # the last timestep at which the teachers are compared
    timestep_weighting: Weighting = "one_minus_alphas_cumprod"  # of L_vsd; or "uniform"
    lora_rank: Size = 64
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
    student_learning_rate: Positive = 1e-6
    student_learning_rate_schedule: Schedule = "constant"  # or "linear", "cosine": both fall to 0 at max_train_steps
    lora_learning_rate: Positive = 1e-3
    lora_learning_rate_schedule: Schedule = "constant"  # see student_learning_rate_schedule
    warmup_steps: AtLeastZero = 0  # linear warm-up of both learning rates
    max_train_steps: Count | None = None  # a recipe does not set it: it is train.max_train_steps
    max_grad_norm: Positive = 1.0  # global norm to which each of the two gradients is clipped
    adam_b1: Fraction = 0.9
    adam_b2: Fraction = 0.999
    adam_eps: Positive = 1e-8
    compute_dtype: ComputeDtype = "bfloat16"  # of the networks; losses, schedule and trained weights are always float32
    gradient_accumulation_steps: Count = 1  # micro-batches that a batch is split into, computed one after the other
    remat: Remat = "none"  # activations that the backward pass computes again: see models.unet.REMAT_POLICIES
    latent_size: Size | None = None  # height and width of the latents; None is the UNet's sample_size

    def __post_init__(self):
        object.__setattr__(self, "lora_targets", _list_as_tuple(self.lora_targets))
        check_fields(self, "distill")
        if not self.max_timestep >= self.min_timestep:
            raise ValueError(
                f"distill.max_timestep must be >= distill.min_timestep = {self.min_timestep}, got {self.max_timestep}"
            )
        if self.negative_prompt and not self.teacher_guidance_scale > 1:
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


HISTORY = "history"  # of the changes of settings: an entry of a run's config.json beside the sections
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
        if not isinstance(config, Mapping) or set(config) != set(sections):
            got = sorted(map(str, config)) if isinstance(config, Mapping) else shown(config)
            raise ValueError(f"expected the config sections {sorted(sections)}, got {got}")
        for name, section in config.items():
            if not isinstance(section, Mapping):
                raise ValueError(f"the config section {name!r} must hold settings, got {shown(section)}")
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
        if not isinstance(config, Mapping) or not isinstance(config.get(section, {}), Mapping):
            return cls.from_config(config)  # which raises
        given = {name: value for name, value in config.get(section, {}).items() if name != derived}
        without_history = {name: values for name, values in config.items() if name != HISTORY}
        return cls.from_config({**without_history, section: given})

    def to_dict(self) -> dict[str, Any]:
        """The sections as nested mappings of plain values, for JSON."""
        return {
            section: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
            for section, values in dataclasses.asdict(self).items()
        }


def default_config() -> ml_collections.ConfigDict:
    """Every setting with its default, in the sections of Settings. A recipe changes it and returns it.

    The config is locked: a setting that does not exist cannot be set. A setting without a default, and one that may be
    None, is a reference of its type, so that a command line can set it to a value or to None. `distill.max_train_steps`
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
            optional_of = without_none(types[field.name])
            if value is None or optional_of is not None:
                kind = types[field.name] if optional_of is None else optional_of
                value = config_dict.FieldReference(value, field_type=kind)
            values[field.name] = value
        config[section.name] = ml_collections.ConfigDict(values)
    return config.lock()


def setting_annotations() -> dict[str, Any]:
    """The declared type and range of every setting, by its name with a dot, such as "train.batch_size"."""
    return {
        f"{section.name}.{name}": annotation
        for section in dataclasses.fields(Settings)
        for name, annotation in typing.get_type_hints(section.type, include_extras=True).items()
        if (section.name, name) != _DERIVED
    }


def optional_settings() -> list[str]:
    """The settings that may be None, with dots: "train.checkpoints_total_limit" and others."""
    return [name for name, annotation in setting_annotations().items() if without_none(annotation) is not None]


def student_sampling(settings: Settings) -> Sampling:
    """The sampling settings of a run's student."""
    distill = settings.distill
    return Sampling("tiue", distill.num_inference_steps, timestep_spacing=distill.timestep_spacing)


def student_config(settings: Settings, unet: UNetConfig) -> UNetConfig:
    """The configuration of a run's student: that of the teacher's UNet, with the latent size of the training."""
    size = settings.distill.latent_size
    return unet if size is None else dataclasses.replace(unet, sample_size=size)
