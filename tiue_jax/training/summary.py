"""The summary of a run in a few lines, from the files in its folder: also while it works and after it was killed."""

import os
import statistics

from tiue_jax import files
from tiue_jax.files import read_json
from tiue_jax.training.best_checkpoint import find_best
from tiue_jax.training.checkpoint_files import saved_steps
from tiue_jax.training.events import Curves, read_run
from tiue_jax.training.listing import listed
from tiue_jax.training.settings import Settings


def lines(workdir: str | os.PathLike[str]) -> list[str]:
    """The lines of a summary.

    Raises:
        OSError, ValueError: the folder is not that of a run, or its `config.json` is damaged.
    """
    folder = files.at(workdir)
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder}: no config.json in it, expected the folder of a run")
    try:
        settings = Settings.from_dict(read_json(config))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config}: {error}") from error
    curves = read_run(folder)
    done = max((step for values in curves.values() for step in values), default=0)
    skipped = curves.get("train/skipped_steps", {})
    text = [f"run: {folder}"]
    count = int(skipped[max(skipped)]) if skipped else 0
    text.append(f"steps: {done:,} of {settings.train.max_train_steps:,}, {count:,} of them skipped")
    if rates := list(curves.get("perf/images_per_sec", {}).values()):
        logged = f"median of {len(rates):,} logged steps"
        text.append(f"speed: {statistics.median(rates):.3g} images/s, {logged}")
    text += _checkpoints(folder, settings, curves)
    if last := _evaluated(curves):
        text.append(f"last evaluation: step {max(last)}: {last[max(last)]}")
    for name in ("student", "student_best"):
        if (folder / name).is_dir():
            text.append(f"{name}: {folder / name}")
    samples = folder / "samples"
    count = len(list(samples.glob("*.png"))) if samples.is_dir() else 0
    text.append(f"images: {samples} ({count:,})" if count else "images: none")
    return text


def _checkpoints(folder: os.PathLike[str], settings: Settings, curves: Curves) -> list[str]:
    """The lines on the checkpoints, and on the best one."""
    try:
        steps = saved_steps(folder)
    except FileNotFoundError:
        return ["checkpoints: none"]
    found = [f"checkpoints: {listed([f'{step:,}' for step in steps], ', ')}"]
    if settings.train.checkpoints_best_metric is not None:
        try:
            step, value = find_best(folder, settings)
        except ValueError as error:
            return [*found, f"best checkpoint: none, {str(error).split(': ')[-1]}"]
        measured = _evaluated(curves).get(step, f"{settings.train.checkpoints_best_metric} {value:.4g}")
        found.append(f"best checkpoint: {step:,} by {settings.train.checkpoints_best_metric}: {measured}")
    return found


def _evaluated(curves: Curves) -> dict[int, str]:
    """By step, the metrics that were measured there, in words."""
    by_step: dict[int, list[str]] = {}
    for tag, values in sorted(curves.items()):
        if tag.startswith("eval/"):
            for step, value in values.items():
                by_step.setdefault(step, []).append(f"{tag} {value:.4g}")
    return {step: ", ".join(found) for step, found in by_step.items()}
