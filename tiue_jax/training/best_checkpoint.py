"""The best checkpoint of a run, by a metric that the run measured at each checkpoint."""

import math
import os

from tiue_jax.files import read_json
from tiue_jax.training.checkpoint_files import checkpoints_folder, saved_steps
from tiue_jax.training.eval_metrics import EVAL_METRICS
from tiue_jax.training.settings import Settings


def find_best(workdir: str | os.PathLike[str], settings: Settings) -> tuple[int, float]:
    """Returns the step of the best checkpoint, and its metric. Of equal ones it is the newest.

    Args:
        workdir: the run's folder.
        settings: of the run. `train.checkpoints_best_metric` is the metric.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        ValueError: the run measured no such metric.
    """
    metric = settings.train.checkpoints_best_metric
    if metric is None:
        raise ValueError(
            f"{workdir}: has no best checkpoint: expected a run with train.checkpoints_best_metric, one of "
            f"{list(EVAL_METRICS)}, got None; take the last checkpoint or one by its step"
        )
    sign = 1 if EVAL_METRICS[metric] == "min" else -1
    best: tuple[int, float] | None = None
    for step in saved_steps(workdir):
        value = _metric(workdir, step, metric)
        if value is not None and (best is None or sign * value <= sign * best[1]):
            best = step, value
    if best is None:
        raise ValueError(f"{workdir}: has no best checkpoint: none of its checkpoints holds {metric}")
    return best


def _metric(workdir: str | os.PathLike[str], step: int, name: str) -> float | None:
    """The metric in a checkpoint; None if it is missing or damaged."""
    try:
        value = read_json(checkpoints_folder(workdir) / str(step) / "metrics" / "metrics").get(name)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, float) and math.isfinite(value) else None
