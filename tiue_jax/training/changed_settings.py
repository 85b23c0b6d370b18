"""The rules of what may change on resume: some settings freely, others with a reason that the run keeps, some never."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import jax

from tiue_jax.training import distributed
from tiue_jax.training.listing import listed
from tiue_jax.training.settings import HISTORY, Settings

# These change no update of the weights.
FREE = (
    # The prompts may have moved. The data position knows them by their fingerprint.
    "data.prompts",
    "data.field",
    "data.split",
    "data.max_bad_share",
    "train.max_train_steps",
    "train.max_train_minutes",
    "train.log_every",
    "train.profile_steps",
    "train.checkpoint_every",
    "train.checkpoints_total_limit",
    "train.checkpoints_best_metric",
    "train.max_skipped_steps",
    "train.validation_every",
    "train.validation_prompts",
    "train.validation_num_inference_steps",
    "train.validation_guidance_scale",
    "train.mesh_data",
    "train.mesh_fsdp",
    "train.mesh_replicate_below",
    "train.mesh_replicate_frozen",
    "train.health_images",
    "train.evaluation_metrics",
    "train.evaluation_every",
    "train.evaluation_images",
    "train.evaluation_images_per_prompt",
    "train.evaluation_prompts",
    "train.evaluation_extractor",
    "train.evaluation_reference",
    "distill.max_train_steps",
    "distill.gradient_accumulation_steps",
    "distill.remat",
)
# These fix the length of a run in which a learning rate or a loss weight falls towards the end.
LENGTH = ("train.max_train_steps", "distill.max_train_steps")
# The embeddings may have moved: a hash knows them too. But with and without embeddings, the step is another program.
FREE_TO_MOVE = ("data.embeddings",)
# Models and prompts may move, too, as long as their fingerprints are those of the run. By the first part of the name.
NAMED_BY_FINGERPRINT = {
    "model.pretrained_model_name_or_path": "teacher",
    "model.clip_model_name_or_path": "clip",
    "model.tiny_vae_name_or_path": "tiny_vae",
}
PROMPTS = ("data.prompts", "prompts")  # a setting, and the name of its fingerprint
STUDENT = ("model.student_name_or_path", "student")  # the same for the start of the student
FINGERPRINTS = "fingerprints"  # the name in a checkpoint, beside HISTORY

# What no reason can change, and why.
ADAPTERS = "the adapters in the checkpoint fit no other value"
START = "it is read before the first step only"
FIXED = {
    "distill.lora_rank": ADAPTERS,
    "distill.lora_targets": ADAPTERS,
    STUDENT[0]: START,
    "teacher.prediction_type": "the student's output is of this type",
}


class Change(NamedTuple):
    """A setting or a fingerprint that is not that of the run."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {self.before!r}, now {self.now!r}"


