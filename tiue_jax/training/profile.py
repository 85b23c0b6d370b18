"""A JAX profile of a few training steps, which TensorBoard and xprof open."""

import logging
from pathlib import Path
from typing import Any, Self

import jax

logger = logging.getLogger(__name__)

FIRST_STEP = 3  # after the start of a run; the steps before still load the program and fill the data pipeline


class StepProfile:
    """Profiles the steps of a run from FIRST_STEP on, on process 0; a context manager.

    Call `before_step` and `after_step` around each step. Everything that process 0 does between the profiled steps is
    in the profile too. A profile is no part of the result: if it cannot be made or written, the run logs a warning and
    goes on.
    """

    def __init__(self, folder: Path, steps: int | None):
        """Profiles nothing yet.

        Args:
            folder: gets the profile as `plugins/profile/<time>/<host>.xplane.pb`, where TensorBoard looks for it.
            steps: how many steps to profile; None profiles none.
        """
        self._folder = folder
        self._last_step = FIRST_STEP + steps - 1 if steps and jax.process_index() == 0 else 0
        self._step = 0
        self._running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def before_step(self) -> None:
        """Starts the profile if the next step is the first one to profile."""
        self._step += 1
        if self._step == FIRST_STEP <= self._last_step:
            try:
                jax.profiler.start_trace(self._folder)
                self._running = True
            except Exception as error:  # RuntimeError, if another profile runs; others by the profiler of each platform
                logger.warning("no profile: %s", error)

    def after_step(self, outputs: Any) -> None:
        """Writes the profile if the last step to profile was started. Waits then for `outputs`, arrays of the step."""
        if self._running and self._step == self._last_step:
            jax.block_until_ready(outputs)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            try:
                jax.profiler.stop_trace()
            except Exception as error:  # JaxRuntimeError, if the files cannot be written
                logger.warning("cannot write a profile to %s: %s", self._folder, error)
