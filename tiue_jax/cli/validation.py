"""The look at a run's student between training steps: images, health panel and evaluation.

Nothing here that fails stops the run: it is one line in the log, and the metric is missing at that step. Errors in the
settings are raised before the first step.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from tiue_jax.cli.command_line import one_line
from tiue_jax.cli.output import JsonLog, say
from tiue_jax.data import embeddings
from tiue_jax.evaluate.within_run import Evaluation
from tiue_jax.models import functional
from tiue_jax.training import distributed
from tiue_jax.training.compiled_step import TrainProgram
from tiue_jax.training.distill import Frozen
from tiue_jax.training.eval_metrics import TEACHER_DISTANCE
from tiue_jax.training.health import HealthPanel, picture, prompts_of
from tiue_jax.training.metrics import MetricsWriter
from tiue_jax.training.preview import Preview, StudentSampler, load_teacher
from tiue_jax.training.settings import Settings
from tiue_jax.training.teacher import Teacher
from tiue_jax.training.train_state import TrainState


class Validation:
    """The previews, health panels and evaluations of a run. All processes make it and call it together.

    Args:
        settings: of the run.
        teacher: of the run.
        program: of the run.
        frozen: the teacher's weights.
        evaluation: of the run; None if there is none.
        writer, json_log: where images and metrics go.

    Raises:
        OSError, ValueError: a part of the teacher is missing or wrong.
    """

    def __init__(
        self,
        settings: Settings,
        teacher: Teacher,
        program: TrainProgram,
        frozen: Frozen,
        evaluation: Evaluation | None,
        writer: MetricsWriter,
        json_log: JsonLog,
    ):
        train = settings.train
        self._settings, self._writer, self._json_log = settings, writer, json_log
        self._preview: Preview | None = None
        self._sampler: StudentSampler | None = None
        self._panel: HealthPanel | None = None
        self._evaluation = evaluation
        self._compiled = False  # all programs have run once
        if train.validation_prompts and jax.process_index() == 0:
            of_teacher = load_teacher(teacher.folder, settings)
            # raised for a teacher whose numbers overflow in compute_dtype; the other processes know nothing of it
            overflow = FloatingPointError
            self._preview = self._attempt("no images of the teacher", lambda: Preview(of_teacher, settings), overflow)
            self._sampler = StudentSampler(of_teacher, settings)
        distributed.barrier("before the first step")  # process 0 has sampled the teacher
        if evaluation is not None:
            if self._sampler is None:
                self._sampler = StudentSampler(load_teacher(teacher.folder, settings), settings)
            count, every = train.evaluation_images, train.evaluation_every
            say(f"evaluation: {', '.join(train.evaluation_metrics)} of {count} images every {every:,} steps")
        if train.validation_prompts and train.health_images:
            self._panel = self._attempt("no health panels", lambda: make_panel(settings, teacher, program, frozen))
            if not distributed.all_agree(self._panel is not None):
                self._panel = None
        if self._panel is not None:
            times = ", ".join(map(str, self._panel.timesteps))
            say(f"health panel: teachers at timesteps {times}, compiled in {self._panel.compile_seconds:.0f} s")

    def is_due(self, done: int, last: bool) -> bool:
        """True if something is to be shown or measured after `done` steps."""
        return any(self._due(done, last))

    def __call__(
        self, done: int, last: bool, state: TrainState, frozen: Frozen, seconds_per_step: float
    ) -> dict[str, float]:
        """Shows and measures the student of `state`. Returns the metrics of the checkpoint, by name.

        Args:
            done: number of steps done.
            last: this is the last step of the run.
            state: of the run.
            frozen: the teacher's weights.
            seconds_per_step: as it was lately, for the line on the cost.
        """
        show, evaluate = self._due(done, last)
        train = self._settings.train
        costs: list[str] = []  # of each part, in words
        evaluated: dict[str, float] = {}

        @contextlib.contextmanager
        def timed(name: str, every: int) -> Iterator[None]:
            began = time.monotonic()
            yield
            seconds = time.monotonic() - began
            share = f" ({seconds / (every * seconds_per_step):.1%})" if np.isfinite(seconds_per_step) else ""
            costs.append(f"{name} {seconds:.2g} s{share}")

        every = min([train.validation_every] * show + [train.evaluation_every] * evaluate)
        with timed("weights to the host", every):
            average = distributed.to_every_process(state.ema) if evaluate else distributed.to_process_0(state.ema)
        if show:
            with timed("preview", train.validation_every):
                evaluated |= self._show(done, average)
            if self._panel is not None:
                with timed("health panel", train.validation_every):
                    self._examine(done, self._panel, state, frozen)
        if evaluate and self._evaluation is not None:
            with timed("evaluation", train.evaluation_every):
                evaluated |= self._evaluate(done, self._evaluation, average)
        if evaluated:
            say(f"step {done}: {', '.join(f'{name} {value:.4g}' for name, value in evaluated.items())}")
        compiling = "" if self._compiled else "; the first time compiles"
        say(f"step {done}: took {', '.join(costs)} of the training time{compiling}")
        self._compiled = True
        self._log(done, evaluated)
        return evaluated

    def _due(self, done: int, last: bool) -> tuple[bool, bool]:
        """Whether images are to be shown, and whether the student is to be evaluated."""
        train = self._settings.train
        return (
            bool(train.validation_prompts) and (last or done % train.validation_every == 0),
            self._evaluation is not None and (last or done % train.evaluation_every == 0),
        )

    def _show(self, done: int, average: functional.Params | None) -> dict[str, float]:
        """Writes the student's images above the teacher's. Returns their distance."""

        def show() -> float:
            assert self._preview is not None and self._sampler is not None and average is not None
            grid, distance = self._preview(self._sampler, average)
            about = {"step": done, "prompts": "; ".join(self._settings.train.validation_prompts)}
            self._writer.image(done, "student_above_teacher", grid, about)
            return distance

        distance = None
        if self._preview is not None:
            distance = self._attempt(f"step {done}: no images of the student", show)
        distributed.barrier(f"images of step {done}")
        found = distributed.from_process_0(np.nan if distance is None else distance)
        return {TEACHER_DISTANCE: found} if np.isfinite(found) else {}

    def _examine(self, done: int, panel: HealthPanel, state: TrainState, frozen: Frozen) -> None:
        """Writes the health panel and its numbers."""
        health = self._attempt(f"step {done}: no health panel", lambda: panel(state, frozen))

        def write() -> None:
            assert health is not None and self._sampler is not None
            self._log(done, {name: value for name, value in health.scalars.items() if np.isfinite(value)})
            about = {"step": done, "rows": "; ".join(health.rows)}
            self._writer.image(done, "health", picture(self._sampler.decode(health.latents), health.rows), about)

        if health is not None and jax.process_index() == 0:
            self._attempt(f"step {done}: no image of the health panel", write)
        distributed.barrier(f"health panel of step {done}")

    def _evaluate(self, done: int, evaluation: Evaluation, average: functional.Params | None) -> dict[str, float]:
        """Measures the student on the devices of all processes."""
        sampler, nothing = self._sampler, f"step {done}: no evaluation"
        assert average is not None and sampler is not None
        mine = self._attempt(nothing, lambda: evaluation.features(sampler, average))
        if not distributed.all_agree(mine is not None):
            return {}
        assert mine is not None
        features = evaluation.gather(mine)
        measured = None
        if jax.process_index() == 0:
            measured = self._attempt(nothing, lambda: evaluation.measure(features))
        measured = distributed.gather(measured)[0]
        return {name: value for name, value in (measured or {}).items() if np.isfinite(value)}

    def _log(self, done: int, values: dict[str, float]) -> None:
        if values:
            self._writer.scalars(done, values)
            self._json_log.write({"step": done} | values)

    def _attempt(self, consequence: str, function: Callable[[], Any], of: type[Exception] = Exception) -> Any:
        """The result of `function`. After an error it is None, and the log has one line that says the consequence.

        Other errors than those `of` a class are raised.
        """
        try:
            return function()
        except of as error:  # also of libraries: no image is worth a run
            reason = one_line(error) or type(error).__name__
            print(f"warning: {consequence}: {reason}; the run goes on", file=sys.stderr)
            return None


def make_panel(settings: Settings, teacher: Teacher, program: TrainProgram, frozen: Frozen) -> HealthPanel:
    """Makes the health panel of a run, with the prompts as the training step reads them."""
    prompts = prompts_of(settings, program.mesh)
    if settings.data.embeddings:
        encode = embeddings.load_encode(teacher.folder, len(prompts), settings.model.clip_skip)
        columns = {"text": np.asarray(encode(prompts)).astype(embeddings.DTYPE)}
    else:
        columns = {"input_ids": teacher.tokenize(prompts)}
    return HealthPanel(settings, program, teacher.schedule, columns, frozen)
