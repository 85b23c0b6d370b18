"""Orbax's CheckpointManager, with the changes that a run needs."""

import math
from collections.abc import Mapping

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as keep

from tiue_jax.files import read_json
from tiue_jax.training import orbax_output
from tiue_jax.training.checkpoint_files import one_line


class CheckpointManager(ocp.CheckpointManager):
    """Keeps the newest checkpoints of a folder, and the best one by a metric.

    It differs from orbax's class in two points. Orbax's asks jax for a preemption from a thread of process 0, with a
    step that may be long past. Jax takes that step for the one which this process is at, and could agree with the other
    processes to stop at a step that they have left behind. Here only the training loop asks. And orbax's fails if the
    metrics of one checkpoint are damaged. Here that checkpoint counts as one without metrics.

    Attributes:
        damaged: for each checkpoint with damaged metrics, by step, a line that says why.
    """

    def __init__(self, folder: epath.Path, total_limit: int | None, metric: str | None, mode: str):
        """See checkpoint.Checkpoints; `mode` is "min" or "max"."""
        self.damaged: dict[int, str] = {}
        self._metric = metric
        self._limited = total_limit is not None
        orbax_output.silence()
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # left by a run that was killed while it saved
            best_fn=self._value if metric else None,
            best_mode=mode,
            preservation_policy=self._policy(total_limit, mode),
        )
        super().__init__(folder, options=options)

    def reached_preemption(self, step: int) -> bool:
        """Returns False: stop requests are handled by stop_request."""
        return False

    def metrics(self, step: int) -> dict[str, float] | None:
        """The saved metric of a checkpoint. None if it was not saved or is damaged, which `damaged` then says."""
        path = self.directory / str(step) / "metrics" / "metrics"
        if self._metric is None or not path.exists():
            return None
        try:
            saved = read_json(path)
            if any(type(value) is not float or not math.isfinite(value) for value in saved.values()):
                raise ValueError(f"{path}: expected finite numbers, got {saved}")
        except (OSError, ValueError) as error:
            self.damaged[step] = one_line(error)
            return None
        return {self._metric: saved[self._metric]} if self._metric in saved else None

    def delete_old(self) -> None:
        """Deletes the checkpoints beyond the limit, which orbax does only after the next save. All must call it."""
        for step in self._get_old_steps_to_remove() if self._limited else []:
            self.delete(step)

    def _value(self, metrics: Mapping[str, float]) -> float:
        return metrics[self._metric or ""]

    def _policy(self, total_limit: int | None, mode: str) -> keep.PreservationPolicy | None:
        if total_limit is None:
            return None
        policies: list[keep.PreservationPolicy] = [keep.LatestN(total_limit)]
        if self._metric:
            best = keep.BestN(
                get_metric_fn=self._value,
                reverse=mode == "min",  # BestN sorts the checkpoints and keeps the last one
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
        return keep.AnyPreservationPolicy(policies)
