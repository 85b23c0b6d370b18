"""The settings that may change when a run is resumed, and the check that no other setting has changed."""

from collections.abc import Mapping
from typing import Any

from tiue_jax.training.listing import listed
from tiue_jax.training.settings import Settings, default_config

# These change no update of the weights.
FREE = (
    # The prompts may have moved. The data position knows them by their fingerprint.
    "data.prompts",
    "data.field",
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
    "distill.max_train_steps",
    "distill.gradient_accumulation_steps",
    "distill.remat",
)
# These fix the length of a run in which a learning rate or a loss weight falls towards the end.
LENGTH = ("train.max_train_steps", "distill.max_train_steps")
# The embeddings may have moved: a hash knows them too. But with and without embeddings, the step is another program.
FREE_TO_MOVE = ("data.embeddings",)


def check_resumed(saved: Mapping[str, Any], settings: Settings) -> None:
    """Checks that a run may go on with `settings`.

    Args:
        saved: the settings that the run was started with, from a checkpoint. A setting that was added later, and so is
            not in an old checkpoint, has its default.
        settings: those to go on with.

    Raises:
        ValueError: naming the settings that have changed and may not.
    """
    defaults = default_config().to_dict()
    sections = {name: defaults.get(name, {}) | dict(section) for name, section in saved.items()}
    check_config(sections, settings.to_dict(), free_settings(settings))


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


def check_config(saved: Mapping[str, Any], current: Mapping[str, Any], free: Mapping[str, type]) -> None:
    """Checks that two nested mappings of settings are equal, apart from the settings in `free`.

    A setting that is missing in one of them differs. See `free_settings` for the types in `free`.

    Raises:
        ValueError: naming the settings that differ, with dots.
    """
    before, now = _flat(saved), _flat(current)
    missing = object()

    def is_free(name: str) -> bool:
        kind = free.get(name, ())
        return isinstance(before.get(name) or None, kind) and isinstance(now.get(name) or None, kind)

    changed = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name, missing) != now.get(name, missing) and not is_free(name)
    ]
    if changed:
        raise ValueError(f"settings differ from those that the run was started with: {listed(changed)}")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"seed": 0}} as {"train.seed": 0}; a tuple as a list, which JSON returns for it."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat
