"""Checkpoints of a run: the training state, the settings and the position in the data; saved and restored.

They lie in `{workdir}/checkpoints/<step>`, where step is the number of steps done. Each is written in the background
to a temporary folder, which is then renamed. So a run that is killed, even while it saves, leaves the last whole
checkpoint. A checkpoint holds a checksum of every array, of the settings and of the position.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from etils import epath

from tiue_jax import files
from tiue_jax.training import checkpoint_files, checksums, distributed
from tiue_jax.training.checkpoint_files import BrokenCheckpointError, one_line
from tiue_jax.training.checkpoint_manager import CheckpointManager

logger = logging.getLogger(__name__)

BROKEN_FOLDER = "checkpoints_broken"
LONGEST_REASON = 200  # characters of the reason in an error


class NotSavedError(OSError):
    """A checkpoint, or another file of a run's folder, could not be written."""


class Restored(NamedTuple):
    """A checkpoint that was read."""

    step: int
    state: Any
    data: dict[str, Any]  # the position of the data iterator


class Saved(NamedTuple):
    """The settings of the run in a checkpoint, and more about it."""

    config: dict[str, Any]  # the settings
    about: dict[str, Any]  # fingerprints and history, see changed_settings.py; empty in those of the first versions


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last one to be written."""

    def __init__(
        self, workdir: str | epath.PathLike, total_limit: int | None = None, best: tuple[str, str] | None = None
    ):
        """Opens a run's checkpoints, and removes what a killed run has not finished writing.

        Args:
            workdir: the run's folder; created if needed.
            total_limit: how many of the newest checkpoints are kept; None keeps all.
            best: the name of a metric, and "min" or "max". The best checkpoint by it is kept too.

        Raises:
            ValueError: `total_limit` is less than 1.
        """
        if total_limit is not None and total_limit < 1:
            raise ValueError(f"checkpoints_total_limit must be >= 1 or None, got {total_limit}")
        self.folder = checkpoint_files.checkpoints_folder(workdir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metric: str | None = None
        mode = "min"
        if best:
            self._metric, mode = best
        self._manager = CheckpointManager(self.folder, total_limit, self._metric, mode)
        self._failed = False
        for step, why in sorted(self._manager.damaged.items()):
            if step != self.latest() and jax.process_index() == 0:
                logger.warning("checkpoint %d counts as one without metrics: %s", step, why)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        failed_before = self._failed
        try:
            with self._reporting():
                self._manager.close()
        except NotSavedError:
            if not failed_before:  # otherwise orbax raises the same error once more
                raise

    def latest(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Waits until all checkpoints are written. NotSavedError if one could not be."""
        with self._reporting():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises NotSavedError if saving has failed in the background. Does not wait for a save in progress."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def save(
        self,
        step: int,
        state: Any,
        config: Mapping[str, Any],
        data: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves a checkpoint in the background. `state` may be donated to the next step as soon as this returns.

        Args:
            step: number of steps done.
            state: a pytree of arrays.
            config: the run's settings, plain values for JSON.
            data: the position of the data iterator, plain values for JSON.
            metrics: measured at this step, by name. A checkpoint can only be the best one with a finite value of the
                metric that `best` names.
            about: more about the run, plain values for JSON.

        Raises:
            NotSavedError: this checkpoint, or the one before, could not be written, as on a full disk. Older
                checkpoints are intact.
        """
        value = (metrics or {}).get(self._metric or "", math.nan)
        plain = {"config": dict(config), "data": dict(data), "about": dict(about or {})}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            checksums=ocp.args.JsonSave(checksums.of_arrays(state) | checksums.of_json_items(plain)),
            **{name: ocp.args.JsonSave(value) for name, value in plain.items()},
        )
        with self._reporting():
            measured = {self._metric: float(value)} if math.isfinite(value) else None
            self._manager.save(step, args=items, metrics=measured, force=True)

    def saved(self, step: int) -> Saved:
        """The settings of a checkpoint and more about its run. BrokenCheckpointError if they are missing or damaged."""
        self.wait()  # this checkpoint may be the one that is being written
        return Saved(**checkpoint_files.read_about(self._path(step)))

    def restore(self, step: int, structs: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint: the state, bit for bit as it was saved, and the position of the data iterator.

        Args:
            step: the step of the checkpoint.
            structs: the state's tree of ShapeDtypeStructs that carry shardings. The number of devices may be another
                than that of the run which saved the checkpoint.

        Raises:
            BrokenCheckpointError: files are missing or damaged, for this process or another one.
            ValueError: the checkpoint holds a tree of other names or shapes; all of them are named.
        """
        path = self._path(step)
        with self._together(step):
            with checkpoint_files.reading(path):
                saved = checkpoint_files.saved_shapes(path / "state")
            checkpoint_files.check_shapes(path, saved, structs)
            with checkpoint_files.reading(path):
                sums = files.read_json(path / checkpoint_files.CHECKSUMS)
                data = files.read_json(path / "data" / "metadata")
                # The manager's own `restore` has a barrier, at which a process that cannot read would be missing.
                state = ocp.StandardCheckpointHandler().restore(path / "state", args=ocp.args.StandardRestore(structs))
            others = checkpoint_files.read_about(path)
        with self._together(step):
            found = checksums.of_arrays(state) | checksums.of_json_items({"data": data, **others})
            checkpoint_files.compare(path, sums, found)
        return state, data

    def resume(
        self, structs: Any, check: Callable[[dict[str, Any], dict[str, Any]], None], *, allow_older: bool = False
    ) -> Restored | None:
        """Reads the newest checkpoint. Returns None if there is none.

        Args:
            structs: see `restore`.
            check: called with the settings of the checkpoint and what else it tells about its run; raises if the run
                may not go on from it.
            allow_older: if the newest checkpoints are broken, move them to `checkpoints_broken/` and read the newest
                whole one.

        Raises:
            BrokenCheckpointError: the newest checkpoint is broken, or with `allow_older` all are.
            ValueError: see `restore` and `check`.
        """
        broken: list[int] = []
        newest = self.latest()
        for step in reversed(self.steps()):
            try:
                with self._together(step):
                    if step == newest and step in self._manager.damaged:
                        raise checkpoint_files.broken(self._path(step), self._manager.damaged[step])
                    check(*self.saved(step))
                restored = Restored(step, *self.restore(step, structs))
            except BrokenCheckpointError as error:
                broken.append(step)
                if not allow_older:
                    older = [s for s in self.steps() if s < step]
                    hint = f"--allow_older resumes from step {older[-1]}" if older else "there is no older one"
                    raise BrokenCheckpointError(f"{error}; {hint}") from error
                continue
            self._move_aside(broken)
            with self._reporting():
                self._manager.delete_old()  # the limit may have been lowered
            return restored
        if broken:
            raise BrokenCheckpointError(f"{self.folder}: no whole checkpoint, all are broken: {broken}")
        return None

    def _path(self, step: int) -> epath.Path:
        return self.folder / str(step)

    def _move_aside(self, steps: list[int]) -> None:
        """Moves broken checkpoints out of the way of new ones of the same steps. Process 0 does it for all."""
        if steps and jax.process_index() == 0:
            aside = self.folder.parent / BROKEN_FOLDER
            aside.mkdir(exist_ok=True)
            for step in steps:
                (self.folder / str(step)).rename(aside / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}")
        if steps:
            distributed.barrier("broken checkpoints moved")
            self._manager.damaged.clear()
            self._manager.reload()

    @contextlib.contextmanager
    def _together(self, step: int) -> Iterator[None]:
        """Ends a part of reading a checkpoint in the same way on all processes. All must call it.

        Perhaps only one process reads the damaged file, and all must take the same checkpoint. Processes that fail must
        not meet in here while the others wait for them in the block: the block fails before it communicates.

        Raises:
            BrokenCheckpointError: the block raised it, on this process or on another one.
        """
        error: BrokenCheckpointError | None = None
        try:
            yield
        except BrokenCheckpointError as caught:
            error = caught
        distributed.barrier("checkpoint read")  # one process may read for minutes longer than the others
        if not distributed.all_agree(error is None):
            raise error or checkpoint_files.broken(self._path(step), "another process cannot read it")

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turns all errors of writing, now or before in the background, into one line that says what is left."""
        try:
            yield
        except Exception as error:
            self._failed = True
            whole = [path for path in self.folder.iterdir() if path.name.isdigit()]
            last = max(whole, key=lambda path: int(path.name), default=None)
            kept = "no checkpoint was saved before" if last is None else f"the last good checkpoint is {last}"
            reason = one_line(error)
            if len(reason) > LONGEST_REASON:  # the operating system's message is at the end
                reason = f"... {reason[-LONGEST_REASON:]}"
            raise NotSavedError(f"cannot save a checkpoint in {self.folder}: {reason}; {kept}") from error
