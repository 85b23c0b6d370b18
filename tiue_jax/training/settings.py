"""Settings of a training run, with their defaults: four frozen dataclasses, one for each section of a recipe.

A recipe changes `default_config()`. The command line reads it once into `Settings`, and no other module sees the
ml_collections config.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Self

import ml_collections
from ml_collections import config_dict

from tiue_jax.checked_fields import Range, check_fields, one_of, shown, without_none
from tiue_jax.models.unet import UNetConfig
from tiue_jax.sampling.settings import Sampling
from tiue_jax.sharding import REPLICATE_BELOW
from tiue_jax.training import eval_metrics
from tiue_jax.training.distill_settings import DistillConfig
from tiue_jax.training.eval_metrics import EVAL_METRICS
from tiue_jax.training.setting_types import INT32_MAX, AtLeastZero, Count, Positive, list_as_tuple


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
        object.__setattr__(self, "embeddings", list_as_tuple(self.embeddings))
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
    mesh_data: Annotated[int, Range(-1, INT32_MAX)] = -1
    mesh_fsdp: Annotated[int, Range(-1, INT32_MAX)] = 1
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
            object.__setattr__(self, name, list_as_tuple(getattr(self, name)))
        check_fields(self, "train")
        eval_metrics.check(self)


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
                value = config_dict.FieldReference(value, field_type=typing.get_origin(kind) or kind)
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
    spacing = distill.timestep_spacing if distill.timesteps is None else None
    # A full UNet at each step is what "ddim" computes; the student, like "tiue", knows no guidance.
    sampler, guidance_scale = ("tiue", None) if distill.shared_encoder else ("ddim", 1.0)
    return Sampling(
        sampler,
        distill.num_inference_steps,
        guidance_scale=guidance_scale,
        timestep_spacing=spacing,
        timesteps=distill.timesteps,
    )


def student_config(settings: Settings, unet: UNetConfig) -> UNetConfig:
    """The configuration of a run's student: that of the teacher's UNet, with the latent size of the training."""
    size = settings.distill.latent_size
    return unet if size is None else dataclasses.replace(unet, sample_size=size)
