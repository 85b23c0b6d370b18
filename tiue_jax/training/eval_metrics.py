"""The metrics that a run can measure of its student, and what the settings must hold for each."""

from typing import Protocol

from tiue_jax.checked_fields import shown

# By their names in evaluate/scores.py, and whether the smallest or the largest value is best. These compare with real
# images:
_AGAINST_REFERENCE = {
    "frechet_distance": "min",
    "kid": "min",
    "cmmd": "min",
    "precision": "max",
    "recall": "max",
    "density": "max",
    "coverage": "max",
    "near_copies": "min",
}
_OF_IMAGES = {"inception_score": "max", "clip_score": "max", "retrieval": "max", "diversity": "max"}
EVALUATION_METRICS = _AGAINST_REFERENCE | _OF_IMAGES
TEACHER_DISTANCE = "eval/teacher_distance"
# The metrics by which a run can keep its best checkpoint. The first one is measured at every validation, the others at
# every evaluation.
EVAL_METRICS = {TEACHER_DISTANCE: "min", **{f"eval/{name}": best for name, best in EVALUATION_METRICS.items()}}


class _TrainConfig(Protocol):
    """The fields of settings.TrainConfig that are read here."""

    @property
    def checkpoint_every(self) -> int: ...
    @property
    def checkpoints_best_metric(self) -> str | None: ...
    @property
    def validation_every(self) -> int: ...
    @property
    def validation_prompts(self) -> tuple[str, ...]: ...
    @property
    def evaluation_every(self) -> int: ...
    @property
    def evaluation_metrics(self) -> tuple[str, ...]: ...
    @property
    def evaluation_images(self) -> int: ...
    @property
    def evaluation_images_per_prompt(self) -> int: ...
    @property
    def evaluation_extractor(self) -> str | None: ...
    @property
    def evaluation_reference(self) -> str | None: ...


def check(train: _TrainConfig) -> None:
    """Raises ValueError for metrics that are unknown, or that lack what they need."""
    wanted = train.evaluation_metrics
    if unknown := [name for name in wanted if name not in EVALUATION_METRICS]:
        known = ", ".join(EVALUATION_METRICS)
        raise ValueError(f"train.evaluation_metrics must be some of {known}, got {shown(unknown[0])}")
    if wanted and not train.evaluation_extractor:
        raise ValueError("train.evaluation_metrics needs evaluation_extractor, such as 'emoji-clip', got none")
    if against := [name for name in wanted if name in _AGAINST_REFERENCE and not train.evaluation_reference]:
        raise ValueError(f"train.evaluation_metrics: {against[0]} needs evaluation_reference, got none")
    if "diversity" in wanted and min(train.evaluation_images_per_prompt, train.evaluation_images) < 2:
        got = train.evaluation_images_per_prompt
        raise ValueError(f"train.evaluation_metrics: diversity needs evaluation_images_per_prompt >= 2, got {got}")
    if train.checkpoints_best_metric is not None:
        _check_best(train, train.checkpoints_best_metric)


def _check_best(train: _TrainConfig, metric: str) -> None:
    """Raises ValueError if `checkpoints_best_metric` is not measured at every checkpoint."""
    needed = f"train.checkpoints_best_metric = {metric!r} needs"
    if metric == TEACHER_DISTANCE:
        if not train.validation_prompts:
            raise ValueError(f"{needed} validation_prompts, got none")
        kind, every = "a validation", train.validation_every
    else:
        if (name := metric.removeprefix("eval/")) not in train.evaluation_metrics:
            raise ValueError(f"{needed} {name!r} in evaluation_metrics, got {list(train.evaluation_metrics)}")
        kind, every = "an evaluation", train.evaluation_every
    if train.checkpoint_every % every:
        raise ValueError(
            f"{needed} {kind} at each checkpoint: expected checkpoint_every to be a multiple of "
            f"{kind.split()[1]}_every, got {train.checkpoint_every} and {every}"
        )
