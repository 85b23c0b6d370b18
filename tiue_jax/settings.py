"""Settings of a training run, read once from a config file into frozen dataclasses.

The four sections are those of the files in configs/. Below train.py nobody sees a config object.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

from tiue_jax.distill_config import DistillConfig
from tiue_jax.sharding import REPLICATE_BELOW

# What a run measures of its student at every validation, and which end is the better one.
EVAL_METRICS = {"eval/teacher_distance": "min"}


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