class Resumption:
    """Compares the settings and the fingerprints of a run with those to go on with.

    Attributes:
        changes: those that the last call of `check` found, and that `why` allows.

    Args:
        settings: to go on with.
        fingerprints: of the teacher, the prompts and others, by name.
        why: the user's reason to go on although settings differ; None if they may not.
    """

    def __init__(self, settings: Settings, fingerprints: Mapping[str, str], why: str | None = None):
        self._settings, self._fingerprints, self._why = settings, dict(fingerprints), why
        self.changes: list[Change] = []
        self._history: list[dict[str, Any]] = []

    @property
    def changed(self) -> set[str]:
        """The names of the changes."""
        return {change.name for change in self.changes}

    def facts(self) -> dict[str, Any]:
        """All that must be the same on all processes, by name. Models may lie in another folder on each machine."""
        facts: dict[str, Any] = {f"fingerprint of {name}": text for name, text in self._fingerprints.items()}
        for name, value in _flat(self._settings.to_dict()).items():
            if name not in {*NAMED_BY_FINGERPRINT, STUDENT[0]}:
                facts[f"setting {name}"] = value
        return facts | {"--override_settings": self._why}

    def check(self, saved: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Checks that a run may go on from a checkpoint.

        The start of the student may be gone by now. Its setting is compared and its fingerprint is kept as it was.

        Args:
            saved: the settings in the checkpoint.
            about: the result of `about` when it was saved; empty in checkpoints of the first versions.

        Raises:
            ValueError: naming what has changed and may not.
        """
        before = about.get(FINGERPRINTS, {})
        changes = find_changes(saved, self._settings, before, self._fingerprints)
        setting, owner = STUDENT
        if jax.process_index() > 0:  # the checkpoint has the name that process 0 knows it by
            changes = [change for change in changes if change.name != setting]
        check_changes(changes, self._why)
        self._fingerprints |= {name: text for name, text in before.items() if name == owner}
        self.changes, self._history = changes, list(about.get(HISTORY, []))

    def history(self, step: int) -> list[dict[str, Any]]:
        """The changes of the run until now, one entry for each resumption with changes. All processes must call it."""
        if not self.changes:
            return self._history
        now = distributed.gather(datetime.now(UTC).isoformat(timespec="seconds"))[0]
        changes = [{"name": name, "from": before, "to": after} for name, before, after in self.changes]
        return [*self._history, {"step": step, "time": now, "why": self._why, "changes": changes}]

    def about(self, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The facts that a checkpoint keeps besides the settings."""
        return {FINGERPRINTS: self._fingerprints, HISTORY: list(history)}


def find_changes(
    saved: Mapping[str, Any], settings: Settings, before: Mapping[str, str], now: Mapping[str, str]
) -> list[Change]:
    """The settings and fingerprints that are not those of the run and may not change freely.

    Args:
        saved: the settings of the run.
        settings: those to go on with.
        before: the fingerprints of the run. A checkpoint of the first versions has none. Then no model may move.
        now: the fingerprints to go on with.
    """
    different = {name for name in before.keys() & now.keys() if before[name] != now[name]}

    def parts(owner: str, names: set[str]) -> set[str]:
        return {name for name in names if name.split(".")[0] == owner}

    free = free_settings(settings)
    for setting, owner in NAMED_BY_FINGERPRINT.items():
        if parts(owner, before.keys() & now.keys()) and not parts(owner, different):
            free[setting] = str
    setting, owner = PROMPTS
    if parts(owner, different):
        del free[setting]
    # a setting that is younger than the checkpoint had its default
    changes = compare(Settings.from_dict(saved).to_dict(), settings.to_dict(), free)
    for name in sorted(different):
        shown = name if name in FIXED else f"fingerprint of {name}"
        changes.append(Change(shown, before[name], now[name]))
    return changes


def check_changes(changes: Sequence[Change], why: str | None) -> None:
    """Raises ValueError if there are changes without a reason, or that no reason allows. It names them."""
    if fixed := [f"{change} ({FIXED[change.name]})" for change in changes if change.name in FIXED]:
        raise ValueError(
            f"settings that no run can change: {listed(fixed)}; start a new run in another --workdir, from the "
            "student of this one with model.student_name_or_path"
        )
    if changes and why is None:
        raise ValueError(
            f"settings differ from those that the run was started with: {listed([str(change) for change in changes])}; "
            'to record this and go on: --override_settings="WHY"'
        )


def free_settings(settings: Settings) -> dict[str, type]:
    """The settings, with dots, that may change when a run is resumed; each with the type of value that it must keep.

    The type `object` allows any change. The type `str` allows a change from one text to another, but not from or to
    None. The length of the run is free only if no learning rate and no loss weight falls towards its end.
    """
    distill = settings.distill
    rate_falls = {distill.student_learning_rate_schedule, distill.lora_learning_rate_schedule} != {"constant"}
    clip_falls = bool(distill.clip_weight) and distill.clip_decay_steps is None
    fixed = LENGTH if rate_falls or clip_falls else ()
    free: dict[str, type] = {name: object for name in FREE if name not in fixed}
    return free | dict.fromkeys(FREE_TO_MOVE, str)


def compare(saved: Mapping[str, Any], current: Mapping[str, Any], free: Mapping[str, type]) -> list[Change]:
    """The differences of two nested mappings of settings, with dots in the names, apart from the settings in `free`.

    A setting that is missing in one of them differs. See `free_settings` for the types in `free`.
    """
    before, now = _flat(saved), _flat(current)
    missing = object()

    def is_free(name: str) -> bool:
        kind = free.get(name, ())
        return isinstance(before.get(name) or None, kind) and isinstance(now.get(name) or None, kind)

    return [
        Change(name, before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name, missing) != now.get(name, missing) and not is_free(name)
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"seed": 0}} as {"train.seed": 0}; a tuple as a list, which JSON returns for it."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat
